"""What the network reads (config, images, weights), and its variables before training."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from configs import default
from experiments import study
from experiments.settings import unused_settings
from medtl_jax.errors import UserError
from medtl_jax.models.inputs import IMAGENET, InputSpec
from medtl_jax.models.registry import initialize, model_spec, variable_shapes
from medtl_jax.objectives.task import Task
from medtl_jax.weights.files import WeightFile
from medtl_jax.weights.pretrained import Pretrained

CLASSES = ("a", "b", "c", "d")
TASK = Task("classify", CLASSES)
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


def test_new_parts_are_the_auxiliary_heads_in_use_the_decoder_and_the_head():
    assert study.new_parts(config(name="googlenet")) == ("head",)
    assert study.new_parts(config(name="googlenet", auxiliary=0.3)) == ("aux1", "aux2", "head")
    assert study.auxiliary_heads(config(name="googlenet")) == ()
    segment = {**config(name="resnet18", decoder="4,4"), "task": "segment"}
    assert study.new_parts(segment) == ("decoder", "head")
    assert study.decoder_widths(segment) == (4, 4)
    assert study.decoder_widths(config(name="resnet18", decoder="4,4")) == ()


@pytest.mark.parametrize(
    ("task", "outputs"), [("classify", 4), ("multilabel", 4), ("ordinal", 3), ("regress", 4)]
)
def test_the_head_has_the_outputs_of_the_task(task, outputs):
    settings = config(name="lenet5", image_size=28)
    scale = (1.0,) * 4 if task == "regress" else ()
    read = model_spec("lenet5").input
    network, _ = study.make_model(settings, Task(task, CLASSES, mean=scale, std=scale), read)
    assert variable_shapes(network, 28)["params"]["head"]["bias"].shape == (outputs,)


def test_a_segmentation_has_a_decoder_of_the_widths_of_the_config():
    settings = {**config(name="resnet18", image_size=32, decoder="6,5,4,3,2"), "task": "segment"}
    read = model_spec("resnet18").input
    network, spec = study.make_model(settings, Task("segment", CLASSES), read)
    shapes = variable_shapes(network, 32)["params"]
    assert spec.new_parts == ("decoder", "head")
    assert shapes["head"]["kernel"].shape == (1, 1, 2, 4)
    assert shapes["decoder"]["up1"]["project"]["kernel"].shape[-1] == 6


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
    network, _ = study.make_model(settings, TASK, read)
    flat = drawn(network, 28)
    found, report = study.initial_variables(network, settings, weights("lenet5", read, flat), TASK)
    scratch, none = study.initial_variables(network, settings, None, TASK)
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
    network, _ = study.make_model(settings, TASK, read)
    kept = dataclasses.replace(weights("lenet5", read, drawn(network, 28)), classes=CLASSES)
    filled, report = study.initial_variables(network, settings, kept, TASK)
    assert report.kept == {} and set(filled["params"]) == {"stem", "stage1", "features", "head"}
    with pytest.raises(UserError) as caught:
        study.initial_variables(network, settings, kept, Task("classify", ("a", "b", "d", "c")))
    assert str(caught.value) == (
        "model.keep_head: the head of net.safetensors is for a, b, c, d, the data have a, b, d, c; "
        "set it to False for a new head"
    )


@pytest.mark.parametrize(
    ("made", "wanted", "words"),
    [
        (TASK, Task("multilabel", CLASSES), "is for classify, the data have multilabel"),
        (None, Task("multilabel", CLASSES), "is for classify, the data have multilabel"),
        (
            Task("ordinal", CLASSES),
            Task("ordinal", CLASSES, "cumulative"),
            "is for ordinal (corn), the data have ordinal (cumulative)",
        ),
        (Task("ordinal", CLASSES), TASK, "is for ordinal (corn), the data have classify"),
    ],
)
def test_a_head_for_another_task_is_not_kept(made, wanted, words):
    settings = config(name="lenet5", image_size=28, keep_head=True)
    read = model_spec("lenet5").input
    network, _ = study.make_model(settings, wanted, read)
    flat = drawn(network, 28)
    kept = dataclasses.replace(weights("lenet5", read, flat), classes=CLASSES, task=made)
    with pytest.raises(UserError) as caught:
        study.initial_variables(network, settings, kept, wanted)
    message = f"model.keep_head: the head of net.safetensors {words}; set it to False for a new "
    assert str(caught.value) == message + "head"


def test_a_kept_head_of_numbers_is_in_the_scale_of_the_data():
    settings = config(name="lenet5", image_size=28, keep_head=True)
    read = model_spec("lenet5").input
    old, new = (Task("regress", ("age",), mean=(m,), std=(s,)) for m, s in ((50, 10), (40, 20)))
    network, _ = study.make_model(settings, new, read)
    flat = drawn(network, 28)
    kept = dataclasses.replace(weights("lenet5", read, flat), classes=("age",), task=old)
    filled, report = study.initial_variables(network, settings, kept, new)
    head = filled["params"]["head"]
    np.testing.assert_allclose(head["kernel"], flat["params/head/kernel"] / 2, rtol=1e-6)
    np.testing.assert_allclose(head["bias"], flat["params/head/bias"] / 2 + 0.5, rtol=1e-6)
    assert "head from the scale of the file's targets" in str(report)


def test_a_network_for_masks_is_for_no_other_task():
    plain, segment = config(), {**config(), "task": "segment"}
    assert study.fits_task(plain, "regress") and not study.fits_task(plain, "segment")
    assert study.fits_task(segment, "segment") and not study.fits_task(segment, "classify")
    assert not study.fits_task({**plain, "task": "ordinal"}, "classify")


def test_a_decoder_with_too_few_widths_needs_no_data_to_be_refused():
    wide = {**config(name="resnet18", image_size=64, decoder="4,4,4,4,4"), "task": "segment"}
    study.check_decoder(wide)
    with pytest.raises(UserError, match=r"model.decoder=4,4: at this image size .* has 5 sizes"):
        study.check_decoder({**wide, "model": {**wide["model"], "decoder": "4,4"}})


def test_settings_that_do_nothing_are_named():
    changed = config(decoder="4,4")
    changed["eval"] |= {"surface_tolerance": 3.0, "target_sensitivity": 0.9}
    decoder = "model.decoder=4,4 has no effect: it is for the task segment"
    tolerance = "eval.surface_tolerance=3.0 has no effect: it is for the task segment"
    sensitivity = (
        "eval.target_sensitivity=0.9 has no effect: it is for the task classify or ordinal or "
        "multilabel"
    )
    assert unused_settings(changed, "classify") == [decoder, tolerance]
    assert unused_settings(changed, "segment") == [sensitivity]
    assert unused_settings(changed, "regress") == [decoder, tolerance, sensitivity]
    assert unused_settings(config(), "regress") == []


def test_auxiliary_heads_keep_their_trunk_and_get_new_classifiers():
    settings = config(name="googlenet", image_size=32, auxiliary=0.3)
    read = model_spec("googlenet").input
    network, _ = study.make_model(settings, TASK, read)
    shapes = variable_shapes(network, 32)
    flat = drawn(network, 32)
    filled, report = study.initial_variables(
        network, settings, weights("googlenet", read, flat), TASK
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
