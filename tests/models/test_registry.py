"""Models by name: their parts, shapes and dtypes, traced for every one of them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medtl_jax.errors import UserError
from medtl_jax.models import inputs, registry
from medtl_jax.models.backbone import HEAD_OF_AUXILIARY

CLASSES = 4
NAMES = registry.list_models()
# Those whose file of torchvision has auxiliary heads.
AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("aux",)}
# Plain networks of convolutions with biases.
WITHOUT_NORMS = {"lenet5", "alexnet", "vgg11", "vgg13", "vgg16", "vgg19", "vgg16_gap"}
WITHOUT_NORMS |= {"googlenet_caffe"}
# Trainable values with heads of 1000 classes (10 for the networks of small images), published
# or counted by hand.
PARAMETERS = {
    # Convolutions 6 * 26, 16 * 151; dense 401 * 120, 121 * 84, 85 * 10.
    ("lenet5", 10, 1): 156 + 2416 + 48120 + 10164 + 850,
    # 3x3 kernels 3 -> 32 -> 64 -> 128 -> 256, a scale and a shift each, 257 a class.
    ("baseline_cnn", 10, 3): 9 * (96 + 2048 + 8192 + 32768) + 2 * (32 + 64 + 128 + 256) + 2570,
    # Caffe's bvlc_googlenet without its auxiliary classifiers.
    ("googlenet_caffe", 1000, 3): 6_998_552,
    # Keras's VGG16(include_top=False), and the head.
    ("vgg16_gap", 1000, 3): 14_714_688 + 513_000,
    # The ResNets for CIFAR-10 of the repository kuangliu/pytorch-cifar.
    ("resnet18_3x3", 10, 3): 11_173_962,
    ("resnet34_3x3", 10, 3): 21_282_122,
    ("resnet50_3x3", 10, 3): 23_520_842,
    ("resnet101_3x3", 10, 3): 42_512_970,
}


def trace(model, height, width, train=False):
    """`(logits, out, variables)` of two images as shapes, without computing anything."""
    order = []

    def init(key, image):
        keys = {"params": key, "dropout": key}
        (logits, out), variables = model.init_with_output(keys, image, train=train)
        order.extend(out)
        return logits, out, variables

    image = jax.ShapeDtypeStruct((2, height, width, model.in_chans), jnp.float32)
    logits, out, variables = jax.eval_shape(init, jax.random.key(0), image)
    return logits, {name: out[name] for name in order}, variables


def at(tree, path):
    return functools.reduce(lambda tree, key: tree[key], path.split("/"), tree)


def count(params):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def check_result(logits, out, spec, height, width):
    stages = [name for name in spec.stages if name != "features"]
    assert stages == ["stem", *(f"stage{i}" for i in range(1, len(stages)))]
    assert list(out) == [*stages, "features"]
    assert (logits.shape, logits.dtype) == ((2, CLASSES), jnp.float32)
    assert out["features"].ndim == 2 and out["features"].dtype == jnp.float32
    sides = (height, width)
    for name in stages:
        assert out[name].ndim == 4 and out[name].shape[0] == 2
        shrunk = out[name].shape[1:3]
        assert all(1 <= now <= before for now, before in zip(shrunk, sides, strict=True)), name
        sides = shrunk


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_the_variables_at_the_smallest_size(name):
    model, spec = registry.create_model(name, CLASSES, in_chans=1)
    size = spec.smallest_input
    logits, out, variables = trace(model, size, size)
    check_result(logits, out, spec, size, size)
    params, statistics = variables["params"], variables.get("batch_stats", {})
    assert spec.name == name
    assert set(params) == {*spec.stages, spec.head}
    assert set(statistics) <= set(spec.stages)
    assert (statistics == {}) == (name in WITHOUT_NORMS)
    assert params[spec.head]["kernel"].shape == (out["features"].shape[1], CLASSES)
    first = at(params, spec.first_conv)
    assert first["kernel"].shape[2] == 1 and "offset" not in first
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", NAMES)
def test_training_in_bfloat16_on_five_channels_of_an_odd_oblong(name):
    fields = {"in_chans": 5, "dtype": jnp.bfloat16, "offset": True}
    model, spec = registry.create_model(name, CLASSES, **fields)
    height = spec.smallest_input + 1 + spec.smallest_input % 2
    width = height + 12
    logits, out, variables = trace(model, height, width, train=True)
    check_result(logits, out, spec, height, width)
    assert {out[stage].dtype for stage in out} == {jnp.dtype("float32"), jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    first = at(variables["params"], spec.first_conv)
    assert first["kernel"].shape[2] == 5 and first["offset"].shape[2] == 1
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(variables["params"])]
    assert sum("offset" in path for path in paths) == 1


@pytest.mark.parametrize("name", NAMES)
def test_auxiliary_heads_of_the_specification(name):
    spec = registry.model_spec(name)
    assert spec.auxiliary == AUXILIARY.get(name, ())
    assert (spec.smallest_auxiliary >= spec.smallest_input) == bool(spec.auxiliary)


@pytest.mark.parametrize("name", AUXILIARY)
def test_auxiliary_heads_give_logits_in_training_alone(name):
    model, spec = registry.create_model(name, CLASSES, auxiliary=True)
    size = spec.smallest_auxiliary
    _, trained, variables = trace(model, size, size, train=True)
    assert set(variables["params"]) == {*spec.stages, spec.head, *spec.auxiliary}
    assert set(variables["batch_stats"]) == {*spec.stages, *spec.auxiliary}
    image = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    _, evaluated = jax.eval_shape(model.apply, variables, image)
    assert set(trained) - set(evaluated) == set(spec.auxiliary)
    for head in spec.auxiliary:
        assert variables["params"][head][HEAD_OF_AUXILIARY]["kernel"].shape[1] == CLASSES
        assert (trained[head].shape, trained[head].dtype) == ((2, CLASSES), jnp.float32)


@pytest.mark.parametrize("name", sorted(set(NAMES) - AUXILIARY.keys()))
def test_auxiliary_heads_that_a_model_does_not_have_are_refused(name):
    with pytest.raises(UserError, match=f"model.auxiliary: {name} has no auxiliary heads"):
        registry.create_model(name, CLASSES, auxiliary=True)


@pytest.mark.parametrize(("name", "classes", "channels"), PARAMETERS)
def test_published_number_of_parameters(name, classes, channels):
    model, spec = registry.create_model(name, classes, channels)
    params = registry.variable_shapes(model, spec.smallest_input)["params"]
    assert count(params) == PARAMETERS[name, classes, channels]


def test_every_model_is_listed_once_in_order():
    assert list(NAMES) == sorted(set(NAMES))
    families = "baseline_cnn lenet5 lenet5_bn alexnet vgg11 vgg13_bn vgg16 vgg19_bn googlenet "
    families += "googlenet_caffe inception_v3 resnet18 resnet34 resnet50 resnet101 resnet18_3x3 "
    families += "densenet121 mobilenet_v2 efficientnet_b0 efficientnet_lite0 efficientnet_lite1"
    assert set(families.split()) <= set(NAMES)


def test_an_unknown_name_is_one_line():
    with pytest.raises(UserError, match=r"model.name='resnet' is not a model; known: .*lite0"):
        registry.create_model("resnet", 2)


def test_momentum_is_the_weights_own_unless_it_is_given():
    assert registry.create_model("efficientnet_lite0", 2)[0].momentum == 0.99
    assert registry.create_model("resnet18", 2)[0].momentum == 0.9
    assert registry.create_model("efficientnet_lite0", 2, momentum=0.5)[0].momentum == 0.5


EPS = {"resnet": 1e-5, "vgg": 1e-5, "densenet": 1e-5, "mobilenet": 1e-5, "efficientnet_b0": 1e-5}
EPS |= {"googlenet": 1e-3, "inception": 1e-3, "efficientnet_lite": 1e-3}


@pytest.mark.parametrize("prefix", EPS)
def test_eps_is_the_weights_own(prefix):
    found = {registry.create_model(n, 2)[0].eps for n in NAMES if n.startswith(prefix)}
    assert found == {EPS[prefix]}


INPUTS = {"resnet18": "IMAGENET", "vgg16": "IMAGENET", "lenet5": "CENTRED"}
INPUTS |= {"inception_v3": "CENTRED", "googlenet_caffe": "CAFFE", "efficientnet_lite2": "LITE"}


@pytest.mark.parametrize("name", INPUTS)
def test_input_without_weights(name):
    assert registry.model_spec(name).input == getattr(inputs, INPUTS[name])


def test_another_domain_is_refused():
    model, _ = registry.create_model("lenet5", CLASSES)
    variables = registry.variable_shapes(model, 28)
    image = jax.ShapeDtypeStruct((1, 28, 28, 3), jnp.float32)
    with pytest.raises(ValueError, match="domain 1: this model keeps"):
        jax.eval_shape(lambda v, x: model.apply(v, x, domain=1), variables, image)


@pytest.mark.parametrize("channels", [1, 4])
def test_another_number_of_channels_is_refused(channels):
    model, _ = registry.create_model("resnet18", CLASSES)
    variables = registry.variable_shapes(model, 32)
    image = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    with pytest.raises(ValueError, match=f"an image of {channels} channels, in_chans=3"):
        jax.eval_shape(model.apply, variables, image)


def test_initialize_only_a_part_gives_the_same_values(tiny_model):
    model, _ = tiny_model()
    whole = registry.initialize(model, 16, jax.random.key(3))
    head = registry.initialize(model, 16, jax.random.key(3), only=lambda name: name == "head")
    assert set(head["params"]) == {"head"} and head["batch_stats"] == {}
    np.testing.assert_array_equal(
        head["params"]["head"]["kernel"], whole["params"]["head"]["kernel"]
    )
    assert 0.005 < float(whole["params"]["head"]["kernel"].std()) < 0.02


def test_a_network_without_norms_has_empty_statistics():
    model, _ = registry.create_model("lenet5", CLASSES)
    assert registry.variable_shapes(model, 28)["batch_stats"] == {}
    assert registry.initialize(model, 28, jax.random.key(0))["batch_stats"] == {}
