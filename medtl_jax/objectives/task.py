"""A task: what the network's outputs mean, its losses, and how an epoch is chosen."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import scipy.special

from medtl_jax.data.catalog import MISSING, TASKS, Array, DataSpec
from medtl_jax.errors import UserError
from medtl_jax.objectives.losses import (
    ORDINAL,
    LossTerm,
    add,
    binary_cross_entropy,
    cross_entropy,
    huber,
    ordinal,
    ordinal_log_probabilities,
    soft_dice,
)

# Validation value by which the best epoch is chosen, and whether more is better.
_SELECTION = {
    "classify": ("accuracy", "balanced_accuracy", "f1", "mcc", "auc", "pr_auc"),
    "ordinal": ("accuracy", "balanced_accuracy", "quadratic_kappa", "mae", "auc"),
    "multilabel": ("auc", "pr_auc", "f1"),
    "segment": ("dice", "iou"),
    "regress": ("mae", "mse", "rmse", "r2", "pearson"),
}
# Their mean over several targets would be that of years and of millimetres.
_IN_UNITS = ("mae", "mse", "rmse")
_LESS_IS_BETTER = ("loss", "mae", "mse", "rmse")
# Of config.train: the value that asks for nothing, and the tasks that know the option.
_OPTIONS = {
    "label_smoothing": (0.0, ("classify", "segment")),
    "class_weights": ("none", ("classify", "multilabel", "ordinal", "segment")),
    "sampling": ("uniform", ("classify", "ordinal")),
    "focal_gamma": (0.0, ("classify", "multilabel", "segment")),
    "logit_adjustment": (0.0, ("classify",)),
    "ordinal": (ORDINAL[0], ("ordinal",)),
    "dice": (1.0, ("segment",)),
    "huber_delta": (1.0, ("regress",)),
}
# Numbers of the network's output that are worked on at a time, and targets read at a time.
_BLOCK = 2**22
_READ = 64


@dataclasses.dataclass(frozen=True)
class Task:
    """What is predicted, as far as the meaning of the network's outputs goes.

    Logits (float32) and scores of n images with k classes, findings or numbers:

    - `classify`: logits `[n, k]`; score float32 `[n, k]`, the softmax.
    - `multilabel`: logits `[n, k]`; score float32 `[n, k]`, the sigmoid.
    - `ordinal`: logits `[n, k - 1]`; score float32 `[n, k]`, `losses.ordinal_log_probabilities`.
    - `segment`: logits `[n, h, w, k]`; score float16 `[n, h, w, k]`, the softmax.
    - `regress`: logits `[n, k]` in standard deviations about the mean of the training targets;
      score float32 `[n, k]` in the targets' own units.

    Attributes:
      name: one of `catalog.TASKS`.
      classes: as in `catalog.DataSpec`.
      ordinal: for `ordinal`, what its logits mean: one of `losses.ORDINAL`.
      mean, std: for `regress`, of the training targets, one number for each of `classes`.

    Raises:
      ValueError: if the attributes do not hold together.
    """

    name: str
    classes: tuple[str, ...]
    ordinal: str = ORDINAL[0]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self):
        least = 1 if self.name in ("multilabel", "regress") else 2
        scales = len(self.classes) if self.name == "regress" else 0
        if self.name not in TASKS:
            raise ValueError(f"no task {self.name!r}; want one of {', '.join(TASKS)}")
        if self.ordinal not in ORDINAL:
            raise ValueError(f"no ordinal loss {self.ordinal!r}; want one of {', '.join(ORDINAL)}")
        if len(self.classes) < least or len(set(self.classes)) != len(self.classes):
            raise ValueError(
                f"the task {self.name} needs {least} or more names, each once, of what to predict; "
                f"there are: {', '.join(map(repr, self.classes)) or 'none'}"
            )
        if len(self.mean) != scales or len(self.std) != scales:
            raise ValueError(f"{self.name} of {len(self.classes)} wants {scales} means and stds")
        if not all(map(math.isfinite, self.mean)) or not all(0 < s < math.inf for s in self.std):
            raise ValueError("means must be finite, stds finite and more than 0")

    @property
    def outputs(self) -> int:
        """The number of channels of the head."""
        return len(self.classes) - (self.name == "ordinal")

    @property
    def selection(self) -> dict[str, bool]:
        """`{name: more is better}` of the validation values that `train.select` may name."""
        names = _selectable(self.name, len(self.classes))
        return {name: name not in _LESS_IS_BETTER for name in names}

    def score(self, logits: np.ndarray) -> np.ndarray:
        """The score of logits `[n, ...]`, as the class lists them; worked out block by block."""
        kind = np.float16 if self.name == "segment" else np.float32
        score = np.empty((*logits.shape[:-1], len(self.classes)), kind)
        for rows in _blocks(logits):
            score[rows] = self._score(logits[rows])
        return score

    def _score(self, logits: np.ndarray) -> np.ndarray:
        if self.name == "regress":
            return logits.astype(np.float64) * self.std + self.mean
        if self.name == "multilabel":
            return scipy.special.expit(logits.astype(np.float64))
        return np.exp(self._log_probabilities(logits))

    def _log_probabilities(self, logits: np.ndarray) -> np.ndarray:
        if self.name == "ordinal":
            logits = jnp.asarray(logits, jnp.float32)
            return np.asarray(ordinal_log_probabilities(logits, self.ordinal))
        return scipy.special.log_softmax(logits.astype(np.float64), axis=-1)

    def val_loss(self, logits: np.ndarray, target: np.ndarray) -> float:
        """The loss to validate with: a proper score, without weights or options of the training.

        The mean over images or pixels of the negative log-likelihood of their class (`classify`,
        `ordinal`, `segment`), over known findings of the binary cross-entropy, both in nats; over
        known numbers of the squared error in standard deviations. NaN if nothing is known.
        """
        total, count = self.loss_sums(logits, target)
        return total / count if count else math.nan

    def loss_sums(self, logits: np.ndarray, target: np.ndarray) -> tuple[float, int]:
        """Sum and count whose quotient is `val_loss`, to add up over parts of a split."""
        axes = len(self.classes) if self.name in ("multilabel", "regress") else None
        wanted = logits.shape[:-1] if axes is None else (len(logits), axes)
        if target.shape != wanted or logits.shape[-1] != self.outputs:
            raise ValueError(f"logits {logits.shape} and target {target.shape} of {self.name}")
        total, count = 0.0, 0
        for rows in _blocks(logits):
            losses = self._losses(logits[rows], target[rows])
            total, count = total + float(losses.sum(dtype=np.float64)), count + losses.size
        return total, count

    def _losses(self, logits: np.ndarray, target: np.ndarray) -> np.ndarray:
        """One loss for each entry that is known, in any order."""
        if self.name == "regress":
            known = ~np.isnan(target)
            wanted = (target.astype(np.float64) - self.mean) / self.std
            return (logits - wanted)[known] ** 2
        if self.name == "multilabel":
            logits = logits.astype(np.float64)
            towards = np.where(target == 1, logits, -logits)
            return -scipy.special.log_expit(towards[target != MISSING])
        labels = target[..., None].astype(np.intp)
        return -np.take_along_axis(self._log_probabilities(logits), labels, axis=-1)

    def to_card(self) -> dict:
        """The task as JSON values, for a run's `environment.json`."""
        card = dataclasses.asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in card.items()}

    @classmethod
    def from_card(cls, card: object) -> "Task":
        """The task of `to_card`, read back. ValueError for anything that is no such card."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(card, dict) or sorted(card) != sorted(names):
            raise ValueError(f"the card of a task must hold {', '.join(names)}")
        if not (isinstance(card["name"], str) and isinstance(card["ordinal"], str)):
            raise ValueError("a task's name and ordinal must be strings")
        for key, kind in (("classes", str), ("mean", (int, float)), ("std", (int, float))):
            values = card[key]
            if not isinstance(values, list) or not all(
                isinstance(value, kind) and not isinstance(value, bool) for value in values
            ):
                raise ValueError(f"a task's {key} must be a list of names or numbers")
        try:
            mean, std = (tuple(float(value) for value in card[key]) for key in ("mean", "std"))
        except OverflowError:
            raise ValueError("a task's mean or std is too large") from None
        return cls(card["name"], tuple(card["classes"]), card["ordinal"], mean, std)


def _blocks(logits: np.ndarray) -> Iterator[slice]:
    """Slices of whole images with about `_BLOCK` numbers in each."""
    size = max(1, _BLOCK // max(1, math.prod(logits.shape[1:])))
    return (slice(start, start + size) for start in range(0, len(logits), size))


def make_task(spec: DataSpec, target: Array, ordinal: str) -> Task:
    """The task of a data set, whose scales are those of its training targets.

    Args:
      spec: of the data set.
      target: of the training split.
      ordinal: `config.train.ordinal`.

    Raises:
      UserError: too few classes, or one named twice; a number or finding that is missing in
        every training image; a number that is infinite, or the same in every one, so that there
        is nothing to learn.
    """
    if spec.task == "multilabel":
        for name, column in zip(spec.classes, np.asarray(target).T, strict=True):
            if (column == MISSING).all():
                raise UserError(_all_missing(spec, f"the finding {name!r}"))
    mean, std = (), ()
    if spec.task == "regress":
        columns = zip(spec.classes, np.asarray(target, np.float64).T, strict=True)
        mean, std = zip(*(_scale(spec, name, column) for name, column in columns), strict=True)
    try:
        return Task(spec.task, spec.classes, ordinal, mean, std)
    except ValueError as error:
        raise UserError(f"{spec.name}: {error}") from None


def _scale(spec: DataSpec, name: str, column: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the known values of one number to predict."""
    known = column[~np.isnan(column)]
    if not known.size:
        raise UserError(_all_missing(spec, f"the target {name!r}"))
    if np.isinf(known).any():
        raise UserError(
            f"{spec.name}: the target {name!r} is infinite in a training image; mend it"
        )
    if known.min() == known.max():
        raise UserError(
            f"{spec.name}: the target {name!r} is {known[0]:g} in every training image that has "
            "one, so there is nothing to learn; leave it out"
        )
    return float(known.mean()), float(known.std())


def _all_missing(spec: DataSpec, what: str) -> str:
    return f"{spec.name}: {what} is missing in every training image; fill it in or leave it out"


def _selectable(task: str, count: int) -> tuple[str, ...]:
    """What `train.select` may name for a task with so many classes, findings or numbers."""
    names = ("loss", *_SELECTION[task])
    if task == "regress" and count > 1:
        return tuple(name for name in names if name not in _IN_UNITS)
    return names


def check_select(select: str, task: str, count: int = 1) -> None:
    """UserError unless `train.select` names a value of the task called `task`.

    `count` is the number of targets of a regression: 1 while it is not known.
    """
    names = _selectable(task, count)
    if select not in names:
        several = f" of {count} targets, each with a unit of its own" if count > 1 else ""
        why = several if select in _SELECTION[task] else ""
        raise UserError(
            f"train.select={select!r} is no value of the task {task}{why}; choose from "
            f"{', '.join(names)}"
        )


def check_options(task: str, settings: Mapping) -> None:
    """Raises UserError for an option of `config.train` that the task called `task` has not."""
    for name, (off, tasks) in _OPTIONS.items():
        if task not in tasks and settings[name] != off:
            raise UserError(
                f"train.{name}={settings[name]} means nothing for the task {task} (it is for "
                f"{', '.join(tasks)}); leave it at {off}"
            )


def make_terms(
    task: Task, target: Array, settings: Mapping, outputs: Sequence[str] = ("logits",)
) -> dict[str, LossTerm]:
    """The loss of each of `outputs`: of the head and of the auxiliary heads in use.

    Args:
      task: from `make_task`.
      target: of the training split, for the weights of the classes.
      settings: `config.train`.
      outputs: entries of the network's `out`.

    Raises:
      UserError: an option that the task has not, or that these targets do not allow.
    """
    check_options(task.name, settings)
    mode, gamma = settings["class_weights"], settings["focal_gamma"]
    if task.name == "regress":
        return {name: huber(task.mean, task.std, settings["huber_delta"], name) for name in outputs}
    if task.name == "multilabel":
        weights = positive_weights(np.asarray(target), task.classes, mode)
        return {name: binary_cross_entropy(weights, name, focal_gamma=gamma) for name in outputs}
    weights = class_weights(target, task.classes, mode)
    if task.name == "ordinal":
        return {name: ordinal(weights, task.ordinal, name) for name in outputs}
    adjustment = None
    if settings["logit_adjustment"]:
        counts = _class_counts(target, task.classes, "train.logit_adjustment")
        prior = np.log(counts / counts.sum())
        adjustment = (settings["logit_adjustment"] * prior).astype(np.float32)
    terms = {
        name: cross_entropy(
            weights, settings["label_smoothing"], name, focal_gamma=gamma, adjustment=adjustment
        )
        for name in outputs
    }
    if task.name == "segment" and settings["dice"]:
        dices = {name: soft_dice(task.outputs, name) for name in outputs}
        terms = {name: add(term, settings["dice"], dices[name]) for name, term in terms.items()}
    return terms


def class_weights(target: Array, classes: Sequence[str], mode: str) -> np.ndarray:
    """float32 `[k]`: ones, or `n / (k * n_c)` for `mode="balanced"`.

    `target` holds indices into the k `classes`, of n images or pixels, of which n_c are of class
    c. UserError for another mode, and for a class that the training images have not.
    """
    _check_mode(mode)
    if mode == "none":
        return np.ones(len(classes), np.float32)
    counts = _class_counts(target, classes, "train.class_weights=balanced")
    return (counts.sum() / (len(classes) * counts)).astype(np.float32)


def positive_weights(target: np.ndarray, classes: Sequence[str], mode: str) -> np.ndarray:
    """float32 `[k]`: ones, or for `mode="balanced"` a finding's absences for each presence.

    `target` is int `[n, k]` of 1, 0 and `MISSING`, which does not count. UserError for another
    mode, and for a finding that is present in no training image, or absent in none.
    """
    _check_mode(mode)
    if mode == "none":
        return np.ones(len(classes), np.float32)
    present, absent = (target == 1).sum(0), (target == 0).sum(0)
    for name, some, others in zip(classes, present, absent, strict=True):
        if not some or not others:
            raise UserError(
                "train.class_weights=balanced needs training images with and without every "
                f"finding; {name!r} is known present in {some} and known absent in {others}"
            )
    return (absent / present).astype(np.float32)


def sampling_groups(task: Task, target: Array, mode: str) -> np.ndarray | None:
    """int32 `[n]`, the groups to draw equally often (`loader.training_indices`), or None.

    `mode` is `config.train.sampling`: `uniform` has no groups, `balanced` the classes. UserError
    for another mode, for a task whose images are not of one class each, and for a class that the
    training images have not.
    """
    if mode not in ("uniform", "balanced"):
        raise UserError(f"train.sampling={mode!r} is not known; choose 'uniform' or 'balanced'")
    check_options(
        task.name, {name: off for name, (off, _) in _OPTIONS.items()} | {"sampling": mode}
    )
    if mode == "uniform":
        return None
    _class_counts(target, task.classes, "train.sampling=balanced")
    return np.asarray(target, np.int32)


def _check_mode(mode: str) -> None:
    if mode not in ("none", "balanced"):
        raise UserError(f"train.class_weights={mode!r} is not known; choose 'none' or 'balanced'")


def count_labels(target: Array, classes: int) -> np.ndarray:
    """int64 `[classes]`, images or pixels of each class in a target of indices, read in parts."""
    counts = np.zeros(classes, np.int64)
    for start in range(0, len(target), _READ):
        labels = np.ravel(target[start : start + _READ])
        counts += np.bincount(labels, minlength=classes)
    return counts


def _class_counts(target: Array, classes: Sequence[str], asked: str) -> np.ndarray:
    """int64 `[k]`, images or pixels of each class; UserError where `asked` for needs them all."""
    counts = count_labels(target, len(classes))
    if not counts.all():
        absent = classes[int(np.argmin(counts))]
        raise UserError(f"{asked} needs training images of every class; {absent!r} has none")
    return counts
