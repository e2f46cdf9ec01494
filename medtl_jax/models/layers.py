"""Building blocks shared by the families: convolution, norm and activation, drop-path."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from medtl_jax.models import kernels
from medtl_jax.models.norms import BatchNorm

Activation = Callable[[jax.Array], jax.Array]

# Below this many input channels a dense convolution is a stem, reading the image itself.
_STEM_CHANNELS = 4


def relu6(x: jax.Array) -> jax.Array:
    """`min(max(x, 0), 6)`."""
    return jnp.clip(x, 0, 6)


class Conv(nn.Module):
    """Convolution without bias, TensorFlow "SAME" padding: `[b, h, w, c]` -> `[b, h', w', o]`.

    The kernel is `[k, k, c, o]`, or `[k, k, 1, c]` when `depthwise`.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    depthwise: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k, c = self.kernel_size, x.shape[-1]
        # He et al. 2015; the fan of a depthwise kernel is its own window alone.
        fan = "fan_in" if self.depthwise else "fan_out"
        init = nn.initializers.variance_scaling(2.0, fan, "normal")
        kernel = self.param("kernel", init, (k, k, 1 if self.depthwise else c, self.features))
        kernel = kernel.astype(self.dtype)
        height, width = (kernels.same_padding(x.shape[axis], k, self.stride) for axis in (1, 2))
        if self.depthwise:
            return kernels.depthwise_conv(x, kernel, self.stride, (height, width))
        if k == 1 and self.stride == 1:
            return kernels.pointwise_conv(x, kernel)
        if c <= _STEM_CHANNELS:
            return kernels.stem_conv(x, kernel, self.stride, (height, width))
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            (height, width),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class ConvNormAct(nn.Module):
    """Convolution, batch norm and activation (None for a linear projection)."""

    features: int
    kernel_size: int = 1
    stride: int = 1
    depthwise: bool = False
    activation: Activation | None = relu6
    momentum: float = 0.99
    eps: float = 1e-3
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        x = Conv(
            self.features,
            self.kernel_size,
            self.stride,
            self.depthwise,
            dtype=self.dtype,
            name="conv",
        )(x)
        x = BatchNorm(self.momentum, self.eps, self.dtype, name="norm")(x, update=update)
        return x if self.activation is None else self.activation(x)


class DropPath(nn.Module):
    """`x` `[b, ...]` with each example zeroed with probability `rate`, the others rescaled.

    Stochastic depth (Huang et al. 2016); EfficientNet calls it drop-connect.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if not train or self.rate == 0.0:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, shape)
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros((), x.dtype))
