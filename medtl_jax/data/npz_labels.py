"""The label arrays of an .npz as targets: the task that their shape allows, and their values."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medtl_jax.data.catalog import MISSING
from medtl_jax.data.imagefile import UnreadableError
from medtl_jax.data.masks import MAX_CLASSES, different_values, to_classes
from medtl_jax.data.strata import CLASS_TASKS
from medtl_jax.data.targets import BACKGROUND_FOREGROUND, check_known, check_train
from medtl_jax.errors import UserError

# Kinds of dtype (NumPy's letters) and forms of array that each task takes.
_KINDS = {"classify": "iu", "ordinal": "iu", "multilabel": "biuf", "regress": "iuf"}
_KINDS["segment"] = "biu"
_FORMS = {
    "classify": ("[n]", "[n, 1]"),
    "ordinal": ("[n]", "[n, 1]"),
    "multilabel": ("[n]", "[n, 1]", "[n, k]"),
    "regress": ("[n]", "[n, 1]", "[n, k]"),
    "segment": ("[n, h, w]",),
}
_BY_FORM = {"[n, k]": "multilabel", "[n, h, w]": "segment"}
_SHOWN = 6


def task_of_labels(key: str, shape: tuple[int, ...], task: str, path: Path) -> str:
    """Returns `task`, or where it is "" the one that the array's shape says.

    One number an image is a class, several are findings, a plane is a mask.

    Raises:
      UserError: a shape that is not one of the task's.
    """
    form = _form(shape)
    task = task or _BY_FORM.get(form, "classify")
    if form not in _FORMS[task]:
        other = f" (shapes of task={_BY_FORM[form]})" if form in _BY_FORM else ""
        raise UserError(
            f"{path}: {key} has shape {shape}{other}; task={task} takes {' or '.join(_FORMS[task])}"
        )
    return task


def check_label_type(key: str, dtype: np.dtype, task: str, path: Path) -> None:
    """Raises UserError unless the array of labels may have this type in this task."""
    if dtype.kind in _KINDS[task]:
        return
    what = {"regress": "numbers", "multilabel": "0, 1 or NaN"}.get(task, "integers")
    hint = " (task=regress predicts numbers)" if dtype.kind == "f" else ""
    raise UserError(f"{path}: {key} must be {what}, not {dtype}{hint}")


def _form(shape: tuple[int, ...]) -> str:
    if len(shape) == 1:
        return "[n]"
    if len(shape) == 2:
        return "[n, 1]" if shape[1] == 1 else "[n, k]"
    return "[n, h, w]" if len(shape) == 3 else "of more than three axes"


def read_targets(
    task: str,
    labels: Mapping[str, np.ndarray],
    keys: Mapping[str, str],
    classes: tuple[str, ...] | None,
    complete: bool,
    path: Path,
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Returns the class names and the target of each split, as in `catalog.Split`.

    Args:
      task: one of `catalog.TASKS`.
      labels: array of each split of the file, of the task's form and type.
      keys: names of those arrays, for messages.
      classes: names of classes, findings or numbers; None counts them from "0", those of masks
        by the values in train.
      complete: whether every class needs an image in train, every other target a known value.
      path: the file, for messages.

    Raises:
      UserError: a value that is none of the task's; other numbers of columns than of names; a
        split of whose findings or numbers nothing is known.
    """
    if task in CLASS_TASKS:
        flat = {split: array.reshape(-1) for split, array in labels.items()}
        classes = _check_classes(flat, keys, classes, complete, path)
        return classes, {split: array.astype(np.int32) for split, array in flat.items()}
    if task == "segment":
        classes, masks = _read_masks(labels, keys, classes, path)
        if complete and "train" in masks:
            check_train(task, masks["train"], classes, str(path))
        return classes, masks
    columns = {split: array.reshape(len(array), -1) for split, array in labels.items()}
    classes = _check_columns(columns, keys, classes, path)
    read = _findings if task == "multilabel" else _numbers
    targets = {split: read(array, keys[split], path) for split, array in columns.items()}
    for split, target in targets.items():
        check_known(task, target, classes, str(path), split)
    if complete and "train" in targets:
        check_train(task, targets["train"], classes, str(path))
    return classes, targets


def _check_columns(
    columns: Mapping[str, np.ndarray],
    keys: Mapping[str, str],
    classes: tuple[str, ...] | None,
    path: Path,
) -> tuple[str, ...]:
    first = next(iter(columns))
    count = columns[first].shape[1]
    for split, array in columns.items():
        if array.shape[1] != count:
            raise UserError(
                f"{path}: {keys[split]} has {array.shape[1]} columns and {keys[first]} {count}"
            )
    if classes is not None and len(classes) != count:
        raise UserError(
            f"{path}: {keys[first]} has {count} columns for the {len(classes)} names "
            f"{', '.join(classes)}"
        )
    return classes or tuple(str(k) for k in range(count))


def _findings(values: np.ndarray, key: str, path: Path) -> np.ndarray:
    unknown = np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)
    wrong = values[~(unknown | (values == 0) | (values == 1))]
    if wrong.size:
        raise UserError(
            f"{path}: {key} has the value {wrong[0]}: findings are 0, 1 or, where they are not "
            "known, NaN (numbers need task=regress)"
        )
    return np.where(unknown, MISSING, values == 1).astype(np.int8)


def _numbers(values: np.ndarray, key: str, path: Path) -> np.ndarray:
    if (np.abs(values.astype(np.float64)) > float(np.finfo(np.float32).max)).any():
        raise UserError(f"{path}: {key} has a value that is infinite or beyond float32")
    return values.astype(np.float32)


def _read_masks(
    labels: Mapping[str, np.ndarray],
    keys: Mapping[str, str],
    classes: tuple[str, ...] | None,
    path: Path,
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    if classes is None:
        counted = "train" if "train" in labels else next(iter(labels))
        classes = _classes_of_values(labels[counted], keys[counted], path)
    masks = {}
    for split, array in labels.items():
        try:
            masks[split] = to_classes(array, len(classes))
        except UnreadableError as error:
            raise UserError(f"{path}: {keys[split]} cannot be used as masks: {error}") from error
    return classes, masks


def _classes_of_values(masks: np.ndarray, key: str, path: Path) -> tuple[str, ...]:
    """Returns the classes that the values of masks are, where nobody has named them.

    Raises:
      UserError: they are neither 0, 1, ... nor 0 and 255: a value for pixels that nobody has
        labelled, say, would become a class.
    """
    values = different_values(masks).tolist()
    if set(values) <= {0, 1} or set(values) <= {0, 255}:
        return BACKGROUND_FOREGROUND
    if values != list(range(len(values))):
        shown = ", ".join(map(str, values[:_SHOWN])) + ", ..." * (len(values) > _SHOWN)
        raise UserError(
            f"{path}: {key} has the values {shown}, which are neither 0, 1, ... without a gap nor "
            "0 and 255: name the classes of 0, 1, ... in data.classes, and give no pixel another "
            "value"
        )
    return tuple(map(str, values[:MAX_CLASSES]))


def _check_classes(
    labels: Mapping[str, np.ndarray],
    keys: Mapping[str, str],
    classes: tuple[str, ...] | None,
    complete: bool,
    path: Path,
) -> tuple[str, ...]:
    """Returns the class names, after checking that every label is one and train has them all."""
    values = {split: np.unique(array) for split, array in labels.items()}
    for split, found in values.items():
        if found[0] < 0:
            raise UserError(
                f"{path}: {keys[split]} has a negative label ({found[0]}): count from 0"
            )
    highest = max(int(found[-1]) for found in values.values())
    if classes and highest >= len(classes):
        whose = "of the set that the file's name stands for (rename the file if it is another set)"
        if not complete:
            whose = f"that the model knows ({', '.join(classes)})"
        raise UserError(
            f"{path}: label {highest} is out of range for the {len(classes)} classes {whose}"
        )
    count = len(classes) if classes else highest + 1
    if count < 2:
        raise UserError(f"{path}: all labels are 0; a classifier needs two classes or more")
    if complete and "train" in values:
        _check_complete(values["train"].tolist(), count, keys["train"], path)
    return classes or tuple(str(k) for k in range(count))


def _check_complete(train: list[int], count: int, key: str, path: Path) -> None:
    """Raises UserError unless the sorted labels `train`, of the array `key`, are 0..count-1."""
    if len(train) < count:
        gap = next((k for k, label in enumerate(train) if k != label), len(train))
        raise UserError(
            f"{path}: {key} has {len(train)} of the {count} classes 0..{count - 1}: "
            f"no image of class {gap}"
        )
