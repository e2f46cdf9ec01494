"""What a repository of the hub says of its weights, and what is made of it."""

import json

import numpy as np
import pytest

from medtl_jax.errors import UserError
from medtl_jax.models import inputs
from medtl_jax.models.inputs import InputSpec
from medtl_jax.models.registry import list_models, model_spec, variable_shapes
from medtl_jax.objectives.task import Task
from medtl_jax.weights.hub import NO_CONFIG, config_path, read_input
from medtl_jax.weights.pretrained import open_pretrained, save_weights
from medtl_jax.weights.safetensors_files import write_safetensors
from medtl_jax.weights.tables import timm_architecture

# As timm 1.0.31 writes it for resnet18, of pretrained_cfg what matters here.
ARGUMENTS = {"in_chans": 3, "num_classes": 1000, "global_pool": "avg"}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
RESNET18 = {
    "architecture": "resnet18",
    "num_classes": 1000,
    "num_features": 512,
    "global_pool": "avg",
    "model_args": ARGUMENTS,
    "pretrained_cfg": {"tag": "a1_in1k", "mean": MEAN, "std": STD, "first_conv": "conv1"},
}


def changed(**entries):
    return json.dumps({**RESNET18, **entries})


def cfg(**entries):
    return changed(pretrained_cfg={"mean": MEAN, "std": STD, **entries})


@pytest.fixture
def refusal(tmp_path):
    """`refuse(text of the config) -> message`, one line."""

    def refuse(text, model="resnet18", architecture="resnet18"):
        path = tmp_path / "config.json"
        path.write_text(text)
        with pytest.raises(UserError) as caught:
            read_input(path, model, architecture)
        message = str(caught.value)
        assert message.isprintable() and len(message) < 600
        return message

    return refuse


def test_mean_and_std_are_those_of_the_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(RESNET18))
    read = read_input(path, "resnet18", "resnet18")
    assert read.mean == pytest.approx(inputs.IMAGENET.mean)
    assert read.std == pytest.approx(inputs.IMAGENET.std) and not read.offset
    # As efficientnet_b0.ra4_e3600_r224_in1k has them; an older config has no model_args.
    half = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    path.write_text(json.dumps({"architecture": "efficientnet_b0", "pretrained_cfg": half}))
    assert read_input(path, "efficientnet_b0", "efficientnet_b0") == inputs.CENTRED
    path.write_text(cfg(mean=[0, 0, 0], std=[1, 1, 1]))
    assert read_input(path, "resnet18", "resnet18") == InputSpec((0.0,) * 3, (255.0,) * 3)


@pytest.mark.parametrize(
    "text",
    [
        NO_CONFIG.decode(),
        "[]",
        "null",
        '{"architectures": ["ResNetForImageClassification"]}',
        changed(pretrained_cfg=None),
        changed(architecture=["resnet18"]),
        # timm before 0.8: the cfg's entries at the top.
        json.dumps({"architecture": "resnet18", "mean": MEAN, "std": STD}),
    ],
)
def test_repositories_without_timms_config(refusal, text):
    message = refusal(text)
    assert "no config.json that names timm's architecture and pretrained_cfg" in message
    assert message.endswith("download the file by hand and set model.weights to its path")


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b"{}" + b" " * 2**20, b"\xff\xfe{"])
def test_a_damaged_config(tmp_path, data):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(
        UserError, match=r"config\.json, kept as .*, cannot be read \(.*Error\); dow"
    ):
        read_input(tmp_path / "config.json", "resnet18", "resnet18")


@pytest.mark.parametrize(
    ("text", "model", "ours", "words"),
    [
        (changed(architecture="resnet18d"), "resnet18", "resnet18", "'resnet18d', but resnet18 is"),
        (
            changed(architecture="efficientnet_lite0"),
            "efficientnet_lite0",
            "tf_efficientnet_lite0",
            "says architecture 'efficientnet_lite0', but efficientnet_lite0 is timm's "
            "tf_efficientnet_lite0;",
        ),
        (changed(architecture="vgg16"), "vgg16", None, "but vgg16 is no architecture of timm's"),
        (changed(architecture="\x1b[2J" * 99), "resnet18", "resnet18", r"says architecture '\x1b["),
        (changed(model_args={**ARGUMENTS, "output_stride": 8}), *["resnet18"] * 2, "output_stride"),
        (changed(model_args={"global_pool": "max"}), "resnet18", "resnet18", "by 'global_pool'"),
        (changed(global_pool="avgmax"), "resnet18", "resnet18", "by 'global_pool'"),
        (changed(global_pool=["avg"]), "resnet18", "resnet18", "by 'global_pool'"),
        (changed(model_args=[]), "resnet18", "resnet18", "no valid model_args"),
    ],
)
def test_other_networks(refusal, text, model, ours, words):
    assert words in refusal(text, model, ours)


@pytest.mark.parametrize(
    "text",
    [
        cfg(mean=None),
        cfg(std="0.5"),
        cfg(mean=[]),
        cfg(mean=MEAN[:2]),
        cfg(mean=[0.5, 0.5, 1.5]),
        cfg(mean=[0.5, 0.5, -0.5]),
        cfg(mean=[0.5, 0.5, True]),
        cfg(mean=[0.5, 0.5, "0.5"]),
        cfg(mean=[0.5, 0.5, float("nan")]),
        cfg(std=[0.5, 0.5, float("inf")]),
        cfg(std=[0.5, 0.5, 0.0]),
        cfg(mean=[0.5] * 2000, std=[0.5] * 2000),
        changed(pretrained_cfg={}),
    ],
)
def test_means_that_are_none(refusal, text):
    assert "no valid pretrained_cfg.mean and .std" in refusal(text)


# timm 1.0.31, whose networks were compared with torchvision's on equal weights.
ARCHITECTURES = {
    "densenet121": "densenet121",
    "efficientnet_b0": "efficientnet_b0",
    "efficientnet_lite0": "tf_efficientnet_lite0",
    "efficientnet_lite1": "tf_efficientnet_lite1",
    "efficientnet_lite2": "tf_efficientnet_lite2",
    "inception_v3": "inception_v3",
    "mobilenet_v2": "mobilenetv2_100",
    "resnet18": "resnet18",
    "resnet18_3x3": "resnet18",
    "resnet34": "resnet34",
    "resnet34_3x3": "resnet34",
    "resnet50": "resnet50",
    "resnet50_3x3": "resnet50",
    "resnet101": "resnet101",
    "resnet101_3x3": "resnet101",
}


def test_architectures_that_are_ours():
    found = {name: timm_architecture(name) for name in list_models()}
    assert {name: ours for name, ours in found.items() if ours} == ARCHITECTURES


# ---- in open_pretrained ------------------------------------------------------------------------


@pytest.fixture
def stem(tmp_path):
    """A file with the first tensor of a ResNet-18 under torchvision's and timm's name."""
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"conv1.weight": np.ones((64, 3, 7, 7), np.float32)}, {})
    return path


def test_the_config_beside_a_file_decides(stem):
    spec = model_spec("resnet18")
    alone = open_pretrained(spec, stem)
    assert (alone.input, alone.input_origin) == (inputs.IMAGENET, "names of torchvision")
    config_path(stem).write_text(cfg(mean=[0.5] * 3, std=[0.5] * 3))
    weights = open_pretrained(spec, stem)
    assert (weights.input, weights.input_origin) == (inputs.CENTRED, "as its repository says")
    assert weights.scheme == "torchvision"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (NO_CONFIG.decode(), "its repository has no config.json"),
        (changed(architecture="resnet18d"), "resnet18d"),
        (cfg(mean=[0.5], std=[0.5]), "pretrained_cfg.mean for 1 channels, the weights of resnet18"),
    ],
)
def test_a_config_that_does_not_fit_names_the_file(stem, config, words):
    config_path(stem).write_text(config)
    with pytest.raises(UserError) as caught:
        open_pretrained(model_spec("resnet18"), stem)
    message = str(caught.value)
    assert message.startswith(f"weights file {stem}: ") and words in message


@pytest.mark.parametrize("config", [NO_CONFIG.decode(), changed(architecture="resnet18d"), "{"])
def test_a_file_of_ours_needs_no_config(tmp_path, config):
    path, spec = tmp_path / "model.safetensors", model_spec("lenet5")
    shapes = variable_shapes(spec.build(3), 28)["params"]["head"]
    head = {name: np.zeros(leaf.shape, np.float32) for name, leaf in shapes.items()}
    save_weights(path, {"params": {"head": head}}, spec, Task("classify", ("a", "b", "c")))
    config_path(path).write_text(config)
    weights = open_pretrained(spec, path)
    assert (weights.input, weights.input_origin) == (spec.input, "as the file says")
