"""Epochs: train, validate, choose the best, save, stop early."""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from medtl_jax.console import Advance, Console
from medtl_jax.data.catalog import Dataset, Split
from medtl_jax.data.loader import steps_per_epoch
from medtl_jax.data.streams import is_streamed
from medtl_jax.distributed import Stop
from medtl_jax.domain.selection import Validator
from medtl_jax.errors import UserError
from medtl_jax.files import write_file
from medtl_jax.metrics.scores import prepare
from medtl_jax.metrics.uncertainty import overall_scores
from medtl_jax.models.backbone import HEAD
from medtl_jax.objectives.task import Task, check_select
from medtl_jax.process import Preempted, termination
from medtl_jax.training.checkpoint import Begun, Checkpoints
from medtl_jax.training.devices import DataMesh
from medtl_jax.training.inference import Predict, is_finite
from medtl_jax.training.runner import Feed, Runner, mean_logs
from medtl_jax.training.selection import best_so_far, check_validation, task_validator
from medtl_jax.training.step import StepParts, TrainState, evaluation_variables
from medtl_jax.transfer.groups import FROZEN
from medtl_jax.transfer.optim import Schedule
from medtl_jax.transfer.phases import phase_of

# Validation values for the line of an epoch; metrics.jsonl has all of them.
_PRINTED = ("accuracy", "auc", "quadratic_kappa", "dice", "mae", "r2")


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """How long to train and how to choose: `config.train` and the batch size.

    An epoch of a small set is few updates, so that `epochs` alone would fit one set size only:
    training goes on until `min_steps` updates too. An epoch, after which the network is validated,
    is one pass over the images, and as many more as make it `epoch_steps` updates.
    """

    epochs: int
    min_steps: int
    batch_size: int
    patience: int
    select: str
    seed: int
    epoch_steps: int = 0

    def __post_init__(self):
        if self.epochs < 1 or self.patience < 0 or self.min_steps < 0:
            raise UserError(
                "train.epochs must be at least 1, train.patience and train.min_steps at least 0"
            )

    def steps(self, examples: int) -> int:
        """Updates in an epoch of so many images."""
        return max(steps_per_epoch(examples, self.batch_size), self.epoch_steps)

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


@dataclasses.dataclass(frozen=True)
class TrainingPhase:
    """A stretch of the training with parts of its own, from the epoch `first` (0-based) on.

    Attributes:
      varied: `fn(values)`, the parts with other values, which may be traced, of some settings: see
        `Training.values`. None where there are no such settings.
    """

    first: int
    parts: StepParts
    varied: Callable[[Mapping[str, jax.Array]], StepParts] | None = None


def validate(predict: Predict, variables, images, target: np.ndarray, task: Task) -> dict:
    """`val_loss` and the task's other selection values (None where undefined) of a split."""
    logits = predict(variables, images)
    if not is_finite(logits):
        raise UserError("training diverged: the network's outputs are not finite; lower optim.*.lr")
    cases = prepare(task.name, target, task.score(logits), task.classes, surfaces=False)
    # All at once, without those of every class: an epoch of a small network takes less.
    scores = overall_scores(task.name, cases, np.ones((len(cases), 1)))
    values = {f"val_{name}": float(scores[name][0]) for name in task.selection if name != "loss"}
    known = {name: None if math.isnan(value) else value for name, value in values.items()}
    return {"val_loss": task.val_loss(logits, target), **known}


@dataclasses.dataclass(frozen=True)
class Training:
    """What is trained, on what, and for how long.

    Attributes:
      phases: in their order, the first from epoch 0 on.
      feed: what the steps read.
      val: what each epoch is validated on.
      schedules: group -> learning rate, for the records.
      evaluated: from a state the variables `{"params", "batch_stats"}` that are kept where they
        are the best.
      validated: of these, those that the labelled split is predicted with.
      judged: `fn(predict, variables)`, of these further values for the record of the epoch.
      validator: names the best epoch; None = `settings.select` on the validation split.
      values: of the settings in which this training may differ from another one that is a member
        of the same program, see `TrainingPhase.varied`.
    """

    phases: Sequence[TrainingPhase]
    feed: Feed
    val: Split
    task: Task
    settings: LoopSettings
    schedules: Mapping[str, Schedule]
    mesh: DataMesh
    evaluated: Callable[[TrainState], dict] = evaluation_variables
    validated: Callable[[dict], dict] = lambda variables: variables
    judged: Callable[[Predict, dict], dict] = lambda predict, variables: {}
    validator: Validator | None = None
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def chosen_by(self) -> Validator:
        """What names the best epoch."""
        return self.validator or task_validator(self.settings.select, self.task)


@dataclasses.dataclass(frozen=True)
class Keeping:
    """Where a training leaves what it makes, and tells of it."""

    checkpoints: Checkpoints
    folder: pathlib.Path
    console: Console
    record_events: Callable[[dict], None] = lambda record: None


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The steps of one epoch, to be run: the state before them and the rows that they see."""

    number: int
    phase: int
    state: TrainState
    indices: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.indices["train"])


@dataclasses.dataclass(frozen=True)
class Trained:
    """The state after an epoch, the mean of each log, and what it took.

    `seconds` and `cpu_seconds` are without those of compilation; `cost` is that of
    `runner.Runner.cost`; `program` says how the members of a program were computed.
    """

    state: TrainState
    means: dict[str, float | None]
    seconds: float
    cpu_seconds: float
    cost: Mapping[str, float]
    compile_seconds: float = 0.0
    program: str = ""


def fit(training: Training, state: TrainState, predict: Predict, keeping: Keeping) -> list[dict]:
    """The epoch records after training; the best epoch's variables are in the checkpoints.

    The best is that of `selection.best_so_far`; while there is none, training goes on.

    Continues after the last checkpoint if there is one, with the optimizer of its phase. At the
    first epoch of a phase its optimizer begins anew, without the moments of the phase before.
    Writes `metrics.jsonl` as it goes, and tells `keeping.record_events` of each new epoch.

    Raises:
      Preempted: after SIGTERM, once the state at the step that was reached is saved; the training
        goes on from there. Where an epoch is one program, it is finished first.
    """
    with termination.deferred():
        return _fit(training, epochs(training, state, predict, keeping), keeping)


def _fit(
    training: Training, work: Generator[Epoch, Trained | None, list[dict]], keeping: Keeping
) -> list[dict]:
    key, stop = jax.random.key(training.settings.seed), Stop()
    run = phase = done = None
    while True:
        try:
            epoch = work.send(done)
        except StopIteration as stopped:
            return stopped.value
        if done is not None and stop():
            raise Preempted
        if epoch.phase != phase:
            phase, parts = epoch.phase, training.phases[epoch.phase].parts
            # Gives the device's memory back before the images are put there again.
            run = None
            run = Runner(parts, training.mesh, key, training.feed, _scans(training, parts))
        begun = _begun(epoch, run, training, keeping) if done is None else Begun(epoch.state)
        title, total = f"epoch {epoch.number}/{training.settings.epochs}", len(epoch)
        with keeping.console.progress(title) as advance:
            begun = _go_on(begun, epoch, run, advance, stop)
        if not run.scans and begun.steps < total:
            keeping.checkpoints.save_begun(epoch.number - 1, begun)
            raise Preempted
        means, took = mean_logs(begun.logged), (begun.seconds, begun.cpu_seconds)
        done = Trained(begun.state, means, *took, run.cost(), begun.compile_seconds)


def _begun(epoch: Epoch, run: Runner, training: Training, keeping: Keeping) -> Begun:
    """The epoch as far as it had come when the training was stopped, or before its first step."""
    finished, template = epoch.number - 1, epoch.state.replace(anchor=None)
    # Programs of whole epochs have no use for a part of one.
    found = None if run.scans else keeping.checkpoints.restore_begun(finished, template)
    if found is None or found.steps >= len(epoch):
        return Begun(epoch.state)
    keeping.console.note(f"continuing in epoch {epoch.number} after {found.steps} steps")
    whole = found.state.replace(anchor=epoch.state.anchor)
    placed = training.mesh.place(whole, training.mesh.replicated)
    return dataclasses.replace(found, state=placed)


def _go_on(begun: Begun, epoch: Epoch, run: Runner, advance: Advance, stop: Stop) -> Begun:
    """The epoch with its other steps, or as many of them as are made before `stop`."""
    first, total = begun.steps, len(epoch)
    rest = {name: rows[first:] for name, rows in epoch.indices.items()}
    started, worked = time.perf_counter(), time.process_time()
    state, logged = run.steps(
        begun.state, rest, lambda steps, _: advance(first + steps, total, ""), stop
    )
    compiling, working = run.taken()
    return Begun(
        state,
        [*begun.logged, *logged],
        begun.seconds + time.perf_counter() - started - compiling,
        begun.cpu_seconds + time.process_time() - worked - working,
        begun.compile_seconds + compiling,
    )


def _scans(training: Training, parts: StepParts) -> bool:
    """Whether an epoch is one program: on CPU a convolution in a scan is slow, a head is not."""
    return training.mesh.scans or parts.start == HEAD


def epochs(
    training: Training, state: TrainState, predict: Predict, keeping: Keeping
) -> Generator[Epoch, Trained | None, list[dict]]:
    """Asks for the epochs one by one, as in `fit`, and is sent what came out of each.

    What is between two epochs (resuming, validation, records, checkpoints) is done in here, so
    that whoever runs the steps may run those of several trainings at once.
    """
    settings, phases, task = training.settings, training.phases, training.task
    val_images = training.val.images
    if not is_streamed(val_images):
        val_images = training.mesh.place(val_images, training.mesh.replicated)
    val_target = np.asarray(training.val.target[:])
    state, history = _resume(state, training, keeping)
    size, firsts = settings.batch_size, [phase.first for phase in phases]
    steps = settings.steps(training.feed.examples)
    rates = _last_rates(training, steps)
    while len(history) < settings.epochs and not _stalled(history, training, steps):
        number = phase_of(len(history), firsts)
        state = _enter(state, number, training, keeping.console)
        indices = training.feed.indices(settings.seed, len(history) * steps, steps, size)
        done = yield Epoch(len(history) + 1, number, state, indices)
        state, variables = done.state, training.evaluated(done.state)
        scores = validate(predict, training.validated(variables), val_images, val_target, task)
        scores |= training.judged(predict, variables)
        scores |= {name: float(values[len(history)]) for name, values in rates.items()}
        history.append(_record(training, len(history) + 1, number, steps, done, scores))
        epoch = len(history)
        is_best = best_so_far(history, training.chosen_by) == epoch
        write_history(keeping.folder / "metrics.jsonl", history)
        best = variables if is_best else None
        # The anchor never changes: `checkpoints.initial` has it.
        keeping.checkpoints.save(epoch, state.replace(anchor=None), history, best)
        keeping.record_events(history[-1])
        keeping.console.note(_line(history[-1], settings.epochs, training.chosen_by.key, is_best))
    if len(history) < settings.epochs:
        what = training.chosen_by.key.replace("_", " ")
        keeping.console.note(f"stopped early: no better {what} in {settings.patience} epochs")
    return history


def _last_rates(training: Training, steps: int) -> dict[str, np.ndarray]:
    """The learning rate of each group at the last step of each epoch."""
    # As float32, of which integers up to 2^24 are exact: schedules mix them with floats.
    last = jnp.float32(np.arange(1, training.settings.epochs + 1) * steps - 1)
    rates = {f"lr_{name}": rate(last) for name, rate in training.schedules.items()}
    return {name: np.broadcast_to(np.asarray(rate), last.shape) for name, rate in rates.items()}


def _record(
    training: Training, epoch: int, phase: int, steps: int, done: Trained, scores: dict
) -> dict:
    """The line of `metrics.jsonl` of an epoch, numbered from 1."""
    means = dict(done.means)
    images = steps * training.settings.batch_size
    return {
        "epoch": epoch,
        "step": epoch * steps,
        "train_loss": means.pop("loss"),
        **scores,
        **means,
        **({"phase": phase + 1} if len(training.phases) > 1 else {}),
        "seconds": round(done.seconds, 3),
        "cpu_seconds": round(done.cpu_seconds, 3),
        "compile_seconds": round(done.compile_seconds, 3),
        **done.cost,
        **({"program": done.program} if done.program else {}),
        "images_per_second": round(images / done.seconds, 1),
    }


def _enter(state: TrainState, number: int, training: Training, console: Console) -> TrainState:
    """The state at the first step of a phase, or as it is in the midst of one."""
    if int(state.phase) == number:
        return state
    parts = training.phases[number].parts
    trained = ", ".join(stage for stage, group in parts.table.items() if group != FROZEN)
    console.note(f"phase {number + 1}/{len(training.phases)}: {trained}")
    opt_state = parts.optimizer.init(state.params)
    entered = state.replace(opt_state=opt_state, phase=jnp.int32(number))
    return training.mesh.place(entered, training.mesh.replicated)


def _resume(state: TrainState, training: Training, keeping: Keeping):
    """The state and the records to go on from: those of the last checkpoint, if there is one."""
    epoch, mesh = keeping.checkpoints.last_epoch(), training.mesh
    if epoch is None:
        return mesh.place(state, mesh.replicated), []
    # The optimizer's state has the shape of the phase that the epoch belongs to.
    firsts = [phase.first for phase in training.phases]
    parts = training.phases[phase_of(epoch - 1, firsts)].parts
    template = state.replace(opt_state=parts.optimizer.init(state.params), anchor=None)
    restored, history = keeping.checkpoints.restore_last(template)
    keeping.console.note(f"continuing after epoch {len(history)}")
    return mesh.place(restored.replace(anchor=state.anchor), mesh.replicated), history


def _stalled(history: list[dict], training: Training, steps: int) -> bool:
    """Whether `train.patience` is at its end; it begins with the last phase and with the average.

    `steps` are those of an epoch.
    """
    settings, last = training.settings, training.phases[-1]
    if not settings.patience or not history:
        return False
    best = best_so_far(history, training.chosen_by)
    first = max(last.first, (last.parts.average.swa_start or 0) // steps)
    return best is not None and len(history) - max(best, first) >= settings.patience


def _line(record: dict, epochs: int, key: str, is_best: bool) -> str:
    shown = {name: f"val_{name}" for name in _PRINTED}
    if not key.startswith("val_"):
        shown[key.replace("_", " ")] = key
    values = "  ".join(
        f"{name} {_shown(record[value])}" for name, value in shown.items() if value in record
    )
    return (
        f"epoch {record['epoch']}/{epochs}  loss {_shown(record['train_loss'])}  "
        f"val loss {record['val_loss']:.4f}  {values}  "
        f"{record['images_per_second']:.0f} images/s{'  best' if is_best else ''}"
    )


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
