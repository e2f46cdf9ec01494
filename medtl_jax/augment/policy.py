"""From `config.augment` to one function over a batch."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from medtl_jax.augment import geometry, intensity
from medtl_jax.errors import UserError
from medtl_jax.keys import named_key

Augment = Callable[..., tuple[jax.Array, jax.Array | None]]

_GEOMETRY = {
    "flip_horizontal": lambda key, image, p: geometry.flip(key, image, p, axis=1),
    "flip_vertical": lambda key, image, p: geometry.flip(key, image, p, axis=0),
    "shift": geometry.shift,
}
_INTENSITY = {
    "brightness": intensity.brightness,
    "contrast": intensity.contrast,
}


def make_augment(augment: Mapping[str, float]) -> Augment:
    """`fn(key, images, masks=None) -> (images, masks)`, to be called inside jit.

    Images `[b, h, w, c]` in 0..255 come back as float32. Masks, integers `[b, h, w]`, come back
    with their dtype, flipped and moved with their images (edges repeated in both) by the same
    draw; None stays None. ValueError if masks are not of the images' size.

    Each example draws from its own key, `fold_in(key, position)`, and each transform from a
    named fold of that, so that neither the batch size, nor another transform, nor a mask changes
    a draw. A transform with strength 0 is left out of the program. UserError if a strength is not
    in 0..1.
    """
    for name, strength in augment.items():
        if not 0 <= strength <= 1:
            raise UserError(f"augment.{name}={strength} must lie in 0..1")
    active = {name: strength for name, strength in augment.items() if strength > 0}

    def transform(key, image, transforms):
        for name, strength in active.items():
            if name in transforms:
                image = transforms[name](named_key(key, name), image, strength)
        return image

    def batch(key, images, masks=None):
        if masks is not None and masks.shape != images.shape[:3]:
            raise ValueError(f"masks {masks.shape} are not of the size of images {images.shape}")
        images = images.astype(jnp.float32)
        if not active:
            return images, masks
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(images.shape[0]))
        images = jax.vmap(lambda k, image: transform(k, image, _GEOMETRY | _INTENSITY))(
            keys, images
        )
        if masks is not None:
            masks = jax.vmap(lambda k, mask: transform(k, mask[..., None], _GEOMETRY))(keys, masks)
            masks = masks[..., 0]
        return images, masks

    return batch
