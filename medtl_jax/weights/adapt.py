"""Weights for images of another number of channels, exact on grey images.

A convolution with kernel W over a normalised RGB image sees, where all three channels are equal
to g, `sum_c W_c * (g - m_c) / s_c`, and zeros in the padding. With one mean m and deviation s,
`(g - m_c) / s_c = (g - m) / s * (s / s_c) + (m - m_c) / s_c`, so the same result comes from the
one channel `(g - m) / s` with the kernel `sum_c W_c * s / s_c`, plus the convolution of an image
of ones with the kernel `sum_c W_c * (m - m_c) / s_c`. The ones are padded with zeros like the
image: the second part is not a mere bias, it differs at the border. It is the convolution's
`offset`, absent where all channels have one mean.
"""

import dataclasses

import numpy as np

from medtl_jax.errors import UserError
from medtl_jax.models.inputs import InputSpec


def adapted_input(source: InputSpec, channels: int) -> InputSpec:
    """What weights for `source` expect after `adapt_kernel` to images of `channels` channels.

    Raises:
      UserError: the weights are for several channels that are not red, green, blue.
    """
    if channels == source.channels:
        return source
    if source.channels not in (1, 3):
        raise UserError(
            f"the weights read {source.channels} channels, the images have {channels}: only "
            "weights for 1 or 3 channels can be adapted"
        )
    mean, std = float(np.mean(source.mean)), float(np.mean(source.std))
    offset = source.offset or any(m != mean for m in source.mean)
    return dataclasses.replace(
        source, mean=(mean,) * channels, std=(std,) * channels, offset=offset
    )


def adapt_kernel(
    kernel: np.ndarray, offset: np.ndarray | None, source: InputSpec, target: InputSpec
) -> dict[str, np.ndarray]:
    """`{"kernel": [k, k, c', o]}`, and its `"offset"` `[k, k, 1, o]` where `target` has one.

    Each channel of the result has an equal share, so c' equal channels give the same as one.

    Args:
      kernel: `[k, k, c, o]`, floats, of the first convolution of weights for `source`.
      offset: of the same, `[k, k, 1, o]`, or None.
      source, target: c and c' channels; `target` is `adapted_input(source, c')`.
    """
    # Sums of half precision would lose the grey image's logits.
    dtype = np.promote_types(kernel.dtype, np.float32)
    adapted = {"kernel": kernel}
    shift = np.zeros((*kernel.shape[:2], 1, kernel.shape[3])) if offset is None else offset
    if source.channels != target.channels:
        mean, std = (np.float64(part)[:, None] for part in (source.mean, source.std))
        wide = kernel.astype(np.float64)
        grey = (wide * (target.std[0] / std)).sum(2, keepdims=True) / target.channels
        adapted["kernel"] = np.repeat(grey, target.channels, axis=2).astype(dtype)
        shift = shift + (wide * ((target.mean[0] - mean) / std)).sum(2, keepdims=True)
    if target.offset:
        adapted["offset"] = np.asarray(shift, dtype)
    return adapted
