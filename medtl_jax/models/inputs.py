"""What a network, or the weights in it, expects of an image."""

import dataclasses

import jax
import jax.numpy as jnp

from medtl_jax.augment import equalization

_ENHANCE = {"equalize": equalization.equalize, "clahe": equalization.clahe}
CONTRASTS = ("none", *_ENHANCE)
"""What may be done to the contrast of every image before it is normalised."""


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """Channels and normalisation: the network reads `(x - mean) / std`, x in 0..255.

    Attributes:
      mean, std: one number a channel; three channels are red, green, blue.
      offset: the first convolution has an `offset`, see `weights.adapt`.
      contrast: one of `CONTRASTS`, which x has gone through, see `augment.equalization`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    offset: bool = False
    contrast: str = "none"

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.mean)


IMAGENET = InputSpec((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""torchvision's and most others': the mean and deviation of ImageNet's training images."""

CENTRED = InputSpec((127.5,) * 3, (127.5,) * 3)
"""0..255 to -1..1, as the Inception networks were trained."""

LITE = InputSpec((127.0,) * 3, (128.0,) * 3)
"""EfficientNet-Lite's: integers to about -1..1."""

CAFFE = InputSpec((123.68, 116.779, 103.939), (1.0,) * 3)
"""Caffe's, in red, green, blue: the mean colour subtracted, nothing divided."""


def enhance(image: jax.Array, contrast: str) -> jax.Array:
    """`[b, h, w, c]` in 0..255 with the contrast that the network reads, one of `CONTRASTS`.

    Images that stay as they are keep their dtype, the others are float32.
    """
    return image if contrast == "none" else jax.vmap(_ENHANCE[contrast])(image)


def normalize(image: jax.Array, spec: InputSpec) -> jax.Array:
    """`[b, h, w, 1 or c]` in 0..255 -> float32 `[b, h, w, c]` as the weights expect it."""
    if image.shape[-1] not in (1, spec.channels):
        raise ValueError(f"an image of {image.shape[-1]} channels for {spec.channels} of the model")
    mean, std = jnp.asarray(spec.mean, jnp.float32), jnp.asarray(spec.std, jnp.float32)
    # A grey image broadcasts to the channels here, so it travels as one.
    return (enhance(image, spec.contrast).astype(jnp.float32) - mean) / std
