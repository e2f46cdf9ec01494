"""What the network reads (config, images, weights), and its variables before training."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from configs import default
from experiments import study
from medtl_jax.errors import UserError
from medtl_jax.models.inputs import IMAGENET, InputSpec
from medtl_jax.models.registry import initialize, model_spec, variable_shapes
from medtl_jax.weights.files import WeightFile
from medtl_jax.weights.pretrained import Pretrained

CLASSES = ("a", "b", "c", "d")
GREY_IMAGENET = InputSpec((114.495,), (pytest.approx(57.63, abs=1e-9),), offset=True)


def config(**model) -> dict:
    values = default.get_config().to_dict()
    return {**values, "model": {**values["model"], **model}}


def weights(name: str, read: InputSpec, flat=None) -> Pretrained:
    file = WeightFile({}, "0" * 64, "safetensors", pathlib.Path("net.safetensors"))
    return Pretrained(flat or {}, read, model_spec(name), file, "ours")


@pytest.mark.parametrize(
    ("in_chans", "channels", "wanted"),
    [
        (0, 3, IMAGENET),
        (3, 3, IMAGENET),
        (3, 1, IMAGENET),  # a grey image is read as three equal channels
        (0, 1, GREY_IMAGENET),
        (1, 1, GREY_IMAGENET),
        (2, 1, InputSpec(GREY_IMAGENET.mean * 2, GREY_IMAGENET.std * 2, True)),
    ],
)
def test_the_input_follows_images_config_and_weights(in_chans, channels, wanted):
    found = study.input_spec(config(in_chans=in_chans), channels, weights("resnet18", IMAGENET))
    assert (found.mean, found.std, found.offset) == (wanted.mean, wanted.std, wanted.offset)


def test_weights_that_are_drawn_have_no_offset():
    found = study.input_spec(config(name="resnet18", in_chans=1), 1, None)
    assert found.channels == 1 and not found.offset
    assert found.mean == GREY_IMAGENET.mean
    assert study.input_spec(config(name="lenet5"), 3, None).mean == (127.5,) * 3


@pytest.mark.parametrize(("in_chans", "channels"), [(1, 3), (2, 3), (4, 3)])
def test_channels_that_do_not_fit(in_chans, channels):
    with pytest.raises(UserError) as caught:
        study.input_spec(config(in_chans=in_chans), channels, None)
    assert str(caught.value) == (
        f"model.in_chans={in_chans}, but the images have {channels} channels; leave it at 0"
    )


def test_heads_are_the_auxiliary_ones_in_use_and_the_classifier():
    assert study.heads(config(name="googlenet")) == ("head",)
    assert study.heads(config(name="googlenet", auxiliary=0.3)) == ("aux1", "aux2", "head")
    assert study.heads(config(name="resnet18")) == ("head",)


def drawn(network, size: int) -> dict[str, np.ndarray]:
    """Flat random weights for every place of `network`."""
    rng = np.random.default_rng(0)
    leaves = jax.tree_util.tree_leaves_with_path(variable_shapes(network, size))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): rng.random(leaf.shape, np.float32)
        for path, leaf in leaves
    }


@pytest.mark.parametrize("dont_load", ["", "params/stage1/.*", " params/features/fc2/.* , "])
def test_what_is_kept_has_the_values_that_training_from_scratch_begins_with(dont_load):
    settings = config(name="lenet5", image_size=28, dont_load=dont_load)
    read = dataclasses.replace(model_spec("lenet5").input)
    network, _ = study.make_model(settings, 4, read)
    flat = drawn(network, 28)
    found, report = study.initial_variables(
        network, settings, weights("lenet5", read, flat), CLASSES
    )
    scratch, none = study.initial_variables(network, settings, None, CLASSES)
    assert none is None
    kept = {"params/head/kernel", "params/head/bias"}
    if dont_load:
        prefix = dont_load.strip().removesuffix(",").strip().removesuffix(".*")
        kept |= {name for name in flat if name.startswith(prefix)}
    assert set(report.kept) == kept
    for kind, tree in found.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = f"{kind}/{jax.tree_util.keystr(path, simple=True, separator='/')}"
            own = scratch[kind]
            for key in path:
                own = own[key.key]
            wanted = own if name in kept else flat[name]
            np.testing.assert_array_equal(leaf, wanted, err_msg=name)
    again = initialize(network, 28, jax.random.key(1))
    assert not np.array_equal(again["params"]["head"]["kernel"], found["params"]["head"]["kernel"])


def test_a_head_for_other_classes_is_not_kept():
    settings = config(name="lenet5", image_size=28, keep_head=True)
    read = model_spec("lenet5").input
    network, _ = study.make_model(settings, 4, read)
    kept = dataclasses.replace(weights("lenet5", read, drawn(network, 28)), classes=CLASSES)
    filled, report = study.initial_variables(network, settings, kept, CLASSES)
    assert report.kept == {} and set(filled["params"]) == {"stem", "stage1", "features", "head"}
    with pytest.raises(UserError) as caught:
        study.initial_variables(network, settings, kept, ("a", "b", "d", "c"))
    assert str(caught.value) == (
        "model.keep_head: the head of net.safetensors is for a, b, c, d, the data have a, b, d, c; "
        "set it to False for a new head"
    )


def test_auxiliary_heads_keep_their_trunk_and_get_new_classifiers():
    settings = config(name="googlenet", image_size=32, auxiliary=0.3)
    read = model_spec("googlenet").input
    network, _ = study.make_model(settings, 4, read)
    shapes = variable_shapes(network, 32)
    flat = drawn(network, 32)
    filled, report = study.initial_variables(
        network, settings, weights("googlenet", read, flat), CLASSES
    )
    assert set(report.kept) == {
        f"params/{head}/{leaf}"
        for head in ("aux1/classifier", "aux2/classifier", "head")
        for leaf in ("kernel", "bias")
    }
    assert jax.tree.structure(filled) == jax.tree.structure(shapes)
    assert not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(filled))
    fc = filled["params"]["aux2"]["fc"]["kernel"]
    np.testing.assert_array_equal(fc, flat["params/aux2/fc/kernel"])
