"""The backbones by name, and the facts that belong to each."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from medtl_jax.errors import UserError
from medtl_jax.models import classic, densenet, inception, inputs, mobile, resnet
from medtl_jax.models.backbone import FEATURES, HEAD
from medtl_jax.models.inputs import InputSpec
from medtl_jax.models.unet import DECODER, check_widths

Variables = dict[str, dict]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Facts that belong to a backbone and its weights, not to the code that runs it.

    Attributes:
      name: as in `config.model.name`.
      build: makes the Linen module from `num_classes` and keyword overrides.
      stages: the parts that have parameters, in forward order, without the head and the
        auxiliary heads: `stem`, `stage1`, ...
      head: the name of the new classifier's parameters.
      input: what it is trained with from scratch; pretrained weights bring their own.
      norm_momentum: of the running statistics, in Flax's convention, when the weights were made.
      smallest_input: the least image size in pixels, with something left on every map.
      first_conv: path of the convolution that reads the image.
      auxiliary: names of the auxiliary heads that `auxiliary=True` adds.
      optional: parts besides the auxiliary heads that a file of weights may hold and the model
        does not have.
      smallest_auxiliary: `smallest_input` with them.
      decoder: name of the U-Net decoder's parameters, "" for a network without one.
    """

    name: str
    build: Callable[..., nn.Module]
    stages: tuple[str, ...]
    head: str = HEAD
    input: InputSpec = inputs.IMAGENET
    norm_momentum: float = 0.9
    smallest_input: int = 32
    first_conv: str = "stem/conv"
    auxiliary: tuple[str, ...] = ()
    smallest_auxiliary: int = 0
    optional: tuple[str, ...] = ()
    decoder: str = ""

    @property
    def new_parts(self) -> tuple[str, ...]:
        """The parts that belong to the task and not to the backbone: the decoder and the head."""
        return (self.decoder, self.head) if self.decoder else (self.head,)


def with_decoder(spec: ModelSpec) -> ModelSpec:
    """The specification of a backbone with a U-Net decoder instead of a classifier.

    It has neither the layers between the last stage and the classifier nor auxiliary heads, but
    weights made with them load all the same.
    """
    return dataclasses.replace(
        spec,
        stages=tuple(stage for stage in spec.stages if stage != FEATURES),
        auxiliary=(),
        smallest_auxiliary=0,
        optional=(*spec.optional, *spec.auxiliary),
        decoder=DECODER,
    )


def _stages(count: int, features: bool) -> tuple[str, ...]:
    names = ("stem", *(f"stage{i}" for i in range(1, count + 1)))
    return (*names, FEATURES) if features else names


def _vgg(name: str, depths: tuple[int, ...], norm: bool, hidden: bool = True) -> ModelSpec:
    build = functools.partial(classic.VGG, depths=depths, norm=norm, hidden=hidden)
    return ModelSpec(
        name,
        build,
        _stages(4, hidden),
        first_conv="stem/conv1/conv",
        optional=() if hidden else (FEATURES,),
    )


def _resnet(name: str, depths: tuple[int, ...], bottleneck: bool, small: bool = False) -> ModelSpec:
    build = functools.partial(
        resnet.ResNet, depths=depths, bottleneck=bottleneck, small_images=small
    )
    return ModelSpec(name, build, _stages(4, False), smallest_input=16)


def _lite(number: int, width: float, depth: float, dropout: float) -> ModelSpec:
    build = functools.partial(
        mobile.EfficientNetLite, stages=mobile.scaled_stages(width, depth), dropout=dropout
    )
    name = f"efficientnet_lite{number}"
    return ModelSpec(
        name,
        build,
        _stages(7, True),
        input=inputs.LITE,
        norm_momentum=0.99,
        smallest_input=16,
    )


_VGG_DEPTHS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
_RESNET_PLANS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
}

_MODELS = {
    spec.name: spec
    for spec in (
        ModelSpec(
            "baseline_cnn",
            classic.BaselineCNN,
            _stages(3, False),
            input=inputs.CENTRED,
            smallest_input=16,
            first_conv="stem/conv1/conv",
        ),
        ModelSpec(
            "lenet5",
            classic.LeNet5,
            _stages(1, True),
            input=inputs.CENTRED,
            smallest_input=16,
            first_conv="stem/conv/conv",
        ),
        ModelSpec(
            "lenet5_bn",
            classic.LeNet5BatchNorm,
            _stages(1, True),
            input=inputs.CENTRED,
            smallest_input=16,
            first_conv="stem/conv/conv",
        ),
        ModelSpec("alexnet", classic.AlexNet, _stages(4, True), smallest_input=63),
        *(_vgg(name, depths, False) for name, depths in _VGG_DEPTHS.items()),
        *(_vgg(f"{name}_bn", depths, True) for name, depths in _VGG_DEPTHS.items()),
        _vgg("vgg16_gap", _VGG_DEPTHS["vgg16"], False, hidden=False),
        *(_resnet(name, *plan) for name, plan in _RESNET_PLANS.items()),
        *(_resnet(f"{name}_3x3", *plan, small=True) for name, plan in _RESNET_PLANS.items()),
        ModelSpec(
            "googlenet",
            inception.GoogLeNet,
            _stages(6, False),
            input=inputs.CENTRED,
            smallest_input=16,
            first_conv="stem/conv1/conv",
            auxiliary=("aux1", "aux2"),
            smallest_auxiliary=16,
        ),
        ModelSpec(
            "googlenet_caffe",
            functools.partial(inception.GoogLeNet, caffe=True, dropout=0.4),
            _stages(6, False),
            input=inputs.CAFFE,
            first_conv="stem/conv1/conv",
            optional=("aux1", "aux2"),
        ),
        ModelSpec(
            "inception_v3",
            inception.InceptionV3,
            _stages(4, False),
            input=inputs.CENTRED,
            smallest_input=75,
            first_conv="stem/conv1a/conv",
            auxiliary=("aux",),
            smallest_auxiliary=299,
        ),
        ModelSpec("densenet121", densenet.DenseNet, _stages(4, True)),
        ModelSpec("mobilenet_v2", mobile.MobileNetV2, _stages(7, True), smallest_input=16),
        ModelSpec("efficientnet_b0", mobile.EfficientNetB0, _stages(7, True), smallest_input=16),
        _lite(0, 1.0, 1.0, 0.2),
        _lite(1, 1.0, 1.1, 0.2),
        _lite(2, 1.1, 1.2, 0.3),
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


def create_model(
    name: str, num_classes: int, in_chans: int = 3, **overrides
) -> tuple[nn.Module, ModelSpec]:
    """The Linen module with a head of `num_classes`, and its specification.

    `in_chans` is the number of channels of its image. `overrides` are fields of the module, see
    `Backbone`: `dropout`, `drop_path`, `auxiliary`, `decoder`, `dtype`, `offset`, `domains`,
    `domain_affine`, and `momentum` of the running statistics, which is the weights' own where it
    is not given. With a `decoder` the specification is that of `with_decoder`.

    Raises:
      UserError: no such model, `auxiliary` for one without auxiliary heads, `drop_path` for one
        without residuals, or a `decoder` of impossible widths or with `auxiliary`.
    """
    spec = model_spec(name)
    if overrides.get("decoder"):
        check_widths(overrides["decoder"])
        spec = with_decoder(spec)
        if overrides.get("auxiliary"):
            raise UserError(
                "model.auxiliary: auxiliary heads classify whole images; set it to 0 for masks"
            )
    if overrides.get("auxiliary") and not spec.auxiliary:
        raise UserError(f"model.auxiliary: {name} has no auxiliary heads; set it to 0")
    fields = {"momentum": spec.norm_momentum, "in_chans": in_chans, **overrides}
    model = spec.build(num_classes, **fields)
    if model.drop_path and not model.has_residuals:
        raise UserError(f"model.drop_path: {name} has no residuals to drop; set it to 0")
    return model, spec


def variable_shapes(model: nn.Module, image_size: int) -> Variables:
    """`{"params", "batch_stats"}` as `jax.ShapeDtypeStruct` leaves; nothing is computed."""
    image = jax.ShapeDtypeStruct((1, image_size, image_size, model.in_chans), jnp.float32)
    return _with_statistics(jax.eval_shape(model.init, jax.random.key(0), image))


def initialize(model: nn.Module, image_size: int, key: jax.Array, only=None) -> Variables:
    """Freshly initialised variables, all float32.

    With `only`, a predicate on the top-level names (stages and heads), the others are left out:
    XLA then compiles and runs no more than the parts asked for.
    """

    def init(key):
        image = jnp.zeros((1, image_size, image_size, model.in_chans), jnp.float32)
        variables = _with_statistics(model.init(key, image))
        return {
            kind: {name: leaf for name, leaf in tree.items() if only is None or only(name)}
            for kind, tree in variables.items()
        }

    return jax.jit(init)(key)


def _with_statistics(variables: Variables) -> Variables:
    """`variables` with a `batch_stats`, which Linen leaves out of a network without batch norm."""
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
