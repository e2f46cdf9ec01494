"""Which training images a run uses: some of each class, and a validation part where none is."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from medtl_jax.data.carve import carve
from medtl_jax.data.catalog import SPLITS, Dataset, Split
from medtl_jax.data.images import one_line
from medtl_jax.data.strata import CLASS_TASKS, fewest, pool_rare, strata, way
from medtl_jax.data.streams import select
from medtl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """What to make of the training images of a set.

    Attributes:
      per_class: images of each class to draw before anything else; 0 takes all of them.
      val_fraction: part of those for validation, between 0 and 1, where the set has no
        validation split.
      seed: of both choices.
      training: False where a trained model is scored: `per_class` then counts only for a
        validation split that has to be carved, so that it is the one of the training run.
    """

    per_class: int = 0
    val_fraction: float = 0.15
    seed: int = 0
    training: bool = True


@dataclasses.dataclass(frozen=True)
class Division:
    """Sorted rows (int64) of the training images for `train` and `val`, and notes about them."""

    train: np.ndarray
    val: np.ndarray
    notes: tuple[str, ...]


def draw_per_class(
    labels: Sequence[str],
    ids: Sequence[str],
    patients: Sequence[str] | None,
    count: int,
    seed: int,
) -> np.ndarray:
    """Returns the sorted rows (int64) of `count` images of each class, drawn at random.

    Images are ranked by the SHA-256 of seed and id, and each class takes its first `count`. So
    the draw depends on neither the order of the rows nor the version of a library, and the draw
    of a smaller count is part of that of a larger one. With `patients`, whose ranks then come
    first, a class is filled by whole patients; of the last one as many images as still fit.

    Args:
      labels: class of each image.
      ids: unique name of each image.
      patients: patient of each image, None where they are not known.
      count: images of each class, 1 or more.
      seed: another one draws other images.

    Raises:
      ValueError: a class has fewer images than `count`.
    """
    fewest, rarest = min((found, label) for label, found in Counter(labels).items())
    if fewest < count:
        raise ValueError(f"class '{rarest}' has {fewest} training images")
    ranks = [_rank(seed, name) for name in ids]
    if patients is not None:
        known = {name: _rank(seed, name) for name in set(patients)}
        ranks = [known[name] + rank for name, rank in zip(patients, ranks, strict=True)]
    drawn: Counter[str] = Counter()
    rows = []
    for row in sorted(range(len(ranks)), key=ranks.__getitem__):
        if drawn[labels[row]] < count:
            drawn[labels[row]] += 1
            rows.append(row)
    return np.sort(np.array(rows, np.int64))


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


def divide(
    labels: Sequence[str],
    ids: Sequence[str],
    patients: Sequence[str] | None,
    plan: TrainPlan,
    *,
    splits: Collection[str],
    has_val: bool,
    source: str,
    task: str = "classify",
) -> Division:
    """Returns which training images become `train` and which `val`, by `plan`.

    Args:
      labels, ids, patients: class (or, of another task, stratum: see `strata.strata`), unique
        name and patient (None where they are not known) of each training image of the set.
      plan: what to draw and to carve.
      splits: the splits that are asked for; `val` is carved if it is one of them.
      has_val: whether the set has a validation split of its own, which is never touched.
      source: the set, for messages.
      task: one of `catalog.TASKS`.

    Raises:
      UserError: a class has too few images to draw or to carve from; images are to be drawn of
        each class and the task has none; `val_fraction` is none.
    """
    _check_per_class(plan, task, source)
    carving = "val" in splits and not has_val
    rows, val, notes = np.arange(len(labels)), np.empty(0, np.int64), ()
    if plan.per_class and (plan.training or carving):
        try:
            rows = draw_per_class(labels, ids, patients, plan.per_class, plan.seed)
        except ValueError as error:
            raise UserError(
                f"{source}: data.per_class={plan.per_class} is too many, {error}; "
                "lower it or add images"
            ) from error
        notes = (f"train: {plan.per_class} images of each class drawn with seed {plan.seed}",)
        if "val" in splits and has_val:
            notes += ("val stays whole: data.per_class is for train alone",)
    elif plan.per_class and "train" in splits:
        notes = ("train is whole: data.per_class is for training alone",)
    if carving:
        groups = None if patients is None else [patients[row] for row in rows]
        val = rows[_carve_val([labels[row] for row in rows], groups, plan, task, source)]
        how = way(task) + (", whole patients" if groups else "")
        notes += (f"val: {len(val)} of the {len(rows)} train images, {how}",)
    return Division(np.setdiff1d(rows, val), val, notes)


def _check_per_class(plan: TrainPlan, task: str, source: str) -> None:
    if plan.per_class and task not in CLASS_TASKS:
        raise UserError(
            f"{source}: data.per_class={plan.per_class} draws images of each class, and the task "
            f"{task} has no class of an image: set it to 0"
        )


def _carve_val(
    labels: Sequence[str],
    patients: Sequence[str] | None,
    plan: TrainPlan,
    task: str,
    source: str,
) -> np.ndarray:
    fraction = plan.val_fraction
    if not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise UserError(f"data.val_fraction must lie between 0 and 1, not {fraction!r}")
    try:
        if task in CLASS_TASKS:
            return carve(labels, patients, float(fraction), plan.seed)
        pooled = pool_rare(labels, fewest(fraction))
        return carve(pooled, patients, float(fraction), plan.seed, every_class=False)
    except ValueError as error:
        more = "raise data.per_class" if plan.per_class else "add images"
        raise UserError(
            f"{source}: cannot make a val split from train ({one_line(error)}): "
            f"{more}, change data.val_fraction or provide val"
        ) from error


def reduce_train(dataset: Dataset, plan: TrainPlan) -> Dataset:
    """Returns the set with the images of `train` that `plan` draws; its other splits as they are.

    Raises:
      UserError: as `divide`.
    """
    train = dataset.splits.get("train")
    if train is None or not plan.per_class:
        return dataset
    spec = dataset.spec
    _check_per_class(plan, spec.task, spec.name)
    names = strata(spec.task, train.target, spec.classes, len(train))
    patients = None if train.patients is None else train.patients.tolist()
    division = divide(
        names,
        train.ids.tolist(),
        patients,
        plan,
        splits=dataset.splits,
        has_val=True,
        source=spec.name,
        task=spec.task,
    )
    spec = dataclasses.replace(spec, notes=spec.notes + division.notes)
    reduced = _select(train, division.train)
    return Dataset(spec, {**dataset.splits, "train": reduced})


def _select(split: Split, rows: np.ndarray) -> Split:
    if len(rows) == len(split):
        return split
    return Split(
        images=select(split.images, rows),
        target=select(split.target, rows),
        ids=split.ids[rows],
        patients=None if split.patients is None else split.patients[rows],
        extra={key: select(values, rows) for key, values in split.extra.items()},
    )


def splits_to_read(splits: Collection[str], present: Collection[str]) -> tuple[str, ...]:
    """Returns `splits` in their usual order, `train` in the place of an absent `val`."""
    needed = {"train" if name == "val" and name not in present else name for name in splits}
    return tuple(name for name in SPLITS if name in needed)


def whole_train(splits: Collection[str], present: Collection[str]) -> tuple[str, ...]:
    """Returns a note where `train` holds what a training run would have carved `val` from."""
    if "train" in splits and "val" not in splits and "val" not in present:
        return ("train is whole: the set has no val split, and none was taken from train",)
    return ()
