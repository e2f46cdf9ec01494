"""Intensity augmentation: pure functions of a key and one float image `[h, w, c]` in 0..255."""

import jax
import jax.numpy as jnp


def brightness(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """The image plus one draw from +-`strength` of the full range, clipped to 0..255."""
    offset = 255.0 * jax.random.uniform(key, minval=-strength, maxval=strength)
    return jnp.clip(image + offset, 0.0, 255.0)


def contrast(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """The image stretched about its mean by a factor from 1 +- `strength`, clipped to 0..255."""
    factor = 1.0 + jax.random.uniform(key, minval=-strength, maxval=strength)
    mean = image.mean()
    return jnp.clip(mean + factor * (image - mean), 0.0, 255.0)
