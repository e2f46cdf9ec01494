"""What is kept of each image to find its copies: a hash of its pixels, a thumbnail, a few facts.

A perceptual hash of an image is made of the signs of low frequencies of its cosine transform. Chest
X-rays look so much alike that the signs do not tell them apart, so the numbers themselves are kept,
`describe`: an embedding of the pixels that no network is needed for. Left out are brightness (the
lowest frequencies), contrast (length 1) and what all images of the set share (mean and spread of
each frequency). A mirrored image changes the sign of its odd horizontal frequencies alone, and a
cropped one is described as if it were whole, by integrals over a part of the pixels.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
from threadpoolctl import threadpool_limits

from medtl_jax.data.catalog import Array

SIDE = 48  # of thumbnails
FREQUENCIES = 12  # of the cosine transform, along each axis
# Sums of the two frequencies below it are brightness and slow shading.
_LOWEST = 2
_HIGHEST = 15
# Values within which a line of pixels counts as one shade: JPEG leaves some noise.
BORDER_TOLERANCE = 10
_BLOCK = 64
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_TINY = 1e-6

_SUMS = np.add.outer(np.arange(FREQUENCIES), np.arange(FREQUENCIES))
_KEPT = (_SUMS >= _LOWEST) & (_SUMS <= _HIGHEST)
MIRROR = np.broadcast_to((-1.0) ** np.arange(FREQUENCIES), _KEPT.shape)[_KEPT].astype(np.float32)
"""float32 `[d]`: a description times this is that of the mirrored image."""

WHOLE = ((0.0, 0.0),)
"""Nothing is cut off."""

Crop = tuple[float, float, float, float]
"""Parts of height and width cut off at the top, bottom, left and right."""


@dataclasses.dataclass(frozen=True)
class Prints:
    """Of the n images of a split.

    Attributes:
      keys: `[n]`, SHA-256 (hex) of size and pixels.
      thumbnails: uint8 `[n, t, t]`, grey, t at most `SIDE`.
      lowest, highest: uint8 `[n]`, of the pixels.
      means: float32 `[n]`, of the grey pixels.
      borders: float32 `[n]`, the widest strip along one of the four sides that has one shade
        alone, as a part of that side's length across; 1 for an image of one shade.
    """

    keys: np.ndarray
    thumbnails: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    means: np.ndarray
    borders: np.ndarray

    @property
    def constant(self) -> np.ndarray:
        """bool `[n]`: images in which nothing can be told from anything else."""
        spread = self.highest.astype(np.int32) - self.lowest
        return spread <= BORDER_TOLERANCE


@threadpool_limits.wrap(limits=1, user_api="blas")
def take_prints(images: Array) -> Prints:
    """Returns the prints of images uint8 `[n, s, s, c]`, in memory or streamed, a few at a time."""
    parts = [
        _prints_of(np.asarray(images[start : start + _BLOCK]))
        for start in range(0, len(images), _BLOCK)
    ]
    return Prints(
        *(
            np.concatenate([getattr(part, field.name) for part in parts])
            for field in dataclasses.fields(Prints)
        )
    )


def _prints_of(images: np.ndarray) -> Prints:
    shape = str(images.shape[1:]).encode()
    keys = [hashlib.sha256(shape + image.tobytes()).hexdigest() for image in images]
    grey = to_luma(images)
    size = grey.shape[1]
    shrink = averages(min(size, SIDE), size)
    small = np.rint(shrink @ grey @ shrink.T).astype(np.uint8)
    flat = images.reshape(len(images), -1)
    return Prints(
        np.array(keys, dtype=str),
        small,
        flat.min(axis=1),
        flat.max(axis=1),
        grey.mean(axis=(1, 2)),
        _borders(grey),
    )


def to_luma(images: np.ndarray) -> np.ndarray:
    """Returns float32 `[n, s, s]` of uint8 `[n, s, s, c]`: ITU-R 601 luma, not rounded."""
    if images.shape[-1] == 1:
        return images[..., 0].astype(np.float32)
    return images.astype(np.float32) @ _LUMA


def _borders(grey: np.ndarray) -> np.ndarray:
    """Returns the widest strip of one shade along a side of each image, as a part of its size."""
    widths = []
    for turned in (grey, grey[:, ::-1], grey.swapaxes(1, 2), grey.swapaxes(1, 2)[:, ::-1]):
        edge = turned[:, :1, :1]
        plain = (np.abs(turned - edge) <= BORDER_TOLERANCE).all(axis=2)
        widths.append(np.cumprod(plain, axis=1).sum(axis=1))
    return (np.max(widths, axis=0) / grey.shape[1]).astype(np.float32)


@functools.cache
def averages(count: int, size: int) -> np.ndarray:
    """Returns float32 `[count, size]`: the means of `size` pixels over as many equal parts."""
    edges = np.linspace(0, size, count + 1)
    ends = np.clip(np.arange(size + 1)[None], edges[:-1, None], edges[1:, None])
    return (np.diff(ends, axis=1) * count / size).astype(np.float32)


@functools.cache
def _cosines(size: int, first: float, last: float) -> np.ndarray:
    """Returns float32 `[FREQUENCIES, size]`: the cosine transform of a line of pixels without the
    parts `first` and `last` at its ends, exact for pixels that are squares of one shade.
    """
    start, stop = first * size, size - last * size
    ends = np.clip(np.arange(size + 1), start, stop)
    turns = np.pi * (ends - start) / (stop - start)
    rows = [np.diff(turns) / np.pi]
    rows += [np.diff(np.sin(k * turns)) * np.sqrt(2) / (np.pi * k) for k in range(1, FREQUENCIES)]
    return np.stack(rows).astype(np.float32)


def describe(thumbnails: np.ndarray, ends: Sequence[tuple[float, float]] = WHOLE) -> np.ndarray:
    """Returns float32 `[k * k, n, d]`, of length 1 (0 for an image of one shade), see the module.

    Args:
      thumbnails: uint8 `[n, t, t]`.
      ends: the k pairs of parts that are cut off before, first and last, of the rows and in every
        combination (`crops`) of the columns.
    """
    count, size = thumbnails.shape[:2]
    weights = np.concatenate([_cosines(size, *pair) for pair in ends]).T
    # Two products of large matrices take less than many of small ones.
    columns = thumbnails.astype(np.float32).reshape(-1, size) @ weights
    turned = np.ascontiguousarray(columns.reshape(count, size, -1).swapaxes(1, 2))
    both = turned.reshape(-1, size) @ weights
    parts = both.reshape(count, len(ends), FREQUENCIES, len(ends), FREQUENCIES)
    # Axes: image, crop of columns, column frequency, crop of rows, row frequency.
    parts = parts.transpose(3, 1, 0, 4, 2)
    return _unit(parts.reshape(len(ends) ** 2, count, *_KEPT.shape)[..., _KEPT])


def crops(ends: Sequence[tuple[float, float]]) -> tuple[Crop, ...]:
    """Returns the crops of `describe`, in its order."""
    return tuple((*rows, *columns) for rows, columns in itertools.product(ends, ends))


@dataclasses.dataclass(frozen=True)
class Whitening:
    """What the images of a set share: mean and spread of each number of their descriptions.

    The mean is that of the images and their mirror images, so that a mirrored image stays one.
    """

    mean: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, descriptions: np.ndarray) -> "Whitening":
        """Returns that of `[n, d]`."""
        mean = np.where(MIRROR > 0, descriptions.mean(axis=0), 0).astype(np.float32)
        return cls(mean, np.maximum(descriptions.std(axis=0), _TINY))

    def apply(self, descriptions: np.ndarray) -> np.ndarray:
        """Returns the same shape, of length 1: what sets each image apart."""
        there = np.abs(descriptions).max(axis=-1, keepdims=True) > 0
        return _unit((descriptions - self.mean) / self.spread * there)


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > _TINY, length, np.inf)
