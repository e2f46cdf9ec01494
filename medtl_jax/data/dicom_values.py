"""From the stored values of a DICOM frame to grey or colour on the scale 0..255.

PS3.3 of the standard: modality LUT (C.11.1), VOI LUT and window (C.11.2), palettes (C.7.9), and the
functional groups in which enhanced files keep them (C.7.6.16).
"""

import logging
from types import ModuleType
from typing import Any

import numpy as np

from medtl_jax.data.imagefile import UnreadableError
from medtl_jax.data.planes import PERCENTILES, Grey, middle_range, spread
from medtl_jax.errors import UserError

INSTALL = "pip install 'medtl_jax[medical]'"
# Elements that turn stored values into grey, and indices into colours.
GREY = (
    "ModalityLUTSequence",
    "RescaleSlope",
    "RescaleIntercept",
    "VOILUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
)
PALETTE = tuple(
    f"{colour}PaletteColorLookupTable{part}"
    for colour in ("Red", "Green", "Blue")
    for part in ("Descriptor", "Data")
)


def load_pydicom() -> ModuleType:
    """Returns the library; those who read no DICOM need not have it."""
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise UserError(f"to read DICOM files needs pydicom: {INSTALL}") from error
    # Its remarks on values may quote them, and a value may be a name.
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    return pydicom


def _first(value: Any) -> float | None:
    """Returns the first of one or several numbers."""
    if value is None or isinstance(value, int | float | str):
        return value if value in (None, "") else float(value)
    return float(value[0]) if len(value) else None


def _of_frame(dataset: Any, frame: int) -> Any:
    """Returns a data set of the elements that turn a frame's stored values into grey.

    Enhanced files have them in the functional groups of all frames, or of each.
    """
    found = load_pydicom().Dataset()
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    own = (dataset.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]
    places = [dataset]
    for group in (*shared[:1], *own):
        for sequence in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            places.extend((group.get(sequence) or [])[:1])
    for place in places:
        for keyword in GREY:
            if place.get(keyword) not in (None, ""):
                setattr(found, keyword, place.get(keyword))
    # How the words of a table are stored.
    found.file_meta = dataset.file_meta
    return found


def to_grey(
    stored: np.ndarray, dataset: Any, frame: int, window: tuple[float, float] | None
) -> Grey:
    """Returns the grey values of one frame; see `dicom.DicomFrame.read`.

    Args:
      stored: its pixels `[h, w]` as they are in the file.
      dataset: the file's header.
      frame: its number, from 0.
      window: centre and width in the units of the modality; None takes the file's own.

    Raises:
      UnreadableError: its window cannot be used, or it has no finite value.
    """
    elements = _of_frame(dataset, frame)
    values = _modality_values(stored, elements)
    if window is not None:
        centre, width = window
        grey = spread(values, centre - width / 2, centre + width / 2)
        how = f"DICOM by data.window={centre:g},{width:g}"
    elif elements.get("VOILUTSequence"):
        grey, how = _by_table(values, elements), "DICOM by the file's first VOI LUT"
    elif (
        _first(elements.get("WindowCenter")) is not None
        and _first(elements.get("WindowWidth")) is not None
    ):
        grey, how = _by_window(values, elements), "DICOM by the file's first window"
    elif stored.dtype == np.uint8 and np.array_equal(values, stored):
        grey = spread(values, 0, 2 ** dataset.get("BitsStored", 8) - 1)
        how = "8-bit DICOM without a window, as stored"
    else:
        padding = dataset.get("PixelPaddingValue")
        seen = values if padding is None else values[stored != padding]
        grey = spread(values, *middle_range(seen if seen.size else values))
        how = (
            "DICOM without a window, {} to {} per cent of each image's values mapped to 0..255"
        ).format(*PERCENTILES)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        grey = np.float32(255) - grey
    return Grey(grey, how)


def _modality_values(stored: np.ndarray, elements: Any) -> np.ndarray:
    """Returns the values in the units of the modality; `stored` itself where they are the same."""
    if elements.get("ModalityLUTSequence"):
        # pydicom subtracts the table's first value in the type of the pixels, which may wrap.
        stored = stored.astype(np.int32)
    return load_pydicom().pixels.apply_modality_lut(stored, elements)


def _by_window(values: np.ndarray, elements: Any) -> np.ndarray:
    """Returns float32 0..255: the first window, by the function that the file names."""
    pydicom = load_pydicom()
    # pydicom's result spans what the stored values could be. Those of eight bits are 0..255.
    view = pydicom.Dataset()
    view.PhotometricInterpretation = "MONOCHROME2"
    view.BitsStored, view.PixelRepresentation = 8, 0
    view.WindowCenter = _first(elements.WindowCenter)
    view.WindowWidth = _first(elements.WindowWidth)
    if elements.get("VOILUTFunction"):
        view.VOILUTFunction = str(elements.VOILUTFunction)
    try:
        with np.errstate(over="ignore"):
            grey = pydicom.pixels.apply_windowing(values, view)
    except ValueError as error:
        raise UnreadableError(f"its window cannot be used ({error}): set data.window") from error
    return grey.astype(np.float32)


def _by_table(values: np.ndarray, elements: Any) -> np.ndarray:
    """Returns float32 0..255: the first VOI LUT."""
    pydicom = load_pydicom()
    item = elements.VOILUTSequence[0]
    count, first, bits = (int(number) for number in item.LUTDescriptor)
    # pydicom counts the entries in the type of its results, where more than 256 of 8 bits wrap.
    item.LUTDescriptor = [count, first, max(bits, 16)]
    whole = np.clip(np.rint(values), first, first + (count or 2**16) - 1).astype(np.int32)
    return spread(pydicom.pixels.apply_voi(whole, elements), 0, 2**bits - 1)


def from_palette(stored: np.ndarray, dataset: Any) -> np.ndarray:
    """Returns float32 `[h, w, 3]`, 0..255, of the indices of a palette.

    Raises:
      UnreadableError: a kind of palette that is not read.
    """
    # Tables in segments may expand to any size.
    if "RedPaletteColorLookupTableData" not in dataset:
        raise UnreadableError("a palette in segments, or none: convert it to RGB")
    count, first, _ = (int(number) for number in dataset.RedPaletteColorLookupTableDescriptor)
    count = count or 2**16
    if count > 256 and len(dataset.RedPaletteColorLookupTableData) < 2 * count:
        # pydicom's indices wrap there.
        raise UnreadableError(f"a palette of {count} colours of 8 bits: convert it to RGB")
    indices = np.clip(stored.astype(np.int32), first, first + count - 1)
    colours = load_pydicom().pixels.apply_color_lut(indices, dataset)[..., :3]
    return spread(colours, 0, np.iinfo(colours.dtype).max)
