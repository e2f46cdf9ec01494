"""Which images are in the files of a set: a picture is one, DICOM and NIfTI files hold several.

An image of a file with several is called `file#k`, k from 0: a frame, or a slice of a volume. A
folder of DICOM files stands for one series, its slices in the order of their places. What is known
of the patients comes with the images (`Found.patient`; see `dicom` on what is kept of it).
"""

import contextlib
import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from medtl_jax.data.dicom import PATIENT_KEYS, DicomFrame, Header, has_magic, read_header
from medtl_jax.data.imagefile import UnreadableError, decoder_warnings_off
from medtl_jax.data.images import BLOCK, IMAGE_SUFFIXES, Progress, attempt, in_order
from medtl_jax.data.nifti import PLANES, Layout, NiftiSlice, is_nifti, read_layout
from medtl_jax.data.planes import ImageSource, Plane, stack_neighbours
from medtl_jax.errors import UserError

# As messages name what is an image file.
KINDS = " ".join([*sorted(IMAGE_SUFFIXES), ".dcm", ".nii", ".nii.gz"])

_DICOM_SUFFIXES = frozenset({".dcm", ".dicom"})
# The table of contents of a medium has a DICOM file's mark, and no image.
_INDEX = "DICOMDIR"
_PART = re.compile(r"(?P<file>.+)#(?P<index>\d{1,9})")
# Directions of rows and columns of one series differ by rounding alone.
_PARALLEL = 1e-3
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """How files that are no pictures are read: the keys of the section `data` for them.

    Attributes:
      window: centre and width; None takes the file's own, or percentiles.
      plane: one of `nifti.PLANES`.
      slices: 1, or 3 for the neighbouring slices as channels.
      patient: one of `dicom.PATIENT_KEYS`.
    """

    window: tuple[float, float] | None = None
    plane: str = "axial"
    slices: int = 1
    patient: str = "PatientID"


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """One image of a set.

    Attributes:
      source: what `images.decode_many` reads.
      id: its file's, with `#k` where that holds several.
      patient: what its file says, or the file's own id; None of a picture, which says nothing.
      key: the element of a DICOM file that `patient` is, or "file".
    """

    source: ImageSource
    id: str
    patient: str | None = None
    key: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class _File:
    """The images of one file, with the header of a DICOM file."""

    images: tuple[Found, ...]
    header: Header | None = None


def reading_of(config: Mapping[str, Any]) -> Reading:
    """Returns the keys window, plane, slices and dicom_patient of `config`, the section `data`.

    Raises:
      UserError: a value that none of them can have.
    """
    slices, plane = config.get("slices", 1), config.get("plane", "axial")
    patient = config.get("dicom_patient", "PatientID")
    if isinstance(slices, bool) or slices not in (1, 3):
        raise UserError(f"data.slices must be 1 or 3, not {slices!r}")
    for key, value, known in (
        ("plane", plane, tuple(PLANES)),
        ("dicom_patient", patient, PATIENT_KEYS),
    ):
        if value not in known:
            raise UserError(f"data.{key} must be one of {', '.join(known)}, not {value!r}")
    return Reading(_window(str(config.get("window") or "")), plane, slices, patient)


def check_channels(reading: Reading, grey: bool) -> None:
    """Raises UserError where neighbouring slices would become one grey channel."""
    if grey and reading.slices == 3:
        raise UserError(
            "data.slices=3 makes images of three channels, and the model reads grey ones: leave "
            "it at 1"
        )


def _window(text: str) -> tuple[float, float] | None:
    if not text.strip():
        return None
    numbers: list[float] = []
    with contextlib.suppress(ValueError):
        numbers = [float(part) for part in text.split(",")]
    if len(numbers) != 2 or not all(map(math.isfinite, numbers)) or numbers[1] <= 0:
        raise UserError(
            f"data.window={text!r} must be centre,width, such as 40,400; the width above 0"
        )
    return numbers[0], numbers[1]


def is_image(path: Path) -> bool:
    """Returns whether the file is to be a picture, a DICOM file or a NIfTI volume.

    That is told by its name; only of names that say nothing are the first bytes read.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES or is_nifti(path):
        return True
    return is_dicom(path)


def is_dicom(path: Path) -> bool:
    """Returns whether the file is named as a DICOM file, or begins as one."""
    if path.suffix.lower() in _DICOM_SUFFIXES:
        return True
    if path.suffix.lower() in IMAGE_SUFFIXES or path.name.upper() == _INDEX:
        return False
    return path.is_file() and has_magic(path)


def series_files(folder: Path) -> list[Path]:
    """Returns the DICOM files of a folder by name; none where it holds anything else."""
    files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    return files if all(map(is_dicom, files)) else []


def find_images(
    files: Sequence[tuple[Path, str]], reading: Reading, progress: Progress | None = None
) -> list[tuple[Found, ...]]:
    """Returns the images of each of the files, whose headers alone are read.

    A path that does not exist and ends in `#k` means the k-th image of a file; a folder means the
    DICOM series in it, whose images are called by their own files. With `reading.slices` = 3 the
    neighbours of a slice are those in its volume, among the frames of its file as they are stored,
    or in the same series among `files`.

    Args:
      files: path and id of each, the id being a path too.
      reading: how they are read.
      progress: called as `progress(done, total, text)` where there are headers to read.

    Raises:
      UserError: some files cannot be used (how many, and why the first), pydicom or nibabel is
        not installed, or slices whose neighbours are not known.
    """
    expanded = [_listed(path, name) for path, name in files]
    singles = [single for listed in expanded for single in listed]
    if all(path.suffix.lower() in IMAGE_SUFFIXES for path, *_ in singles) and reading.slices == 1:
        return [(Found(path, name),) for path, name in files]
    results = _read_all(singles, reading, progress)
    _refuse([path for path, *_ in singles], results)
    found = iter(results)
    sets = [[next(found) for _ in listed] for listed in expanded]
    for (path, _), parts in zip(files, sets, strict=True):
        if path.is_dir():
            parts[:] = _in_order(parts, path)
    if reading.slices == 3:
        sets = _with_neighbours(sets)
    return [tuple(image for part in parts for image in part.images) for parts in sets]


def _listed(path: Path, name: str) -> list[tuple[Path, str, int | None]]:
    """Returns path, id and the chosen image, None for all, of the file or files of a path."""
    if path.is_dir():
        files = series_files(path)
        if not files:
            raise UserError(f"{path} is a folder, and not one of DICOM files alone: list its files")
        return [(file, f"{name}/{file.name}", None) for file in files]
    part = _PART.fullmatch(path.name)
    if part and not path.exists():
        file = path.with_name(part["file"])
        if is_nifti(file) or is_dicom(file):
            return [(file, name.rpartition("#")[0], int(part["index"]))]
    return [(path, name, None)]


def _read_all(
    files: Sequence[tuple[Path, str, int | None]], reading: Reading, progress: Progress | None
) -> list[_File | str]:
    total, results = len(files), []

    def read_block(start: int) -> list[_File | str]:
        return [attempt(_reader(*file, reading)) for file in files[start : start + BLOCK]]

    with decoder_warnings_off(), contextlib.closing(in_order(read_block, total)) as blocks:
        for block in blocks:
            results.extend(block)
            if progress:
                progress(len(results), total, "reading headers")
    return results


def _reader(path: Path, name: str, chosen: int | None, reading: Reading) -> Callable[[], _File]:
    return lambda: _images_of(path, name, chosen, reading)


def _images_of(path: Path, name: str, chosen: int | None, reading: Reading) -> _File:
    """Returns the images of one file, or the chosen one."""
    header = None
    if is_nifti(path):
        layout = read_layout(path)
        count, patient, key = layout.count(reading.plane), name, "file"
    elif is_dicom(path):
        header = read_header(path)
        count, (patient, key) = header.frames, _patient(header, name, reading.patient)
    elif reading.slices == 3:
        raise UnreadableError("data.slices=3 needs slices of volumes, and this is a picture")
    else:
        return _File((Found(path, name),))
    if chosen is not None and chosen >= count:
        raise UnreadableError(f"there is no image {chosen}: it holds {count}, numbered from 0")
    places = range(count) if chosen is None or reading.slices == 3 else [chosen]
    planes: list[Plane] = []
    for k in places:
        where = f"{path}#{k}" if count > 1 else str(path)
        if header is None:
            planes.append(NiftiSlice(path, k, reading.plane, layout, reading.window, where))
        else:
            size = (header.width, header.height)
            planes.append(DicomFrame(path, k, *size, reading.window, where))
    if reading.slices == 3 and count > 1:
        planes = stack_neighbours(planes)
    ids = [f"{name}#{k}" if count > 1 else name for k in places]
    images = [Found(plane, own, patient, key) for plane, own in zip(planes, ids, strict=True)]
    return _File(tuple(images[k] for k, at in enumerate(places) if chosen in (None, at)), header)


def _patient(header: Header, name: str, wanted: str) -> tuple[str, str]:
    """Returns the patient of a file and the element that names them, `file` where none does."""
    for key in (wanted, "StudyInstanceUID"):
        if key != "file" and header.names[key]:
            return header.names[key], key
        if key == "file":
            break
    return name, "file"


def _refuse(paths: Sequence[Path], results: Sequence[_File | str]) -> None:
    bad = [row for row, result in enumerate(results) if isinstance(result, str)]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(results)} images cannot be read, first: {paths[bad[0]]} "
            f"({results[bad[0]]}); replace or remove them"
        )


def _in_order(parts: Sequence[_File], folder: Path) -> list[_File]:
    """Returns the files of a folder, which must be one series, by their places in the body."""
    names = {part.header.names["SeriesInstanceUID"] for part in parts}
    if len(names) > 1:
        raise UserError(f"{folder} holds {len(names)} DICOM series: make a folder of each")
    return [parts[row] for row in _order([part.header for part in parts], str(folder))[0]]


def _order(headers: Sequence[Header], where: str) -> tuple[list[int], list[float]]:
    """Returns the rows of the slices of a series in order, and where each is, in that order.

    That is ImagePositionPatient along the normal of the slices, in mm, or where a slice lacks it,
    or they are not parallel, the InstanceNumber. Slices at one place follow by InstanceNumber.

    Raises:
      UserError: slices without either.
    """
    orientations = [header.orientation for header in headers]
    numbers = [header.number for header in headers]
    if all(orientations) and all(header.position for header in headers):
        directions = np.array(orientations)
        if np.ptp(directions, axis=0).max() <= _PARALLEL:
            normal = np.cross(directions[0, :3], directions[0, 3:])
            places = [float(np.dot(header.position, normal)) for header in headers]
            # To a micrometre: equal places differ by rounding.
            places = [round(place, 3) for place in places]
            rows = sorted(range(len(places)), key=lambda row: (places[row], numbers[row] or 0))
            return rows, [places[row] for row in rows]
    if None in numbers and len(numbers) > 1:
        raise UserError(
            f"the order of the slices of {where} is not known: some have neither "
            "ImagePositionPatient nor InstanceNumber"
        )
    rows = sorted(range(len(numbers)), key=lambda row: numbers[row] or 0)
    return rows, [float(numbers[row] or 0) for row in rows]


def _with_neighbours(sets: list[list[_File]]) -> list[list[_File]]:
    """Returns the same with every DICOM file of one frame between its neighbours in the series."""
    series: dict[str, list[tuple[int, int]]] = {}
    for row, parts in enumerate(sets):
        for column, part in enumerate(parts):
            if part.header is not None and part.header.frames == 1:
                # A file without the name of its series is alone in it.
                name = part.header.names["SeriesInstanceUID"] or part.images[0].id
                series.setdefault(name, []).append((row, column))
    stacked = [list(parts) for parts in sets]
    for places in series.values():
        parts = [sets[row][column] for row, column in places]
        where = str(parts[0].images[0].source)
        order, heights = _order([part.header for part in parts], f"the series of {where}")
        if len(set(heights)) < len(heights):
            raise UserError(
                f"the series of {where} has several slices in one place: data.slices=3 needs one"
            )
        planes = attempt(
            lambda parts=parts, order=order: stack_neighbours(
                [parts[row].images[0].source for row in order]
            )
        )
        if isinstance(planes, str):
            raise UserError(f"the series of {where} cannot be used: {planes}")
        for row, plane in zip(order, planes, strict=True):
            image = dataclasses.replace(parts[row].images[0], source=plane)
            at = places[row]
            stacked[at[0]][at[1]] = dataclasses.replace(parts[row], images=(image,))
    return stacked


def read_layout_or_refuse(path: Path) -> Layout:
    """Returns what the NIfTI file says of its volume; UserError where it cannot be read."""
    with decoder_warnings_off():
        layout = attempt(lambda: read_layout(path))
    if isinstance(layout, str):
        raise UserError(f"{path} cannot be read: {layout}")
    return layout


def patients_note(found: Sequence[Found]) -> tuple[str, ...]:
    """Returns a note on where the patients come from; none where no file says any."""
    counts = Counter(image.key for image in found)
    if set(counts) == {""}:
        return ()
    words = {"": "each picture its own", "file": "each file its own"}
    said = ", ".join(
        f"{words.get(key, f'by {key} of the DICOM files')} ({count} images)"
        for key, count in counts.items()
    )
    return (f"patients: {said}",)
