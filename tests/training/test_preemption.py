"""SIGTERM: what is reached is saved, and the rest gives the numbers of an undisturbed run."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from epoch_records import Notes, without_costs

from medtl_jax import files, process
from medtl_jax.console import Console
from medtl_jax.data.catalog import Split
from medtl_jax.errors import UserError
from medtl_jax.objectives.task import Task
from medtl_jax.process import Preempted, Termination
from medtl_jax.training import loop
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.devices import data_mesh
from medtl_jax.training.inference import make_predict
from medtl_jax.training.runner import Feed
from medtl_jax.training.step import evaluation_variables


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_waits_where_it_is_deferred():
    handler, seen, found = signal.getsignal(signal.SIGTERM), [], Termination()
    with pytest.raises(Preempted), found.listening(), found.deferred():
        with found.deferred():
            terminate()
            seen.append("inner")
        seen.append("outer")
    assert seen == ["inner", "outer"] and found.asked
    with found.listening():
        assert not found.asked
    assert signal.getsignal(signal.SIGTERM) is handler


AT_ONCE = """
import asyncio, os, signal
from medtl_jax.process import termination
async def work():
    asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
    await asyncio.sleep(60)
with termination.listening():
    asyncio.run(work())
"""


def test_sigterm_ends_anything_else_at_once_also_within_an_event_loop():
    done = subprocess.run(
        [sys.executable, "-c", AT_ONCE], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 143
    assert done.stderr == "stopped by SIGTERM; the same command continues or repeats the run\n"


class Ending(Notes):
    """A console whose user ends the process after so many steps of an epoch."""

    def __init__(self, epoch, step):
        super().__init__()
        self._title, self._step = f"epoch {epoch}/", step

    @contextlib.contextmanager
    def progress(self, title):
        def advance(done, total, text=""):
            if title.startswith(self._title) and done == self._step:
                terminate()

        yield advance


@pytest.fixture
def fit(make_training, pictures):
    """`fit(folder, console)`: 3 epochs of 3 steps, the second one with a phase of its own."""
    training = make_training(ema=0.5)
    labels = np.arange(48).astype(str)
    split = Split(pictures["image"][:16], pictures["target"][:16], labels[:16])
    mesh = data_mesh(4)

    def run(folder, console):
        folder.mkdir(exist_ok=True)
        parts, task = training.parts, Task("classify", ("low", "middle", "high"))
        wanted = loop.Training(
            phases=[loop.TrainingPhase(0, parts), loop.TrainingPhase(1, parts)],
            feed=Feed({"train": pictures}),
            val=split,
            task=task,
            settings=loop.LoopSettings(3, 0, 16, 0, "loss", 3),
            schedules={},
            mesh=mesh,
        )
        predict = make_predict(parts.model, parts.spec, mesh, 8)
        with process.termination.listening(), Checkpoints(folder / "checkpoints") as checkpoints:
            keeping = loop.Keeping(checkpoints, folder, console)
            history = loop.fit(wanted, training.state(), predict, keeping)
            template = jax.eval_shape(lambda: evaluation_variables(training.state()))
            return history, checkpoints.restore_best(3, template)

    return run


def test_a_stopped_training_ends_like_one_that_was_left_alone(fit, tmp_path):
    history, best = fit(tmp_path / "whole", Notes())
    assert history[-1]["val_loss"] == min(record["val_loss"] for record in history)
    stopped = tmp_path / "stopped"
    # In the first epoch, twice in one of the second phase, and at the end of the last one.
    for epoch, step, finished in ((1, 2, 0), (2, 1, 1), (2, 2, 1), (3, 3, 3)):
        console = Ending(epoch, step)
        with pytest.raises(Preempted):
            fit(stopped, console)
        log = stopped / "metrics.jsonl"
        assert len(log.read_text().splitlines() if log.is_file() else ()) == finished
        assert (stopped / "checkpoints" / "begun").exists() == (step < 3)
        if (epoch, step) == (2, 2):
            assert "continuing in epoch 2 after 1 steps" in console.lines
    again, variables = fit(stopped, Notes())
    assert without_costs(again) == without_costs(history)
    assert all(record["seconds"] > 0 for record in again)
    for a, b in zip(jax.tree.leaves(variables), jax.tree.leaves(best), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_damaged_beginning_of_an_epoch_is_one_line(fit, tmp_path):
    with pytest.raises(Preempted):
        fit(tmp_path, Ending(1, 2))
    (record,) = (tmp_path / "checkpoints" / "begun").rglob("history/metadata")
    found = json.loads(record.read_text())
    record.write_text(json.dumps({**found, "logged": [1.0]}))
    with pytest.raises(UserError, match="begun/0 is damaged"):
        fit(tmp_path, Notes())


def test_who_follows_writes_no_file_and_says_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(process._Role, "follows", True)
    files.write_file(tmp_path / "file", "text")
    quiet = Console(quiet=True)
    quiet.note("a line")
    with quiet.progress("work") as advance:
        advance(1, 2)
    files.write_file(tmp_path / "of this machine", "text", cached=True)
    assert [path.name for path in tmp_path.iterdir()] == ["of this machine"]
    assert capsys.readouterr().out == ""
