"""Plain chains of convolutions: a baseline CNN, LeNet-5, AlexNet and VGG."""

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

from medtl_jax.models.backbone import Backbone
from medtl_jax.models.layers import Activation, ConvNormAct, LayerSettings, dense
from medtl_jax.models.pooling import adaptive_avg_pool, avg_pool, max_pool


class Chain(nn.Module):
    """Convolutions of one stage, `conv1` first, after a max pooling if `pool` gives its window.

    The pooling has stride 2.
    """

    widths: tuple[int, ...]
    kernel_size: int = 3
    padding: int = 1
    pool: int = 0
    use_bias: bool = True
    norm: bool = False
    offset: bool = False
    settings: LayerSettings = LayerSettings()

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        if self.pool:
            x = max_pool(x, self.pool, 2)
        for i, width in enumerate(self.widths):
            x = ConvNormAct(
                width,
                self.kernel_size,
                padding=self.padding,
                use_bias=self.use_bias,
                norm=self.norm,
                offset=self.offset and i == 0,
                settings=self.settings,
                name=f"conv{i + 1}",
            )(x, update=update)
        return x


class HiddenLayers(nn.Module):
    """Fully connected layers over a map pooled to `grid` x `grid`: `[b, widths[-1]]`.

    Attributes:
      pool: window of a max pooling of stride 2 before, 0 = none.
      drop_first: drops the map's values too, not only those between the layers.
    """

    widths: tuple[int, ...]
    grid: int
    pool: int
    dropout: float
    drop_first: bool
    settings: LayerSettings

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        x = adaptive_avg_pool(max_pool(x, self.pool, 2), self.grid)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.widths):
            if i > 0 or self.drop_first:
                x = nn.Dropout(self.dropout, deterministic=not update, name=f"dropout{i + 1}")(x)
            x = nn.relu(dense(width, self.settings, f"fc{i + 1}")(x))
        return x


class PooledMap(nn.Module):
    """The map after a last max pooling of window and stride 2."""

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        return max_pool(x, 2, 2)


class BaselineCNN(Backbone):
    """The `Backbone` that every other one has to beat: four 3x3 convolutions with batch norm."""

    widths: tuple[int, ...] = (32, 64, 128, 256)
    dropout: float = 0.2

    def trunk(self) -> Iterator[tuple[str, nn.Module]]:
        for number, width in enumerate(self.widths):
            name = f"stage{number}" if number else "stem"
            yield (
                name,
                Chain(
                    (width,),
                    pool=2 if number else 0,
                    use_bias=False,
                    norm=True,
                    offset=self.offset and number == 0,
                    settings=self.settings,
                    name=name,
                ),
            )


# The size of LeNet's images; MNIST's 28 pixels get two more on every side.
_LENET_IMAGE = 32


class LeNetStage(nn.Module):
    """A 5x5 convolution without padding, after an average pooling of stride 2 unless it is `first`.

    The first pads images smaller than 32 pixels by 2.
    """

    width: int
    first: bool
    norm: bool
    activation: Activation
    offset: bool
    settings: LayerSettings

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        padding = 2 if self.first and min(x.shape[1:3]) < _LENET_IMAGE else 0
        if not self.first:
            x = avg_pool(x, 2, 2)
        return ConvNormAct(
            self.width,
            5,
            padding=padding,
            use_bias=True,
            norm=self.norm,
            activation=self.activation,
            offset=self.offset,
            settings=self.settings,
            name="conv",
        )(x, update=update)


class LeNetFeatures(nn.Module):
    """LeNet's layers C5 and F6, `[b, 84]`, over a 5x5 map."""

    activation: Activation
    settings: LayerSettings

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        x = adaptive_avg_pool(avg_pool(x, 2, 2), 5)
        x = x.reshape(x.shape[0], -1)
        for name, width in (("fc1", 120), ("fc2", 84)):
            x = nn.Dense(width, dtype=self.settings.dtype, name=name)(x)
            x = self.activation(x)
        return x


def scaled_tanh(x: jax.Array) -> jax.Array:
    """`1.7159 tanh(2x / 3)`, the squashing function of LeCun et al. (1998)."""
    return 1.7159 * jnp.tanh(x * (2.0 / 3.0))


class LeNet5(Backbone):
    """The `Backbone` of LeNet-5 (LeCun et al. 1998) for images of 28 or 32 pixels.

    C3 sees all six maps of S2, the subsampling has no coefficients of its own and the output is
    linear, as in most later uses. Other sizes are averaged to the 5x5 map that C5 reads.
    """

    activation: Activation = scaled_tanh

    # Whether a batch norm follows each convolution.
    has_norms = False

    def trunk(self) -> Iterator[tuple[str, nn.Module]]:
        for name, width in (("stem", 6), ("stage1", 16)):
            first = name == "stem"
            how = (first, self.has_norms, self.activation, self.offset and first, self.settings)
            yield name, LeNetStage(width, *how, name=name)
        yield "features", LeNetFeatures(self.activation, self.settings, name="features")


class LeNet5BatchNorm(LeNet5):
    """The `Backbone` of LeNet-5 with a batch norm after each convolution, and ReLU."""

    activation: Activation = nn.relu

    has_norms = True


class AlexNet(Backbone):
    """The `Backbone` of AlexNet in torchvision's form (Krizhevsky 2014, one tower)."""

    dropout: float = 0.5
    drops_features = False

    def trunk(self) -> Iterator[tuple[str, nn.Module]]:
        stem = ConvNormAct(
            64,
            11,
            4,
            2,
            use_bias=True,
            norm=False,
            offset=self.offset,
            settings=self.settings,
            name="stem",
        )
        yield "stem", stem
        plan = ((192, 5, 3), (384, 3, 3), (256, 3, 0), (256, 3, 0))
        for number, (width, kernel_size, pool) in enumerate(plan, 1):
            name = f"stage{number}"
            padding = kernel_size // 2
            chain = Chain((width,), kernel_size, padding, pool, settings=self.settings, name=name)
            yield name, chain
        yield (
            "features",
            HiddenLayers((4096, 4096), 6, 3, self.dropout, True, self.settings, name="features"),
        )


class VGG(Backbone):
    """The `Backbone` of VGG (Simonyan & Zisserman 2015); a stage is the map before its pooling.

    Attributes:
      depths: convolutions in each of the five blocks, the first of which is the stem.
      norm: batch norms after the convolutions.
      hidden: the two fully connected layers of the original; without them the last map is
        averaged over space, which needs neither 224 pixels nor 120 million weights.
    """

    depths: tuple[int, ...] = (2, 2, 3, 3, 3)
    norm: bool = False
    hidden: bool = True
    dropout: float = 0.5

    def trunk(self) -> Iterator[tuple[str, nn.Module]]:
        for number, depth in enumerate(self.depths):
            name = f"stage{number}" if number else "stem"
            width = min(512, 64 * 2**number)
            yield (
                name,
                Chain(
                    (width,) * depth,
                    pool=2 if number else 0,
                    norm=self.norm,
                    offset=self.offset and number == 0,
                    settings=self.settings,
                    name=name,
                ),
            )
        if self.hidden:
            yield (
                "features",
                HiddenLayers(
                    (4096, 4096), 7, 2, self.dropout, False, self.settings, name="features"
                ),
            )
        else:
            yield "features", PooledMap(name="features")
