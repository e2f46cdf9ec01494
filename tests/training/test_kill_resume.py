"""The command line, killed and started again: the same predictions to the byte."""

import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

COMMAND = """
import sys
from medtl_jax.training import checkpoint
checkpoint.SECONDS_APART = float(sys.argv.pop())
import launch
sys.exit(launch.run_command(sys.argv))
"""
ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = {
    "data.phantom.train": 48,
    "data.phantom.val": 16,
    "data.phantom.test": 16,
    "model.image_size": 32,
    "train.min_steps": 0,
    "train.ema": 0.5,
    "data.batch_size": 16,
    "eval.batch_size": 16,
    "eval.resamples": 50,
    "eval.drift": False,
}


@pytest.fixture
def start(compilation_cache):
    """`start(workdir, apart=0.0, **overrides)`: the process of one call of launch.py.

    Every epoch is written, as it is where epochs take longer than `apart` seconds.
    """

    def begin(workdir, apart=0.0, **overrides):
        settings = {**SETTINGS, **overrides}
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        # As in this process: see tests/conftest.py.
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        if compilation_cache:
            environment["JAX_COMPILATION_CACHE_DIR"] = compilation_cache
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                COMMAND,
                "--config=configs/finetune.py",
                f"--workdir={workdir}",
                *(f"--config.{key}={value}" for key, value in settings.items()),
                str(apart),
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )

    return begin


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def kill(process, folder, epochs, delay):
    """Kills the process `delay` seconds after its log has that many epochs."""
    log = folder / "metrics.jsonl"
    while epochs and not (log.is_file() and len(log.read_text().splitlines()) >= epochs):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it had ended before"


def ends_the_same(start, tmp_path, kills):
    """Asserts that a run killed at `kills`, `(epochs, longest delay)`, ends like a whole one.

    Returns its folder.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole))
    rng = random.Random(0)
    for epochs, longest in kills:
        kill(start(killed), killed, epochs, rng.uniform(0.0, longest))
    finish(start(killed))
    assert (killed / "predictions.npz").read_bytes() == (whole / "predictions.npz").read_bytes()
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}
    return killed


@pytest.mark.slow
def test_a_killed_run_of_pretrained_weights_ends_like_an_uninterrupted_one(start, tmp_path):
    """Killed in an epoch and while it predicts and reports after the last one."""
    start = functools.partial(start, **{"train.epochs": 2})
    ends_the_same(start, tmp_path, ((1, 0.2), (2, 0.5)))


@pytest.mark.slow
def test_a_run_killed_in_each_of_its_phases_ends_like_an_uninterrupted_one(start, tmp_path):
    """Killed while it starts, in each epoch, two of which begin phases, and after the last one."""
    settings = {
        "model.name": "lenet5_bn",
        "model.weights": "none",
        "train.epochs": 4,
        "transfer.phases": "1: head; 1: features,head; 2: .*",
    }
    kills = ((0, 4.0), (1, 0.2), (2, 0.3), (3, 0.4), (4, 0.5))
    killed = ends_the_same(functools.partial(start, **settings), tmp_path, kills)

    history = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in history] == [1, 2, 3, 4]
    chosen = min(history, key=lambda record: (record["val_loss"], record["epoch"]))
    scored = tmp_path / "scored"
    finish(start(scored, experiment="evaluate", **{"eval.run": killed, "eval.splits": "val"}))
    metrics = json.loads((scored / "metrics.json").read_text())
    assert metrics["val"]["accuracy"]["value"] == chosen["val_accuracy"]


def written_and_logged(folder):
    """The epoch of the last checkpoint, 0 where there is none, and the epochs of the log."""
    last = folder / "checkpoints" / "last"
    written = [int(path.name) for path in last.iterdir() if path.name.isdigit()]
    return max(written, default=0), len((folder / "metrics.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_a_run_killed_with_epochs_that_are_not_written_ends_the_same(start, tmp_path):
    """Killed with the log ahead of the checkpoint: what is not written is trained again."""
    settings = {"model.name": "lenet5_bn", "model.weights": "none", "train.epochs": 12}
    begin = functools.partial(start, apart=1.5, **settings)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(begin(whole))
    ahead = []
    for epochs in (4, 9):
        kill(begin(killed), killed, epochs, 0.0)
        written, logged = written_and_logged(killed)
        ahead.append(logged - written)
    assert max(ahead) > 0
    finish(begin(killed))
    assert (killed / "predictions.npz").read_bytes() == (whole / "predictions.npz").read_bytes()
    history = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in history] == list(range(1, 13))
