"""Building blocks shared by the families: convolution, norm and activation, drop-path."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from medtl_jax.models import kernels
from medtl_jax.models.norms import BatchNorm

Activation = Callable[[jax.Array], jax.Array]
# Pixels on every side, on top and bottom and on left and right, or TensorFlow's "SAME".
Padding = int | tuple[int, int] | str
Size = int | tuple[int, int]


def relu6(x: jax.Array) -> jax.Array:
    """`min(max(x, 0), 6)`."""
    return jnp.clip(x, 0, 6)


@dataclasses.dataclass(frozen=True)
class LayerSettings:
    """What all layers of a network have in common.

    Attributes:
      momentum: of the running statistics, in Flax's convention (1 - torch's).
      eps: added to a variance; part of the weights' definition.
      dtype: of the computation; parameters and statistics stay float32.
      domains, domain_affine: of the batch norms, see `norms.BatchNorm`.
    """

    momentum: float = 0.9
    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    domains: int = 1
    domain_affine: bool = False


def explicit_padding(
    padding: Padding, image: tuple[int, int], kernel: tuple[int, int], stride: int
) -> kernels.Padding:
    """`((top, bottom), (left, right))` in pixels, for an image and a kernel `(height, width)`."""
    if padding == "same":
        height, width = (
            kernels.same_padding(*sizes, stride) for sizes in zip(image, kernel, strict=True)
        )
        return height, width
    vertical, horizontal = padding if isinstance(padding, tuple) else (padding, padding)
    return (vertical, vertical), (horizontal, horizontal)


class Conv(nn.Module):
    """Convolution: `[b, h, w, c]` -> `[b, h', w', o]`.

    The kernel is `[k, k, c, o]`, or `[k, k, 1, c]` when `depthwise`.

    Attributes:
      padding: pixels on both sides, one number or `(vertical, horizontal)`, or `"same"` for
        TensorFlow's rule.
      use_bias: adds `bias` `[o]`.
      offset: adds the convolution of an image of ones with `offset` `[k, k, 1, o]`: a bias that
        knows where the padding lies, see `weights.adapt`.
    """

    features: int
    kernel_size: Size = 1
    stride: int = 1
    padding: Padding = 0
    depthwise: bool = False
    use_bias: bool = False
    offset: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k = self.kernel_size if isinstance(self.kernel_size, tuple) else (self.kernel_size,) * 2
        # He et al. 2015; the fan of a depthwise kernel is its own window alone.
        fan = "fan_in" if self.depthwise else "fan_out"
        init = nn.initializers.variance_scaling(2.0, fan, "normal")
        channels = 1 if self.depthwise else x.shape[-1]
        kernel = self.param("kernel", init, (*k, channels, self.features)).astype(self.dtype)
        padding = explicit_padding(self.padding, x.shape[1:3], k, self.stride)
        convolve = kernels.depthwise_conv if self.depthwise else kernels.conv
        y = convolve(x, kernel, self.stride, padding)
        if self.offset:
            zeros = nn.initializers.zeros
            offset = self.param("offset", zeros, (*k, 1, self.features)).astype(self.dtype)
            ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
            y = y + kernels.conv(ones, offset, self.stride, padding)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(self.dtype)
        return y


class ConvNormAct(nn.Module):
    """Convolution, batch norm (unless `norm=False`) and activation (None: a linear projection)."""

    features: int
    kernel_size: Size = 1
    stride: int = 1
    padding: Padding = 0
    depthwise: bool = False
    use_bias: bool = False
    norm: bool = True
    activation: Activation | None = nn.relu
    offset: bool = False
    settings: LayerSettings = LayerSettings()

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        x = Conv(
            self.features,
            self.kernel_size,
            self.stride,
            self.padding,
            self.depthwise,
            self.use_bias,
            self.offset,
            self.settings.dtype,
            name="conv",
        )(x)
        if self.norm:
            x = make_norm(self.settings, "norm")(x, update=update)
        return x if self.activation is None else self.activation(x)


def make_norm(settings: LayerSettings, name: str) -> BatchNorm:
    """The batch norm of a network with these settings, to be called inside a module."""
    return BatchNorm(
        settings.momentum,
        settings.eps,
        settings.dtype,
        settings.domains,
        settings.domain_affine,
        name=name,
    )


def dense(features: int, settings: LayerSettings, name: str) -> nn.Dense:
    """A fully connected layer `[b, c]` -> `[b, features]`, to be called inside a module."""
    init = nn.initializers.normal(0.01)
    return nn.Dense(features, dtype=settings.dtype, kernel_init=init, name=name)


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
