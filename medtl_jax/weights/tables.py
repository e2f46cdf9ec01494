"""The tables of all families: what torchvision, timm, Keras and Caffe call each of our layers."""

import re
from collections.abc import Callable

from medtl_jax.models import inception, inputs
from medtl_jax.models.backbone import HEAD_OF_AUXILIARY
from medtl_jax.models.inputs import InputSpec
from medtl_jax.models.mobile import EFFICIENTNET_B0_STAGES, MOBILENET_V2_STAGES, StageSpec
from medtl_jax.models.registry import create_model
from medtl_jax.weights.naming import (
    CONV_HWIO,
    CONV_OIHW,
    DENSE_IO,
    DENSE_OI,
    VECTOR,
    Layout,
    Naming,
    bgr,
    flattened,
)


class _Table:
    """Collects the rows of one naming, layer by layer; `suffixes` are those of kernel and bias."""

    def __init__(self, scheme: str, input_spec: InputSpec) -> None:
        self.scheme, self.input = scheme, input_spec
        self.targets: dict[str, tuple[str, Layout]] = {}
        self.ignored: set[str] = set()

    suffixes = (".weight", ".bias")
    conv_layout, dense_layout = CONV_OIHW, DENSE_OI

    def _kernel(self, source: str, target: str, layout: Layout, bias: bool) -> None:
        kernel, shift = self.suffixes
        self.targets[source + kernel] = (f"params/{target}/kernel", layout)
        if bias:
            self.targets[source + shift] = (f"params/{target}/bias", VECTOR)

    def conv(self, source: str, target: str, bias: bool = False, layout=None) -> None:
        self._kernel(source, f"{target}/conv", layout or self.conv_layout, bias)

    def dense(self, source: str, target: str, layout: Layout | None = None) -> None:
        self._kernel(source, target, layout or self.dense_layout, True)

    def norm(self, source: str, target: str) -> None:
        self.targets[f"{source}.weight"] = (f"params/{target}/norm/scale", VECTOR)
        self.targets[f"{source}.bias"] = (f"params/{target}/norm/bias", VECTOR)
        self.targets[f"{source}.running_mean"] = (f"batch_stats/{target}/norm/mean", VECTOR)
        self.targets[f"{source}.running_var"] = (f"batch_stats/{target}/norm/var", VECTOR)
        # Torch counts its updates for a momentum of None, which no model here uses.
        self.ignored.add(f"{source}.num_batches_tracked")

    def conv_norm(self, conv: str, norm: str, target: str, bias: bool = False) -> None:
        self.conv(conv, target, bias)
        self.norm(norm, target)

    def done(self, rename: Callable[[str], str] = str) -> Naming:
        return Naming(self.scheme, self.input, self.targets, frozenset(self.ignored), rename)


class _KerasTable(_Table):
    suffixes = ("/kernel", "/bias")
    conv_layout, dense_layout = CONV_HWIO, DENSE_IO


class _CaffeTable(_Table):
    suffixes = ("/w", "/b")


def namings(model_name: str) -> tuple[Naming, ...]:
    """Every known naming of a model's weights; empty where only our own files load."""
    return tuple(make() for make in _MAKERS.get(model_name, ()))


def timm_architecture(model_name: str) -> str | None:
    """timm's name of the network that computes what ours does; None where there is none."""
    return _TIMM.get(model_name)


def _alexnet() -> Naming:
    table = _Table("torchvision", inputs.IMAGENET)
    table.conv("features.0", "stem", bias=True)
    for number, index in enumerate((3, 6, 8, 10), 1):
        table.conv(f"features.{index}", f"stage{number}/conv1", bias=True)
    table.dense("classifier.1", "features/fc1", flattened(256, 6))
    table.dense("classifier.4", "features/fc2")
    table.dense("classifier.6", "head")
    return table.done()


def _vgg_torchvision(name: str) -> Naming:
    model, _ = create_model(name, 1)
    table, index = _Table("torchvision", inputs.IMAGENET), 0
    for stage, depth in enumerate(model.depths):
        for i in range(1, depth + 1):
            target = f"stage{stage}/conv{i}" if stage else f"stem/conv{i}"
            table.conv(f"features.{index}", target, bias=True)
            if model.norm:
                table.norm(f"features.{index + 1}", target)
            index += 3 if model.norm else 2
        index += 1  # the max pooling
    table.dense("classifier.0", "features/fc1", flattened(512, 7))
    table.dense("classifier.3", "features/fc2")
    table.dense("classifier.6", "head")
    return table.done()


def _vgg_keras(name: str) -> Naming:
    model, _ = create_model(name, 1)
    table = _KerasTable("keras", inputs.CAFFE)
    for stage, depth in enumerate(model.depths):
        for i in range(1, depth + 1):
            first = stage == 0 and i == 1
            target = f"stage{stage}/conv{i}" if stage else f"stem/conv{i}"
            layout = bgr(CONV_HWIO) if first else None
            table.conv(f"block{stage + 1}_conv{i}", target, bias=True, layout=layout)
    table.dense("fc1", "features/fc1")
    table.dense("fc2", "features/fc2")
    table.dense("predictions", "head")
    return table.done()


def _resnet(name: str) -> Naming:
    model, _ = create_model(name, 1)
    table = _Table("torchvision", inputs.IMAGENET)
    table.conv_norm("conv1", "bn1", "stem")
    for stage, depth in enumerate(model.depths, 1):
        for block in range(depth):
            source, target = f"layer{stage}.{block}", f"stage{stage}/block{block + 1}"
            for i in range(1, 4 if model.bottleneck else 3):
                table.conv_norm(f"{source}.conv{i}", f"{source}.bn{i}", f"{target}/conv{i}")
            if block == 0 and (stage > 1 or model.bottleneck):
                shortcut = f"{source}.downsample"
                table.conv_norm(f"{shortcut}.0", f"{shortcut}.1", f"{target}/shortcut")
    table.dense("fc", "head")
    return table.done()


def _densenet() -> Naming:
    model, _ = create_model("densenet121", 1)
    table = _Table("torchvision", inputs.IMAGENET)
    table.conv_norm("features.conv0", "features.norm0", "stem")
    for stage, layers in enumerate(model.layers, 1):
        if stage > 1:
            source = f"features.transition{stage - 1}"
            table.conv_norm(f"{source}.conv", f"{source}.norm", f"stage{stage}/transition")
        for layer in range(1, layers + 1):
            source = f"features.denseblock{stage}.denselayer{layer}"
            for i, part in ((1, "reduce"), (2, "grow")):
                target = f"stage{stage}/layer{layer}/{part}"
                table.conv_norm(f"{source}.conv{i}", f"{source}.norm{i}", target)
    table.norm("features.norm5", "features")
    table.dense("classifier", "head")
    # The published file dates from a torch that allowed dots in a module's name.
    return table.done(lambda key: re.sub(r"\.(norm|conv)\.(\d)\.", r".\1\2.", key))


def _mobilenet_v2() -> Naming:
    table, index = _Table("torchvision", inputs.IMAGENET), 1
    table.conv_norm("features.0.0", "features.0.1", "stem")
    for target, expands in _blocks(MOBILENET_V2_STAGES):
        source = f"features.{index}.conv"
        parts = ("expand", "depthwise") if expands else ("depthwise",)
        for i, part in enumerate(parts):
            table.conv_norm(f"{source}.{i}.0", f"{source}.{i}.1", f"{target}/{part}")
        last = len(parts)
        table.conv_norm(f"{source}.{last}", f"{source}.{last + 1}", f"{target}/project")
        index += 1
    table.conv_norm(f"features.{index}.0", f"features.{index}.1", "features")
    table.dense("classifier.1", "head")
    return table.done()


def _efficientnet_b0() -> Naming:
    table = _Table("torchvision", inputs.IMAGENET)
    table.conv_norm("features.0.0", "features.0.1", "stem")
    for target, expands in _blocks(EFFICIENTNET_B0_STAGES):
        stage, block = map(int, re.findall(r"\d+", target))
        source = f"features.{stage}.{block - 1}.block"
        parts = ("expand", "depthwise") if expands else ("depthwise",)
        for i, part in enumerate(parts):
            table.conv_norm(f"{source}.{i}.0", f"{source}.{i}.1", f"{target}/{part}")
        last = len(parts)
        for i, part in ((1, "reduce"), (2, "expand")):
            table.dense(
                f"{source}.{last}.fc{i}", f"{target}/squeeze_excite/{part}", layout=CONV_OIHW
            )
        table.conv_norm(f"{source}.{last + 1}.0", f"{source}.{last + 1}.1", f"{target}/project")
    table.conv_norm("features.8.0", "features.8.1", "features")
    table.dense("classifier.1", "head")
    return table.done()


def _timm_inverted(
    stages: tuple[StageSpec, ...], input_spec: InputSpec, squeeze: bool = False
) -> Naming:
    """timm's EfficientNets and MobileNetV2: blocks.<stage>.<block>, norms counted in a block."""
    table = _Table("timm", input_spec)
    table.conv_norm("conv_stem", "bn1", "stem")
    for target, expands in _blocks(stages):
        stage, block = map(int, re.findall(r"\d+", target))
        source = f"blocks.{stage - 1}.{block - 1}"
        parts = {"expand": "conv_pw"} if expands else {}
        parts |= {"depthwise": "conv_dw", "project": "conv_pwl" if expands else "conv_pw"}
        for i, (part, conv) in enumerate(parts.items(), 1):
            table.conv_norm(f"{source}.{conv}", f"{source}.bn{i}", f"{target}/{part}")
        if squeeze:
            for part in ("reduce", "expand"):
                inner = f"{target}/squeeze_excite/{part}"
                table.dense(f"{source}.se.conv_{part}", inner, layout=CONV_OIHW)
    table.conv_norm("conv_head", "bn2", "features")
    table.dense("classifier", "head")
    return table.done()


def _efficientnet_lite_package(stages: tuple[StageSpec, ...]) -> Naming:
    """As in the package efficientnet-lite-pytorch; blocks are counted through."""
    table = _Table("efficientnet-lite-pytorch", inputs.LITE)
    table.conv_norm("_conv_stem", "_bn0", "stem")
    for index, (target, expands) in enumerate(_blocks(stages)):
        source = f"_blocks.{index}"
        if expands:
            table.conv_norm(f"{source}._expand_conv", f"{source}._bn0", f"{target}/expand")
        table.conv_norm(f"{source}._depthwise_conv", f"{source}._bn1", f"{target}/depthwise")
        table.conv_norm(f"{source}._project_conv", f"{source}._bn2", f"{target}/project")
    table.conv_norm("_conv_head", "_bn1", "features")
    table.dense("_fc", "head")
    return table.done()


def _blocks(stages: tuple[StageSpec, ...]) -> list[tuple[str, bool]]:
    """`(path of the block, whether it has an expanding convolution)`, in order."""
    return [
        (f"stage{number}/block{block}", stage.expansion != 1)
        for number, stage in enumerate(stages, 1)
        for block in range(1, stage.repeats + 1)
    ]


# The conv layers of GoogLeNet's stages 2 to 6, which read `inception<block>`.
_GOOGLENET_BLOCKS = {
    "stage2": ("3a", "3b"),
    "stage3": ("4a",),
    "stage4": ("4b", "4c", "4d"),
    "stage5": ("4e",),
    "stage6": ("5a", "5b"),
}


def _googlenet() -> Naming:
    # The published weights were trained with TensorFlow's input, -1..1; torchvision turns its
    # own normalisation into that inside the model (`transform_input`).
    table = _Table("torchvision", inputs.CENTRED)
    table.conv_norm("conv1.conv", "conv1.bn", "stem/conv1")
    for name in ("conv2", "conv3"):
        table.conv_norm(f"{name}.conv", f"{name}.bn", f"stage1/{name}")
    branches = {
        "branch1": "branch1",
        "branch2.0": "branch2_1",
        "branch2.1": "branch2_2",
        "branch3.0": "branch3_1",
        "branch3.1": "branch3_2",
        "branch4.1": "branch4",
    }
    for stage, blocks in _GOOGLENET_BLOCKS.items():
        for block in blocks:
            for theirs, ours in branches.items():
                source, target = f"inception{block}.{theirs}", f"{stage}/inception{block}/{ours}"
                table.conv_norm(f"{source}.conv", f"{source}.bn", target)
    for name in ("aux1", "aux2"):
        table.conv_norm(f"{name}.conv.conv", f"{name}.conv.bn", f"{name}/conv")
        table.dense(f"{name}.fc1", f"{name}/fc", flattened(128, 4))
        table.dense(f"{name}.fc2", f"{name}/{HEAD_OF_AUXILIARY}")
    table.dense("fc", "head")
    return table.done()


def _googlenet_caffe() -> Naming:
    table = _CaffeTable("caffe", inputs.CAFFE)
    table.conv("conv1/7x7_s2", "stem/conv1", bias=True, layout=bgr(CONV_OIHW))
    table.conv("conv2/3x3_reduce", "stage1/conv2", bias=True)
    table.conv("conv2/3x3", "stage1/conv3", bias=True)
    branches = {
        "1x1": "branch1",
        "3x3_reduce": "branch2_1",
        "3x3": "branch2_2",
        "5x5_reduce": "branch3_1",
        "5x5": "branch3_2",
        "pool_proj": "branch4",
    }
    for stage, blocks in _GOOGLENET_BLOCKS.items():
        for block in blocks:
            for theirs, ours in branches.items():
                target = f"{stage}/inception{block}/{ours}"
                table.conv(f"inception_{block}/{theirs}", target, bias=True)
    for number, name in ((1, "aux1"), (2, "aux2")):
        table.conv(f"loss{number}/conv", f"{name}/conv", bias=True)
        table.dense(f"loss{number}/fc", f"{name}/fc", flattened(128, 4))
        table.dense(f"loss{number}/classifier", f"{name}/{HEAD_OF_AUXILIARY}")
    table.dense("loss3/classifier", "head")
    return table.done()


def _inception_v3() -> Naming:
    # TensorFlow's input here too, see `_googlenet`.
    table = _Table("torchvision", inputs.CENTRED)
    plain = {
        "Conv2d_1a_3x3": "stem/conv1a",
        "Conv2d_2a_3x3": "stem/conv2a",
        "Conv2d_2b_3x3": "stem/conv2b",
        "Conv2d_3b_1x1": "stage1/conv3b",
        "Conv2d_4a_3x3": "stage1/conv4a",
    }
    for source, target in plain.items():
        table.conv_norm(f"{source}.conv", f"{source}.bn", target)
    for stage, ops in inception.INCEPTION_V3.items():
        for block in ops:
            if isinstance(block, inception.Mixed):
                theirs = block.name.replace("mixed", "Mixed_")
                for name in inception.convolutions(block):
                    source = f"{theirs}.{name}"
                    target = f"{stage}/{block.name}/{name}"
                    table.conv_norm(f"{source}.conv", f"{source}.bn", target)
    for i in (0, 1):
        source = f"AuxLogits.conv{i}"
        table.conv_norm(f"{source}.conv", f"{source}.bn", f"aux/conv{i + 1}")
    table.dense("AuxLogits.fc", f"aux/{HEAD_OF_AUXILIARY}")
    table.dense("fc", "head")
    return table.done()


def _lite(name: str) -> tuple[Callable[[], Naming], ...]:
    stages = create_model(name, 1)[0].stages
    return (
        lambda: _efficientnet_lite_package(stages),
        lambda: _timm_inverted(stages, inputs.CENTRED),
    )


def _bound(make: Callable[[str], Naming], name: str) -> Callable[[], Naming]:
    return lambda: make(name)


_VGGS = ("vgg11", "vgg13", "vgg16", "vgg19")
_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")

# As timm 1.0 builds them, compared in keys, padding and epsilons. Its efficientnet_lite0 and
# tf_efficientnet_b0 have the keys of networks here, and pad otherwise.
_TIMM = {
    "densenet121": "densenet121",
    "efficientnet_b0": "efficientnet_b0",
    "inception_v3": "inception_v3",
    "mobilenet_v2": "mobilenetv2_100",
    **{f"efficientnet_lite{i}": f"tf_efficientnet_lite{i}" for i in range(3)},
    **{f"{name}{form}": name for name in _RESNETS for form in ("", "_3x3")},
}

_MAKERS: dict[str, tuple[Callable[[], Naming], ...]] = {
    "alexnet": (_alexnet,),
    "googlenet": (_googlenet,),
    "googlenet_caffe": (_googlenet_caffe,),
    "inception_v3": (_inception_v3,),
    "densenet121": (_densenet,),
    "mobilenet_v2": (
        _mobilenet_v2,
        lambda: _timm_inverted(MOBILENET_V2_STAGES, inputs.IMAGENET),
    ),
    "efficientnet_b0": (
        _efficientnet_b0,
        lambda: _timm_inverted(EFFICIENTNET_B0_STAGES, inputs.IMAGENET, squeeze=True),
    ),
    **{f"efficientnet_lite{i}": _lite(f"efficientnet_lite{i}") for i in range(3)},
    **{
        name: (_bound(_vgg_torchvision, name), _bound(_vgg_keras, name))
        for name in (*_VGGS, "vgg16_gap")
    },
    **{f"{name}_bn": (_bound(_vgg_torchvision, f"{name}_bn"),) for name in _VGGS},
    **{
        f"{name}{form}": (_bound(_resnet, f"{name}{form}"),)
        for name in _RESNETS
        for form in ("", "_3x3")
    },
}
