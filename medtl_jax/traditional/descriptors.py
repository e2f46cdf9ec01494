"""Hand-made descriptors of images: HOG, LBP and raw pixels, one vector an image.

All are fixed: nothing is learned of any image, so that a vector depends on its image alone.
"""

import functools
import hashlib
import importlib.metadata
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image
from skimage.feature import hog, local_binary_pattern

import medtl_jax
from medtl_jax.data.catalog import Array, Split
from medtl_jax.transfer.feature_cache import FeatureKey, Note, Took, cached
from medtl_jax.transfer.features import split_digest

# Of HOG: cells along a side, blocks of 2 x 2 cells, 9 directions without sign.
_CELLS, _BLOCK, _DIRECTIONS = 8, 2, 9
# Of LBP: points on a circle of this radius, and along each side the parts that have a histogram.
_POINTS, _RADIUS, _PARTS = 8, 1, 4
# Uniform patterns that are told apart by their turn, and one for all others.
_PATTERNS = _POINTS * (_POINTS - 1) + 3
# Of raw pixels: the most along a side.
_PIXELS = 32
# Images that are described, and of a stream decoded, at a time.
_AT_ONCE = 64

Describe = Callable[[np.ndarray], np.ndarray]
Advance = Callable[[int, int, str], None]


def hog_vector(image: np.ndarray) -> np.ndarray:
    """float32 `[d]`: histograms of oriented gradients (Dalal & Triggs 2005) of uint8 `[s, s, c]`.

    8 x 8 cells, or a few more of a side that 8 does not divide; of colour the channel with the
    largest gradient. d is 1764 of 8 x 8 cells.
    """
    cell = max(2, image.shape[0] // _CELLS)
    found = hog(
        image,
        orientations=_DIRECTIONS,
        pixels_per_cell=(cell, cell),
        cells_per_block=(_BLOCK, _BLOCK),
        block_norm="L2-Hys",
        channel_axis=-1,
    )
    return found.astype(np.float32)


def lbp_vector(image: np.ndarray) -> np.ndarray:
    """float32 `[944]`: local binary patterns (Ahonen et al. 2006) of uint8 `[s, s, c]`.

    The grey image's uniform patterns of 8 points at radius 1, counted in each of 4 x 4 parts; the
    square roots of their shares (Hellinger's distance: frequent patterns do not drown the rest).
    """
    patterns = local_binary_pattern(_grey(image), _POINTS, _RADIUS, "nri_uniform").astype(np.intp)
    counts = [
        np.bincount(part.ravel(), minlength=_PATTERNS) / part.size
        for rows in np.array_split(patterns, _PARTS, axis=0)
        for part in np.array_split(rows, _PARTS, axis=1)
    ]
    return np.sqrt(np.concatenate(counts)).astype(np.float32)


def pixel_vector(image: np.ndarray) -> np.ndarray:
    """float32 `[d]` in 0..1: the pixels of uint8 `[s, s, c]`, shrunk by area to at most 32 x 32."""
    side = min(_PIXELS, image.shape[0])
    # As floats: Pillow rounds bytes after each of its two passes.
    planes = [
        np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BOX))
        for plane in np.moveaxis(image.astype(np.float32), -1, 0)
    ]
    return np.stack(planes, axis=-1).ravel() / np.float32(255)


def _grey(image: np.ndarray) -> np.ndarray:
    """uint8 `[s, s]`; of colour the luma of ITU-R BT.601."""
    if image.shape[-1] == 1:
        return image[..., 0]
    return np.asarray(Image.fromarray(image).convert("L"))


DESCRIPTORS: dict[str, Describe] = {"hog": hog_vector, "lbp": lbp_vector, "pixels": pixel_vector}


def described(name: str, images: Array, advance: Advance) -> Iterator[np.ndarray]:
    """Yields the vectors of images, block by block: float32 `[b, d]`, each image once, in order.

    Args:
      name: of `DESCRIPTORS`.
      images: uint8 `[n, s, s, c]`, an array or streamed; a block of them is held at a time.
      advance: called as `advance(done, n, "")`.
    """
    describe, count = DESCRIPTORS[name], len(images)
    for start in range(0, count, _AT_ONCE):
        block = np.asarray(images[start : start + _AT_ONCE])
        yield np.stack([describe(image) for image in block])
        advance(min(start + _AT_ONCE, count), count, "")


def kept_descriptors(
    folder: pathlib.Path, name: str, split: Split, note: Note, advance: Advance, took: Took
) -> np.memmap:
    """float32 `[n, d]`: the vectors of a split, from the cache in `folder` where they are there.

    `note` and `took` as for `feature_cache.cached`, whose errors it raises.
    """
    width = len(DESCRIPTORS[name](np.asarray(split.images[:1])[0]))
    key = _key(name, split)
    return cached(
        folder,
        key,
        (len(split), width),
        lambda: described(name, split.images, advance),
        note,
        took,
    )


def _key(name: str, split: Split) -> FeatureKey:
    """What decides the vectors: the images, and our and the libraries' code."""
    packages = ("numpy", "pillow", "scikit-image")
    return FeatureKey(
        variables="",
        network=f"traditional/{name}",
        attributes={},
        start="",
        input={},
        image=tuple(split.images.shape[1:]),
        data=split_digest(split),
        views=0,
        augment={},
        seed=0,
        compute="float32",
        precision="",
        platform="cpu",
        versions={
            "medtl_jax": medtl_jax.__version__,
            "source": _source_digest(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
    )


@functools.cache
def _source_digest() -> str:
    return hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()
