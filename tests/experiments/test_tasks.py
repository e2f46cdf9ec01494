"""Every task from the command line: what a run writes, evaluates and predicts."""

import csv
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from medtl_jax.data.catalog import Dataset
from medtl_jax.data.export import export_dataset
from medtl_jax.data.phantom import make_phantom
from medtl_jax.data.phantom_tasks import retarget

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUDY = f"--config={ROOT / 'configs' / 'finetune.py'}"
# Five layers with batch norms: what a task makes of a network's outputs is the same for every
# network, and compilation is most of the time.
TINY = {
    "model.name": "lenet5_bn",
    "model.weights": "none",
    "data.phantom.train": 48,
    "data.phantom.val": 24,
    "data.phantom.test": 24,
    "model.image_size": 32,
    "model.decoder": "8,8,8",
    "train.epochs": 1,
    "train.min_steps": 0,
    "data.batch_size": 16,
    "eval.batch_size": 16,
    "eval.resamples": 50,
    "transfer.groups.low": "stem,stage1",
}
HIGH = {"segment": "decoder,head"}
FIRST = {
    "classify": ("accuracy", "auc", "ece_calibrated", "mcc"),
    "ordinal": ("quadratic_kappa", "accuracy", "nll_calibrated"),
    "multilabel": ("auc", "pr_auc", "f1_micro"),
    "segment": ("dice", "iou", "hd95", "nsd", "dice_pooled"),
    "regress": ("mae", "rmse", "r2", "pearson"),
}


def call(launch, workdir, task, **settings) -> int:
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    high = {"task": task, "transfer.groups.high": HIGH.get(task, "features,head")}
    keys = [f"--config.{key}={value}" for key, value in {**TINY, **high, **changes}.items()]
    with jax.numpy_dtype_promotion("standard"):
        return launch.run_command(["launch.py", STUDY, f"--workdir={workdir}", *keys])


@pytest.fixture(scope="module", params=FIRST)
def trained(request, launch, tmp_path_factory) -> tuple[str, pathlib.Path]:
    """A task and the folder of a tiny run of it."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    assert call(launch, folder, request.param) == 0
    return request.param, folder


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.slow
def test_a_run_of_each_task_writes_what_it_should(trained):
    task, folder = trained
    metrics = read_metrics(folder)
    assert set(FIRST[task]) <= metrics["test"].keys()
    for name in FIRST[task]:
        entry = metrics["test"][name]
        value, interval = entry["value"], entry["ci95"]
        assert np.isfinite(value) and (interval or entry["reason"])
        assert interval is None or interval[0] <= value <= interval[1]
        assert entry["n"] == 24 or task == "multilabel"
    # The phantom's patients have images of several classes: there is no one truth of a patient.
    mixed = task in ("classify", "ordinal")
    by_patient = FIRST[task][0] in metrics.get("test_patient", {})
    assert by_patient == (task in ("multilabel", "regress"))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert ("no scores by patient" in page.lower()) == mixed
    assert (folder / "report.html").stat().st_size < 5_000_000
    assert list((folder / "tensorboard").iterdir())
    card = json.loads((folder / "calibration.json").read_text())
    temperatures = {"multilabel": 3, "regress": 0}.get(task, 1)
    assert card["fitted_on"] == "val" and len(card["temperature"]) == temperatures
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["task"]["name"] == environment["data"]["task"] == task
    assert f"--config.task={task}" in environment["command"]
    with np.load(folder / "predictions.npz") as arrays:
        score, target = arrays["test_score"], arrays["test_target"]
        assert len(np.unique(arrays["test_id"])) == len(score) == len(target) == 24
        if task in ("classify", "ordinal", "segment"):
            np.testing.assert_allclose(score.astype(float).sum(-1), 1, atol=5e-3)


@pytest.mark.slow
def test_evaluate_gives_the_metrics_of_the_run(trained, launch, tmp_path):
    task, folder = trained
    settings = {"experiment": "evaluate", "eval__run": folder, "eval__splits": "test"}
    assert call(launch, tmp_path / "scores", task, **settings) == 0
    found, wanted = read_metrics(tmp_path / "scores"), read_metrics(folder)
    assert found == {name: wanted[name] for name in wanted if name.startswith("test")}
    assert (tmp_path / "scores" / "report.html").stat().st_size < 5_000_000


@pytest.mark.slow
def test_what_was_fitted_on_val_is_not_scored_there(trained, launch, tmp_path, no_pictures_here):
    task, folder = trained
    settings = {"experiment": "evaluate", "eval__run": folder, "eval__splits": "val"}
    assert call(launch, tmp_path / "scores", task, **settings) == 0
    found, wanted = read_metrics(tmp_path / "scores"), read_metrics(folder)
    assert found == {name: wanted[name] for name in wanted if name.startswith("val")}
    assert not any("@" in name or "_calibrated" in name for name in found["val"])
    fitted = {name.split("/")[0] for name in wanted["test"]} - {
        name.split("/")[0] for name in wanted["val"]
    }
    calibrated = {"ece_calibrated", "brier_calibrated", "nll_calibrated"}
    if task in ("segment", "regress"):
        assert fitted == (calibrated if task == "segment" else set())
        return
    assert fitted >= calibrated | {"recall@youden", "recall@sensitivity"}
    assert all(name.endswith(("_calibrated", "@youden", "@sensitivity")) for name in fitted)


@pytest.mark.slow
def test_evaluate_scores_a_table_as_its_source(trained, launch, tmp_path, no_pictures_here):
    task, folder = trained
    whole = retarget(make_phantom(32, train=48, val=24, test=24), task, 0)
    table = Dataset(whole.spec, {"test": whole.splits["test"]})
    form = export_dataset(table, "csv", tmp_path / "set").config
    settings = {key.replace(".", "__"): value for key, value in form.items() if key != "task"}
    settings |= {"experiment": "evaluate", "eval__run": folder}
    assert call(launch, tmp_path / "scores", task, **settings) == 0
    found, wanted = read_metrics(tmp_path / "scores"), read_metrics(folder)
    assert found == {name: wanted[name] for name in wanted if name.startswith("test")}
    with (
        np.load(tmp_path / "scores" / "predictions.npz") as ours,
        np.load(folder / "predictions.npz") as theirs,
    ):
        for name in ("test_target", "test_score", "test_patient"):
            np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.slow
def test_predict_agrees_with_the_run(trained, launch, tmp_path, no_pictures_here):
    task, folder = trained
    split = make_phantom(32, train=48, val=24, test=24, splits=("test",)).splits["test"]
    images = tmp_path / "images"
    images.mkdir()
    for number, image in enumerate(split.images[:6]):
        picture = Image.fromarray(image[..., 0])
        picture.save(images / f"{number}.png")
    settings = {"experiment": "predict", "eval__run": folder, "data__dir": images}
    assert call(launch, tmp_path / "table", task, **settings) == 0
    with (tmp_path / "table" / "predictions.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert [row[0] for row in rows] == [f"{number}.png" for number in range(6)]
    with np.load(folder / "predictions.npz") as arrays:
        score = arrays["test_score"][:6].astype(float)
    if task == "segment":
        for row, wanted in zip(rows, score, strict=True):
            with Image.open(tmp_path / "table" / row[1]) as mask:
                assert mask.size == (32, 32)
                assert ((np.asarray(mask) > 0) == wanted.argmax(-1)).mean() > 0.995
        return
    count = score.shape[1]
    found = np.array([row[-count:] for row in rows], float)
    np.testing.assert_allclose(found, score, rtol=1e-4, atol=1e-4)
    assert len(header) == len(rows[0])
