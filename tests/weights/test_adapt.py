"""Another number of channels: a kernel by hand, then whole networks against their RGB originals."""

import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medtl_jax.errors import UserError
from medtl_jax.models.classic import VGG
from medtl_jax.models.inputs import CAFFE, CENTRED, IMAGENET, LITE, InputSpec, normalize
from medtl_jax.models.registry import create_model, model_spec, variable_shapes
from medtl_jax.weights.adapt import adapt_kernel, adapted_input
from medtl_jax.weights.files import WeightFile
from medtl_jax.weights.pretrained import Pretrained, fill, for_channels
from medtl_jax.weights.tables import namings

# ---- the kernel by hand ------------------------------------------------------------------------

RGB = InputSpec((10.0, 20.0, 60.0), (2.0, 4.0, 6.0))


def test_the_common_input_is_the_mean_over_the_channels():
    assert adapted_input(RGB, 1) == InputSpec((30.0,), (4.0,), offset=True)
    assert adapted_input(RGB, 2) == InputSpec((30.0,) * 2, (4.0,) * 2, offset=True)
    assert adapted_input(RGB, 3) is RGB
    # One mean needs no offset, whatever the deviations are.
    equal = InputSpec((7.0,) * 3, (1.0, 2.0, 3.0))
    assert adapted_input(equal, 1) == InputSpec((7.0,), (2.0,))


def test_a_kernel_of_one_pixel():
    kernel = np.array([1.0, 3.0, 6.0], np.float32).reshape(1, 1, 3, 1)
    # W_c s / s_c = 1 * 4/2, 3 * 4/4, 6 * 4/6; W_c (m - m_c) / s_c = 1 * 20/2, 3 * 10/4, 6 * -30/6.
    one = adapt_kernel(kernel, None, RGB, adapted_input(RGB, 1))
    assert {name: array.tolist() for name, array in one.items()} == {
        "kernel": [[[[9.0]]]],
        "offset": [[[[-12.5]]]],
    }
    four = adapt_kernel(kernel, None, RGB, adapted_input(RGB, 4))
    assert four["kernel"].tolist() == [[[[2.25]] * 4]]
    assert four["offset"].tolist() == [[[[-12.5]]]]
    # The pixel 50: (50-10)/2 + 3 (50-20)/4 + 6 (50-60)/6 = 20 + 22.5 - 10 = 9 (50-30)/4 - 12.5.
    assert 9.0 * (50 - 30) / 4 - 12.5 == 20 + 22.5 - 10
    assert all(array.dtype == np.float32 for array in one.values())


def test_an_offset_is_carried_on():
    grey = InputSpec((30.0,), (4.0,), offset=True)
    kernel = np.array([9.0, 3.0], np.float32).reshape(1, 1, 1, 2)
    offset = np.array([-12.5, 1.0], np.float32).reshape(1, 1, 1, 2)
    three = adapt_kernel(kernel, offset, grey, adapted_input(grey, 3))
    assert three["kernel"].tolist() == [[[[3.0, 1.0]] * 3]]
    assert three["offset"].tolist() == [[[[-12.5, 1.0]]]]
    same = adapt_kernel(kernel, offset, grey, grey)
    assert same["kernel"] is kernel
    np.testing.assert_array_equal(same["offset"], offset)


def test_half_precision_is_widened_before_it_is_summed():
    kernel = np.full((1, 1, 3, 1), 1 / 3, np.float16)
    parts = adapt_kernel(kernel, None, IMAGENET, adapted_input(IMAGENET, 1))
    mean, std = np.mean(IMAGENET.mean), np.mean(IMAGENET.std)
    wide = float(kernel[0, 0, 0, 0])
    assert parts["kernel"].dtype == parts["offset"].dtype == np.float32
    assert parts["kernel"].item() == pytest.approx(
        sum(wide * std / s for s in IMAGENET.std), rel=1e-7
    )
    assert parts["offset"].item() == pytest.approx(
        sum(wide * (mean - m) / s for m, s in zip(IMAGENET.mean, IMAGENET.std, strict=True)),
        rel=1e-6,
    )


def test_only_grey_and_colour_are_adapted():
    four = InputSpec((1.0,) * 4, (1.0,) * 4)
    assert adapted_input(four, 4) is four
    with pytest.raises(UserError, match=r"the weights read 4 channels, the images have 3: only"):
        adapted_input(four, 3)


# ---- whole networks ----------------------------------------------------------------------------

# One a family, at an odd size that it can take.
SLOW = ("googlenet", "inception_v3", "densenet121", "mobilenet_v2", "efficientnet_b0")
SIZES = {
    "alexnet": 67,
    "vgg16_gap": 37,
    "googlenet": 37,
    "googlenet_caffe": 37,
    "inception_v3": 77,
    "resnet18": 37,
    "densenet121": 37,
    "mobilenet_v2": 37,
    "efficientnet_b0": 37,
    "efficientnet_lite0": 37,
}
SHALLOW_VGG = functools.partial(VGG, depths=(1,) * 5, norm=True, hidden=False)


def drawn(model: nn.Module, size: int) -> dict[str, np.ndarray]:
    """Flat variables of a network at work: He's kernels, norms that change little."""
    rng = np.random.default_rng(0)
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variable_shapes(model, size)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        values = rng.random(leaf.shape, np.float32)
        if name.endswith("kernel"):
            fan = np.prod(leaf.shape[:-1])
            flat[name] = (values - np.float32(0.5)) * np.float32(np.sqrt(24 / fan))
        else:
            flat[name] = values + np.float32(0.5 if name.endswith(("scale", "var")) else -0.5)
    return flat


def nested(flat: dict[str, np.ndarray]) -> dict:
    tree: dict = {"params": {}, "batch_stats": {}}
    for name, array in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return tree


class StemDone(Exception):
    """Raised after the stem: what follows it is not even traced."""


def stem_map(model: nn.Module, variables: dict, image: jax.Array) -> jax.Array:
    """What the stem gives."""

    def stem(variables, image):
        def stop(call, args, kwargs, context):
            result = call(*args, **kwargs)
            if context.module.name == "stem" and context.method_name == "__call__":
                raise StemDone(result)
            return result

        with nn.intercept_methods(stop):
            try:
                model.apply(variables, image)
            except StemDone as done:
                return done.args[0]
        raise AssertionError("a network without a stem")

    return jax.jit(stem)(variables, image)


def after_stem(model: nn.Module, size: int):
    """The logits as a function of the variables and of the stem's map: one program for all."""

    def logits(variables, stem):
        def give(call, args, kwargs, context):
            at_stem = context.module.name == "stem" and context.method_name == "__call__"
            return stem if at_stem else call(*args, **kwargs)

        with nn.intercept_methods(give):
            return model.apply(variables, jnp.zeros((2, size, size, model.in_chans)))[0]

    return jax.jit(logits)


def as_read(flat: dict[str, np.ndarray], spec, read: InputSpec) -> Pretrained:
    file = WeightFile({}, "0" * 64, "safetensors", pathlib.Path("net.safetensors"))
    return Pretrained(flat, read, spec, file, "ours")


def assert_grey_equals_replica(make, spec, read: InputSpec, size: int) -> None:
    """The logits of grey images, read as 1 and as 5 channels, are those of their RGB replicas.

    `make(in_chans=, offset=)` is the network and `read` what its RGB weights expect.
    """
    original = make(in_chans=3, offset=False)
    flat = drawn(original, size)
    variables = nested(flat)
    rest = after_stem(original, size)
    grey = np.random.default_rng(1).integers(0, 256, (2, size, size, 1), np.uint8)
    replica = jnp.asarray(np.repeat(grey, 3, axis=-1))
    stem = stem_map(original, variables, normalize(replica, read))
    wanted = np.asarray(rest(variables, stem))
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-2 * np.abs(wanted).max()
    for channels in (1, 5):
        weights = for_channels(as_read(flat, spec, read), channels)
        assert weights.input.channels == channels
        model = make(in_chans=channels, offset=weights.input.offset)
        adapted, _ = fill(variable_shapes(model, size), weights)
        image = jnp.asarray(np.repeat(grey, channels, axis=-1))
        found = stem_map(model, adapted, normalize(image, weights.input))
        # The rest of the variables are the original's, bit for bit.
        untouched = jax.tree.map(
            np.array_equal, {**adapted["params"], "stem": 0}, {**variables["params"], "stem": 0}
        )
        assert all(jax.tree.leaves(untouched))
        assert jax.tree.all(
            jax.tree.map(np.array_equal, adapted["batch_stats"], variables["batch_stats"])
        )
        logits = np.asarray(rest(variables, found))
        assert np.abs(logits - wanted).max() <= 1e-5 * np.abs(wanted).max(), channels


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SIZES]
)
def test_grey_gives_the_logits_of_its_rgb_replica(name):
    def make(**fields):
        return create_model(name, 7, **fields)[0]

    read = namings(name)[0].input
    assert_grey_equals_replica(make, model_spec(name), read, SIZES[name])


def test_the_same_in_a_vgg_with_batch_norm():
    def make(**fields):
        return SHALLOW_VGG(7, **fields)

    assert_grey_equals_replica(make, model_spec("vgg11_bn"), IMAGENET, 37)


def test_every_published_input_is_among_those_tested():
    tested = {namings(name)[0].input for name in SIZES}
    assert tested == {IMAGENET, CAFFE, CENTRED, LITE}


@pytest.mark.parametrize("offset", [False, True])
def test_grey_weights_read_colour_as_equal_channels(offset):
    read = InputSpec((90.0,), (40.0,), offset)
    small, spec = create_model("lenet5", 4, in_chans=1, offset=offset)
    wide, _ = create_model("lenet5", 4, in_chans=3, offset=offset)
    flat = drawn(small, 28)
    weights = for_channels(as_read(flat, spec, read), 3)
    adapted, report = fill(variable_shapes(wide, 28), weights)
    assert report.adapted == (f"params/{spec.first_conv}/kernel from 1 to 3 channels",)
    grey = np.random.default_rng(2).integers(0, 256, (2, 28, 28, 1), np.uint8)
    wanted, _ = small.apply(nested(flat), normalize(jnp.asarray(grey), read))
    found, _ = wide.apply(adapted, normalize(jnp.asarray(grey), weights.input))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


# ---- what cannot be adapted --------------------------------------------------------------------

NAME = "params/stem/conv/kernel"


@pytest.mark.parametrize(
    "kernel", [None, np.ones((3, 3, 4, 8)), np.ones((3, 8)), np.ones((3, 3, 3, 8), int)]
)
def test_a_first_kernel_that_is_none(kernel):
    flat = {} if kernel is None else {NAME: kernel}
    with pytest.raises(UserError) as caught:
        for_channels(as_read(flat, model_spec("resnet18"), IMAGENET), 1)
    message = f"no first convolution {NAME} over 3 channels to adapt to 1"
    assert str(caught.value) == f"weights file net.safetensors: {message}"


@pytest.mark.parametrize(
    ("described", "offset"),
    [
        (True, None),
        (True, np.ones((3, 3, 1, 7))),
        (True, np.ones(8)),
        (False, np.ones((3, 3, 1, 8))),
    ],
)
def test_an_offset_that_does_not_belong(described, offset):
    flat = {NAME: np.ones((3, 3, 1, 8), np.float32)}
    if offset is not None:
        flat["params/stem/conv/offset"] = offset
    grey = InputSpec((1.0,), (1.0,), described)
    with pytest.raises(UserError) as caught:
        for_channels(as_read(flat, model_spec("resnet18"), grey), 3)
    assert str(caught.value) == (
        "weights file net.safetensors: params/stem/conv/offset does not belong to its kernel and "
        "to the input that the file describes"
    )
