"""Contrast enhancement without a draw: histogram equalisation, and CLAHE.

Both take one image `[h, w, c]` in 0..255 (any real dtype; c = 1 grey, c = 3 red, green, blue) and
return float32 of the same shape in 0..255. Colours keep their chroma: the luminance is enhanced and
its change added to all three channels. Values are rounded to 256 levels to be counted and looked
up; what lies between two levels moves with the nearer one. Both work under jit and vmap: counting
by scatter-add and lookups by gather were the fastest forms on a CPU too.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

LEVELS = 256

# Rec. 601, as in JPEG and Pillow.
_LUMINANCE = (0.299, 0.587, 0.114)


def luminance(image: jax.Array) -> jax.Array:
    """`[h, w, 3]` -> its Rec. 601 luminance `[h, w]`; the one channel of `[h, w, 1]`.

    ValueError for another number of channels.
    """
    channels = image.shape[-1]
    if channels == 1:
        return image[..., 0]
    if channels != 3:
        raise ValueError(f"an image of {channels} channels is neither grey (1) nor colour (3)")
    return sum(weight * image[..., i] for i, weight in enumerate(_LUMINANCE))


def equalize(image: jax.Array) -> jax.Array:
    """The image with its luminance spread so that all levels are about equally frequent.

    A level becomes the number of pixels below it, scaled so that the lowest level present becomes
    0 and the highest 255; an image of a single level stays as it is.
    """

    def enhance(level):
        counts = _histogram(level.reshape(-1), LEVELS).astype(jnp.float32)
        below = jnp.cumsum(counts) - counts
        # `below` of the highest level present is the largest that belongs to a pixel.
        largest = jnp.where(counts > 0, below, 0.0).max()
        table = jnp.floor(below * 255.0 / jnp.maximum(largest, 1.0) + 0.5)
        table = jnp.where(largest > 0, table, jnp.arange(LEVELS, dtype=jnp.float32))
        return table[level]

    return _on_luminance(image, enhance)


def clahe(image: jax.Array, clip_limit: float = 2.0, tiles: int = 8) -> jax.Array:
    """The image after contrast-limited adaptive histogram equalisation (Zuiderveld 1994).

    The image, mirrored at its lower and right edges up to a multiple of `tiles`, is cut into
    `tiles` x `tiles` tiles. In each, counts above `clip_limit` times the mean count (at least 1)
    are cut off and spread evenly over all levels; the cumulative sum is that tile's table. A pixel
    gets the bilinear mean of the tables of the four nearest tile centres. ValueError if `tiles` is
    below 1 or `clip_limit` is not positive.
    """

    if tiles < 1 or clip_limit <= 0:
        raise ValueError(f"tiles={tiles} must be at least 1 and clip_limit={clip_limit} above 0")

    def enhance(level):
        height, width = level.shape
        size = -(-height // tiles), -(-width // tiles)
        tables = _tile_tables(level, size, tiles, clip_limit).reshape(-1)
        top, bottom, down = _neighbours(height, size[0], tiles)
        left, right, across = _neighbours(width, size[1], tiles)

        def looked_up(rows, columns):
            tile = rows[:, None] * tiles + columns[None, :]
            return tables[jnp.asarray(tile * LEVELS) + level]

        down, across = jnp.asarray(down)[:, None], jnp.asarray(across)
        upper = (1.0 - across) * looked_up(top, left) + across * looked_up(top, right)
        lower = (1.0 - across) * looked_up(bottom, left) + across * looked_up(bottom, right)
        return (1.0 - down) * upper + down * lower

    return _on_luminance(image, enhance)


def _on_luminance(image: jax.Array, enhance: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The image plus what `enhance` (int32 levels `[h, w]` -> float32) adds to its levels."""
    image = jnp.asarray(image).astype(jnp.float32)
    level = jnp.clip(jnp.round(luminance(image)), 0.0, 255.0).astype(jnp.int32)
    change = enhance(level) - level.astype(jnp.float32)
    return jnp.clip(image + change[..., None], 0.0, 255.0)


def _histogram(values: jax.Array, length: int) -> jax.Array:
    """How often each of 0..length-1 occurs in `values`, int32 `[length]`."""
    return jnp.zeros(length, jnp.int32).at[values].add(1)


def _tile_tables(
    level: jax.Array, size: tuple[int, int], tiles: int, clip_limit: float
) -> jax.Array:
    """Each tile's table of new values, float32 `[tiles * tiles, LEVELS]` in 0..255."""
    height, width = level.shape
    # Indices, not jnp.pad: a mirror of fewer pixels than are to be filled is walked repeatedly.
    rows, columns = _mirrored(height, size[0] * tiles), _mirrored(width, size[1] * tiles)
    padded = level[rows[:, None], columns[None, :]]
    tile = (np.arange(len(rows)) // size[0])[:, None] * tiles + np.arange(len(columns)) // size[1]
    index = padded + jnp.asarray(tile * LEVELS, jnp.int32)
    counts = _histogram(index.reshape(-1), tiles * tiles * LEVELS)
    counts = counts.reshape(tiles * tiles, LEVELS).astype(jnp.float32)
    area = size[0] * size[1]
    limit = max(clip_limit * area / LEVELS, 1.0)
    excess = jnp.maximum(counts - limit, 0.0).sum(1, keepdims=True)
    kept = jnp.minimum(counts, limit) + excess / LEVELS
    return jnp.cumsum(kept, 1) * (255.0 / area)


def _mirrored(side: int, length: int) -> np.ndarray:
    """Indices 0..side-1 followed by the mirror image (a b c | b a b c ..), int `[length]`."""
    if side == 1:
        return np.zeros(length, np.int32)
    index = np.arange(length) % (2 * side - 2)
    return np.minimum(index, 2 * side - 2 - index).astype(np.int32)


def _neighbours(side: int, size: int, tiles: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tiles before and after each pixel's centre and the second one's weight, `[side]` each."""
    position = np.arange(side) / size - 0.5
    first = np.floor(position).astype(np.int32)
    weight = (position - first).astype(np.float32)
    return np.maximum(first, 0), np.minimum(first + 1, tiles - 1), weight
