"""NIfTI volumes: their slices as a radiologist sees them, whatever the order they are stored in.

The affine of the file (sform, else qform, else nibabel's reading of neither: left, anterior,
superior) says which stored axis runs along the body. Slices are shown as DICOM shows them: axial
and coronal ones with the patient's right on the left of the image, anterior or superior at the top;
sagittal ones with anterior on the left, superior at the top.

A packed volume (.nii.gz) is unpacked whole for one slice; the few that were read last are kept.
"""

import dataclasses
import functools
import gzip
import logging
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from medtl_jax.data.dicom_values import INSTALL
from medtl_jax.data.imagefile import UnreadableError, open_source
from medtl_jax.data.planes import PERCENTILES, Grey, Plane, check_size, middle_range, spread
from medtl_jax.errors import UserError

SUFFIXES = (".nii", ".nii.gz")
# The axis that slices are counted along, of left to right, posterior to anterior, inferior to
# superior; columns and rows of the image are the other two, the first one first.
PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}

_SIZES = {348: "Nifti1Header", 540: "Nifti2Header"}
_MAX_BYTES = 2**31
_MAX_OFFSET = 2**20
# Volumes that are held at once, of those that were read last.
_HELD = 4


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What a NIfTI file says of its volume before it is read.

    Attributes:
      shape: of the volume along left-right, posterior-anterior and inferior-superior.
      axes: for each of these the stored axis.
      flips: for each of these whether it is stored the other way round.
      affine: from voxels so ordered to mm, float64 `[4, 4]`.
      oriented: whether the file says its orientation at all.
    """

    shape: tuple[int, int, int]
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    affine: np.ndarray
    oriented: bool

    def count(self, plane: str) -> int:
        """Returns the number of slices of one of `PLANES`."""
        return self.shape[PLANES[plane]]

    def size(self, plane: str) -> tuple[int, int]:
        """Returns width and height of these slices in pixels."""
        width, height = (self.shape[axis] for axis in range(3) if axis != PLANES[plane])
        return width, height

    def same_grid(self, other: "Layout") -> bool:
        """Returns whether the voxels of two files lie in the same places, to a hundredth mm."""
        return self.shape == other.shape and np.allclose(self.affine, other.affine, atol=0.01)


@dataclasses.dataclass(frozen=True)
class NiftiSlice(Plane):
    """One slice of a NIfTI volume.

    Attributes:
      path: of the file.
      index: of the slice, from 0: from left, posterior or inferior on.
      plane: one of `PLANES`.
      layout: of the volume.
      window: centre and width, in the units of the volume; None takes `planes.PERCENTILES` of the
        whole volume.
      name: in messages.
    """

    path: Path
    index: int
    plane: str
    layout: Layout
    window: tuple[float, float] | None
    name: str

    @property
    def size(self) -> tuple[int, int]:
        return self.layout.size(self.plane)

    def read(self) -> Grey:
        """Returns the pixels, `[h, w]`, after the file's own slope and intercept.

        Raises:
          UnreadableError, or what nibabel raises: the file cannot be used.
        """
        volume = _volume(self.path)
        if self.window is not None:
            centre, width = self.window
            low, high = centre - width / 2, centre + width / 2
            how = f"NIfTI by data.window={centre:g},{width:g}"
        else:
            low, high = volume.middle_range()
            how = (
                "NIfTI without a window, {} to {} per cent of each volume's values mapped to 0..255"
            ).format(*PERCENTILES)
        if not self.layout.oriented:
            how += ", orientation not said and taken as left, anterior, superior"
        return Grey(spread(self._values(volume), low, high), how)

    def labels(self) -> np.ndarray:
        values = self._values(_volume(self.path))
        whole = np.rint(values)
        if (whole != values).any() or np.abs(whole).max() > 2**31:
            raise UnreadableError("a mask with values that are no integers")
        return whole.astype(np.int64)

    def _values(self, volume: "_Volume") -> np.ndarray:
        """Returns the slice `[h, w]` in the units of the volume."""
        layout, fixed = self.layout, PLANES[self.plane]
        rest = [axis for axis in range(3) if axis != fixed]
        index = self.index
        if layout.flips[fixed]:
            index = layout.shape[fixed] - 1 - index
        stored = np.take(volume.stored(), index, axis=layout.axes[fixed])
        if layout.axes[rest[0]] > layout.axes[rest[1]]:
            stored = stored.T
        # Rows run from superior or anterior on, columns from the right or from anterior on: always
        # against the axes' directions.
        stored = stored[tuple(slice(None, None, 1 if layout.flips[axis] else -1) for axis in rest)]
        return volume.scaled(stored).T

    def __str__(self) -> str:
        return self.name


def is_nifti(path: Path) -> bool:
    """Returns whether the file's name is that of a NIfTI volume."""
    return path.name.lower().endswith(SUFFIXES)


def read_layout(path: Path) -> Layout:
    """Returns what the file says of its volume, which is not read.

    Raises:
      UserError: nibabel is not installed.
      UnreadableError, or what nibabel raises: the file cannot be used.
    """
    nibabel = _nibabel()
    _check_header(nibabel, path)
    image = nibabel.load(path)
    affine = np.asarray(image.affine, np.float64)
    if not np.isfinite(affine).all():
        raise UnreadableError("its affine has values that are no numbers")
    orientation = nibabel.io_orientation(affine)
    if np.isnan(orientation).any():
        raise UnreadableError("its affine does not say where each axis points")
    shape = _shape(image.header)
    # From the stored axis's row, the anatomical axis, to the reverse.
    axes = tuple(int(axis) for axis in np.argsort(orientation[:, 0]))
    known = int(image.header["qform_code"]) > 0 or int(image.header["sform_code"]) > 0
    return Layout(
        shape=tuple(shape[axis] for axis in axes),
        axes=axes,
        flips=tuple(bool(orientation[axis, 1] < 0) for axis in axes),
        affine=affine @ nibabel.orientations.inv_ornt_aff(orientation, shape),
        oriented=known,
    )


class _Volume:
    """The stored values of one file, read once, by whoever comes first."""

    def __init__(self, path: Path):
        self._path = path
        self._lock = threading.Lock()
        self._stored: np.ndarray | None = None
        self._range: tuple[float, float] | None = None
        self._slope, self._intercept = 1.0, 0.0

    def stored(self) -> np.ndarray:
        """Returns the values `[x, y, z]` as stored; of an uncompressed file a memory map."""
        with self._lock:
            if self._stored is None:
                self._stored = self._load()
            return self._stored

    def scaled(self, stored: np.ndarray) -> np.ndarray:
        """Returns float64 values in the units of the volume."""
        return stored.astype(np.float64) * self._slope + self._intercept

    def middle_range(self) -> tuple[float, float]:
        """Returns `planes.middle_range` of the whole volume."""
        stored = self.stored()
        with self._lock:
            if self._range is None:
                ends = self.scaled(np.array(middle_range(stored)))
                self._range = float(ends.min()), float(ends.max())
            return self._range

    def _load(self) -> np.ndarray:
        nibabel = _nibabel()
        _check_header(nibabel, self._path)
        image = nibabel.load(self._path)
        if image.dataobj.dtype.kind not in "iuf":
            raise UnreadableError("a NIfTI volume of colours or complex numbers: save grey values")
        self._slope, self._intercept = image.dataobj.slope, image.dataobj.inter
        try:
            stored = image.dataobj.get_unscaled()
        except (EOFError, OSError, ValueError) as error:
            raise UnreadableError(
                "its data cannot be read, the file may be truncated or damaged"
            ) from error
        return stored.reshape(_shape(image.header))


@functools.lru_cache(maxsize=_HELD)
def _held(path: Path, stamp: tuple[int, int]) -> _Volume:
    del stamp  # a file that was written again is another one
    return _Volume(path)


def _volume(path: Path) -> _Volume:
    found = path.stat()
    return _held(path, (found.st_mtime_ns, found.st_size))


def _nibabel() -> ModuleType:
    """Returns the library; those who read no NIfTI need not have it."""
    try:
        import nibabel
    except ImportError as error:
        raise UserError(f"to read NIfTI files needs nibabel: {INSTALL}") from error
    logging.getLogger("nibabel").setLevel(logging.CRITICAL)
    return nibabel


def _check_header(nibabel: ModuleType, path: Path) -> None:
    """Raises UnreadableError unless the first bytes are those of a volume of a bearable size."""
    with open_source(path) as raw:
        packed = path.name.lower().endswith(".gz")
        if not raw.read(1):
            raise UnreadableError("the file is empty")
        raw.seek(0)
        with gzip.GzipFile(fileobj=raw) if packed else raw as stream:
            try:
                start = stream.read(max(_SIZES))
            except (OSError, EOFError) as error:
                raise UnreadableError("no gzip file, or a truncated one") from error
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")} & set(_SIZES)
    if not sizes or len(start) < (size := sizes.pop()):
        raise UnreadableError("no NIfTI file, or a truncated one")
    header = getattr(nibabel, _SIZES[size])(start[:size], check=False)
    shape = _shape(header)
    check_size(shape[0], shape[1], shape[2])
    if np.prod(shape) * header.get_data_dtype().itemsize > _MAX_BYTES:
        raise UnreadableError(f"its volume has more than {_MAX_BYTES:,} bytes")
    # What lies before the data is read whole.
    if not 0 <= float(header["vox_offset"]) <= _MAX_OFFSET:
        raise UnreadableError(f"its data begin after more than {_MAX_OFFSET:,} bytes")


def _shape(header: Any) -> tuple[int, int, int]:
    """Returns the volume's shape as stored, UnreadableError where it has a fourth dimension."""
    shape = tuple(int(size) for size in header.get_data_shape())
    if len(shape) < 2 or min(shape) < 1:
        raise UnreadableError(f"dimensions {shape}: there is nothing")
    if any(size > 1 for size in shape[3:]):
        raise UnreadableError(
            f"{len(shape)}D NIfTI of {' x '.join(map(str, shape))}: save each volume as a 3D file"
        )
    return (*shape, 1)[:3]
