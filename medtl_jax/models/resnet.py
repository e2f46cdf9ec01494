"""Residual networks (He et al. 2016) in torchvision's form: the 3x3 convolution has the stride."""

from collections.abc import Iterator

import flax.linen as nn
import jax

from medtl_jax.models.backbone import Backbone
from medtl_jax.models.layers import ConvNormAct, DropPath, LayerSettings
from medtl_jax.models.pooling import max_pool

# Channels of a bottleneck's result for each of its inner channels.
_EXPANSION = 4


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or a 1x1, 3x3, 1x1 `bottleneck`, around a shortcut.

    The shortcut is a 1x1 convolution named `shortcut` where the shapes differ.
    """

    width: int
    stride: int
    bottleneck: bool
    drop_path: float
    settings: LayerSettings

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        def conv(name, y, features, kernel_size=1, stride=1, activation=nn.relu):
            padding = kernel_size // 2
            layer = ConvNormAct(
                features,
                kernel_size,
                stride,
                padding,
                activation=activation,
                settings=self.settings,
                name=name,
            )
            return layer(y, update=update)

        features = self.width * (_EXPANSION if self.bottleneck else 1)
        if self.bottleneck:
            y = conv("conv1", x, self.width)
            y = conv("conv2", y, self.width, 3, self.stride)
            y = conv("conv3", y, features, activation=None)
        else:
            y = conv("conv1", x, self.width, 3, self.stride)
            y = conv("conv2", y, features, 3, activation=None)
        if x.shape[-1] != features or self.stride != 1:
            x = conv("shortcut", x, features, stride=self.stride, activation=None)
        return nn.relu(x + DropPath(self.drop_path, name="drop_path")(y, train=update))


class Stage(nn.Module):
    """The blocks of one stage, `block1` first; `pool` halves the map before them."""

    width: int
    stride: int
    bottleneck: bool
    drop_paths: tuple[float, ...]
    pool: bool
    settings: LayerSettings

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        if self.pool:
            x = max_pool(x, 3, 2, ((1, 1), (1, 1)))
        for i, rate in enumerate(self.drop_paths):
            stride = self.stride if i == 0 else 1
            block = ResidualBlock(
                self.width, stride, self.bottleneck, rate, self.settings, name=f"block{i + 1}"
            )
            x = block(x, update=update)
        return x


class ResNet(Backbone):
    """The `Backbone` of the ResNets; `stem` is the map before the max pooling.

    Attributes:
      depths: blocks in each of the four stages.
      bottleneck: blocks of 1x1, 3x3, 1x1 convolutions.
      small_images: a 3x3 stem without stride and no max pooling, for images of about 28 pixels
        (the form of He et al. for CIFAR-10, which MedMNIST's benchmark uses).
    """

    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    bottleneck: bool = False
    small_images: bool = False

    has_residuals = True

    def trunk(self) -> Iterator[tuple[str, nn.Module]]:
        kernel_size, stride = (3, 1) if self.small_images else (7, 2)
        yield (
            "stem",
            ConvNormAct(
                64,
                kernel_size,
                stride,
                kernel_size // 2,
                offset=self.offset,
                settings=self.settings,
                name="stem",
            ),
        )
        total, done = sum(self.depths), 0
        for number, depth in enumerate(self.depths, 1):
            name = f"stage{number}"
            rates = tuple(self.drop_path * (done + i) / total for i in range(depth))
            done += depth
            yield (
                name,
                Stage(
                    width=64 * 2 ** (number - 1),
                    stride=1 if number == 1 else 2,
                    bottleneck=self.bottleneck,
                    drop_paths=rates,
                    pool=number == 1 and not self.small_images,
                    settings=self.settings,
                    name=name,
                ),
            )
