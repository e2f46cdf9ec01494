"""Corruptions for robustness reports: five kinds of damage at five severities, on the host.

In the spirit of Hendrycks and Dietterich 2019 (ImageNet-C). The arrays are made with NumPy, SciPy
and Pillow alone, so that a report reads the same pixels whatever device the network runs on.
"""

import hashlib
import io
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import scipy.fft
import scipy.ndimage
from PIL import Image

from medtl_jax.augment.intensity import FIELD_ORDER
from medtl_jax.errors import UserError

NOISE_DEVIATION = (0.08, 0.12, 0.18, 0.26, 0.38)
"""Standard deviation of the Gaussian noise, as a fraction of the full range."""

BLUR_SIGMA = (1 / 224, 2 / 224, 3 / 224, 4 / 224, 6 / 224)
"""Sigma of the Gaussian blur, as a fraction of the shorter side (1 to 6 pixels of 224)."""

LEAST_BLUR = (0.5, 0.6, 0.75, 0.9, 1.1)
"""The least sigma in pixels: a Gaussian that is narrower than its pixels would change nothing."""

CONTRAST_FACTOR = (0.4, 0.3, 0.2, 0.1, 0.05)
"""What is left of the distance to the image's mean colour."""

JPEG_QUALITY = (25, 18, 15, 10, 7)
"""Pillow's quality of the JPEG file; its blocks are 8 x 8 pixels at every image size."""

BIAS_RATIO = (1.25, 1.5, 1.8, 2.2, 3.0)
"""Largest factor of the smooth field, and one over its smallest."""

_Draw = np.random.Generator
# Of an image, by an amount that is the corruption's own.
_Corruption = Callable[[np.ndarray, Any, _Draw], np.ndarray]


def corrupt(
    name: str, severity: int, images: np.ndarray, seed: int, ids: Sequence[str | int]
) -> np.ndarray:
    """The images after the corruption `name`, uint8 of the same shape.

    Args:
      name: one of `NAMES`.
      severity: one of `SEVERITIES`.
      images: uint8 `[n, h, w, c]`, c = 1 grey or 3 red, green, blue.
      seed: the report's seed, at least 0.
      ids: one unique id an image, such as the data set's. An image's draw depends on `seed`,
        `name` and its id alone, so that it is the same among any other images; it does not depend
        on the severity, so that the same pattern grows from 1 to 5.

    Raises UserError for an unknown name or severity or a negative seed, ValueError for arrays of
    another kind or another number of ids.
    """
    if name not in NAMES:
        raise UserError(f"corruption {name!r} is unknown; choose from {', '.join(NAMES)}")
    if severity not in SEVERITIES:
        raise UserError(f"corruption severity {severity} must be one of 1, 2, 3, 4, 5")
    if operator.index(seed) < 0:
        raise UserError(f"corruption seed {seed} must not be negative")
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"{images.dtype} {images.shape} images are not uint8 [n, h, w, 1 or 3]")
    if len(ids) != len(images):
        raise ValueError(f"{len(ids)} ids for {len(images)} images")
    apply, amounts = _CORRUPTIONS[name]
    found = np.empty_like(images)
    for i, image in enumerate(images):
        found[i] = apply(image, amounts[severity - 1], _generator(seed, name, ids[i]))
    return found


def _noise(image: np.ndarray, deviation: float, draw: _Draw) -> np.ndarray:
    return _bytes(image + 255.0 * deviation * draw.standard_normal(image.shape))


def _blur(image: np.ndarray, sigmas: tuple[float, float], draw: _Draw) -> np.ndarray:
    fraction, least = sigmas
    sigma = max(fraction * min(image.shape[:2]), least)
    return _bytes(scipy.ndimage.gaussian_filter(image.astype(np.float64), sigma, axes=(0, 1)))


def _contrast(image: np.ndarray, factor: float, draw: _Draw) -> np.ndarray:
    mean = image.mean(axis=(0, 1))
    return _bytes(mean + factor * (image - mean))


def _jpeg(image: np.ndarray, quality: int, draw: _Draw) -> np.ndarray:
    grey = image.shape[-1] == 1
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if grey else image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)).reshape(image.shape)


def _bias_field(image: np.ndarray, ratio: float, draw: _Draw) -> np.ndarray:
    height, width, _ = image.shape
    rows, columns = min(FIELD_ORDER, height), min(FIELD_ORDER, width)
    if rows == columns == 1:
        return image
    # The cosine series of the augmentation, by the inverse transform of its coefficients.
    spectrum = np.zeros((height, width))
    spectrum[:rows, :columns] = draw.uniform(-1, 1, (FIELD_ORDER, FIELD_ORDER))[:rows, :columns]
    spectrum[0, 0] = 0.0
    spectrum[1:] *= 0.5
    spectrum[:, 1:] *= 0.5
    field = scipy.fft.dctn(spectrum, type=3)
    return _bytes(image * ratio ** (field / np.abs(field).max())[..., None])


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _generator(seed: int, name: str, example: str | int) -> _Draw:
    """The stream of one image: ids of any length count in full."""
    digest = hashlib.sha256(f"{name}/{example}".encode()).digest()
    return np.random.default_rng([operator.index(seed), *np.frombuffer(digest, "<u4")])


_CORRUPTIONS: Mapping[str, tuple[_Corruption, tuple]] = MappingProxyType(
    {
        "noise": (_noise, NOISE_DEVIATION),
        "blur": (_blur, tuple(zip(BLUR_SIGMA, LEAST_BLUR, strict=True))),
        "contrast": (_contrast, CONTRAST_FACTOR),
        "jpeg": (_jpeg, JPEG_QUALITY),
        "bias_field": (_bias_field, BIAS_RATIO),
    }
)

NAMES = tuple(_CORRUPTIONS)
"""The corruptions, in a report's order."""

SEVERITIES = (1, 2, 3, 4, 5)
"""From mild to severe: the place in each constant above."""
