"""Epochs: train, validate, choose the best, save, stop early."""

import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

from medtl_jax.console import Console
from medtl_jax.data.catalog import Dataset, Split
from medtl_jax.data.loader import steps_per_epoch, training_indices
from medtl_jax.data.streams import Streamed, stream_batches
from medtl_jax.errors import UserError
from medtl_jax.files import write_file
from medtl_jax.metrics.scores import task_scores
from medtl_jax.objectives.task import Task, check_select
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.devices import DataMesh
from medtl_jax.training.inference import Predict, is_finite
from medtl_jax.training.selection import best_so_far, check_validation
from medtl_jax.training.step import (
    StepParts,
    TrainState,
    evaluation_variables,
    take,
    train_epoch,
    train_step,
)
from medtl_jax.transfer.optim import Schedule

# Validation values for the line of an epoch; metrics.jsonl has all of them.
_PRINTED = ("accuracy", "auc", "quadratic_kappa", "dice", "mae", "r2")


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """How long to train and how to choose: `config.train` and the batch size.

    An epoch of a small set is few updates, so that `epochs` alone would fit one set size only:
    training goes on until `min_steps` updates too.
    """

    epochs: int
    min_steps: int
    batch_size: int
    patience: int
    select: str
    seed: int

    def __post_init__(self):
        if self.epochs < 1 or self.patience < 0 or self.min_steps < 0:
            raise UserError(
                "train.epochs must be at least 1, train.patience and train.min_steps at least 0"
            )

    def for_set(self, steps_per_epoch: int) -> "LoopSettings":
        """These settings with the epochs that a set of so many steps an epoch needs."""
        needed = math.ceil(self.min_steps / steps_per_epoch)
        return dataclasses.replace(self, epochs=max(self.epochs, needed))


def check_splits(dataset: Dataset, task: Task, settings: LoopSettings) -> None:
    """UserError for splits that a run could not be trained on, or could not be chosen by."""
    check_select(settings.select, task.name, len(task.classes))
    train, val = dataset.splits["train"], dataset.splits["val"]
    if settings.batch_size > len(train):
        raise UserError(
            f"data.batch_size={settings.batch_size} is larger than the training split "
            f"({len(train)} images); lower it"
        )
    check_validation(settings.select, task, val.target)


def write_history(path: pathlib.Path, history: list[dict]) -> None:
    """Writes the epochs as JSON lines, replacing the file in one step."""
    write_file(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in history))


def make_runner(parts: StepParts, mesh: DataMesh, key: jax.Array, data: Mapping, scan: bool):
    """`fn(state, indices [steps, b], advance) -> (state, mean of each logged value)`.

    Arrays in memory are put on the device once; with `scan` an epoch over them is one program,
    without, one program a step, called in a loop. Streamed arrays travel batch by batch.
    """
    if any(isinstance(array, Streamed) for array in data.values()):
        return _stream_runner(parts, mesh, key, data)
    data = jax.device_put(dict(data), mesh.replicated)
    if scan:
        epoch = jax.jit(functools.partial(train_epoch, parts=parts), donate_argnums=0)

        def run(state, indices, advance):
            indices = jax.device_put(indices, mesh.batched_epoch)
            state, logged = epoch(state, data, indices, key)
            return state, _means(jax.device_get([logged]))

        return run

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, data, indices, key):
        return train_step(state, take(data, indices), key, parts=parts)

    def run(state, indices, advance):
        rows = (jax.device_put(row, mesh.batched) for row in indices)
        return _each_step(
            lambda state, row: step(state, data, row, key), state, rows, len(indices), advance
        )

    return run


def _stream_runner(parts: StepParts, mesh: DataMesh, key: jax.Array, data: Mapping):
    """As `make_runner`, for arrays that are not in memory."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch, key):
        return train_step(state, batch, key, parts=parts)

    def run(state, indices, advance):
        batches = (jax.device_put(batch, mesh.batched) for batch in stream_batches(data, indices))
        return _each_step(
            lambda state, batch: step(state, batch, key), state, batches, len(indices), advance
        )

    return run


def _each_step(step, state, inputs, count: int, advance):
    """The state after `step(state, input)` for each of `count` inputs, and the mean logs."""
    logged = []
    for number, one in enumerate(inputs, 1):
        state, sums = step(state, one)
        logged.append(sums)
        # Waiting for the step before this one keeps the queue short and the bar honest.
        if number > 1:
            jax.block_until_ready(logged[-2])
        advance(number, count)
    return state, _means(jax.device_get(logged))


def _means(logged: list[dict]) -> dict[str, float | None]:
    sums = {name: float(np.sum([step[name] for step in logged])) for name in logged[0]}
    count = sums.pop("count")
    means = {name: value / count for name, value in sums.items()}
    # JSON knows no infinity; a gradient's norm may overflow and the training still recover.
    return {name: value if np.isfinite(value) else None for name, value in means.items()}


def validate(predict: Predict, variables, images, target: np.ndarray, task: Task) -> dict:
    """`val_loss` and the task's other selection values (None where undefined) of a split."""
    logits = predict(variables, images)
    if not is_finite(logits):
        raise UserError("training diverged: the network's outputs are not finite; lower optim.*.lr")
    scores = task_scores(task.name, target, task.score(logits), task.classes, surfaces=False)
    values = {name: scores[name].value for name in task.selection if name != "loss"}
    return {
        "val_loss": task.val_loss(logits, target),
        **{f"val_{name}": None if np.isnan(value) else value for name, value in values.items()},
    }


def fit(
    state: TrainState,
    parts: StepParts,
    splits: Mapping[str, Split],
    task: Task,
    settings: LoopSettings,
    schedules: Mapping[str, Schedule],
    predict: Predict,
    mesh: DataMesh,
    checkpoints: Checkpoints,
    folder: pathlib.Path,
    console: Console,
    record_events: Callable[[dict], None] = lambda record: None,
    groups: np.ndarray | None = None,
) -> list[dict]:
    """The epoch records after training; the best epoch's variables are in `checkpoints`.

    The best is that of `selection.best_so_far`; while there is none, training goes on.

    Continues after the last checkpoint if there is one. Writes `metrics.jsonl` as it goes, and
    calls `record_events` with each new epoch's record. `groups` are those of
    `loader.training_indices`.
    """
    train, val = splits["train"], splits["val"]
    val_images = val.images
    if not isinstance(val_images, Streamed):
        val_images = jax.device_put(val_images, mesh.replicated)
    val_target = np.asarray(val.target[:])
    state, history = _resume(state, checkpoints, mesh, console)
    steps = steps_per_epoch(len(train), settings.batch_size)
    data = {"image": train.images, "target": train.target}
    run = make_runner(parts, mesh, jax.random.key(settings.seed), data, mesh.scans)
    while len(history) < settings.epochs and not _stalled(history, settings, task):
        epoch, started = len(history) + 1, time.perf_counter()
        indices = training_indices(
            settings.seed, len(history) * steps, steps, len(train), settings.batch_size, groups
        )
        with console.progress(f"epoch {epoch}/{settings.epochs}") as advance:
            state, means = run(state, indices, advance)
        seconds = time.perf_counter() - started
        record = {
            "epoch": epoch,
            "step": epoch * steps,
            "train_loss": means.pop("loss"),
            **validate(predict, evaluation_variables(state), val_images, val_target, task),
            **means,
            **{f"lr_{name}": float(rate(epoch * steps - 1)) for name, rate in schedules.items()},
            "seconds": round(seconds, 3),
            "images_per_second": round(indices.size / seconds, 1),
        }
        history.append(record)
        is_best = best_so_far(history, settings.select, task) == epoch
        write_history(folder / "metrics.jsonl", history)
        checkpoints.save(epoch, state, history, evaluation_variables(state) if is_best else None)
        record_events(record)
        console.note(_line(record, settings.epochs, is_best))
    if len(history) < settings.epochs:
        console.note(
            f"stopped early: no better val {settings.select} in {settings.patience} epochs"
        )
    return history


def _resume(state, checkpoints, mesh, console):
    restored = checkpoints.restore_last(state)
    if restored is None:
        return jax.device_put(state, mesh.replicated), []
    state, history = restored
    console.note(f"continuing after epoch {len(history)}")
    return jax.device_put(state, mesh.replicated), history


def _stalled(history: list[dict], settings: LoopSettings, task: Task) -> bool:
    if not settings.patience or not history:
        return False
    best = best_so_far(history, settings.select, task)
    return best is not None and len(history) - best >= settings.patience


def _line(record: dict, epochs: int, is_best: bool) -> str:
    values = "  ".join(
        f"{name} {_shown(record[f'val_{name}'])}" for name in _PRINTED if f"val_{name}" in record
    )
    return (
        f"epoch {record['epoch']}/{epochs}  loss {_shown(record['train_loss'])}  "
        f"val loss {record['val_loss']:.4f}  {values}  "
        f"{record['images_per_second']:.0f} images/s{'  best' if is_best else ''}"
    )


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
