"""Intensity augmentation: pure functions of a key and one float image `[h, w, c]` in 0..255.

Every function is `name(key, image, strength) -> image`: float32 of the same shape, clipped to
0..255, and the image itself at strength 0. `strength` may be a traced scalar, and a draw depends
on the key and the shape alone. `COLOUR` names those that change colours: they need three channels,
red, green, blue, and return a grey image (c = 1) as it is. Lengths are fractions of the image's
sides, so that a policy means the same at every resolution. The functions without a key do the
work and draw nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from medtl_jax.augment import equalization

COLOUR = frozenset({"hue", "saturation", "stain"})
"""Transforms that have no meaning for a grey image."""

FIELD_ORDER = 4
"""Cosines along each side in a bias field: at most one and a half waves across the image."""

# Optical density of haematoxylin, eosin and DAB (rows) in red, green and blue.
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], np.float32)
_UNMIX = np.linalg.inv(_STAINS).astype(np.float32)

# Full float32 also on devices whose matrix units would round to fewer bits.
_EXACT = lax.Precision.HIGHEST


def brightness(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """The image plus one draw from +-`strength` of the full range, clipped to 0..255."""
    offset = 255.0 * jax.random.uniform(key, minval=-strength, maxval=strength)
    return _clip(image + offset)


def contrast(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """The image stretched about its mean by a factor from 1 +- `strength`, clipped to 0..255."""
    factor = 1.0 + jax.random.uniform(key, minval=-strength, maxval=strength)
    mean = image.mean()
    return _clip(mean + factor * (image - mean))


def gamma(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """The image with `x -> x**g` on the range 0..1; g from 1 / (1 + `strength`) to 1 + `strength`.

    log g is uniform, so that an image is brightened as often as it is darkened.
    """
    exponent = jnp.exp(_up_to(key, jnp.log1p(strength)))
    return _clip(255.0 * (_clip(image) / 255.0) ** exponent)


def hue(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """The image with all hues turned by one draw from +-`strength` of the colour circle."""
    return image if _grey(image) else turn_hue(image, _up_to(key, strength))


def saturation(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """The image with its colours' distance to grey scaled by a factor from 1 +- `strength`."""
    if _grey(image):
        return image
    grey = equalization.luminance(image)[..., None]
    return _clip(grey + (1.0 + _up_to(key, strength)) * (image - grey))


def stain(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """The image with jittered stains: HED augmentation of Tellez et al. 2018.

    The amounts of haematoxylin, eosin and DAB, by colour deconvolution (Ruifrok and Johnston 2001;
    white is 255), are each multiplied by a factor from 1 +- `strength` and moved by an offset from
    +-`strength` (natural optical density); 0.05 is light, 0.2 strong.
    """
    if _grey(image):
        return image
    factor, offset = _up_to(key, strength, (2, 3))
    # Unmixing, jitter and mixing are linear in the density, so one matrix does all three.
    jitter = jnp.matmul(_UNMIX * (1.0 + factor), _STAINS, precision=_EXACT)
    moved = jnp.matmul(offset, _STAINS, precision=_EXACT)
    # 1 is added so that black has a finite density.
    density = -jnp.log((image.reshape(-1, 3) + 1.0) / 256.0)
    density = jnp.matmul(density, jitter, precision=_EXACT) + moved
    return _clip(256.0 * jnp.exp(-density) - 1.0).reshape(image.shape)


def noise(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """The image plus Gaussian noise; its deviation is from 0 to `strength` of the full range."""
    amount, field = jax.random.split(key)
    deviation = 255.0 * strength * jax.random.uniform(amount)
    # Drawn flat: with c = 3 innermost the same numbers take half as long again on a CPU.
    return _clip(image + deviation * jax.random.normal(field, (image.size,)).reshape(image.shape))


def blur(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """The image after a Gaussian whose sigma is from 0 to `strength` of the shorter side."""
    sigma = strength * min(image.shape[:2]) * jax.random.uniform(key)
    return _clip(gaussian_blur(image, sigma))


def bias_field(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """The image times a smooth positive field, from 1 / (1 + `strength`) to 1 + `strength` at most.

    The field's logarithm is a random cosine series (`cosine_series`) without constant term; its
    largest size is uniform from 0 to log(1 + `strength`). All channels have the same field.
    """
    coefficients = _up_to(key, 1.0, (FIELD_ORDER, FIELD_ORDER))
    # One draw for all, as each compiles for long; the constant term's is free for the size.
    largest = jnp.log1p(strength) * jnp.abs(coefficients[0, 0])
    field = cosine_series(coefficients.at[0, 0].set(0.0), *image.shape[:2])
    return _clip(image * jnp.exp(largest * field / jnp.abs(field).max())[..., None])


def clahe(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """The image moved towards `equalization.clahe` by a part of the way from 0 to `strength`."""
    part = strength * jax.random.uniform(key)
    return _clip(image + part * (equalization.clahe(image) - image))


def equalize(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """`equalization.equalize` of the image with probability `strength`, else the image."""
    return jnp.where(jax.random.bernoulli(key, strength), equalization.equalize(image), image)


def cutout(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """The image with one hole of `strength` of each side, filled with the image's mean colour.

    The hole's centre is any pixel, so that a part of the hole may lie outside (DeVries and Taylor
    2017). A mask keeps its classes under the hole.
    """
    height, width, _ = image.shape
    centre = jax.random.uniform(key, (2,))
    rows = _hole(height, strength, centre[0])
    columns = _hole(width, strength, centre[1])
    inside = (rows[:, None] & columns[None, :])[..., None]
    return jnp.where(inside, image.mean((0, 1)), image)


def turn_hue(image: jax.Array, turn: float | jax.Array) -> jax.Array:
    """`[h, w, 3]` with the HSV hue moved by `turn` (1 = the full circle), rest as it was."""
    value, smallest = image.max(-1), image.min(-1)
    chroma = value - smallest
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    size = jnp.where(chroma > 0, chroma, 1.0)
    sextant = jnp.where(
        value == red,
        (green - blue) / size,
        jnp.where(value == green, (blue - red) / size + 2.0, (red - green) / size + 4.0),
    )
    # A channel is full over a third of the circle, zero over a third, linear between; red, green
    # and blue are the same curve, a third of the circle (two sextants) apart.
    place = sextant + 6.0 * turn

    def channel(sextants):
        # A floor: the remainder of `jnp.mod` is several times slower on a CPU.
        angle = (place + sextants) / 6.0
        angle = 6.0 * (angle - jnp.floor(angle))
        return value - chroma * jnp.clip(jnp.minimum(angle, 4.0 - angle), 0.0, 1.0)

    return _clip(jnp.stack([channel(5.0), channel(3.0), channel(1.0)], -1))


def gaussian_blur(image: jax.Array, sigma: float | jax.Array) -> jax.Array:
    """`[h, w, c]` after a Gaussian of `sigma` pixels, its weights outside the image left out.

    Two small matrix products: on a CPU they cost less than a convolution, and `sigma` may be a
    tracer.
    """
    height, width, channels = image.shape
    flat = image.reshape(height, width * channels)
    rows = jnp.matmul(_gaussian_matrix(height, sigma), flat, precision=_EXACT)
    columns = _gaussian_matrix(width, sigma)
    return jnp.einsum("vw,hwc->hvc", columns, rows.reshape(image.shape), precision=_EXACT)


def cosine_series(coefficients: jax.Array, height: int, width: int) -> jax.Array:
    """`[height, width]`: the sum of `coefficients[i, j]` cos(pi i y) cos(pi j x), y and x in 0..1.

    With at most as many terms as pixels along a side, only `coefficients[0, 0]` moves the mean.
    """
    rows = _cosines(height, coefficients.shape[0])
    columns = _cosines(width, coefficients.shape[1])
    terms = jnp.matmul(rows, coefficients, precision=_EXACT)
    return jnp.matmul(terms, columns.T, precision=_EXACT)


def _clip(image: jax.Array) -> jax.Array:
    return jnp.clip(image, 0.0, 255.0)


def _grey(image: jax.Array) -> bool:
    return image.shape[-1] == 1


def _up_to(key: jax.Array, limit: float | jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    """Uniform draws from -`limit` to `limit`."""
    return limit * jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


def _hole(side: int, fraction: float | jax.Array, centre: jax.Array) -> jax.Array:
    """Boolean `[side]`: the pixels of a hole of `fraction` of the side about `centre` in 0..1."""
    size = jnp.round(fraction * side)
    start = jnp.floor(centre * side) - jnp.floor(size / 2.0)
    pixels = jnp.arange(side, dtype=jnp.float32)
    return (pixels >= start) & (pixels < start + size)


def _cosines(side: int, order: int) -> jax.Array:
    """cos(pi i x) at the pixels' centres, `[side, order]`."""
    centres = (np.arange(side) + 0.5) / side
    return jnp.asarray(np.cos(np.pi * np.outer(centres, np.arange(order))), jnp.float32)


def _gaussian_matrix(side: int, sigma: float | jax.Array) -> jax.Array:
    """`[side, side]`: row i holds the weights of all pixels for pixel i; a row sums to 1."""
    pixels = jnp.arange(side, dtype=jnp.float32)
    # Below a thousandth of a pixel the neighbours' weight is exactly 0.
    distance = (pixels[:, None] - pixels) / jnp.maximum(sigma, 1e-3)
    weight = jnp.exp(-0.5 * distance**2)
    return weight / weight.sum(1, keepdims=True)
