"""A paper's tables at the smallest size: what they hold, how they go on, what is refused."""

import csv

import numpy as np
import pytest
from digit_runs import ROOT, write_digits
from sklearn import metrics as sk

from medtl_jax import runs
from medtl_jax.metrics.table_check import check_table

pytestmark = pytest.mark.usefixtures("small_runs")
STUDY = f"--config={ROOT / 'configs' / 'paper_tables.py'}"


def command(folder, data, **settings):
    usual = {
        "paper.networks": "lenet5=none",
        "paper.baselines": "lbp_logistic",
        "paper.seeds": 2,
        "model.image_size": 32,
        "data.name": "npz",
        "data.dir": data,
        "data.batch_size": 16,
        "train.epochs": 1,
        "train.min_steps": 0,
        "train.devices": 1,
        "eval.batch_size": 16,
        "eval.resamples": 40,
        "transfer.cache_dir": data.parent / "cache",
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    flags = [f"--config.{key}={value}" for key, value in usual.items()]
    return ["launch.py", STUDY, *flags, f"--workdir={folder}"]


@pytest.fixture(scope="module")
def two(small_runs, tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("two") / "digits.npz", 2, seed=1)


@pytest.fixture(scope="module")
def tables(launch, two, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables") / "run"
    assert launch.run_command(command(folder, two)) == 0
    return folder


def predictions(folder, experiment):
    """Target and score of each run of an experiment."""
    found = []
    for cell in sorted((folder / "cells").iterdir()):
        if runs.read_json(cell / runs.CONFIG)["experiment"] == experiment:
            with np.load(cell / "predictions.npz") as file:
                found.append((file["test_target"], file["test_score"]))
    return found


def test_the_cells_are_means_over_the_seeds_of_what_the_runs_predicted(tables):
    with open(tables / "paper_tables.csv", newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["lenet5 (from scratch)", "lbp_logistic"]
    metrics = runs.read_json(tables / runs.METRICS)["test"]
    for model, experiment in (
        ("lenet5 (from scratch)", "finetune"),
        ("lbp_logistic", "traditional"),
    ):
        found = predictions(tables, experiment)
        assert len(found) == 2 and rows[model]["runs"] == "2"
        wanted = {
            "accuracy": [sk.accuracy_score(t, s.argmax(1)) for t, s in found],
            "recall": [sk.recall_score(t, s.argmax(1)) for t, s in found],
            "specificity": [sk.recall_score(t, s.argmax(1), pos_label=0) for t, s in found],
            "dice": [sk.f1_score(t, s.argmax(1)) for t, s in found],
            "iou": [sk.jaccard_score(t, s.argmax(1)) for t, s in found],
            "mae": [np.abs(s[:, 1].astype(float) - t).mean() for t, s in found],
            "mse": [((s[:, 1].astype(float) - t) ** 2).mean() for t, s in found],
        }
        for name, values in wanted.items():
            entry = metrics[f"{name}/{model}"]
            assert entry["value"] == pytest.approx(np.mean(values), abs=1e-6), name
            assert float(rows[model][name]) == pytest.approx(np.mean(values), abs=6e-5), name
            # Draws that are all alike, as of a recall of 1, have no interval.
            assert entry["ci95"] or name not in ("mae", "mse")
            low, high = entry["ci95"] or (entry["value"], entry["value"])
            assert low <= entry["value"] <= high and entry["n"] == 30
    assert not check_table(tables / "paper_tables.csv", binary=True).findings


def test_the_page_has_tables_figures_and_the_check(tables):
    page, words = (tables / "report.html").read_text(), (tables / "paper_tables.md").read_text()
    for text in (page, words):
        assert "Table 2" in text and "Table 3" in text and "Dice equals F1" in text
        assert "18 cells against each other: 0 are impossible" in text
        assert "the positive class" in text
    names = {path.name for path in (tables / "figures").iterdir()}
    wanted = {"figure_6.png", "figure_7.png", "figure_8.png", "figure_9_1.png", "figure_9_2.png"}
    assert wanted <= names


def test_tables_go_on_and_grow_without_making_a_run_twice(launch, two, tables):
    made = {cell: (cell / runs.METRICS).stat().st_mtime_ns for cell in (tables / "cells").iterdir()}
    assert len(made) == 4
    assert (
        launch.run_command(command(tables, two, paper__baselines="lbp_logistic,pixels_logistic"))
        == 0
    )
    again = {
        cell: (cell / runs.METRICS).stat().st_mtime_ns for cell in (tables / "cells").iterdir()
    }
    assert len(again) == 6 and made.items() <= again.items()
    assert "pixels_logistic" in (tables / "paper_tables.md").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"paper__networks": "lenet5"}, "paper.networks: 'lenet5' is not name=weights"),
        ({"paper__networks": "lenet6=none"}, "paper.networks: 'lenet6' is not a model"),
        ({"paper__baselines": "full"}, "paper.baselines: full has a network"),
        ({"paper__baselines": "sift"}, "paper.baselines='sift' is not known"),
        ({"paper__baselines": ""}, "name 1 models"),
        ({"paper__seeds": 0}, "paper.seeds=0 must be at least 1"),
        ({"ablation__seeds": 5}, "set paper.networks, paper.baselines and paper.seeds"),
        ({"task": "segment"}, "one label an image"),
        ({"paper__networks": "lenet5=/no/such/file.pth"}, "/no/such/file.pth"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(launch, two, tmp_path, capfd, settings, message):
    assert launch.run_command(command(tmp_path / "run", two, **settings)) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "run").exists()
