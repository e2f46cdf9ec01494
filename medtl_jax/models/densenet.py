"""Densely connected networks (Huang et al. 2017)."""

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

from medtl_jax.models.backbone import Backbone
from medtl_jax.models.layers import Conv, ConvNormAct, LayerSettings, make_norm
from medtl_jax.models.pooling import avg_pool, max_pool

# A 1x1 convolution makes this many times the growth rate before the 3x3 one.
_BOTTLENECK = 4


class NormActConv(nn.Module):
    """Batch norm, ReLU and convolution, in this order."""

    features: int
    kernel_size: int
    settings: LayerSettings

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        x = nn.relu(make_norm(self.settings, "norm")(x, update=update))
        padding = self.kernel_size // 2
        return Conv(
            self.features,
            self.kernel_size,
            padding=padding,
            dtype=self.settings.dtype,
            name="conv",
        )(x)


class DenseLayer(nn.Module):
    """The `growth` new channels that a layer adds to the map it reads."""

    growth: int
    settings: LayerSettings

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        x = NormActConv(_BOTTLENECK * self.growth, 1, self.settings, name="reduce")(
            x, update=update
        )
        return NormActConv(self.growth, 3, self.settings, name="grow")(x, update=update)


class DenseBlock(nn.Module):
    """A dense block; all but the first halve the channels and the map before it.

    The first begins with the stem's max pooling.
    """

    layers: int
    growth: int
    first: bool
    settings: LayerSettings

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        if self.first:
            x = max_pool(x, 3, 2, ((1, 1), (1, 1)))
        else:
            transition = NormActConv(x.shape[-1] // 2, 1, self.settings, name="transition")
            x = avg_pool(transition(x, update=update), 2, 2)
        for i in range(self.layers):
            new = DenseLayer(self.growth, self.settings, name=f"layer{i + 1}")(x, update=update)
            x = jnp.concatenate([x, new], axis=-1)
        return x


class LastNorm(nn.Module):
    """The last map, normalised and rectified."""

    settings: LayerSettings

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        return nn.relu(make_norm(self.settings, "norm")(x, update=update))


class DenseNet(Backbone):
    """The `Backbone` of DenseNet-121; a transition belongs to the stage that it leads to."""

    layers: tuple[int, ...] = (6, 12, 24, 16)
    growth: int = 32

    def trunk(self) -> Iterator[tuple[str, nn.Module]]:
        stem = ConvNormAct(64, 7, 2, 3, offset=self.offset, settings=self.settings, name="stem")
        yield "stem", stem
        for number, layers in enumerate(self.layers, 1):
            name = f"stage{number}"
            yield name, DenseBlock(layers, self.growth, number == 1, self.settings, name=name)
        yield "features", LastNorm(self.settings, name="features")
