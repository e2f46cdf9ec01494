"""Epochs: train, validate, choose the best, save, stop early."""

import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Mapping

import jax
import numpy as np

from medtl_jax.console import Console
from medtl_jax.data.catalog import Dataset, Split
from medtl_jax.data.loader import steps_per_epoch, training_indices
from medtl_jax.errors import UserError
from medtl_jax.files import write_file
from medtl_jax.metrics.scores import classification_scores
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.devices import DataMesh
from medtl_jax.training.inference import Predict, negative_log_likelihood, probabilities
from medtl_jax.training.step import (
    StepParts,
    TrainState,
    evaluation_variables,
    take,
    train_epoch,
    train_step,
)
from medtl_jax.transfer.optim import Schedule

# Validation value by which the best epoch is chosen, and whether more is better.
SELECTION = {"loss": False, "accuracy": True, "auc": True}


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
        if self.select not in SELECTION:
            raise UserError(
                f"train.select={self.select!r} is not known; choose from {', '.join(SELECTION)}"
            )
        if self.epochs < 1 or self.patience < 0 or self.min_steps < 0:
            raise UserError(
                "train.epochs must be at least 1, train.patience and train.min_steps at least 0"
            )

    def for_set(self, steps_per_epoch: int) -> "LoopSettings":
        """These settings with the epochs that a set of so many steps an epoch needs."""
        needed = math.ceil(self.min_steps / steps_per_epoch)
        return dataclasses.replace(self, epochs=max(self.epochs, needed))


def check_splits(dataset: Dataset, settings: LoopSettings) -> None:
    """UserError for splits that a run could not be trained on, or could not be chosen by."""
    train, val = dataset.splits["train"], dataset.splits["val"]
    if settings.batch_size > len(train):
        raise UserError(
            f"data.batch_size={settings.batch_size} is larger than the training split "
            f"({len(train)} images); lower it"
        )
    absent = set(range(len(dataset.spec.classes))) - set(val.labels.tolist())
    if settings.select == "auc" and absent:
        raise UserError(
            f"train.select=auc is undefined: the validation split has no image of "
            f"{dataset.spec.classes[min(absent)]}; choose train.select=loss"
        )


def best_epoch(history: list[dict], select: str) -> int:
    """The epoch (from 1) with the best validation value; the earliest of equals.

    An undefined value (AUC of a validation split with one class) is never chosen; UserError if
    no epoch has a defined one.
    """
    sign = 1 if SELECTION[select] else -1
    defined = [r for r in history if r[f"val_{select}"] is not None]
    if not defined:
        raise UserError(
            f"train.select={select} is undefined on the validation split; choose train.select=loss"
        )
    return max(defined, key=lambda record: (sign * record[f"val_{select}"], -record["epoch"]))[
        "epoch"
    ]


def write_history(path: pathlib.Path, history: list[dict]) -> None:
    """Writes the epochs as JSON lines, replacing the file in one step."""
    write_file(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in history))


def make_runner(parts: StepParts, mesh: DataMesh, key: jax.Array, scan: bool):
    """`fn(state, data, indices [steps, b], advance) -> (state, mean of each logged value)`.

    With `scan` the epoch is one program; without, one program a step, called in a loop.
    """
    if scan:
        epoch = jax.jit(functools.partial(train_epoch, parts=parts), donate_argnums=0)

        def run(state, data, indices, advance):
            indices = jax.device_put(indices, mesh.batched_epoch)
            state, logged = epoch(state, data, indices, key)
            return state, _means(jax.device_get([logged]))

        return run

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, data, indices, key):
        return train_step(state, take(data, indices), key, parts=parts)

    def run(state, data, indices, advance):
        logged = []
        for number, row in enumerate(indices):
            state, sums = step(state, data, jax.device_put(row, mesh.batched), key)
            logged.append(sums)
            # Waiting for the step before this one keeps the queue short and the bar honest.
            if number:
                jax.block_until_ready(logged[-2])
            advance(number + 1, len(indices))
        return state, _means(jax.device_get(logged))

    return run


def _means(logged: list[dict]) -> dict[str, float | None]:
    sums = {name: float(np.sum([step[name] for step in logged])) for name in logged[0]}
    count = sums.pop("count")
    means = {name: value / count for name, value in sums.items()}
    # JSON knows no infinity; a gradient's norm may overflow and the training still recover.
    return {name: value if np.isfinite(value) else None for name, value in means.items()}


def validate(predict: Predict, variables, images, split: Split, classes) -> dict:
    """`val_loss`, `val_accuracy` and `val_auc` (None where undefined) of a split."""
    logits = predict(variables, images)
    if not np.isfinite(logits).all():
        raise UserError("training diverged: the network's outputs are not finite; lower optim.*.lr")
    scores = classification_scores(split.labels, probabilities(logits), classes)
    auc = scores["auc"].value
    return {
        "val_loss": negative_log_likelihood(logits, split.labels),
        "val_accuracy": scores["accuracy"].value,
        "val_auc": None if np.isnan(auc) else auc,
    }


def fit(
    state: TrainState,
    parts: StepParts,
    splits: Mapping[str, Split],
    classes: tuple[str, ...],
    settings: LoopSettings,
    schedules: Mapping[str, Schedule],
    predict: Predict,
    mesh: DataMesh,
    checkpoints: Checkpoints,
    folder: pathlib.Path,
    console: Console,
) -> list[dict]:
    """The epoch records after training; the best epoch's variables are in `checkpoints`.

    Continues after the last checkpoint if there is one. Writes `metrics.jsonl` as it goes.
    """
    train, val = splits["train"], splits["val"]
    data = jax.device_put({"image": train.images, "label": train.labels}, mesh.replicated)
    val_images = jax.device_put(val.images, mesh.replicated)
    state, history = _resume(state, checkpoints, mesh, console)
    steps = steps_per_epoch(len(train), settings.batch_size)
    run = make_runner(parts, mesh, jax.random.key(settings.seed), mesh.scans)
    while len(history) < settings.epochs and not _stalled(history, settings):
        epoch, started = len(history) + 1, time.perf_counter()
        indices = training_indices(
            settings.seed, len(history) * steps, steps, len(train), settings.batch_size
        )
        with console.progress(f"epoch {epoch}/{settings.epochs}") as advance:
            state, means = run(state, data, indices, advance)
        seconds = time.perf_counter() - started
        record = {
            "epoch": epoch,
            "step": epoch * steps,
            "train_loss": means.pop("loss"),
            "train_accuracy": means.pop("correct"),
            **validate(predict, evaluation_variables(state), val_images, val, classes),
            **means,
            **{f"lr_{name}": float(rate(epoch * steps - 1)) for name, rate in schedules.items()},
            "seconds": round(seconds, 3),
            "images_per_second": round(indices.size / seconds, 1),
        }
        history.append(record)
        is_best = best_epoch(history, settings.select) == epoch
        write_history(folder / "metrics.jsonl", history)
        checkpoints.save(epoch, state, history, evaluation_variables(state) if is_best else None)
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


def _stalled(history: list[dict], settings: LoopSettings) -> bool:
    if not settings.patience or not history:
        return False
    return len(history) - best_epoch(history, settings.select) >= settings.patience


def _line(record: dict, epochs: int, is_best: bool) -> str:
    return (
        f"epoch {record['epoch']}/{epochs}  loss {_shown(record['train_loss'])}  "
        f"val loss {record['val_loss']:.4f}  accuracy {record['val_accuracy']:.4f}  "
        f"auc {_shown(record['val_auc'])}  "
        f"{record['images_per_second']:.0f} images/s{'  best' if is_best else ''}"
    )


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
