"""An ablation: what it trains and what not, its numbers, and several processes on one grid."""

import json
import pathlib
import shlex
import subprocess
import sys
import threading
from types import MappingProxyType

import digit_runs
import numpy as np
import pytest

from medtl_jax import runs
from medtl_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUDY = f"--config={ROOT / 'configs' / 'default.py'}"
AXES = {"optim.high.lr": [0.002, 0.02], "look": {"plain": {}, "noisy": {"augment.noise": 0.3}}}


def command(folder, **settings) -> list[str]:
    usual = {
        **digit_runs.SETTINGS,
        "experiment": "ablation",
        "model.weights": "none",
        "data.dir": folder.parent / "digits.npz",
        "train.devices": 1,
        "train.epochs": 1,
        "ablation.axes": json.dumps(AXES),
        "ablation.design": "one",
        "ablation.seeds": 2,
        **settings,
    }
    flags = [f"--config.{key}={value}" for key, value in usual.items()]
    return ["launch.py", STUDY, *flags, f"--workdir={folder}"]


@pytest.fixture(scope="module")
def finished(launch, small_runs, no_pictures, tmp_path_factory) -> pathlib.Path:
    """The folder of an ablation of three rows and two seeds."""
    root = tmp_path_factory.mktemp("ablation")
    digit_runs.write_digits(root / "digits.npz", 3, 0)
    assert launch.run_command(command(root / "study")) == 0
    return root / "study"


def cells_of(folder: pathlib.Path) -> dict[str, float]:
    """When each finished run was finished, by its folder."""
    return {
        path.name: (path / "metrics.json").stat().st_mtime_ns
        for path in (folder / "cells").iterdir()
        if runs.is_finished(path)
    }


def test_the_numbers_are_those_of_the_runs(finished):
    found = runs.read_json(finished / "ablation.json")
    rows = {row["strategy"]: row for row in found["rows"]}
    assert list(rows) == [
        "lr=0.002, look=plain",
        "lr=0.02, look=plain",
        "lr=0.002, look=noisy",
    ]
    assert found["reference"] == "lr=0.002, look=plain" and found["images"] == 30
    for name, row in rows.items():
        values = [
            runs.read_json(finished / folder / "metrics.json")["test"]["auc"]["value"]
            for folder in row["folders"]
        ]
        assert row["test"]["auc"]["by_seed"] == pytest.approx(values, abs=1e-12)
        assert row["test"]["auc"]["value"] == pytest.approx(np.mean(values), abs=1e-12)
        if name == found["reference"]:
            assert row["against"] == {}
            continue
        change = row["against"]["auc"]["estimate"]
        reference = rows[found["reference"]]["test"]["auc"]["by_seed"]
        assert change["value"] == pytest.approx(np.mean(values) - np.mean(reference), abs=1e-12)
    table = (finished / "ablation.md").read_text()
    assert table.count("| optim.high.lr | look ") == len(found["rows"][0]["test"])
    assert "members" not in table.lower() and set(found["members"].values()) == {1}
    metrics = runs.read_json(finished / "metrics.json")["test"]
    assert metrics["auc/lr=0.02, look=plain"]["n"] == 30
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "augment.noise=0.3" in page and "every run alone" in page


def test_each_run_has_the_settings_of_its_row_and_a_command_that_repeats_it(finished, launch):
    seen = set()
    for path in (finished / "cells").iterdir():
        config = runs.read_json(path / "config.json")
        row = (config["optim"]["high"]["lr"], config["augment"]["noise"], config["seed"])
        seen.add(row)
        assert config["data"]["seed_draw"] == config["seed"]
        words = shlex.split(runs.read_json(path / "environment.json")["command"])
        assert words[:2] == ["python", "launch.py"]
        study = launch._load_study(str(ROOT / "configs" / "default.py"))
        alone, given = launch._apply_settings(study, ["launch.py", *words[3:]])
        from experiments import finetune

        assert finetune.resolve(alone, given) == config
    lr, noise = 0.002, 0.3
    assert seen == {(lr, 0.0, 0), (lr, 0.0, 1), (0.02, 0.0, 0), (0.02, 0.0, 1), (lr, noise, 0),
                    (lr, noise, 1)}  # fmt: skip


def test_what_is_finished_is_not_run_again_and_what_changed_is(finished, launch, no_pictures):
    before = cells_of(finished)
    table = (finished / "ablation.md").read_bytes()
    assert launch.run_command(command(finished)) == 0
    assert cells_of(finished) == before and (finished / "ablation.md").read_bytes() == table
    # Other labels, one row more, one seed less: only the new row is trained.
    axes = {
        "optim.high.lr": [0.002, 0.02, 0.01],
        "augment": {"no": {}, "yes": AXES["look"]["noisy"]},
    }
    grown = {"ablation.axes": json.dumps(axes), "ablation.seeds": 1}
    assert launch.run_command(command(finished, **grown)) == 0
    after = cells_of(finished)
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 1
    assert len(runs.read_json(finished / "ablation.json")["rows"]) == 4
    # The first study again, of other images: every run is another.
    digit_runs.write_digits(finished.parent / "digits.npz", 3, 1)
    assert launch.run_command(command(finished)) == 0
    last = cells_of(finished)
    assert {name: last[name] for name in after} == after and len(last) == len(after) + len(before)
    assert (finished / "ablation.md").read_bytes() != table
    # And of the first ones, whose runs are all there, but whose table is not.
    digit_runs.write_digits(finished.parent / "digits.npz", 3, 0)
    assert launch.run_command(command(finished)) == 0
    assert cells_of(finished) == last and (finished / "ablation.md").read_bytes() == table


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ablation.design": "all"}, "ablation.design='all' is not known; choose from grid, one"),
        ({"ablation.axes": ""}, "ablation.axes is no JSON"),
        ({"ablation.seeds": 0}, "ablation.seeds=0 must be at least 1"),
        (
            {"ablation.axes": '{"optim.high.lr": [0.1, -1]}'},
            "lr=-1, seed 0: optim.high.lr=-1.0",
        ),
        (
            {"ablation.axes": '{"model.name": ["lenet5", "lenet6"]}'},
            "name=lenet6, seed 0: ",
        ),
        (
            {"ablation.axes": '{"data.batch_size": [16, 500]}'},
            "data.batch_size=500",
        ),
        ({"ablation.axes": '{"augment.preset": ["", "photo"]}'}, "preset=photo, seed 0: "),
        (
            {"ablation.axes": '{"data.classes": ["", "2,1,0"]}'},
            "classes=2,1,0, seed 0: its task, classes or test images are not those of",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    finished, launch, tmp_path, capsys, settings, words
):
    (tmp_path / "digits.npz").write_bytes((finished.parent / "digits.npz").read_bytes())
    assert launch.run_command(command(tmp_path / "new", **settings)) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1, message
    assert not (tmp_path / "new").exists()


def test_a_folder_of_something_else_is_refused(finished, launch, capsys):
    inside = finished / "cells" / next(iter(cells_of(finished)))
    data = {"data.dir": finished.parent / "digits.npz"}
    assert launch.run_command(command(inside, **data)) == 2
    assert "holds a run of experiment=finetune" in capsys.readouterr().err


class Stand:
    """As much of a cell as a grid wants."""

    place = ""

    # Of a run that is trained by itself.
    resolved = MappingProxyType(
        {"train": {"program": "alone"}, "transfer": {"pretrain_loss": "none"}}
    )

    def __init__(self, name: str) -> None:
        self.name = name

    def folder(self, study: pathlib.Path) -> pathlib.Path:
        return study / "cells" / self.name


def test_a_run_of_a_process_that_ended_is_taken_over(tmp_path, monkeypatch):
    from experiments import shared_grid

    made, cells = [], [Stand(name) for name in "abc"]
    request = digit_runs.make_request(tmp_path, tmp_path / "none.npz", None)

    def run_seeds(members, request, memos, progress):
        folder = members[0].folder(request.folder)
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text("{}")
        made.append(members[0].name)

    monkeypatch.setattr(shared_grid, "run_seeds", run_seeds)
    monkeypatch.setattr(shared_grid, "_PAUSE", 0.01)
    (tmp_path / "locks").mkdir()
    with shared_grid._tried(tmp_path / "locks" / "b") as ours:
        assert ours
        thread = threading.Thread(target=shared_grid.train_shared, args=(cells, request, {}))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and made == ["a", "c"]
        assert "1 run is made by other processes: waiting" in request.console.lines
    thread.join(10)
    assert not thread.is_alive() and made == ["a", "c", "b"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_run_that_fails_does_not_keep_the_others_from_it(tmp_path, monkeypatch, packed):
    from experiments import shared_grid

    request = digit_runs.make_request(tmp_path, tmp_path / "none.npz", None)

    def run_seeds(members, request, memos, progress):
        tried.append([member.name for member in members])
        if "a" in tried[-1]:
            raise UserError("training diverged")
        for member in members:
            folder = member.folder(request.folder)
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text("{}")

    tried = []
    monkeypatch.setattr(shared_grid, "run_seeds", run_seeds)
    if packed:
        monkeypatch.setattr(shared_grid, "packs", lambda configs: [[*range(len(configs))]])
    (tmp_path / "locks").mkdir()
    with pytest.raises(UserError, match="1 of 3 runs failed, the others are finished: training di"):
        shared_grid.train_shared([Stand(name) for name in "abc"], request, {})
    assert all(runs.is_finished(tmp_path / "cells" / name) for name in "bc")
    assert tried == ([["a", "b", "c"]] if packed else []) + [["a"], ["b"], ["c"]]


def test_the_result_of_another_study_in_the_folder_is_not_taken_for_ones_own(tmp_path):
    from experiments.shared_grid import begin, finishing

    one, other = ({"experiment": "ablation", "data": {"dir": "", "name": n}} for n in "ab")
    folder = tmp_path / "study"
    begin(folder, one, {})
    begin(folder, other, {})
    for config in (one, other):
        with finishing(folder, config, {}, ["0-f"]) as unwritten:
            assert unwritten
            assert runs.read_json(folder / "config.json") == config
            (folder / "metrics.json").write_text("{}")
    with finishing(folder, other, {}, ["0-f"]) as unwritten:
        assert not unwritten
    with finishing(folder, other, {}, ["0-e"]) as unwritten:
        assert unwritten and not runs.is_finished(folder)


WORKER = """
import pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from experiments import shared_grid
from experiments.study import Request
from medtl_jax.console import Console
class Stand:
    place, resolved = "", {}
    def __init__(self, name): self.name = name
    def folder(self, study): return study / "cells" / self.name
def run_seeds(members, request, memos, progress):
    with open(request.folder / "made.txt", "a") as file:
        file.write("".join(member.name + "\\n" for member in members))
    time.sleep(0.02)
    for member in members:
        folder = member.folder(request.folder)
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text("{}")
def packs(configs):
    places = list(range(len(configs)))
    return [places[first : first + 4] for first in places[::4]]
shared_grid.run_seeds, shared_grid.packs, shared_grid._PAUSE = run_seeds, packs, 0.05
folder = pathlib.Path(sys.argv[2])
request = Request({}, folder, "", Console())
shared_grid.train_shared([Stand(str(i)) for i in range(30)], request, {})
"""


def test_processes_share_a_grid_and_make_no_run_twice(tmp_path):
    (tmp_path / "locks").mkdir()
    arguments = [sys.executable, "-c", WORKER, str(ROOT), str(tmp_path)]
    workers = [subprocess.Popen(arguments, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
    made = (tmp_path / "made.txt").read_text().split()
    assert sorted(made, key=int) == [str(number) for number in range(30)]
