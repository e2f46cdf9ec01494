"""Rows of an ablation that fuse members: which runs they have, and what stands in the table."""

import json
import pathlib
import re

import digit_runs
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from configs import ablation as study
from configs import default
from experiments import ablation_fusion
from experiments.ablation_cells import entries_of, make_cells
from medtl_jax import runs
from medtl_jax.errors import UserError
from medtl_jax.metrics.pairing import Predicted

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENSEMBLE = {"one": {}, "three": {"ensemble.members": 3}}
AXES = {"optim.high.lr": [0.002, 0.02], "ensemble": ENSEMBLE}


def config_of(axes, **settings) -> dict:
    usual = default.get_config().to_dict()
    own = {key.replace("__", "."): value for key, value in settings.items()}
    keys = {"ablation.axes": json.dumps(axes), "ablation.seeds": 2, **own}
    return runs.nested_config(usual, {**runs.flat_config(usual), **keys})


def test_members_have_seeds_of_their_own_and_the_images_of_the_first():
    entries = entries_of(make_cells(config_of(AXES, seed=5, data__seed_draw=7)))
    found = [
        (
            entry[0].strategy,
            [cell.config["seed"] for cell in entry],
            {cell.config["data"]["seed_draw"] for cell in entry},
        )
        for entry in entries
    ]
    assert found == [
        (f"lr={lr}, ensemble={label}", [seed + 1000 * m for m in range(members)], {seed + 2})
        for lr in (0.002, 0.02)
        for label, members in (("one", 1), ("three", 3))
        for seed in (5, 6)
    ]


def test_the_first_member_is_the_run_of_the_row_without_members():
    cells = make_cells(config_of(AXES))
    one, three = (
        [cell for cell in cells if cell.strategy == f"lr=0.02, ensemble={label}"]
        for label in ENSEMBLE
    )
    without = make_cells(config_of({"optim.high.lr": [0.002, 0.02]}))
    assert [cell.resolved for cell in one] == [cell.resolved for cell in without[2:]]
    assert [cell.resolved for cell in three[::3]] == [cell.resolved for cell in one]
    assert [cell.command for cell in three[::3]] == [cell.command for cell in one]
    assert all(cell.settings == {"optim.high.lr": 0.02} for cell in three)
    assert not any("ensemble" in cell.command for cell in cells)
    commands = {cell.command for cell in cells}
    assert len(cells) == 16 and len(commands) == 12
    assert any("--config.data.seed_draw=1 " in c and "--config.seed=2001" in c for c in commands)


def test_the_example_of_the_study_is_one():
    text = study.__doc__.split("--config.ablation.axes='")[-1].partition("'\n")[0]
    config = config_of({}, ablation__axes=text, ablation__seeds=1, model__weights="imagenet")
    cells = make_cells(config)
    assert len(entries_of(cells)) == 8 and len(cells) == 16


@pytest.mark.parametrize("members", [2, 3])
def test_rows_of_the_same_members_are_refused_and_of_other_members_are_not(members):
    look = {"plain": {"ensemble.members": 2}, "sharp": {"augment.blur": 0.0}}
    config = config_of({"look": look})
    assert len(make_cells(config)) == 6
    look["sharp"]["ensemble.members"] = members
    if members == 3:
        assert len(make_cells(config_of({"look": look}))) == 10
        return
    with pytest.raises(UserError, match="'look=plain' and 'look=sharp' come to the same runs"):
        make_cells(config_of({"look": look}))


@pytest.mark.parametrize(
    ("axes", "settings", "words"),
    [
        (
            {"ensemble.members": [1, 3]},
            {},
            "ensemble.members=1 must be at least 2 and at most 1000",
        ),
        ({"ensemble.members": [3, 1001]}, {}, "ensemble.members=1001 must be at least 2"),
        ({"ensemble.members": [3, 2.0]}, {}, "ensemble.members=2.0 must be of the type of 5"),
        ({"ensemble.soups": [True, False]}, {}, "ensemble.soups has no effect in an ablation"),
        ({"ensemble.fusions": ["mean", "vote"]}, {}, "of the section only ensemble.members may be"),
        ({"ensemble.networks": ["", "lenet5"]}, {}, "ensemble.networks has no effect in an ablat"),
        ({"ensemble.arrays": ["", "{}"]}, {}, "ensemble.arrays has no effect in an ablation"),
        (AXES, {"ensemble__members": 3}, "set ensemble.members in a row of ablation.axes"),
        (
            {"e": ENSEMBLE, "transfer.strategy": ["full", "probe"]},
            {"model__weights": "imagenet"},
            "e=three, strategy=probe, seed 0: ensemble.members=3: a probe, k-NN or traditional",
        ),
        (AXES, {"seed": 2**32 - 2000}, "ensemble=three, seed 4294967296: seed=4294967296 must be"),
    ],
)
def test_mistakes_are_told_in_one_line(axes, settings, words):
    with pytest.raises(UserError) as raised:
        make_cells(config_of(axes, **settings))
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_so_many_seeds_that_members_would_share_them_are_refused(launch, tmp_path, capsys):
    flags = [f"--config.ablation.axes={json.dumps(AXES)}", "--config.ablation.seeds=1001"]
    words = ["launch.py", f"--config={ROOT / 'configs' / 'ablation.py'}", *flags]
    assert launch.run_command([*words, f"--workdir={tmp_path / 'study'}"]) == 2
    assert "ablation.seeds=1001 must be at least 1 and at most 1000" in capsys.readouterr().err


class Stand:
    """As much of a run as is read."""

    title = "a run"

    def __init__(self, number: int) -> None:
        self.number = number

    def folder(self, study: pathlib.Path) -> pathlib.Path:
        return study / str(self.number)


@pytest.mark.parametrize(
    ("task", "shape"),
    [("classify", (3,)), ("multilabel", (3,)), ("regress", (3,)), ("segment", (4, 5, 3))],
)
def test_members_are_fused_by_their_mean_image_by_image(tmp_path, monkeypatch, task, shape):
    rng = np.random.default_rng(0)
    ids = np.array(["a", "b", "c", "d"])
    scores = rng.random((2, 4, *shape))
    if task in ("classify", "segment"):
        scores /= scores.sum(axis=-1, keepdims=True)
    scores = scores.astype(np.float32)
    target = np.zeros((4, 3) if task in ("multilabel", "regress") else (4, *shape[:-1]), np.int64)
    orders = [np.array([2, 0, 3, 1]), np.array([3, 2, 1, 0])]

    class Run:
        def __init__(self, folder: pathlib.Path) -> None:
            number = int(folder.name)
            order = orders[number]
            named = ("x", "y", "z")
            self.predicted = Predicted(
                "run", task, named, ids[order], target[order], scores[number][order]
            )

    monkeypatch.setattr(ablation_fusion, "read_run", lambda folder, name, split: Run(folder))
    fused = ablation_fusion.read_entry([Stand(0), Stand(1)], tmp_path, "test")
    assert fused.ids.tolist() == ids.tolist() and fused.score.dtype == np.float32
    np.testing.assert_allclose(fused.score, (scores[0] + scores[1]) / 2, atol=1e-6)
    # One run stays as it is.
    alone = ablation_fusion.read_entry([Stand(1)], tmp_path, "test")
    np.testing.assert_array_equal(alone.score, scores[1][orders[1]])


def command(folder: pathlib.Path, members: int) -> list[str]:
    axes = {"ensemble": {"one": {}, "more": {"ensemble.members": members}}}
    settings = {
        **digit_runs.SETTINGS,
        "experiment": "ablation",
        "model.image_size": 32,
        "data.name": "phantom",
        "data.phantom.train": 64,
        "data.phantom.val": 24,
        "data.phantom.test": 40,
        "data.train_fraction": 0.5,
        "model.weights": "none",
        "train.devices": 1,
        "eval.drift": False,
        "ablation.axes": json.dumps(axes),
        "ablation.seeds": 2,
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [
        "launch.py",
        f"--config={ROOT / 'configs' / 'default.py'}",
        *flags,
        f"--workdir={folder}",
    ]


@pytest.fixture(scope="module")
def trained():
    """The names of the runs that were trained, in their order."""
    from experiments import shared_grid

    names, run_seeds = [], shared_grid.run_seeds

    def told(cells, *args):
        names.extend(cell.name for cell in cells)
        return run_seeds(cells, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_grid, "run_seeds", told)
        yield names


@pytest.fixture(scope="module")
def finished(launch, small_runs, no_pictures, trained, tmp_path_factory) -> pathlib.Path:
    """The folder of an ablation of a row of one and a row of two networks, two seeds each."""
    folder = tmp_path_factory.mktemp("members") / "study"
    assert launch.run_command(command(folder, 2)) == 0
    return folder


def predictions(path: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Targets and probabilities, by id."""
    with np.load(path / "predictions.npz") as arrays:
        order = np.argsort(arrays[f"{split}_id"])
        return arrays[f"{split}_target"][order], arrays[f"{split}_score"][order].astype(np.float64)


def by_hand(folder: pathlib.Path, runs_of_seed: list[str], split: str):
    targets, scores = zip(
        *(predictions(folder / name, split) for name in runs_of_seed), strict=True
    )
    assert all((target == targets[0]).all() for target in targets)
    return targets[0], np.mean(scores, axis=0)


@pytest.mark.slow
def test_runs_that_rows_share_are_trained_once(finished, trained):
    seeds = sorted(int(name.partition("-")[0]) for name in trained)
    assert seeds == [0, 1, 1000, 1001]
    assert sorted(trained) == sorted(path.name for path in (finished / "cells").iterdir())
    rows = {row["strategy"]: row for row in runs.read_json(finished / "ablation.json")["rows"]}
    one, more = (rows[f"ensemble={label}"]["folders"] for label in ("one", "more"))
    assert [re.search(r"/(\d+)-", name)[1] for name in more] == ["0", "1000", "1", "1001"]
    assert one == more[::2]
    # The members of a seed learn from the same images, those of another seed from others.
    images = [runs.read_json(finished / name / "environment.json")["data_sha256"] for name in more]
    assert images[0] == images[1] != images[2] == images[3]
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert [page.count(f": {name}<") for name in trained] == [1, 1, 1, 1]


@pytest.mark.slow
def test_the_table_has_the_values_of_the_mean_of_the_members(finished):
    found = runs.read_json(finished / "ablation.json")
    one, more = found["rows"]
    assert found["members"] == {"ensemble=one": 1, "ensemble=more": 2}
    for row, size in ((one, 1), (more, 2)):
        groups = [row["folders"][i : i + size] for i in range(0, 2 * size, size)]
        tested = [by_hand(finished, group, "test") for group in groups]
        expected = {
            "accuracy": [accuracy_score(t, s.argmax(axis=1)) for t, s in tested],
            "auc": [
                roc_auc_score(t, s, multi_class="ovr")
                if s.shape[1] > 2
                else roc_auc_score(t, s[:, 1])
                for t, s in tested
            ],
        }
        assert row["test"].keys() <= expected.keys() and "accuracy" in row["test"]
        for metric, entry in row["test"].items():
            assert entry["by_seed"] == pytest.approx(expected[metric], abs=1e-9)
        chosen = [by_hand(finished, group, "val") for group in groups]
        losses = [log_loss(t, s / s.sum(axis=1, keepdims=True)) for t, s in chosen]
        assert row["validation"] == pytest.approx(losses, rel=1e-5)
        costs = [runs.read_json(finished / name / "cost.json") for name in row["folders"]]
        spent = sum(cost["prepare_seconds"] + cost["train_seconds"] for cost in costs) / 2
        assert row["cost"]["seconds"] == pytest.approx(spent)
        assert row["cost"]["step_bytes"] == max(cost["step_bytes"] for cost in costs)
    change = more["against"]["accuracy"]["estimate"]["by_seed"]
    pairs = zip(
        more["test"]["accuracy"]["by_seed"], one["test"]["accuracy"]["by_seed"], strict=True
    )
    assert change == pytest.approx([after - before for after, before in pairs])
    better = min((one, more), key=lambda row: np.mean(row["validation"]))
    assert found["picked"] == better["strategy"]


@pytest.mark.slow
def test_table_and_page_say_how_many_members_a_row_fuses_and_how(finished):
    table = (finished / "ablation.md").read_text()
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert re.search(r"\| ensemble +\| members \|", table)
    assert re.search(r"\| more( \(picked\))? +\| 2 +\|", table)
    for words in ("is the mean of their probabilities", "nothing is fitted", "ensemble.members=2"):
        assert words in page and (words in table or "=" in words)


@pytest.mark.slow
def test_another_member_is_all_that_is_trained_of_a_larger_ensemble(finished, launch, trained):
    before = list(trained)
    assert launch.run_command(command(finished, 3)) == 0
    new = trained[len(before) :]
    assert sorted(int(name.partition("-")[0]) for name in new) == [2000, 2001]
    assert runs.read_json(finished / "ablation.json")["members"]["ensemble=more"] == 3
