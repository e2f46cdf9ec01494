"""A segmentation through the command line: what belongs to it alone, and its run folder."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import finetune, reporting, study, trained
from experiments.settings import check_config
from medtl_jax import runs
from medtl_jax.console import Console
from medtl_jax.objectives.task import Task
from medtl_jax.report.predict import Predictions, predict_masks, predict_scores

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUDY = f"--config={ROOT / 'configs' / 'finetune.py'}"
TINY = {
    "task": "segment",
    "model.name": "lenet5",
    "model.weights": "none",
    "model.image_size": 32,
    "model.decoder": "4,4,4",
    "data.phantom.train": 16,
    "data.phantom.val": 16,
    "data.phantom.test": 16,
    "data.batch_size": 16,
    "data.bit_depth": 12,
    "train.epochs": 1,
    "train.min_steps": 0,
    "eval.batch_size": 16,
    "eval.resamples": 20,
}


def command(workdir, **settings) -> list[str]:
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    keys = [f"--config.{key}={value}" for key, value in {**TINY, **changes}.items()]
    return ["launch.py", STUDY, f"--workdir={workdir}", *keys]


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """As in launch.py: optax mixes types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def run(launch, no_pictures, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    assert launch.run_command(command(folder)) == 0
    return folder


@pytest.fixture
def refusal(launch, tmp_path, capfd):
    """`refusal(**settings) -> message` of a command that writes nothing."""

    def refuse(**settings) -> str:
        capfd.readouterr()
        assert launch.run_command(command(tmp_path / "new", **settings)) == 2
        assert not (tmp_path / "new").exists()
        return capfd.readouterr().err

    return refuse


@pytest.fixture
def images(run, tmp_path) -> pathlib.Path:
    """A folder of one image."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.full((32, 48), 90, np.uint8)).save(folder / "a.png")
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train__select": "auc"}, "train.select='auc' is no value of the task segment"),
        ({"train__sampling": "balanced"}, "train.sampling=balanced means nothing for the task"),
        ({"model__name": "baseline_cnn", "model__decoder": "4"}, "write 3 numbers of channels"),
        ({"task": "regress", "train__select": "dice"}, "is no value of the task regress"),
    ],
)
def test_options_are_checked_before_the_data_are_read(refusal, settings, message):
    found = refusal(**settings, data__name="folder", data__dir="nowhere")
    assert message in found and "nowhere" not in found


def test_masks_are_named_after_images_whose_names_are_not_too_long(launch, refusal, run, images):
    shutil.copy(images / "a.png", images / f"{'ü' * 119}.png")
    predict = {"experiment": "predict", "eval__run": run, "data__dir": images}
    assert launch.run_command(command(images.parent / "masks", **predict)) == 0
    masks = sorted((images.parent / "masks" / "masks").iterdir())
    assert [path.name for path in masks] == ["a.png.png", f"{'ü' * 119}.png.png"]
    with Image.open(masks[0]) as mask:
        assert mask.size == (48, 32) and set(np.unique(mask)) <= {0, 255}
    (images / "a.png").rename(images / f"{'b' * 239}.png")
    message = refusal(**predict)
    assert "bbb.png is too long a name for its mask, + .png; rename it" in message


def test_predict_reads_files_at_the_bit_depth_of_the_run(run, images):
    given = {"eval.run"}
    config = json.loads((run / runs.CONFIG).read_text())
    config["eval"]["run"] = str(run)
    config["data"]["bit_depth"] = 16
    assert trained.take_model(config, given)["data"]["bit_depth"] == 12
    taken = trained.take_model(config, {*given, "data.bit_depth"})
    assert taken["data"]["bit_depth"] == 16
    check_config(taken, "here")


@pytest.mark.parametrize("task", ["", "classify"])
def test_a_run_folder_of_two_runs_is_refused(refusal, run, images, tmp_path, task):
    mixed = pathlib.Path(shutil.copytree(run, tmp_path / "mixed"))
    config = json.loads((mixed / runs.CONFIG).read_text())
    (mixed / runs.CONFIG).write_text(json.dumps({**config, "task": task}))
    settings = {"experiment": "predict", "eval__run": mixed, "data__dir": images}
    message = refusal(**settings, task=task)
    assert f"is for the task '{task}'" in message and "they are not of one run" in message


def test_settings_without_effect_are_noted(run, tmp_path, capfd):
    config = {**json.loads((run / runs.CONFIG).read_text()), "task": "classify"}
    config["transfer"]["groups"] = {"frozen": "", "low": "", "high": ".*"}
    finetune.prepare(study.Request(config, tmp_path / "new", "", Console()))
    output = " ".join(capfd.readouterr().out.split())
    assert "note: model.decoder=4,4,4 has no effect: it is for the task segment" in output
    assert "surface_tolerance" not in output


def test_masks_of_patients_are_noted_to_be_scored_by_image(run):
    config = json.loads((run / runs.CONFIG).read_text())
    with np.load(run / "predictions.npz") as arrays:
        target, score = arrays["test_target"][:4], arrays["test_score"][:4]
    task = Task("segment", ("background", "lesion"))
    ids, images = np.array(list("abcd")), np.zeros((4, 32, 32, 1), np.uint8)
    alone = Predictions(ids, target, score, images)
    metrics, notes = reporting.score_splits(task, {"test": alone}, None, config, "")
    assert metrics.keys() == {"test"} and notes == []
    grouped = Predictions(ids, target, score, images, np.array(list("ppqq")))
    metrics, notes = reporting.score_splits(task, {"test": grouped}, None, config, "")
    assert metrics.keys() == {"test"} and metrics["test"]["dice"]["n_patients"] == 2
    assert notes == ["Masks are scored by image; intervals resample whole patients."]


def test_masks_are_the_most_probable_classes():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((10, 3, 4, 3)).astype(np.float32)

    def predict(variables, images, then):
        return np.concatenate([then(logits[start : start + 4]) for start in (0, 4, 8)])

    task = Task("segment", ("a", "b", "c"))
    masks = predict_masks(predict, None, logits, task)
    scores = predict_scores(predict, None, logits, task)
    assert (masks.dtype, scores.dtype) == (np.uint8, np.float16)
    np.testing.assert_array_equal(scores, task.score(logits))
    np.testing.assert_array_equal(masks, scores.argmax(axis=-1))
