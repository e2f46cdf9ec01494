"""The backbones by name, and what their pretrained weights expect of an image."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from medtl_jax.errors import UserError
from medtl_jax.models.mobile import EfficientNetLite

Variables = dict[str, dict]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Facts that belong to a backbone and its weights, not to the code that runs it.

    Attributes:
      name: as in `config.model.name`.
      build: makes the Linen module from `num_classes` and keyword overrides.
      stages: parameter groups in forward order, without the head: `stem`, `stage1`, ...
      head: the name of the new classifier's parameters.
      mean, std: of the RGB input, in units of 0..255.
      norm_momentum: of the running statistics, in Flax's convention, when the weights were made.
      smallest_input: the least image size in pixels that the strides leave something of.
    """

    name: str
    build: Callable[..., nn.Module]
    stages: tuple[str, ...]
    head: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    norm_momentum: float
    smallest_input: int


_MODELS = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="efficientnet_lite0",
            build=EfficientNetLite,
            stages=("stem", *(f"stage{i}" for i in range(1, 8)), "features"),
            head="head",
            mean=(127.0, 127.0, 127.0),
            std=(128.0, 128.0, 128.0),
            norm_momentum=0.99,
            smallest_input=32,
        ),
    )
}


def list_models() -> tuple[str, ...]:
    """Names that `create_model` knows, sorted."""
    return tuple(sorted(_MODELS))


def model_spec(name: str) -> ModelSpec:
    """The `ModelSpec` of a name. UserError if there is none."""
    if name not in _MODELS:
        raise UserError(f"model.name={name!r} is not a model; known: {', '.join(list_models())}")
    return _MODELS[name]


def create_model(name: str, num_classes: int, **overrides) -> tuple[nn.Module, ModelSpec]:
    """The Linen module with a head of `num_classes`, and its specification.

    `overrides` are fields of the module: `dropout`, `drop_path`, `dtype`, and `momentum` of the
    running statistics, which is the weights' own where it is not given.
    """
    spec = model_spec(name)
    return spec.build(num_classes, **{"momentum": spec.norm_momentum, **overrides}), spec


def variable_shapes(model: nn.Module, image_size: int) -> Variables:
    """`{"params", "batch_stats"}` as `jax.ShapeDtypeStruct` leaves; nothing is computed."""
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)


def initialize(model: nn.Module, image_size: int, key: jax.Array, only=None) -> Variables:
    """Freshly initialised variables, all float32.

    With `only`, a predicate on the top-level names (stages and head), the others are left out:
    XLA then compiles and runs no more than the parts asked for.
    """

    def init(key):
        image = jnp.zeros((1, image_size, image_size, 3), jnp.float32)
        variables = model.init(key, image)
        return {
            kind: {name: leaf for name, leaf in tree.items() if only is None or only(name)}
            for kind, tree in variables.items()
        }

    return jax.jit(init)(key)


def normalize(image: jax.Array, spec: ModelSpec) -> jax.Array:
    """`[b, h, w, 1 or 3]` in 0..255 -> float32 `[b, h, w, 3]` as the weights expect it."""
    mean, std = jnp.asarray(spec.mean, jnp.float32), jnp.asarray(spec.std, jnp.float32)
    # A grey image broadcasts to the three channels here, so it travels as one.
    return (image.astype(jnp.float32) - mean) / std
