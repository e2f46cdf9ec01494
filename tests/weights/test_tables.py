"""Every table against the variables of its model, and against names as their publishers write."""

import functools

import jax
import numpy as np
import pytest

from medtl_jax.models.backbone import HEAD_OF_AUXILIARY
from medtl_jax.models.registry import create_model, list_models, model_spec, variable_shapes
from medtl_jax.weights.naming import CONV_HWIO, CONV_OIHW, DENSE_IO, DENSE_OI, VECTOR, to_linen
from medtl_jax.weights.tables import namings

OWN_ONLY = {"baseline_cnn", "lenet5", "lenet5_bn"}
CASES = [(name, i) for name in list_models() for i in range(len(namings(name)))]


@functools.cache
def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Flat name -> shape of all variables with 1000 classes, auxiliary heads included."""
    spec = model_spec(name)
    model, _ = create_model(name, 1000, auxiliary=bool(spec.auxiliary))
    size = max(spec.smallest_input, spec.smallest_auxiliary)
    leaves = jax.tree_util.tree_leaves_with_path(variable_shapes(model, size))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves
    }


def part(name: str) -> str:
    return name.split("/")[1]


def test_every_model_but_our_own_has_a_table():
    assert {name for name in list_models() if not namings(name)} == OWN_ONLY


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_table_fills_each_variable_once_and_no_other(name, number):
    naming, spec = namings(name)[number], model_spec(name)
    targets = [target for target, _ in naming.targets.values()]
    assert len(set(targets)) == len(targets)
    assert not naming.ignored & naming.targets.keys()
    extra = {target for target in targets if target not in shapes(name)}
    assert {part(target) for target in extra} <= set(spec.optional)
    assert shapes(name).keys() <= set(targets)


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_tables_layouts_have_the_axes_of_their_variables(name, number):
    naming = namings(name)[number]
    assert naming.input.channels == shapes(name)[f"params/{model_spec(name).first_conv}/kernel"][2]
    for source, (target, layout) in naming.targets.items():
        if target not in shapes(name):
            continue
        shape = shapes(name)[target]
        kinds = {VECTOR.axes: 1, DENSE_OI.axes: 2, DENSE_IO.axes: 2}
        kinds |= {CONV_OIHW.axes: 4, CONV_HWIO.axes: 4}
        assert kinds[layout.axes] == len(shape), source


def theirs(layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file of what has `shape` in Linen."""
    if layout.axes == "OIHW":
        return (shape[3], shape[2], shape[0], shape[1])
    return shape[::-1] if layout.axes == "OI" else shape


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0", "googlenet"])
def test_arrays_in_the_files_shapes_get_the_models(name):
    for naming in namings(name):
        tensors = {
            source: np.zeros(theirs(layout, shapes(name)[target]), np.float32)
            for source, (target, layout) in naming.targets.items()
        }
        found = to_linen(naming, tensors)
        assert {target: array.shape for target, array in found.items()} == shapes(name)


# Keys as they stand in the publishers' files.
PUBLISHED = {
    "alexnet": {
        "features.10.weight": "params/stage4/conv1/conv/kernel",
        "classifier.1.weight": "params/features/fc1/kernel",
        "classifier.6.bias": "params/head/bias",
    },
    "vgg16": {
        "features.0.weight": "params/stem/conv1/conv/kernel",
        "features.28.bias": "params/stage4/conv3/conv/bias",
        "classifier.3.weight": "params/features/fc2/kernel",
        "block1_conv1/kernel": "params/stem/conv1/conv/kernel",
        "block5_conv3/bias": "params/stage4/conv3/conv/bias",
        "fc2/kernel": "params/features/fc2/kernel",
        "predictions/bias": "params/head/bias",
    },
    "vgg19_bn": {
        "features.49.weight": "params/stage4/conv4/conv/kernel",
        "features.50.running_var": "batch_stats/stage4/conv4/norm/var",
    },
    "resnet18": {
        "conv1.weight": "params/stem/conv/kernel",
        "layer2.0.downsample.1.running_mean": "batch_stats/stage2/block1/shortcut/norm/mean",
        "layer4.1.bn2.weight": "params/stage4/block2/conv2/norm/scale",
        "fc.weight": "params/head/kernel",
    },
    "resnet101": {"layer3.22.conv3.weight": "params/stage3/block23/conv3/conv/kernel"},
    "googlenet": {
        "conv3.bn.running_var": "batch_stats/stage1/conv3/norm/var",
        "inception3a.branch3.1.conv.weight": "params/stage2/inception3a/branch3_2/conv/kernel",
        "aux2.fc2.bias": "params/aux2/classifier/bias",
    },
    "googlenet_caffe": {
        "conv1/7x7_s2/w": "params/stem/conv1/conv/kernel",
        "inception_4e/pool_proj/b": "params/stage5/inception4e/branch4/conv/bias",
        "loss3/classifier/w": "params/head/kernel",
    },
    "inception_v3": {
        "Conv2d_4a_3x3.bn.bias": "params/stage1/conv4a/norm/bias",
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (
            "params/stage4/mixed7c/branch3x3dbl_3b/conv/kernel"
        ),
        "AuxLogits.conv1.conv.weight": "params/aux/conv2/conv/kernel",
        "AuxLogits.fc.weight": "params/aux/classifier/kernel",
    },
    "densenet121": {
        "features.denseblock4.denselayer16.conv2.weight": (
            "params/stage4/layer16/grow/conv/kernel"
        ),
        "features.denseblock1.denselayer1.norm.1.weight": (
            "params/stage1/layer1/reduce/norm/scale"
        ),
        "features.denseblock1.denselayer1.conv.2.weight": "params/stage1/layer1/grow/conv/kernel",
        "features.transition3.conv.weight": "params/stage4/transition/conv/kernel",
        "features.norm5.running_mean": "batch_stats/features/norm/mean",
    },
    "mobilenet_v2": {
        "features.1.conv.1.weight": "params/stage1/block1/project/conv/kernel",
        "features.17.conv.3.running_var": "batch_stats/stage7/block1/project/norm/var",
        "blocks.0.0.conv_pw.weight": "params/stage1/block1/project/conv/kernel",
        "blocks.6.0.bn3.running_var": "batch_stats/stage7/block1/project/norm/var",
    },
    "efficientnet_b0": {
        "features.2.1.block.2.fc1.weight": "params/stage2/block2/squeeze_excite/reduce/kernel",
        "features.1.0.block.1.fc2.bias": "params/stage1/block1/squeeze_excite/expand/bias",
        "blocks.1.1.se.conv_reduce.weight": "params/stage2/block2/squeeze_excite/reduce/kernel",
        "bn2.weight": "params/features/norm/scale",
    },
    "efficientnet_lite2": {
        "_blocks.20._project_conv.weight": "params/stage7/block1/project/conv/kernel",
        "blocks.6.0.conv_pwl.weight": "params/stage7/block1/project/conv/kernel",
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_keys(name):
    for key, target in PUBLISHED[name].items():
        (naming,) = (found for found in namings(name) if found.known(key))
        assert naming.targets[naming.rename(key)][0] == target


def test_updates_that_torch_counts_are_ignored():
    (naming,) = namings("densenet121")
    for key in ("features.norm0.num_batches_tracked", "features.norm5.num_batches_tracked"):
        assert key in naming.ignored


def test_auxiliary_classifiers_have_the_name_that_fine_tuning_replaces():
    for name in list_models():
        heads = {part(target) for target in shapes(name)} & set(model_spec(name).auxiliary)
        assert heads == set(model_spec(name).auxiliary)
        for head in heads:
            assert shapes(name)[f"params/{head}/{HEAD_OF_AUXILIARY}/kernel"][1] == 1000
