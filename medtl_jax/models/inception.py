"""GoogLeNet (Szegedy et al. 2015), in two forms, and Inception-v3 (Szegedy et al. 2016).

The mixed blocks are data: a block is a tuple of branches, a branch a tuple of operations.
"""

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

from medtl_jax.models.backbone import HEAD_OF_AUXILIARY, Backbone
from medtl_jax.models.layers import ConvNormAct, LayerSettings, Size, dense
from medtl_jax.models.pooling import adaptive_avg_pool, avg_pool, local_response_norm, max_pool


@dataclasses.dataclass(frozen=True)
class ConvOp:
    """A convolution with its norm (or bias) and ReLU; `padding` as in `layers.Conv`."""

    name: str
    width: int
    kernel_size: Size = 1
    stride: int = 1
    padding: Size = 0


@dataclasses.dataclass(frozen=True)
class PoolOp:
    """A pooling; an average counts the padding, as the originals do."""

    kind: str
    window: int = 3
    stride: int = 1
    padding: int = 0
    ceil: bool = False

    def __call__(self, x: jax.Array) -> jax.Array:
        pool = max_pool if self.kind == "max" else avg_pool
        padding = ((self.padding, self.padding),) * 2
        return pool(x, self.window, self.stride, padding, ceil=self.ceil)


@dataclasses.dataclass(frozen=True)
class NormOp:
    """Local response normalisation over 5 channels (Krizhevsky et al. 2012)."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return local_response_norm(x, 5, 1e-4, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Branches side by side, their channels concatenated; `name` is "" inside another branch."""

    branches: tuple[tuple["Op", ...], ...]
    name: str = ""


Op = ConvOp | PoolOp | NormOp | Mixed


def convolutions(block: Mixed) -> list[str]:
    """Names of the convolutions of a mixed block, forks included."""
    names = []
    for op in (op for branch in block.branches for op in branch):
        names += convolutions(op) if isinstance(op, Mixed) else []
        names += [op.name] if isinstance(op, ConvOp) else []
    return names


class Operations(nn.Module):
    """The operations of one stage in a row.

    Attributes:
      norm: batch norms after the convolutions, which have a bias otherwise.
      offset: of the first convolution, see `layers.Conv`.
    """

    ops: tuple[Op, ...]
    norm: bool
    offset: bool
    settings: LayerSettings

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        for number, op in enumerate(self.ops):
            x = self._apply(op, x, update, self.offset and number == 0)
        return x

    def _apply(self, op: Op, x: jax.Array, update: bool, offset: bool = False) -> jax.Array:
        if isinstance(op, Mixed) and op.name:
            block = Operations((Mixed(op.branches),), self.norm, False, self.settings, name=op.name)
            return block(x, update=update)
        if isinstance(op, Mixed):
            return jnp.concatenate([self._branch(b, x, update) for b in op.branches], axis=-1)
        if not isinstance(op, ConvOp):
            return op(x)
        conv = ConvNormAct(
            op.width,
            op.kernel_size,
            op.stride,
            op.padding,
            use_bias=not self.norm,
            norm=self.norm,
            offset=offset,
            settings=self.settings,
            name=op.name,
        )
        return conv(x, update=update)

    def _branch(self, branch: tuple[Op, ...], x: jax.Array, update: bool) -> jax.Array:
        for op in branch:
            x = self._apply(op, x, update)
        return x


# Of each mixed block: 1x1, 3x3 reduced and full, 5x5 reduced and full, projection of the pool.
_GOOGLENET_WIDTHS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


class GoogLeNet(Backbone):
    """The `Backbone` of GoogLeNet: `caffe=False` is torchvision's form, True the original's.

    torchvision's has batch norms, 3x3 instead of 5x5 kernels and a last inner pooling of 2x2;
    Caffe's has biases and local response normalisation. The stages end where the auxiliary heads
    read: `stage3` is block 4a, `stage4` 4b to 4d.
    """

    caffe: bool = False
    eps: float = 1e-3
    dropout: float = 0.2

    def trunk(self) -> Iterator[tuple[str, nn.Module]]:
        def stage(name, *ops):
            offset = self.offset and name == "stem"
            return name, Operations(ops, not self.caffe, offset, self.settings, name=name)

        norm = (NormOp(),) if self.caffe else ()
        pool = PoolOp("max", 3, 2, ceil=True)
        yield stage("stem", ConvOp("conv1", 64, 7, 2, 3))
        reduce, conv = ConvOp("conv2", 64), ConvOp("conv3", 192, 3, 1, 1)
        yield stage("stage1", pool, *norm, reduce, conv, *norm)
        yield stage("stage2", pool, self._mixed("3a"), self._mixed("3b"))
        yield stage("stage3", pool, self._mixed("4a"))
        yield stage("stage4", *(self._mixed(block) for block in ("4b", "4c", "4d")))
        yield stage("stage5", self._mixed("4e"))
        last = pool if self.caffe else PoolOp("max", 2, 2, ceil=True)
        yield stage("stage6", last, self._mixed("5a"), self._mixed("5b"))

    def _mixed(self, block: str) -> Mixed:
        one, reduce3, three, reduce5, five, projection = _GOOGLENET_WIDTHS[block]
        large, margin = (5, 2) if self.caffe else (3, 1)
        return Mixed(
            (
                (ConvOp("branch1", one),),
                (ConvOp("branch2_1", reduce3), ConvOp("branch2_2", three, 3, 1, 1)),
                (ConvOp("branch3_1", reduce5), ConvOp("branch3_2", five, large, 1, margin)),
                (PoolOp("max", 3, 1, 1, ceil=True), ConvOp("branch4", projection)),
            ),
            name=f"inception{block}",
        )

    def auxiliary_heads(self) -> dict[str, tuple[str, nn.Module]]:
        return {
            stage: (name, GoogLeNetAuxiliary(self.num_classes, self.settings, name=name))
            for stage, name in (("stage3", "aux1"), ("stage4", "aux2"))
        }


class GoogLeNetAuxiliary(nn.Module):
    """Logits `[b, classes]` of a map: pooled to 4x4, a 1x1 convolution, two dense layers."""

    num_classes: int
    settings: LayerSettings

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        x = adaptive_avg_pool(x, 4)
        x = ConvNormAct(128, settings=self.settings, name="conv")(x, update=update)
        x = nn.relu(dense(1024, self.settings, "fc")(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(0.7, deterministic=not update, name="dropout")(x)
        return dense(self.num_classes, LayerSettings(), HEAD_OF_AUXILIARY)(x.astype(jnp.float32))


_AVERAGE = PoolOp("avg", 3, 1, 1)
_SHRINK = PoolOp("max", 3, 2)


def _mixed_a(name: str, pooled: int) -> Mixed:
    return Mixed(
        (
            (ConvOp("branch1x1", 64),),
            (ConvOp("branch5x5_1", 48), ConvOp("branch5x5_2", 64, 5, 1, 2)),
            (
                ConvOp("branch3x3dbl_1", 64),
                ConvOp("branch3x3dbl_2", 96, 3, 1, 1),
                ConvOp("branch3x3dbl_3", 96, 3, 1, 1),
            ),
            (_AVERAGE, ConvOp("branch_pool", pooled)),
        ),
        name=name,
    )


def _mixed_b(name: str) -> Mixed:
    return Mixed(
        (
            (ConvOp("branch3x3", 384, 3, 2),),
            (
                ConvOp("branch3x3dbl_1", 64),
                ConvOp("branch3x3dbl_2", 96, 3, 1, 1),
                ConvOp("branch3x3dbl_3", 96, 3, 2),
            ),
            (_SHRINK,),
        ),
        name=name,
    )


def _row(name: str, width: int, length: int = 7) -> ConvOp:
    return ConvOp(name, width, (1, length), 1, (0, length // 2))


def _column(name: str, width: int, length: int = 7) -> ConvOp:
    return ConvOp(name, width, (length, 1), 1, (length // 2, 0))


def _mixed_c(name: str, inner: int) -> Mixed:
    return Mixed(
        (
            (ConvOp("branch1x1", 192),),
            (
                ConvOp("branch7x7_1", inner),
                _row("branch7x7_2", inner),
                _column("branch7x7_3", 192),
            ),
            (
                ConvOp("branch7x7dbl_1", inner),
                _column("branch7x7dbl_2", inner),
                _row("branch7x7dbl_3", inner),
                _column("branch7x7dbl_4", inner),
                _row("branch7x7dbl_5", 192),
            ),
            (_AVERAGE, ConvOp("branch_pool", 192)),
        ),
        name=name,
    )


def _mixed_d(name: str) -> Mixed:
    return Mixed(
        (
            (ConvOp("branch3x3_1", 192), ConvOp("branch3x3_2", 320, 3, 2)),
            (
                ConvOp("branch7x7x3_1", 192),
                _row("branch7x7x3_2", 192),
                _column("branch7x7x3_3", 192),
                ConvOp("branch7x7x3_4", 192, 3, 2),
            ),
            (_SHRINK,),
        ),
        name=name,
    )


def _mixed_e(name: str) -> Mixed:
    def fork(row: str, column: str) -> Mixed:
        return Mixed(((_row(row, 384, 3),), (_column(column, 384, 3),)))

    return Mixed(
        (
            (ConvOp("branch1x1", 320),),
            (ConvOp("branch3x3_1", 384), fork("branch3x3_2a", "branch3x3_2b")),
            (
                ConvOp("branch3x3dbl_1", 448),
                ConvOp("branch3x3dbl_2", 384, 3, 1, 1),
                fork("branch3x3dbl_3a", "branch3x3dbl_3b"),
            ),
            (_AVERAGE, ConvOp("branch_pool", 192)),
        ),
        name=name,
    )


INCEPTION_V3 = {
    "stem": (
        ConvOp("conv1a", 32, 3, 2),
        ConvOp("conv2a", 32, 3),
        ConvOp("conv2b", 64, 3, 1, 1),
    ),
    "stage1": (_SHRINK, ConvOp("conv3b", 80), ConvOp("conv4a", 192, 3)),
    "stage2": (_SHRINK, _mixed_a("mixed5b", 32), _mixed_a("mixed5c", 64), _mixed_a("mixed5d", 64)),
    "stage3": (
        _mixed_b("mixed6a"),
        _mixed_c("mixed6b", 128),
        _mixed_c("mixed6c", 160),
        _mixed_c("mixed6d", 160),
        _mixed_c("mixed6e", 192),
    ),
    "stage4": (_mixed_d("mixed7a"), _mixed_e("mixed7b"), _mixed_e("mixed7c")),
}


class InceptionV3(Backbone):
    """The `Backbone` of Inception-v3 for images of 299 pixels; at least 75."""

    eps: float = 1e-3
    dropout: float = 0.5

    def trunk(self) -> Iterator[tuple[str, nn.Module]]:
        for name, ops in INCEPTION_V3.items():
            offset = self.offset and name == "stem"
            yield name, Operations(ops, True, offset, self.settings, name=name)

    def auxiliary_heads(self) -> dict[str, tuple[str, nn.Module]]:
        head = InceptionAuxiliary(self.num_classes, self.settings, name="aux")
        return {"stage3": ("aux", head)}


class InceptionAuxiliary(nn.Module):
    """Logits `[b, classes]` of a map of at least 17x17: pooled, two convolutions, a dense layer."""

    num_classes: int
    settings: LayerSettings

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        x = avg_pool(x, 5, 3)
        x = ConvNormAct(128, settings=self.settings, name="conv1")(x, update=update)
        x = ConvNormAct(768, 5, settings=self.settings, name="conv2")(x, update=update)
        x = x.mean((1, 2), dtype=jnp.float32)
        return dense(self.num_classes, LayerSettings(), HEAD_OF_AUXILIARY)(x)
