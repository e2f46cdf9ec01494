"""One set in four forms, in memory and streamed: the same run, from its batches to its metrics."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from medtl_jax.data.catalog import SPLITS, Dataset
from medtl_jax.data.export import KINDS, export_dataset
from medtl_jax.data.phantom import make_phantom
from medtl_jax.data.phantom_tasks import retarget
from medtl_jax.data.readers import load_dataset
from medtl_jax.data.streams import Streamed
from medtl_jax.report.tensorboard import EventWriter

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUDY = f"--config={ROOT / 'configs' / 'finetune.py'}"
SIZE = 32
# All of a network of five layers is trained, on augmented images, over two epochs.
TINY = {
    "model.name": "lenet5",
    "model.weights": "none",
    "model.image_size": SIZE,
    "model.decoder": "8,8,8",
    "train.epochs": 2,
    "train.min_steps": 0,
    "data.batch_size": 16,
    "eval.batch_size": 16,
    "eval.resamples": 50,
}


def phantom(task: str) -> Dataset:
    """The phantom with nothing but images and targets, which every form can hold."""
    dataset = retarget(make_phantom(SIZE, train=60, val=30, test=30), task, 0)
    splits = {
        name: dataclasses.replace(split, patients=None, extra={})
        for name, split in dataset.splits.items()
    }
    return Dataset(dataset.spec, splits)


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> dict[str, dict[str, str]]:
    """`{kind or task: keys that read it}`: four forms of the labels, a table of the masks."""
    root = tmp_path_factory.mktemp("forms")
    labels, masks = phantom("classify"), phantom("segment")
    names = {"folder": "folder", "npz": "set.npz", "csv": "csv", "tfds": "breast"}
    found = {kind: export_dataset(labels, kind, root / names[kind]).config for kind in KINDS}
    return found | {"segment": export_dataset(masks, "csv", root / "masks").config}


def command(folder: pathlib.Path, form: dict[str, str], **settings) -> list[str]:
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    keys = [f"--config.{key}={value}" for key, value in {**TINY, **form, **changes}.items()]
    return ["launch.py", STUDY, f"--workdir={folder}", *keys]


@pytest.fixture(scope="module")
def train(launch, no_pictures, tmp_path_factory):
    """`train(form, **settings) -> folder` of a finished run."""

    def run(form: dict[str, str], **settings) -> pathlib.Path:
        folder = tmp_path_factory.mktemp("run") / "run"
        with jax.numpy_dtype_promotion("standard"):
            assert launch.run_command(command(folder, form, **settings)) == 0
        return folder

    return run


@pytest.fixture(scope="module")
def in_memory(train, forms) -> dict[str, pathlib.Path]:
    """The runs on the two tables, in memory."""
    return {name: train(forms[name]) for name in ("csv", "segment")}


@pytest.fixture(scope="module")
def streamed(train, forms):
    """`streamed(kind) -> folder` of the run on a form that streams, trained once."""
    return functools.cache(lambda kind: train(forms[kind], data__cache_gb=0))


def predictions(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Targets and scores; the names of the images are those of their form."""
    with np.load(folder / "predictions.npz") as arrays:
        return {name: arrays[name] for name in arrays.files if not name.endswith("_id")}


def read(path: pathlib.Path) -> dict:
    return json.loads(path.read_text())


def records(folder: pathlib.Path) -> list[dict]:
    """The epochs, without what they took: a streamed set lies on no device."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    cost = ("seconds", "cpu_seconds", "compile_seconds", "images_per_second")
    cost += ("step_bytes", "data_bytes")
    return [
        {key: value for key, value in json.loads(line).items() if key not in cost} for line in lines
    ]


def test_the_forms_have_the_same_images_and_targets(forms):
    wanted = phantom("classify")
    for kind in KINDS:
        config = {
            key.removeprefix("data."): value
            for key, value in forms[kind].items()
            if key.startswith("data.")
        }
        for cache in (4.0, 0.0):
            found = load_dataset({**config, "cache_gb": cache}, SIZE)
            assert found.spec.task == "classify"
            assert found.spec.classes == wanted.spec.classes
            for name in SPLITS:
                ours, theirs = wanted.splits[name], found.splits[name]
                streams = isinstance(theirs.images, Streamed)
                assert streams == (cache == 0 and kind != "npz")
                np.testing.assert_array_equal(ours.images, theirs.images[:])
                np.testing.assert_array_equal(ours.target, theirs.target)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "npz", "tfds"])
def test_a_run_is_the_same_on_every_form(train, forms, in_memory, kind):
    folder, other = train(forms[kind]), in_memory["csv"]
    found, wanted = predictions(folder), predictions(other)
    assert (
        found.keys()
        == wanted.keys()
        == {f"{split}_{what}" for split in ("val", "test") for what in ("target", "score")}
    )
    for name, array in wanted.items():
        assert array.dtype == found[name].dtype
        np.testing.assert_array_equal(array, found[name], err_msg=name)
    assert len(np.unique(wanted["test_score"], axis=0)) == 30
    assert records(folder) == records(other)
    for name in ("metrics.json", "calibration.json"):
        assert read(folder / name) == read(other / name)


def assert_close(found, wanted, where: str = "") -> None:
    """Two trees of JSON values are equal, numbers up to what the order of a sum makes."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key, value in wanted.items():
            assert_close(found[key], value, f"{where}/{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for one, value in zip(found, wanted, strict=True):
            assert_close(one, value, where)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=2e-5, abs=2e-6), where
    else:
        assert found == wanted, where


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "tfds", "segment"])
def test_streaming_is_the_same_as_memory(streamed, in_memory, kind):
    folder, other = streamed(kind), in_memory[kind.replace("tfds", "csv")]
    notes = read(folder / "environment.json")["data"]["notes"]
    assert any("stream from their files" in note for note in notes)
    assert not any("stream" in note for note in read(other / "environment.json")["data"]["notes"])
    found, wanted = predictions(folder), predictions(other)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        # Masks' scores are stored with 11 bits.
        allowed = 1e-6 if array.dtype != np.float16 else 2.0**-11
        np.testing.assert_allclose(
            found[name].astype(float), array.astype(float), rtol=0, atol=allowed, err_msg=name
        )
    assert_close(read(folder / "metrics.json"), read(other / "metrics.json"))
    assert_close(records(folder), records(other))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "segment"])
def test_a_streamed_run_that_was_interrupted_ends_like_a_whole_one(
    launch, streamed, forms, tmp_path, monkeypatch, kind
):
    whole, folder = streamed(kind), tmp_path / "run"

    def interrupt(writer, record):
        raise KeyboardInterrupt

    arguments = command(folder, forms[kind], data__cache_gb=0)
    with jax.numpy_dtype_promotion("standard"):
        with monkeypatch.context() as patch:
            patch.setattr(EventWriter, "epoch", interrupt)
            assert launch.run_command(arguments) == 130
        assert len(records(folder)) == 1 and not (folder / "metrics.json").exists()
        assert launch.run_command(arguments) == 0
    assert (folder / "predictions.npz").read_bytes() == (whole / "predictions.npz").read_bytes()
    assert read(folder / "metrics.json") == read(whole / "metrics.json")
    assert records(folder) == records(whole)
