"""Trainings in a row, through the command line: what one has learnt is where the next begins."""

import json
import pathlib
import re
import shlex
import shutil

import jax
import numpy as np
import pytest
from digit_runs import SETTINGS, digits, tensors, write_digits

from medtl_jax import runs
from medtl_jax.models.inputs import normalize
from medtl_jax.models.registry import create_model, variable_shapes
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.weights.files import read_weights
from medtl_jax.weights.pretrained import fill, open_pretrained

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUDY = f"--config={ROOT / 'configs' / 'finetune.py'}"


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """As in launch.py: optax mixes types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def train(launch, no_pictures, tmp_path_factory):
    """`train(data, weights, **settings) -> folder` of a finished training; `a__b` sets `a.b`."""

    def call(data: pathlib.Path, weights, **settings) -> pathlib.Path:
        folder = tmp_path_factory.mktemp("runs") / "run"
        changes = {key.replace("__", "."): value for key, value in settings.items()}
        keys = {**SETTINGS, "data.dir": data, "model.weights": weights, **changes}
        arguments = [f"--config.{key}={value}" for key, value in keys.items()]
        assert launch.run_command(["launch.py", STUDY, f"--workdir={folder}", *arguments]) == 0
        return folder

    return call


@pytest.fixture(scope="module")
def five(tmp_path_factory) -> pathlib.Path:
    """Digits 0 to 4."""
    return write_digits(tmp_path_factory.mktemp("five") / "digits.npz", 5, seed=1)


@pytest.fixture(scope="module")
def first(train, five) -> pathlib.Path:
    """A LeNet from scratch on five digits."""
    return train(five, "none")


def weights_card(folder: pathlib.Path) -> dict:
    return runs.read_json(folder / runs.ENVIRONMENT)["weights"]


FREEZE_ALL_BUT_THE_HEAD = {
    "transfer__groups__frozen": "stem,stage1,features",
    "transfer__groups__high": "head",
}


def test_the_file_holds_the_network_that_made_the_predictions(first):
    _, spec = create_model("lenet5", 5)
    weights = open_pretrained(spec, first / runs.WEIGHTS)
    assert json.loads(weights.file.metadata["classes"]) == ["0", "1", "2", "3", "4"]
    assert weights_card(first)["report"] == "no pretrained weights"
    read = weights.input
    assert (read.channels, read.mean, read.offset) == (1, (127.5,), False)
    network, _ = create_model("lenet5", 5, in_chans=1)
    variables, _ = fill(variable_shapes(network, 28), weights)
    with np.load(first / "predictions.npz") as found:
        score, target = found["test_score"], found["test_target"]
    images, labels = digits(30, 5, 12)
    logits, _ = network.apply(variables, normalize(images[..., None], read))
    np.testing.assert_array_equal(target, labels)
    np.testing.assert_allclose(jax.nn.softmax(logits), score, rtol=0, atol=1e-6)


def test_a_new_head_on_the_features_of_the_first_run(train, first, tmp_path_factory):
    three = write_digits(tmp_path_factory.mktemp("three") / "digits.npz", 3, seed=2)
    second = train(three, first, **FREEZE_ALL_BUT_THE_HEAD)
    before, after = tensors(first), tensors(second)
    assert before.keys() == after.keys()
    for name, array in before.items():
        if not name.startswith("params/head/"):
            np.testing.assert_array_equal(after[name], array)
    assert after["params/head/kernel"].shape == (84, 3)
    card = weights_card(second)
    assert card["sha256"] == read_weights(first / runs.WEIGHTS).sha256
    lines = card["report"].splitlines()
    # 146,156 with three channels and 1000 classes: 300 less and 85,000 less.
    assert lines[0].startswith("loaded 60,856 values in 8 tensors from weights.safetensors (sha")
    assert lines[-2:] == [
        "kept own init (255 values): params/head/bias [3], params/head/kernel [84, 3]",
        "not taken from the file: params/head/bias [5], params/head/kernel [84, 5]",
    ]


def test_the_head_is_kept_on_demand_from_the_folder_or_its_file(train, first, five):
    # Nothing but the features moves, and nothing at all at this rate: the head is the first run's.
    still = {
        "transfer__groups__frozen": "stem,stage1,head",
        "transfer__groups__high": "features",
        "optim__high__lr": 1e-30,
        "optim__high__weight_decay": 0,
        "train__epochs": 1,
        "model__keep_head": True,
    }
    folder = train(five, first, **still)
    before, after = tensors(first), tensors(folder)
    assert all(np.array_equal(after[name], array) for name, array in before.items())
    report = weights_card(folder)["report"]
    assert "kept own" not in report and "not taken" not in report
    with (
        np.load(first / "predictions.npz") as theirs,
        np.load(folder / "predictions.npz") as ours,
    ):
        np.testing.assert_array_equal(ours["test_score"], theirs["test_score"])

    file = train(five, first / runs.WEIGHTS, **still)
    assert (file / runs.WEIGHTS).read_bytes() == (folder / runs.WEIGHTS).read_bytes()
    assert weights_card(file)["sha256"] == weights_card(folder)["sha256"]
    assert runs.read_json(file / runs.METRICS) == runs.read_json(folder / runs.METRICS)


def test_without_keep_head_the_head_is_new(train, first, five):
    folder = train(five, first, train__epochs=1)
    config = runs.read_json(folder / runs.CONFIG)
    assert config["transfer"]["groups"] == {
        "frozen": "stem",
        "low": "stage1,features",
        "high": "head",
    }
    assert "kept own init (425 values)" in weights_card(folder)["report"]
    np.testing.assert_array_equal(
        tensors(folder)["params/stem/conv/conv/kernel"],
        tensors(first)["params/stem/conv/conv/kernel"],
    )


def test_grey_weights_in_a_network_for_colour(train, first, five):
    folder = train(five, first, train__epochs=1, model__in_chans=3)
    card = weights_card(folder)
    assert "adapted: params/stem/conv/conv/kernel from 1 to 3 channels" in card["report"]
    read = {"mean": [127.5] * 3, "std": [127.5] * 3, "offset": False, "contrast": "none"}
    assert card["input"] == read
    kernel = tensors(folder)["params/stem/conv/conv/kernel"]
    wanted = np.repeat(tensors(first)["params/stem/conv/conv/kernel"] / 3, 3, axis=2)
    np.testing.assert_allclose(kernel, wanted, rtol=1e-6)


def test_an_unfinished_run_and_another_network_are_refused(launch, first, five, tmp_path, capfd):
    def refuse(**settings) -> str:
        keys = {**SETTINGS, "data.dir": five, **settings}
        arguments = [f"--config.{key}={value}" for key, value in keys.items()]
        new = tmp_path / "new"
        assert launch.run_command(["launch.py", STUDY, f"--workdir={new}", *arguments]) == 2
        assert not new.exists()
        return capfd.readouterr().err

    message = refuse(**{"model.weights": first, "model.name": "baseline_cnn"})
    assert message.endswith("made for the model 'lenet5', not for baseline_cnn\n")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / runs.CONFIG).write_text("{}")
    message = refuse(**{"model.weights": tmp_path / "begun"})
    assert "no weights.safetensors yet, the run has not finished" in message


# ---- a run that was interrupted ----------------------------------------------------------------


def test_a_resumed_run_needs_no_weights(launch, first, five, tmp_path, monkeypatch, capfd):
    source = pathlib.Path(shutil.copytree(first, tmp_path / "source"))
    keys = {**SETTINGS, "data.dir": five, "model.weights": source}
    arguments = [STUDY, *(f"--config.{key}={value}" for key, value in keys.items())]

    def start(name: str) -> int:
        return launch.run_command(["launch.py", f"--workdir={tmp_path / name}", *arguments])

    assert start("whole") == 0
    save = Checkpoints.save

    def interrupted(self, epoch, *content):
        if epoch == 2:
            raise KeyboardInterrupt
        save(self, epoch, *content)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", interrupted)
        assert start("halved") == 130
    begun = runs.read_json(tmp_path / "halved" / runs.ENVIRONMENT)
    shutil.copytree(tmp_path / "halved", tmp_path / "without")
    shutil.rmtree(tmp_path / "without" / "checkpoints")
    shutil.rmtree(source)

    capfd.readouterr()
    assert start("without") == 2
    assert f"weights file {source}: no such file" in capfd.readouterr().err
    assert start("halved") == 0
    for name in (runs.WEIGHTS, runs.METRICS, "predictions.npz"):
        whole, halved = (tmp_path / run / name for run in ("whole", "halved"))
        assert whole.read_bytes() == halved.read_bytes(), name
    assert begun["weights"] == weights_card(tmp_path / "whole")
    assert weights_card(tmp_path / "halved") == begun["weights"]


# ---- the commands of configs/pretrain.py -------------------------------------------------------


def write_keras(path: pathlib.Path, train: int, test: int, seed: int, step: int) -> None:
    """Ten classes in the arrays of Keras's mnist.npz, every `step`-th pixel of the digits."""
    arrays = {}
    for i, (split, count) in enumerate((("train", train), ("test", test))):
        images, labels = digits(count, 10, 10 * seed + i)
        arrays |= {f"x_{split}": images[:, ::step, ::step], f"y_{split}": labels}
    np.savez(path, **arrays)


def documented_commands() -> list[list[str]]:
    """The command lines in the header of configs/pretrain.py, without `python`."""
    from configs import pretrain

    text = pretrain.__doc__.replace("\\\n", " ")
    found = [shlex.split(line)[1:] for line in re.findall("python launch.py .*", text)]
    assert len(found) == 4
    return [[str(ROOT / word) if word == "launch.py" else word for word in line] for line in found]


@pytest.fixture(scope="module")
def carried(launch, tmp_path_factory):
    """`call(command, *more) -> exit code`, where SOURCE and TARGET have been trained."""
    folder = tmp_path_factory.mktemp("carried")
    write_keras(folder / "mnist.npz", 200, 20, seed=3, step=1)
    write_keras(folder / "usps.npz", 150, 20, seed=4, step=2)
    (folder / "configs").symlink_to(ROOT / "configs")
    short = ["train.epochs=1", "train.min_steps=0", "eval.resamples=20"]

    def call(command: list[str], *more: str) -> int:
        return launch.run_command([*command, *(f"--config.{text}" for text in (*short, *more))])

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        source, target, *_ = documented_commands()
        assert call(source) == 0 and call(target) == 0
        yield call


def ids(folder: str, split: str) -> list[str]:
    with np.load(pathlib.Path(folder) / "predictions.npz") as found:
        return found[f"{split}_id"].tolist()


def test_a_hundred_images_leave_one_of_each_class_for_validation(carried):
    config, environment = (
        runs.read_json(pathlib.Path("TARGET") / name) for name in (runs.CONFIG, runs.ENVIRONMENT)
    )
    assert config["data"]["per_class"] == 10 and config["model"]["weights"] == "SOURCE"
    classes = [str(digit) for digit in range(10)]
    assert environment["data"]["counts"] == {
        "train": dict.fromkeys(classes, 9),
        "val": dict.fromkeys(classes, 1),
        "test": dict.fromkeys(classes, 2),
    }


def test_a_carried_network_is_evaluated_and_predicts_by_its_study(carried):
    _, _, evaluate, predict = documented_commands()
    assert carried(evaluate) == 0
    own, found = (runs.read_json(pathlib.Path(run) / runs.METRICS) for run in ("TARGET", "SCORES"))
    assert found["test"] == own["test"] and found.keys() == {"test"}

    from PIL import Image

    with np.load("usps.npz") as arrays, np.load("TARGET/predictions.npz") as scored:
        images, score = arrays["x_test"], scored["test_score"]
    pathlib.Path("IMAGES").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(f"IMAGES/{number:02}.png")
    assert carried(predict) == 0
    table = np.loadtxt("TABLE/predictions.csv", delimiter=",", skiprows=1, usecols=range(2, 12))
    np.testing.assert_allclose(table, score, rtol=0, atol=1e-6)


def test_a_carved_val_is_that_of_the_run(carried, capfd):
    evaluate = documented_commands()[2]
    program, workdir = evaluate[:-1], evaluate[-1]
    assert workdir.startswith("--workdir=")
    pathlib.Path("link.npz").symlink_to("usps.npz")
    ways = {"VAL": ["data.val_fraction=0.1"], "LINK": ["data.dir=link.npz"]}
    for name, settings in ways.items():
        command = [*program, f"--workdir={name}"]
        assert carried(command, "eval.splits=val", *settings) == 0
        assert ids(name, "val") == ids("TARGET", "val")
        assert len(ids(name, "val")) == 10
        own, found = (runs.read_json(pathlib.Path(run) / runs.METRICS) for run in ("TARGET", name))
        assert found["val"] == own["val"]

    for setting, used in [("per_class=12", 10), ("val_fraction=0.3", 0.1), ("seed_split=1", 0)]:
        capfd.readouterr()
        command = [*program, "--workdir=NONE"]
        assert carried(command, "eval.splits=val", f"data.{setting}") == 2
        message = capfd.readouterr().err
        assert message == (
            f"error: data.{setting} could score images as val that the model of TARGET was "
            f"trained on: that run had {used}; leave it out\n"
        )

    # The same images elsewhere are other data, which are divided as is said here.
    shutil.copy("usps.npz", "other.npz")
    other = ("data.dir=other.npz", "eval.splits=val", "data.per_class=12", "data.val_fraction=0.5")
    assert carried([*program, "--workdir=OTHER"], *other) == 0
    assert len(ids("OTHER", "val")) == 60
