"""Geometric augmentation: pure functions of a key and one image `[h, w, c]`."""

import jax
import jax.numpy as jnp


def flip(key: jax.Array, image: jax.Array, probability: float, axis: int) -> jax.Array:
    """The image, mirrored along `axis` (0 = upside down, 1 = left-right) with `probability`."""
    return jnp.where(jax.random.bernoulli(key, probability), jnp.flip(image, axis), image)


def shift(key: jax.Array, image: jax.Array, fraction: float) -> jax.Array:
    """The image moved by whole pixels, up to `fraction` of each side, edges repeated."""
    height, width, channels = image.shape
    rows, columns = round(height * fraction), round(width * fraction)
    padded = jnp.pad(image, ((rows, rows), (columns, columns), (0, 0)), mode="edge")
    limits = jnp.array([2 * rows + 1, 2 * columns + 1])
    row, column = jax.random.randint(key, (2,), 0, limits)
    return jax.lax.dynamic_slice(padded, (row, column, 0), (height, width, channels))
