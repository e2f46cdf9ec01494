"""From `config.augment` to one function over a batch."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from medtl_jax.augment import geometry, intensity
from medtl_jax.errors import UserError
from medtl_jax.keys import named_key

Augment = Callable[[jax.Array, jax.Array], jax.Array]

_TRANSFORMS = {
    "flip_horizontal": lambda key, image, p: geometry.flip(key, image, p, axis=1),
    "flip_vertical": lambda key, image, p: geometry.flip(key, image, p, axis=0),
    "shift": geometry.shift,
    "brightness": intensity.brightness,
    "contrast": intensity.contrast,
}


def make_augment(augment: Mapping[str, float]) -> Augment:
    """`fn(key, images [b, h, w, c] in 0..255) -> float32 [b, h, w, c]`, to be called inside jit.

    Each example draws from its own key, `fold_in(key, position)`, and each transform from a
    named fold of that, so that neither the batch size nor another transform changes a draw.
    A transform with strength 0 is left out of the program. UserError if a strength is not in 0..1.
    """
    for name, strength in augment.items():
        if not 0 <= strength <= 1:
            raise UserError(f"augment.{name}={strength} must lie in 0..1")
    active = {name: strength for name, strength in augment.items() if strength > 0}

    def one(key, image):
        for name, strength in active.items():
            image = _TRANSFORMS[name](named_key(key, name), image, strength)
        return image

    def batch(key, images):
        images = images.astype(jnp.float32)
        if not active:
            return images
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(images.shape[0]))
        return jax.vmap(one)(keys, images)

    return batch
