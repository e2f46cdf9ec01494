"""Studies of many runs over two processes, and after these were stopped or killed: one table."""

import json
import os
import re
import signal
import time

import process_runs
import pytest

from medtl_jax import runs

# Trained one after the other to the same bits, unless a program has several of them.
ONE_BY_ONE = {"train.devices": 1, "train.program": "alone"}
STUDIES = {
    "ensemble": {"ensemble.members": 3, "train.epochs": 2},
    "ablation": {
        "ablation.axes": json.dumps({"optim.high.lr": [0.001, 0.01]}),
        "train.epochs": 2,
        "ablation.seeds": 2,
    },
}
# Heads of the columns that are measured.
COSTS = ("ms", "CPU s", "MB")
RUN = re.compile(r"^run ([0-9, ]+) of ", re.MULTILINE)


@pytest.fixture(scope="module")
def begin(compilation_cache):
    """`begin(name, folder, *flags, **options)`: a process of the study `name` in `folder`."""

    def start(name, folder, *flags, devices=1, pause=0.0, **settings):
        settings = {**process_runs.SETTINGS, **STUDIES[name], **settings}
        return process_runs.start(
            [
                f"--config=configs/{name}.py",
                f"--workdir={folder}",
                *flags,
                *(f"--config.{key}={value}" for key, value in settings.items()),
            ],
            devices=devices,
            cache=compilation_cache,
            pause=pause,
        )

    return start


def sharing(number):
    """The flags of one of two processes, of which nobody is met."""
    return "--coordinator=127.0.0.1:1", "--processes=2", f"--process={number}"


def finish(*processes):
    """What they have said, once they have ended well."""
    codes, outputs = process_runs.ended(processes)
    assert codes == [0] * len(processes), "\n".join(outputs)
    return outputs


def runs_made(outputs):
    """The numbers of the runs that were trained, as often as they were."""
    found = [words for output in outputs for words in RUN.findall(output)]
    return sorted(int(number) for words in found for number in words.split(", "))


def cells(folder):
    return sorted((folder / "cells").iterdir()) if (folder / "cells").is_dir() else []


def wait_for_trainings(folder, processes, count):
    """Waits until so many runs that are not finished have an epoch."""
    deadline = time.monotonic() + 300
    while True:
        begun = [path for path in cells(folder) if (path / "metrics.jsonl").is_file()]
        if sum(not runs.is_finished(path) for path in begun) >= count:
            return
        assert all(process.poll() is None for process in processes), process_runs.ended(processes)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def table_of(folder, name):
    """The lines of the table without what was measured."""
    kept, measured = [], []
    for line in (folder / f"{name}.md").read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            kept.append(line)
            measured = []
            continue
        row = [cell.strip() for cell in line.split("|")]
        measured = measured or [place for place, head in enumerate(row) if head in COSTS]
        # Rules are as wide as their columns.
        if not set("".join(row)) <= {"-"}:
            kept.append([cell for place, cell in enumerate(row) if place not in measured])
    return kept


def assert_same_to_the_bit(folder, wanted, name):
    assert table_of(folder, name) == table_of(wanted, name)
    assert runs.read_json(folder / "metrics.json") == runs.read_json(wanted / "metrics.json")
    assert [path.name for path in cells(folder)] == [path.name for path in cells(wanted)]
    for path, other in zip(cells(folder), cells(wanted), strict=True):
        for file in ("predictions.npz", "metrics.json"):
            assert (path / file).read_bytes() == (other / file).read_bytes(), path


@pytest.mark.slow
def test_an_ensemble_over_two_processes_is_that_of_one(begin, tmp_path):
    """Members of one program, on the two devices of each process: two at a time, or in turns."""
    settings = {"ensemble.members": 4, "train.program": "turns"}
    together = [
        begin("ensemble", tmp_path / "two", *sharing(number), devices=2, **settings)
        for number in range(2)
    ]
    outputs = finish(*together)
    assert runs_made(outputs) == [1, 2, 3, 4]
    for output in outputs:
        assert "one of 2 processes that do not meet" in output
        (made,) = RUN.findall(output)
        assert made in ("1, 2", "3, 4")
    alone = finish(begin("ensemble", tmp_path / "one", devices=2, **settings))
    assert RUN.findall(alone[0]) == ["1, 2, 3, 4"]
    assert_same_to_the_bit(tmp_path / "two", tmp_path / "one", "ensemble")


@pytest.mark.slow
def test_an_ensemble_that_was_stopped_and_killed_has_the_same_table(begin, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "study"
    finish(begin("ensemble", whole, **ONE_BY_ONE))
    stopped = begin("ensemble", folder, pause=0.3, **ONE_BY_ONE)
    wait_for_trainings(folder, [stopped], 1)
    stopped.send_signal(signal.SIGTERM)
    (code,), (output,) = process_runs.ended([stopped])
    assert code == 143 and output.endswith("the same command continues or repeats the run\n")

    pair = [begin("ensemble", folder, *sharing(n), pause=0.3, **ONE_BY_ONE) for n in range(2)]
    wait_for_trainings(folder, pair, 2)
    pair[0].kill()
    pair[1].terminate()
    codes, outputs = process_runs.ended(pair)
    assert codes == [-signal.SIGKILL, 143], outputs
    assert not (folder / "ensemble.md").exists()
    last = finish(begin("ensemble", folder, **ONE_BY_ONE))
    # Those that were under way were not finished, and all is trained once to its end.
    assert runs_made([output, *outputs, *last]) == [1, 2, 3]
    assert_same_to_the_bit(folder, whole, "ensemble")


@pytest.mark.slow
def test_an_ablation_that_was_killed_and_stopped_has_the_same_table(begin, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "study"
    finish(begin("ablation", whole, **ONE_BY_ONE))
    killed = begin("ablation", folder, pause=0.3, **ONE_BY_ONE)
    wait_for_trainings(folder, [killed], 1)
    os.kill(killed.pid, signal.SIGKILL)
    (code,), (output,) = process_runs.ended([killed])
    assert code == -signal.SIGKILL

    pair = [begin("ablation", folder, *sharing(n), pause=0.3, **ONE_BY_ONE) for n in range(2)]
    wait_for_trainings(folder, pair, 2)
    pair[1].terminate()
    # The other one takes over what was begun.
    codes, outputs = process_runs.ended(pair)
    assert codes == [0, 143], outputs
    assert runs_made([output, *outputs]) == [1, 2, 3, 4]
    assert_same_to_the_bit(folder, whole, "ablation")
    before = (folder / "ablation.md").read_bytes()
    (last,) = finish(begin("ablation", folder, *sharing(1), **ONE_BY_ONE))
    assert not runs_made([last]) and (folder / "ablation.md").read_bytes() == before
