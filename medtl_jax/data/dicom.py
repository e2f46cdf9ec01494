"""DICOM files: what their headers say, and their frames as grey or coloured pixels.

Of what a file says about the patient only its PatientID (or, where that is empty or another one is
asked for, a UID) is ever kept; names, dates and everything else stay unread, and pydicom's own
messages, which may quote them, are not shown. The PatientID goes to the run folder as the patient
of an image, and the files' names as they are: replace them before, where they are no pseudonyms.
"""

import contextlib
import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from medtl_jax.data.dicom_values import GREY, PALETTE, from_palette, load_pydicom, to_grey
from medtl_jax.data.imagefile import UnreadableError, open_source
from medtl_jax.data.images import one_line
from medtl_jax.data.planes import (
    MAX_VOXELS,
    Grey,
    Plane,
    check_size,
    spread,
)

# Which elements can name the patient of an image; `file` is its file's own name.
PATIENT_KEYS = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "file")

_MAGIC, _MAGIC_AT = b"DICM", 128
# Where the length that the meta information begins with starts to count.
_META_AT = 144
_IDENTITY = (
    "PatientID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "Modality",
)
_PIXELS = (
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PlanarConfiguration",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
    "PixelPaddingValue",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    *GREY,
    *PALETTE,
)
_DATA = (
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "FloatPixelData",
    "DoubleFloatPixelData",
    "PixelData",
)
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_DEFLATED = "1.2.840.10008.1.2.1.99"
# The standard's transfer syntaxes by the beginning of their UIDs, and who decodes them.
_CODECS = (
    ("1.2.840.10008.1.2.4.8", "pyjpegls"),
    ("1.2.840.10008.1.2.4.9", "pylibjpeg pylibjpeg-openjpeg"),
    ("1.2.840.10008.1.2.4.20", "pylibjpeg pylibjpeg-openjpeg"),
    ("1.2.840.10008.1.2.4.5", "pylibjpeg pylibjpeg-libjpeg"),
    ("1.2.840.10008.1.2.4.7", "pylibjpeg pylibjpeg-libjpeg"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """What a DICOM file says of its images before they are decoded.

    Attributes:
      width, height: in pixels.
      frames: their number.
      names: the patient's and the two UIDs by `PATIENT_KEYS`, "" where they are missing.
      number: InstanceNumber.
      position: ImagePositionPatient, in mm.
      orientation: ImageOrientationPatient, the directions of a row and of a column.
    """

    width: int
    height: int
    frames: int
    names: dict[str, str]
    number: int | None
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None


@dataclasses.dataclass(frozen=True)
class DicomFrame(Plane):
    """One frame of a DICOM file.

    Attributes:
      path: of the file.
      frame: its number, from 0.
      width, height: in pixels.
      window: centre and width that a grey image is shown with, in the units of its modality; None
        takes the file's own.
      name: in messages.
    """

    path: Path
    frame: int
    width: int
    height: int
    window: tuple[float, float] | None
    name: str

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def read(self) -> Grey:
        """Returns the pixels, `[h, w]` or `[h, w, 3]`.

        Grey: modality LUT or rescale, then `window`, or the file's first VOI LUT, or its first
        window by its own function; MONOCHROME1 is inverted last. Without any of these 8-bit
        values stay as they are, and others go from their 0.5th to their 99.5th percentile, those
        of the padding left out. Colour: RGB, also from YBR, and palettes; values of more than 8
        bits are divided by the largest that they can have.

        Raises:
          UnreadableError, or what pydicom raises: the file cannot be used.
        """
        with _opened(self.path) as (stream, dataset):
            stored = _decode(stream, dataset, self.frame)
        kind = str(dataset.get("PhotometricInterpretation", ""))
        if kind in ("MONOCHROME1", "MONOCHROME2"):
            return to_grey(stored, dataset, self.frame, self.window)
        if kind == "PALETTE COLOR":
            return Grey(from_palette(stored, dataset), "DICOM in palette colours")
        bits = dataset.BitsStored
        return Grey(spread(stored, 0, 2**bits - 1), "DICOM in colour")

    def labels(self) -> np.ndarray:
        raise UnreadableError("a DICOM file as a mask: save it as PNG or NIfTI")

    def __str__(self) -> str:
        return self.name


def has_magic(path: Path) -> bool:
    """Returns whether the file can be opened and says that it is a DICOM file."""
    try:
        with path.open("rb") as stream:
            stream.seek(_MAGIC_AT)
            return stream.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def read_header(path: Path) -> Header:
    """Returns what the file says of its images; none of them is decoded.

    Raises:
      UserError: pydicom is not installed.
      UnreadableError, or what pydicom raises: the file cannot be used.
    """
    with _opened(path) as (_, dataset):
        number = None
        with contextlib.suppress(ValueError):  # it only orders slices whose places are unknown
            number = dataset.get("InstanceNumber")
        return Header(
            width=dataset.Columns,
            height=dataset.Rows,
            frames=_frames(dataset),
            names={key: _text(dataset.get(key)) for key in PATIENT_KEYS if key != "file"},
            number=int(number) if isinstance(number, int) else None,
            position=_numbers(dataset.get("ImagePositionPatient"), 3),
            orientation=_numbers(dataset.get("ImageOrientationPatient"), 6),
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Any]]:
    """Yields the file and its header, checked, as a pydicom data set without the pixels."""
    pydicom = load_pydicom()
    with open_source(path) as stream:
        if not stream.read(1):
            raise UnreadableError("the file is empty")
        stream.seek(_MAGIC_AT)
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise UnreadableError("no DICOM file: it lacks the mark DICM at byte 128")
        _check_syntax(pydicom, pydicom.filereader.read_file_meta_info(path), stream)
        stream.seek(0)
        tags = [*_IDENTITY, *_PIXELS]
        try:
            dataset = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=tags)
        except EOFError as error:
            raise UnreadableError("the file is truncated") from error
        _check_header(dataset, path)
        yield stream, dataset


def _check_syntax(pydicom: ModuleType, meta: Any, stream: BinaryIO) -> None:
    """Raises UnreadableError where the file is stored in a way that nobody here can decode.

    `meta` is its meta information. The stream is moved.
    """
    syntax = meta.get("TransferSyntaxUID")
    if not syntax:
        raise UnreadableError("it does not say its transfer syntax")
    if syntax == _DEFLATED:
        if not (length := meta.get("FileMetaInformationGroupLength")):
            raise UnreadableError("a deflated file that does not say where its data begin")
        stream.seek(_META_AT + length)
        _check_deflated(stream)
    try:
        decoder = pydicom.pixels.get_decoder(syntax)
    except NotImplementedError:
        raise UnreadableError(
            f"transfer syntax {syntax.name} ({syntax}), which pydicom does not decode: convert it"
        ) from None
    if not decoder.is_available:
        raise UnreadableError(f"compressed as {syntax.name} ({syntax}): {_codec(syntax)}")


def _decode(stream: BinaryIO, dataset: Any, frame: int) -> np.ndarray:
    """Returns the stored pixels of one frame; of a file with this header, which is read again."""
    pydicom, syntax = load_pydicom(), dataset.file_meta.TransferSyntaxUID
    tags = [*_PIXELS, *_DATA]
    if syntax != _DEFLATED:
        # One frame of an open file takes little memory; but not every file can be read so.
        with contextlib.suppress(Exception):
            return pydicom.pixels.pixel_array(stream, index=frame)
    stream.seek(0)
    try:
        whole = pydicom.dcmread(stream, specific_tags=tags)
        return pydicom.pixels.pixel_array(whole, index=frame)
    except Exception as error:
        # pydicom and the decoders raise many types for what does not fit the header.
        advice = f"; {_codec(syntax)} may help" if syntax.is_compressed else ""
        raise UnreadableError(
            "its pixel data cannot be decoded, it may be truncated or damaged "
            f"({one_line(error)}){advice}"
        ) from error


def _codec(syntax: str) -> str:
    """Returns what to install for a compressed file."""
    for beginning, packages in _CODECS:
        if syntax.startswith(beginning):
            return f"pip install {packages}"
    return "convert it, or install a decoder of pydicom for it"


def _check_deflated(stream: BinaryIO) -> None:
    """Raises UnreadableError where a deflated file, which pydicom inflates whole, is too large.

    The stream is where the file's meta information ends, and is moved.
    """
    inflating, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while block := inflating.unconsumed_tail or stream.read(2**20):
        total += len(inflating.decompress(block, 2**24))
        if total > 2 * MAX_VOXELS:
            raise UnreadableError(f"it inflates to more than {2 * MAX_VOXELS:,} bytes")


def _check_header(dataset: Any, path: Path) -> None:
    """Raises UnreadableError unless there are pixels, of a kind that is known, and not too many."""
    rows, columns = dataset.get("Rows"), dataset.get("Columns")
    if rows is None or columns is None:
        modality = _text(dataset.get("Modality")) or "no modality"
        raise UnreadableError(f"a DICOM file without pixel data ({modality})")
    frames = _frames(dataset)
    check_size(columns, rows, frames)
    kind = _text(dataset.get("PhotometricInterpretation"))
    if kind not in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", *_COLOUR):
        raise UnreadableError(f"photometric interpretation '{kind}': convert it to RGB")
    syntax, bits = dataset.file_meta.TransferSyntaxUID, dataset.get("BitsAllocated")
    if syntax.is_encapsulated or syntax == _DEFLATED or not bits:
        # Every compressed frame has at least the eight bytes of an item's tag and length.
        least = 8 * frames if syntax.is_encapsulated else 0
    else:
        samples = 2 if kind == "YBR_FULL_422" else dataset.get("SamplesPerPixel", 1)
        least = frames * rows * columns * samples * bits // 8
    if (found := path.stat().st_size) < least:
        raise UnreadableError(
            f"a DICOM file without all of its pixel data: {found} bytes, and {frames} images of "
            f"{columns} x {rows} pixels are {least} or more; it may be truncated"
        )


def _frames(dataset: Any) -> int:
    return int(dataset.get("NumberOfFrames") or 1)


def _text(value: Any) -> str:
    """Returns the text of an element on one line, "" where there is none."""
    return " ".join(str(value or "").split())


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """Returns `count` numbers, None where there are not so many."""
    numbers = tuple(map(float, value)) if isinstance(value, Sequence) else ()
    return numbers if len(numbers) == count else None
