"""Images that are no picture file of their own: a frame of a DICOM file, a slice of a volume."""

import abc
import dataclasses
from collections.abc import Sequence

import numpy as np

from medtl_jax.data.imagefile import MAX_PIXELS, Source, UnreadableError, upright_size

# Of all frames or slices of one file.
MAX_VOXELS = 2**31
# Per cent of the values below the darkest and up to the brightest grey, where no window is known.
PERCENTILES = (0.5, 99.5)


@dataclasses.dataclass(frozen=True, slots=True)
class Grey:
    """Decoded pixels on the scale 0..255, not yet rounded, and how they came to it.

    Attributes:
      values: float32 `[h, w]`, or `[h, w, 3]` of a coloured image or of neighbouring slices.
      how: the mapping, as a note on the set says it.
      channels: whether the three channels mean something else than colour: they then stay three,
        also where they are equal.
    """

    values: np.ndarray
    how: str
    channels: bool = False


class Plane(abc.ABC):
    """One such image; `str()` of it is its name in messages."""

    @property
    @abc.abstractmethod
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""

    @abc.abstractmethod
    def read(self) -> Grey:
        """Returns the pixels.

        Raises:
          UnreadableError, or another exception of a damaged file (see `images.attempt`).
        """

    @abc.abstractmethod
    def labels(self) -> np.ndarray:
        """Returns the stored integers `[h, w]`, where the file is a mask; errors as `read`."""


ImageSource = Source | Plane


def upright_size_of(source: ImageSource) -> tuple[int, int]:
    """Returns width and height in pixels, upright, of an image; errors as `upright_size`."""
    return source.size if isinstance(source, Plane) else upright_size(source)


@dataclasses.dataclass(frozen=True)
class Stack(Plane):
    """2.5D: a slice as the second of three channels, its neighbours as the first and the third."""

    planes: tuple[Plane, Plane, Plane]

    @property
    def size(self) -> tuple[int, int]:
        return self.planes[1].size

    def read(self) -> Grey:
        parts = [plane.read() for plane in self.planes]
        if any(part.values.ndim == 3 for part in parts):
            raise UnreadableError("data.slices=3 needs grey slices, and these are in colour")
        values = np.stack([part.values for part in parts], axis=-1)
        return Grey(values, f"{parts[1].how}, neighbouring slices as channels", channels=True)

    def labels(self) -> np.ndarray:
        return self.planes[1].labels()

    def __str__(self) -> str:
        return str(self.planes[1])


def stack_neighbours(planes: Sequence[Plane]) -> list[Plane]:
    """Returns each of the slices, in order, with the one before and after it as a `Stack`.

    The first and the last slice stand in for the neighbours that they lack.

    Raises:
      UnreadableError: slices of different sizes.
    """
    if len(sizes := sorted({plane.size for plane in planes})) > 1:
        raise UnreadableError(f"its slices have different sizes: {sizes[0]} and {sizes[1]}")
    last = len(planes) - 1
    return [
        Stack((planes[max(k - 1, 0)], planes[k], planes[min(k + 1, last)]))
        for k in range(len(planes))
    ]


def spread(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Returns float32 of the same shape: `low` to `high` linearly to 0..255, clipped.

    Values that are no numbers become 0, and everything where `high` is not above `low`.
    """
    if not high > low:
        return np.zeros(values.shape, np.float32)
    scaled = (values.astype(np.float64) - low) * (255.0 / (high - low))
    return np.clip(np.nan_to_num(scaled, nan=0.0), 0.0, 255.0).astype(np.float32)


def middle_range(values: np.ndarray) -> tuple[float, float]:
    """Returns the percentiles `PERCENTILES` of the finite values, interpolated linearly.

    Raises:
      UnreadableError: none of them is finite.
    """
    if not np.issubdtype(values.dtype, np.integer):
        values = values[np.isfinite(values)]
    if not values.size:
        raise UnreadableError("none of its values is a finite number")
    low, high = np.percentile(values, PERCENTILES)
    return float(low), float(high)


def check_size(width: int, height: int, count: int) -> None:
    """Raises UnreadableError unless `count` images of this size are some, and not too many."""
    if min(width, height, count) < 1:
        raise UnreadableError(f"{count} images of {width} x {height} pixels: there is nothing")
    if width * height > MAX_PIXELS:
        raise UnreadableError(f"{width} x {height} is more than {MAX_PIXELS:,} pixels")
    if width * height * count > MAX_VOXELS:
        raise UnreadableError(
            f"{count} images of {width} x {height} are more than {MAX_VOXELS:,} pixels"
        )
