"""Networks of inverted residuals: MobileNetV2, EfficientNet and its Lite form.

Sandler et al. 2018 (MobileNetV2); Tan & Le 2019 (EfficientNet); the Lite form, for mobile
devices, has neither squeeze-excite nor SiLU.
"""

import dataclasses
import math
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

from medtl_jax.models.backbone import Backbone
from medtl_jax.models.layers import (
    Activation,
    Conv,
    ConvNormAct,
    DropPath,
    LayerSettings,
    relu6,
)


@dataclasses.dataclass(frozen=True)
class StageSpec:
    """One stage of inverted residual blocks; only its first block has the stride."""

    repeats: int
    kernel_size: int
    stride: int
    expansion: int
    features: int


MOBILENET_V2_STAGES = (
    StageSpec(1, 3, 1, 1, 16),
    StageSpec(2, 3, 2, 6, 24),
    StageSpec(3, 3, 2, 6, 32),
    StageSpec(4, 3, 2, 6, 64),
    StageSpec(3, 3, 1, 6, 96),
    StageSpec(3, 3, 2, 6, 160),
    StageSpec(1, 3, 1, 6, 320),
)

EFFICIENTNET_B0_STAGES = (
    StageSpec(1, 3, 1, 1, 16),
    StageSpec(2, 3, 2, 6, 24),
    StageSpec(2, 5, 2, 6, 40),
    StageSpec(3, 3, 2, 6, 80),
    StageSpec(3, 5, 1, 6, 112),
    StageSpec(4, 5, 2, 6, 192),
    StageSpec(1, 3, 1, 6, 320),
)


def scaled_stages(width: float, depth: float) -> tuple[StageSpec, ...]:
    """EfficientNet-Lite's stages for the compound coefficients of Tan & Le (2019).

    Channels are multiples of 8 and at least 0.9 of the exact width; the Lite form scales the
    depth of neither its first stage nor its last.
    """
    last = len(EFFICIENTNET_B0_STAGES) - 1

    def scale(number: int, spec: StageSpec) -> StageSpec:
        exact = spec.features * width
        features = max(8, int(exact + 4) // 8 * 8)
        if features < 0.9 * exact:
            features += 8
        repeats = spec.repeats if number in (0, last) else math.ceil(spec.repeats * depth)
        return dataclasses.replace(spec, features=features, repeats=repeats)

    return tuple(scale(number, spec) for number, spec in enumerate(EFFICIENTNET_B0_STAGES))


@dataclasses.dataclass(frozen=True)
class BlockSettings:
    """What all inverted residuals of a network have in common.

    Attributes:
      layer: of the convolutions and norms.
      activation: after every convolution but a block's last.
      tf_padding: TensorFlow's "SAME" padding, else `(k - 1) / 2` pixels on every side.
      squeeze: the squeeze-excite's inner width is the block's input width divided by this; 0 =
        there is none.
    """

    layer: LayerSettings
    activation: Activation
    tf_padding: bool
    squeeze: int

    def conv(self, name: str, features: int, kernel_size: int = 1, **fields) -> ConvNormAct:
        """A convolution, norm and activation named `name`, to be called inside a module."""
        padding = "same" if self.tf_padding else (kernel_size - 1) // 2
        fields = {"activation": self.activation, "settings": self.layer, **fields}
        return ConvNormAct(features, kernel_size, padding=padding, **fields, name=name)


class SqueezeExcite(nn.Module):
    """`x` `[b, h, w, c]` with each channel scaled by a gate in 0..1 (Hu et al. 2018)."""

    inner: int
    activation: Activation
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = x.mean((1, 2), keepdims=True)
        gate = Conv(self.inner, use_bias=True, dtype=self.dtype, name="reduce")(gate)
        gate = Conv(x.shape[-1], use_bias=True, dtype=self.dtype, name="expand")(
            self.activation(gate)
        )
        return x * nn.sigmoid(gate)


class InvertedResidual(nn.Module):
    """MBConv block: expand (1x1), depthwise (k x k), project (1x1), shortcut where shapes agree."""

    spec: StageSpec
    stride: int
    drop_path: float
    settings: BlockSettings

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        spec, settings, c = self.spec, self.settings, x.shape[-1]
        wide = c * spec.expansion
        y = x
        if spec.expansion != 1:
            y = settings.conv("expand", wide)(y, update=update)
        y = settings.conv("depthwise", wide, spec.kernel_size, stride=self.stride, depthwise=True)(
            y, update=update
        )
        if settings.squeeze:
            inner = max(1, c // settings.squeeze)
            dtype = settings.layer.dtype
            y = SqueezeExcite(inner, settings.activation, dtype, name="squeeze_excite")(y)
        y = settings.conv("project", spec.features, activation=None)(y, update=update)
        if self.stride == 1 and c == spec.features:
            y = x + DropPath(self.drop_path, name="drop_path")(y, train=update)
        return y


class Stage(nn.Module):
    """The blocks of one stage, `block1` first."""

    spec: StageSpec
    drop_paths: tuple[float, ...]
    settings: BlockSettings

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        for i, rate in enumerate(self.drop_paths):
            stride = self.spec.stride if i == 0 else 1
            x = InvertedResidual(self.spec, stride, rate, self.settings, name=f"block{i + 1}")(
                x, update=update
            )
        return x


class InvertedResidualNet(Backbone):
    """The `Backbone` of MobileNetV2 and the EfficientNets.

    Attributes:
      stages: the table of blocks.
      stem_width, top_width: channels of the first convolution and of the last.
      activation, tf_padding, squeeze: see `BlockSettings`.
    """

    stages: tuple[StageSpec, ...] = EFFICIENTNET_B0_STAGES
    stem_width: int = 32
    top_width: int = 1280
    activation: Activation = relu6
    tf_padding: bool = False
    squeeze: int = 0
    dropout: float = 0.2

    has_residuals = True

    def trunk(self) -> Iterator[tuple[str, nn.Module]]:
        settings = BlockSettings(self.settings, self.activation, self.tf_padding, self.squeeze)
        yield "stem", settings.conv("stem", self.stem_width, 3, stride=2, offset=self.offset)
        total, done = sum(spec.repeats for spec in self.stages), 0
        for number, spec in enumerate(self.stages, 1):
            name = f"stage{number}"
            rates = tuple(self.drop_path * (done + i) / total for i in range(spec.repeats))
            done += spec.repeats
            yield name, Stage(spec, rates, settings, name=name)
        yield "features", settings.conv("features", self.top_width)


class MobileNetV2(InvertedResidualNet):
    """MobileNetV2 of width 1."""

    stages: tuple[StageSpec, ...] = MOBILENET_V2_STAGES


class EfficientNetB0(InvertedResidualNet):
    """EfficientNet-B0 as in torchvision: symmetric padding, SiLU, squeeze-excite."""

    activation: Activation = nn.silu
    squeeze: int = 4
    drop_path: float = 0.2


class EfficientNetLite(InvertedResidualNet):
    """EfficientNet-Lite; Lite0 unless `stages` says otherwise."""

    tf_padding: bool = True
    eps: float = 1e-3
    drop_path: float = 0.2
