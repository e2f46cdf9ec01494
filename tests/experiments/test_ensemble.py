"""An ensemble: what it trains and what not, its numbers, and that the test has no part in it."""

import json
import pathlib
import shutil
from collections.abc import Iterator

import digit_runs
import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from medtl_jax import runs

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUDY = f"--config={ROOT / 'configs' / 'default.py'}"
RATES = [0.002, 0.004, 0.003]


def command(folder, **settings) -> list[str]:
    usual = {
        **digit_runs.SETTINGS,
        "experiment": "ensemble",
        "model.weights": folder.parent / "weights",
        "data.dir": folder.parent / "digits.npz",
        "train.devices": 1,
        "train.epochs": 2,
        "eval.drift": False,
        "ensemble.members": 3,
        "ensemble.arrays": json.dumps({"optim.high.lr": RATES}),
        **settings,
    }
    flags = [f"--config.{key}={value}" for key, value in usual.items()]
    return ["launch.py", STUDY, *flags, f"--workdir={folder}"]


@pytest.fixture(scope="module")
def finished(launch, small_runs, five, no_pictures, tmp_path_factory) -> Iterator[pathlib.Path]:
    """The folder of an ensemble of three members that began with the same weights."""
    root = tmp_path_factory.mktemp("ensemble")
    digit_runs.write_digits(root / "digits.npz", 3, 0)
    digit_runs.run(root / "weights", five, "none", train__epochs=1)
    from experiments import ensemble

    with pytest.MonkeyPatch.context() as patch:
        # Half of the time, and the subject of other tests.
        patch.setattr(ensemble, "ensemble_figures", lambda found: {})
        patch.setattr(ensemble, "study_sheet", lambda *args: {})
        assert launch.run_command(command(root / "study")) == 0
        yield root / "study"


def result(folder: pathlib.Path) -> dict:
    return runs.read_json(folder / "ensemble.json")


def rows_of(folder: pathlib.Path) -> dict[str, dict]:
    return {row["name"]: row for row in result(folder)["rows"]}


def cells_of(folder: pathlib.Path) -> dict[str, int]:
    """When each finished member was finished, by its folder."""
    return {
        path.name: (path / "metrics.json").stat().st_mtime_ns
        for path in (folder / "cells").iterdir()
        if runs.is_finished(path)
    }


def predictions(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """What a run predicts, in the order of the ids of each split."""
    with np.load(folder / "predictions.npz") as found:
        arrays = dict(found)
    for split in ("val", "test"):
        order = np.argsort(arrays[f"{split}_id"])
        for name in ("id", "target", "score"):
            arrays[f"{split}_{name}"] = arrays[f"{split}_{name}"][order]
    return arrays


def loss_of(found: dict[str, np.ndarray]) -> float:
    score = found["val_score"].astype(np.float64)
    return log_loss(found["val_target"], score / score.sum(axis=1, keepdims=True))


def test_members_are_runs_that_differ_as_they_should(finished):
    members = [row for row in result(finished)["rows"] if row["kind"] == "member"]
    assert [row["name"] for row in members] == [f"lenet5@28, seed {seed}" for seed in range(3)]
    for seed, row in enumerate(members):
        path = finished / row["made_of"]["folder"]
        config = runs.read_json(path / "config.json")
        assert config["seed"] == seed and config["data"]["seed_draw"] == 0
        assert config["optim"]["high"]["lr"] == RATES[seed]
        assert path.name.startswith(f"lenet5-{seed}-")
        metrics = runs.read_json(path / "metrics.json")["test"]
        for metric, estimate in row["test"].items():
            assert estimate["value"] == pytest.approx(metrics[metric]["value"], abs=1e-12)
        val = predictions(path)
        wanted = loss_of(val)
        assert row["validation"] == pytest.approx(wanted, rel=1e-5)


def test_the_mean_of_the_members_is_theirs(finished):
    rows = rows_of(finished)
    found = [predictions(path) for path in (finished / "cells").iterdir()]
    mean = np.mean([one["test_score"].astype(np.float64) for one in found], axis=0)
    target = found[0]["test_target"]
    auc = np.mean([roc_auc_score(target == k, mean[:, k]) for k in range(3)])
    row = rows["mean"]
    assert row["test"]["auc"]["value"] == pytest.approx(auc, abs=1e-9)
    accuracy = (mean.argmax(axis=1) == target).mean()
    assert row["test"]["accuracy"]["value"] == pytest.approx(accuracy, abs=1e-12)
    assert row["networks"] == 3
    assert row["cost"]["parameters"] == 3 * rows["lenet5@28, seed 0"]["cost"]["parameters"]
    # 156 + 2416 + 48120 + 10164 + 85 x 3: LeNet-5 of the paper, with three classes.
    assert rows["uniform soup"]["cost"]["parameters"] == 61_111
    assert rows["uniform soup"]["networks"] == rows["greedy soup"]["networks"] == 1
    best = rows[result(finished)["best"]]
    change = row["against"]["auc"]["estimate"]["value"]
    assert change == pytest.approx(auc - best["test"]["auc"]["value"], abs=1e-9)


def test_what_validation_prefers_is_picked_and_can_be_compared_like_a_run(finished, capsys):
    from experiments import compare

    found, rows = result(finished), rows_of(finished)
    for kind, name in (("member", found["best"]), ("fusion", found["picked"])):
        values = {n: row["validation"] for n, row in rows.items() if row["kind"] == kind}
        assert name == min(values, key=values.get)
    kept, row = predictions(finished), rows[found["picked"]]
    assert row["validation"] == pytest.approx(loss_of(kept), rel=1e-4)
    right = kept["test_score"].argmax(axis=1) == kept["test_target"]
    metrics = runs.read_json(finished / "metrics.json")["test"]
    assert metrics["accuracy"]["value"] == pytest.approx(right.mean())
    assert metrics["accuracy"]["value"] == metrics[f"accuracy/{found['picked']}"]["value"]
    member = finished / rows[found["best"]]["made_of"]["folder"]
    page = finished.parent / "comparison.html"
    compare.main([str(member), str(finished), "--out", str(page), "--resamples", "100"])
    assert "accuracy" in capsys.readouterr().out and page.is_file()


def test_no_gain_is_said_so(finished):
    lines = (finished / "ensemble.md").read_text(encoding="utf-8").splitlines()
    verdicts = [line for line in lines if " minus lenet5@28, seed " in line and ": " in line]
    picked = rows_of(finished)[result(finished)["picked"]]["against"]
    told = {metric: judged["verdict"] for metric, judged in picked.items()}
    for metric, label in (("auc", "AUC"), ("accuracy", "accuracy")):
        line = next(line for line in verdicts if line.startswith(f"- {label}: "))
        assert f": {told[metric]}" in line
        assert ("no gain" in line) == (told[metric] != "better")


def test_the_test_targets_change_no_fit_and_no_pick(finished, launch, no_pictures):
    """The same predictions with test labels in another order: only test values are others."""
    settings = {"ensemble.soups": False}
    assert launch.run_command(command(finished, **settings)) == 0
    before, rows = result(finished), rows_of(finished)
    kept = {}
    for path in (finished / "cells").iterdir():
        file = path / "predictions.npz"
        kept[file] = file.read_bytes()
        arrays = dict(np.load(file))
        arrays["test_target"] = (arrays["test_target"] + 1) % 3
        np.savez(file, **arrays)
    (finished / "metrics.json").unlink()
    assert launch.run_command(command(finished, **settings)) == 0
    after = result(finished)
    assert (after["picked"], after["best"]) == (before["picked"], before["best"])
    changed = 0
    for name, row in rows_of(finished).items():
        for key in ("made_of", "validation", "networks"):
            assert row[key] == rows[name][key], (name, key)
        changed += row["test"]["accuracy"]["value"] != rows[name]["test"]["accuracy"]["value"]
    assert changed == len(rows)
    for file, content in kept.items():
        file.write_bytes(content)
    (finished / "metrics.json").unlink()


def without_times(folder: pathlib.Path) -> dict:
    found = result(folder)
    for row in found["rows"]:
        del row["cost"]["milliseconds"]
    return found


@pytest.mark.slow
def test_what_is_finished_is_not_trained_again_and_an_ensemble_grows(
    finished, launch, no_pictures, monkeypatch, capsys
):
    assert launch.run_command(command(finished)) == 0
    before, table = cells_of(finished), (finished / "ensemble.md").read_bytes()
    assert launch.run_command(command(finished)) == 0
    assert cells_of(finished) == before and (finished / "ensemble.md").read_bytes() == table
    first = without_times(finished)
    more = {
        "ensemble.members": 4,
        "ensemble.arrays": json.dumps({"optim.high.lr": [*RATES, 0.005]}),
    }
    from medtl_jax.training.checkpoint import Checkpoints

    save = Checkpoints.save

    def stopped(self, number, *content):
        if number == 2:
            raise KeyboardInterrupt
        save(self, number, *content)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stopped)
        assert launch.run_command(command(finished, **more)) == 130
    assert cells_of(finished) == before
    capsys.readouterr()
    assert launch.run_command(command(finished, **more)) == 0
    assert "3 of 4 members are finished already\n" in capsys.readouterr().out
    after = cells_of(finished)
    assert {name: after[name] for name in before} == before and len(after) == 4
    grown = rows_of(finished)
    assert grown["mean"]["networks"] == 4
    # Back to three: all is there, and the table is the first one.
    assert launch.run_command(command(finished)) == 0
    assert cells_of(finished) == after and without_times(finished) == first
    said = capsys.readouterr().out
    assert "3 of 3 members are finished already\n" in said
    assert f"1 in {finished / 'cells'} are of an ensemble with more or other members" in said


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_members_of_one_program_that_was_stopped_go_on_in_one_of_another_size(
    finished, launch, no_pictures, tmp_path, count
):
    """As those that nobody stopped end: each has a checkpoint of its own."""
    rates = [*RATES, 0.005]
    settings = {
        "data.dir": finished.parent / "digits.npz",
        "model.weights": finished.parent / "weights",
        "train.program": "turns",
        "ensemble.soups": False,
    }

    def begin(members):
        arrays = {"ensemble.arrays": json.dumps({"optim.high.lr": rates[:members]})}
        return command(tmp_path / "study", **settings, **arrays, **{"ensemble.members": members})

    from medtl_jax.training.checkpoint import Checkpoints

    save, second = Checkpoints.save, []

    def stopped(self, number, *content):
        second.append(number == 2)
        if sum(second) == 2:
            raise KeyboardInterrupt
        save(self, number, *content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", stopped)
        assert launch.run_command(begin(3)) == 130
    assert cells_of(tmp_path / "study") == {}
    assert launch.run_command(begin(count)) == 0
    assert len(cells_of(tmp_path / "study")) == count
    for path in (finished / "cells").iterdir():
        seed = runs.read_json(path / "config.json")["seed"]
        found = list((tmp_path / "study" / "cells").glob(f"lenet5-{seed}-*"))
        if seed >= min(count, 3):
            continue
        (other,) = found
        wanted, ours = predictions(path), predictions(other)
        np.testing.assert_allclose(ours["test_score"], wanted["test_score"], rtol=1e-3, atol=1e-5)


def halve(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def halve_checkpoint(path: pathlib.Path) -> None:
    for file in (path / "checkpoints" / "best").rglob("*"):
        if file.is_file():
            halve(file)


def rename_classes(path: pathlib.Path) -> None:
    found = runs.read_json(path / "environment.json")
    found["task"]["classes"] = found["data"]["classes"] = ["x", "y", "z"]
    runs.write_json(path / "environment.json", found)


DAMAGE = {
    "metrics.json cannot be read": lambda path: halve(path / "metrics.json"),
    "predictions.npz cannot be read": lambda path: halve(path / "predictions.npz"),
    "environment.json cannot be read": lambda path: halve(path / "environment.json"),
    "notes.json cannot be read": lambda path: (path / "notes.json").write_text("{"),
    "best/2 is damaged": halve_checkpoint,
    "environment.json is of other images, of the task classify with 'x, y, z': these are of "
    "classify with '0, 1, 2'": rename_classes,
}


@pytest.mark.parametrize("words", DAMAGE)
@pytest.mark.parametrize("place", [0, 2])
def test_a_damaged_member_is_one_line_with_its_folder(
    finished, launch, no_pictures, tmp_path, capsys, words, place
):
    folder = tmp_path / "study"
    shutil.copytree(finished, folder)
    for name in ("metrics.json", "inference.json"):
        (folder / name).unlink(missing_ok=True)
    path = sorted((folder / "cells").glob(f"lenet5-{place}-*"))[0]
    DAMAGE[words](path)
    data = {"data.dir": finished.parent / "digits.npz"}
    data["model.weights"] = finished.parent / "weights"
    assert launch.run_command(command(folder, **data)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and f"{path}/" in line and words in line
    assert line.endswith(f"; delete {path} to have the run made again")
    assert not runs.is_finished(folder)


@pytest.mark.parametrize("experiment", ["evaluate", "predict"])
def test_an_ensemble_is_no_run_to_evaluate_or_to_predict_with(
    finished, launch, tmp_path, capsys, experiment
):
    flags = [f"--config.experiment={experiment}", f"--config.eval.run={finished}"]
    new = tmp_path / "new"
    assert launch.run_command(["launch.py", STUDY, *flags, f"--workdir={new}"]) == 2
    first = sorted(cells_of(finished))[0]
    assert capsys.readouterr().err == (
        f"error: {finished} is an ensemble: name one of its runs, such as "
        f"{finished / 'cells' / first}\n"
    )
    assert not new.exists()


@pytest.mark.slow
def test_networks_of_two_kinds_and_sizes(finished, launch, tmp_path, no_pictures):
    (tmp_path / "digits.npz").write_bytes((finished.parent / "digits.npz").read_bytes())
    settings = {
        "model.weights": "none",
        "ensemble.networks": "lenet5@32, lenet5_bn",
        "ensemble.members": 1,
        "ensemble.arrays": "",
        "ensemble.fusions": "mean,greedy",
        "train.epochs": 1,
        # Drawn digits of a kind look like copies.
        "data.audit": "off",
    }
    folder = tmp_path / "mixed"
    assert launch.run_command(command(folder, **settings)) == 0
    rows = rows_of(folder)
    members = ["lenet5@32, seed 0", "lenet5_bn@28, seed 0"]
    assert list(rows) == [*members, "mean", "greedy"]
    sizes = [rows[name]["cost"]["parameters"] for name in members]
    assert rows["mean"]["cost"]["parameters"] == sum(sizes) and sizes[0] != sizes[1]
    weights = rows["greedy"]["made_of"]["weights"]
    used = [name for name, weight in zip(members, weights, strict=True) if weight]
    assert rows["greedy"]["networks"] == len(used)
    notes = result(folder)["notes"]
    assert any("no soup of lenet5@32: it has one member" in note for note in notes)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ensemble.members": 1, "ensemble.arrays": ""}, "ensemble.members=1: an ensemble has"),
        ({"ensemble.members": 0}, "ensemble.members=0 must be at least 1"),
        ({"ensemble.arrays": '{"optim.high.lr": [0.1, 0.2]}'}, "has 2 values, and ensemble.memb"),
        ({"ensemble.arrays": '{"optim.high.rate": [1, 2, 3]}'}, "there is no key optim.high.rate"),
        ({"ensemble.arrays": '{"seed": [1, 2, 3]}'}, "members cannot differ in seed"),
        ({"ensemble.arrays": '{"train.select": [1, 2, 3]}'}, "cannot differ in train.select"),
        ({"ensemble.arrays": '{"train.accumulate": [1, 2, 4]}'}, "cannot differ in train.accum"),
        ({"ensemble.arrays": '{"train.remat": [true, true, false]}'}, "differ in train.remat"),
        ({"ensemble.arrays": '{"optim.high.lr": [1, 2, "a"]}'}, "seed 2: optim.high.lr='a' must"),
        ({"ensemble.arrays": '{"optim.high.lr": [1, 2, -1]}'}, "lenet5@28, seed 2: optim.high.lr"),
        ({"ensemble.arrays": '{"augment.rotate": [1, 2, 9999]}'}, "seed 2: augment.rotate=9999"),
        ({"ensemble.arrays": '{"seed": [1], "seed": [2]}'}, "ensemble.arrays: seed is there twice"),
        ({"ensemble.arrays": "lr"}, "ensemble.arrays is no JSON"),
        ({"ensemble.arrays": '{"optim.high.lr": 1}'}, "ensemble.arrays: name keys with lists"),
        ({"ensemble.networks": "lenet5@x"}, "ensemble.networks: 'lenet5@x' is no network"),
        ({"ensemble.networks": "lenet5,"}, "ensemble.networks: '' is no network"),
        ({"ensemble.networks": "lenet5,lenet5@28"}, "lenet5@28 is there twice"),
        ({"ensemble.networks": "lenet6"}, "lenet6@28, seed 0: "),
        ({"ensemble.networks": "lenet5,lenet5@32", "task": "segment"}, "masks of different sizes"),
        ({"ensemble.fusions": "mean,median"}, "no fusion 'median'"),
        ({"ensemble.fusions": "rank"}, "'rank' is for two classes"),
        ({"domain.target.name": "npz", "domain.target.dir": "x"}, "domain.target.name=npz has no"),
        ({"transfer.strategy": "knn"}, "nothing that a seed changes"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    finished, launch, tmp_path, capsys, settings, words
):
    data = {"data.dir": finished.parent / "digits.npz"}
    data["model.weights"] = finished.parent / "weights"
    assert launch.run_command(command(tmp_path / "new", **data, **settings)) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1, message
    assert not (tmp_path / "new").exists()
