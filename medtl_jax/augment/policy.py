"""From `config.augment` to one function over a batch."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from medtl_jax.augment import geometry, intensity
from medtl_jax.augment.geometry import Geometry, Placement
from medtl_jax.augment.mix import make_mix
from medtl_jax.augment.presets import TRANSFORMS, find_preset
from medtl_jax.errors import UserError
from medtl_jax.keys import named_key

Augment = Callable[..., tuple[jax.Array, jax.Array | None]]

LIMITS = MappingProxyType(
    {
        **geometry.LIMITS,
        "brightness": 1.0,
        "contrast": 1.0,
        "gamma": 3.0,
        "hue": 0.5,
        "saturation": 1.0,
        "stain": 1.0,
        "bias_field": 3.0,
        "clahe": 1.0,
        "equalize": 1.0,
        "blur": 0.25,
        "noise": 1.0,
        "cutout": 1.0,
    }
)
"""The largest strength of each transform."""

_INTENSITIES = tuple(name for name in TRANSFORMS if name not in geometry.LIMITS)
# Strengths that are probabilities: RandAugment's magnitude is none of them.
_PROBABILITIES = ("flip_horizontal", "flip_vertical", "quarter_turns", "equalize")
# Cubuk et al. 2020 flip and crop every image too, and draw among the others.
_ALWAYS = ("flip_horizontal", "flip_vertical", "quarter_turns", "crop")
_MOST_MAGNITUDE = 10.0


def active_transforms(augment: Mapping) -> dict[str, float]:
    """`{name: strength}` of the transforms of `config.augment` that are on, in their order.

    With RandAugment these are the strengths at its magnitude.

    Raises:
      UserError: a strength, an alpha or a magnitude out of its range, an unknown preset, or a
        RandAugment that would draw more transforms than are on.
    """
    if augment.get("preset"):
        find_preset(augment["preset"])
    make_mix(augment)
    on = {name: augment.get(name, 0.0) for name in TRANSFORMS}
    for name, strength in on.items():
        limit = LIMITS[name]
        if not _is_traced(strength) and not 0 <= strength <= limit:
            raise UserError(f"augment.{name}={strength} must lie in 0..{limit:g}")
    on = {name: strength for name, strength in on.items() if _is_traced(strength) or strength}
    return _at_magnitude(augment, on)


def _is_traced(strength: float | jax.Array) -> bool:
    # That of a member of an ensemble: it was checked as a number, and is on.
    return isinstance(strength, jax.Array)


def _at_magnitude(augment: Mapping, on: dict[str, float]) -> dict[str, float]:
    """The strengths `on` at the magnitude of RandAugment, where it is in use."""
    count, magnitude = augment.get("randaugment", 0), augment.get("randaugment_strength", 1.0)
    if not count:
        return on
    drawn = _drawn(on)
    if not 1 <= count <= len(drawn):
        raise UserError(
            f"augment.randaugment={count} must be 0 or at most the number of transforms to draw "
            f"from, which are {len(drawn)}: {', '.join(drawn) or 'none'}; set their strengths or "
            "augment.preset"
        )
    if not 0 < magnitude <= _MOST_MAGNITUDE:
        raise UserError(
            f"augment.randaugment_strength={magnitude} must be more than 0 and at most "
            f"{_MOST_MAGNITUDE:g}"
        )
    for name in drawn:
        limit = LIMITS[name]
        if _is_traced(on[name]):
            continue
        if name not in _PROBABILITIES and magnitude * on[name] > limit:
            raise UserError(
                f"augment.randaugment_strength={magnitude} times augment.{name}={on[name]} is "
                f"above {limit:g}; lower one of the two"
            )
    scaled = {name: magnitude * on[name] for name in drawn if name not in _PROBABILITIES}
    return {**on, **scaled}


def _drawn(on: Mapping[str, float]) -> tuple[str, ...]:
    """The transforms among which RandAugment draws."""
    return tuple(name for name in on if name not in _ALWAYS)


def drawing_settings(augment: Mapping) -> dict[str, float]:
    """All of `config.augment` that the draws of single images depend on.

    UserError as `active_transforms`.
    """
    return {**active_transforms(augment), "randaugment": augment.get("randaugment", 0)}


def check_channels(augment: Mapping, channels: int) -> None:
    """UserError for transforms of colours where the images have none, `channels` = 1."""
    asked = [f"augment.{n}" for n in TRANSFORMS if n in intensity.COLOUR and augment.get(n)]
    if channels == 1 and asked:
        raise UserError(
            f"{', '.join(asked)} would change colours, and these images are grey: set it to 0, or "
            "choose an augment.preset for grey images"
        )


def make_augment(augment: Mapping) -> Augment:
    """`fn(key, images, masks=None) -> (images, masks)`, to be called inside jit.

    Images `[b, h, w, c]` in 0..255 come back as float32. Masks, integers `[b, h, w]`, come back
    with their dtype, moved with their images by the same draw; None stays None. ValueError if
    masks are not of the images' size.

    Each example draws from its own key, `fold_in(key, position)`, and each transform from a
    named fold of that, so that neither the batch size, nor another transform, nor a mask changes
    a draw. A transform with strength 0 is left out of the program.

    With `randaugment` = n, each image passes n of the transforms that are on, drawn without
    replacement, at their strengths times `randaugment_strength`; flips, turns and crops stay as
    they are for every image (Cubuk et al. 2020; all of them are computed, and n are kept).

    Args:
      augment: `config.augment`; what it lacks is off.

    Raises:
      UserError: as `active_transforms`.
    """
    on = active_transforms(augment)
    place = functools.partial(_place, on=on, count=augment.get("randaugment", 0))

    def one(key, image, mask):
        placement, kept = place(key, image.shape[:2])
        image = geometry.move_image(placement, image)
        for name in _INTENSITIES:
            if name in on:
                changed = getattr(intensity, name)(named_key(key, name), image, on[name])
                image = jnp.where(kept[name], changed, image) if name in kept else changed
        return image, None if mask is None else geometry.move_mask(placement, mask)

    def batch(key, images, masks=None):
        if masks is not None and masks.shape != images.shape[:3]:
            raise ValueError(f"masks {masks.shape} are not of the size of images {images.shape}")
        images = images.astype(jnp.float32)
        if not on:
            return images, masks
        return jax.vmap(one)(_example_keys(key, images.shape[0]), images, masks)

    return batch


def make_placements(augment: Mapping) -> Callable[..., Placement]:
    """`fn(key, count, size) -> Placement`: how `make_augment` moves so many images of `size`.

    Its leaves have a leading axis `count`: boxes move with their images by
    `jax.vmap(geometry.move_boxes, (0, 0, None))(placements, boxes, size)`.

    Args:
      augment: as for `make_augment`.
    """
    on = active_transforms(augment)
    place = functools.partial(_place, on=on, count=augment.get("randaugment", 0))

    def placements(key, count, size):
        return jax.vmap(lambda key: place(key, size)[0])(_example_keys(key, count))

    return placements


def _example_keys(key: jax.Array, count: int) -> jax.Array:
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(count))


def _place(
    key: jax.Array, size: tuple[int, int], *, on: Mapping[str, float], count: int
) -> tuple[Placement, dict[str, jax.Array]]:
    """The placement of one example, and what RandAugment keeps of the transforms it draws among.

    `count` is that of RandAugment: with 0 nothing is drawn, and all that is `on` is kept.
    """
    kept = _choose(named_key(key, "randaugment"), _drawn(on), count) if count else {}
    # A strength that is an array keeps its transform in the program: of 0 it changes nothing.
    strengths = {
        name: on[name] * kept[name].astype(jnp.float32) if name in kept else on[name]
        for name in geometry.LIMITS
        if name in on
    }
    return geometry.draw(key, size, Geometry(**strengths)), kept


def _choose(key: jax.Array, names: tuple[str, ...], count: int) -> dict[str, jax.Array]:
    """For each of `names` whether it is among the `count` that are drawn, a bool scalar."""
    rank = jax.random.permutation(key, len(names))
    return {name: rank[place] < count for place, name in enumerate(names)}
