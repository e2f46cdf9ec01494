"""EfficientNet-Lite (Tan & Le 2019, in the form for mobile devices without squeeze-excite)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from medtl_jax.models.layers import ConvNormAct, DropPath


@dataclasses.dataclass(frozen=True)
class StageSpec:
    """One stage of inverted residual blocks; only its first block has the stride."""

    repeats: int
    kernel_size: int
    stride: int
    expansion: int
    features: int


LITE0_STAGES = (
    StageSpec(1, 3, 1, 1, 16),
    StageSpec(2, 3, 2, 6, 24),
    StageSpec(2, 5, 2, 6, 40),
    StageSpec(3, 3, 2, 6, 80),
    StageSpec(3, 5, 1, 6, 112),
    StageSpec(4, 5, 2, 6, 192),
    StageSpec(1, 3, 1, 6, 320),
)


class InvertedResidual(nn.Module):
    """MBConv block: expand (1x1), depthwise (k x k), project (1x1), shortcut where shapes agree."""

    spec: StageSpec
    stride: int
    drop_path: float
    momentum: float
    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        spec, c = self.spec, x.shape[-1]
        common = {"momentum": self.momentum, "eps": self.eps, "dtype": self.dtype}
        y = x
        if spec.expansion != 1:
            y = ConvNormAct(c * spec.expansion, **common, name="expand")(y, update=update)
        y = ConvNormAct(
            c * spec.expansion,
            spec.kernel_size,
            self.stride,
            depthwise=True,
            **common,
            name="depthwise",
        )(y, update=update)
        y = ConvNormAct(spec.features, activation=None, **common, name="project")(y, update=update)
        if self.stride == 1 and c == spec.features:
            y = x + DropPath(self.drop_path, name="drop_path")(y, train=update)
        return y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite: `(logits [b, classes], out)`.

    `out` holds `stem`, `stage1` .. `stage7` as `[b, h, w, c]` maps and `features` `[b, 1280]`,
    the pooled map that the head reads.

    Attributes:
      num_classes: width of the head.
      stages: the table of blocks.
      stem_width, top_width: channels of the first convolution and of the last.
      dropout: rate before the head.
      drop_path: block i of n drops its residual with the rate `drop_path * i / n`, as in the
        original; a frozen stage drops none.
      momentum, eps: of the batch norms.
      dtype: of the computation; parameters and statistics stay float32.
    """

    num_classes: int
    stages: tuple[StageSpec, ...] = LITE0_STAGES
    stem_width: int = 32
    top_width: int = 1280
    dropout: float = 0.2
    drop_path: float = 0.0
    momentum: float = 0.99
    eps: float = 1e-3
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        train: bool = False,
        frozen: tuple[str, ...] = (),
        domain: int = 0,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        if domain != 0:
            raise ValueError(f"domain {domain}: this model keeps the statistics of domain 0 alone")
        common = {"momentum": self.momentum, "eps": self.eps, "dtype": self.dtype}

        def update(stage):
            return train and stage not in frozen

        out = {}
        x = image.astype(self.dtype)
        x = ConvNormAct(self.stem_width, 3, 2, **common, name="stem")(x, update=update("stem"))
        out["stem"] = x
        total, done = sum(spec.repeats for spec in self.stages), 0
        for number, spec in enumerate(self.stages, 1):
            name = f"stage{number}"
            rates = tuple(self.drop_path * (done + i) / total for i in range(spec.repeats))
            done += spec.repeats
            x = Stage(spec, rates, **common, name=name)(x, update=update(name))
            out[name] = x
        x = ConvNormAct(self.top_width, **common, name="features")(x, update=update("features"))
        x = x.mean((1, 2), dtype=jnp.float32)
        out["features"] = x
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        head = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name="head")
        return head(x), out


class Stage(nn.Module):
    """The blocks of one stage, `block1` first."""

    spec: StageSpec
    drop_paths: tuple[float, ...]
    momentum: float
    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        for i, rate in enumerate(self.drop_paths):
            x = InvertedResidual(
                self.spec,
                self.spec.stride if i == 0 else 1,
                rate,
                self.momentum,
                self.eps,
                self.dtype,
                name=f"block{i + 1}",
            )(x, update=update)
        return x
