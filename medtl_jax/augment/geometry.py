"""Geometric augmentation: pure functions of a key and one image or mask `[h, w, c]`.

A draw depends on the key and on height and width alone, so that a mask moves with its image; no
value is made that was not there, so that a mask keeps its classes and its dtype.
"""

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
