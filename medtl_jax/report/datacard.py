"""What a data set's targets are, counted for the data card of a report."""

from collections.abc import Mapping, Sequence

import numpy as np

from medtl_jax.data.catalog import MISSING, Array

# Masks counted at a time: streamed ones are decoded for it.
_ROWS = 64


def count_targets(
    task: str, classes: Sequence[str], targets: Mapping[str, Array]
) -> dict[str, dict[str, dict[str, int | str]] | dict[str, int]]:
    """Returns `{"counts": {split: {class: number or short text}}, "images": {split: n}}`.

    Of a class: its images (`classify`, `ordinal`); positives, negatives and missing labels
    (`multilabel`); its share of the pixels (`segment`); mean, standard deviation, range and
    missing values (`regress`).

    Args:
      task: one of `catalog.TASKS`.
      classes: names of classes, findings or numbers.
      targets: of each split, see `catalog.Split`.
    """
    counts = {split: _rows(task, classes, target) for split, target in targets.items()}
    return {"counts": counts, "images": {split: len(target) for split, target in targets.items()}}


def _rows(task: str, classes: Sequence[str], target: Array) -> dict[str, int | str]:
    if task == "segment":
        pixels = np.zeros(len(classes), np.int64)
        for start in range(0, len(target), _ROWS):
            part = target[start : start + _ROWS]
            pixels += np.bincount(part.ravel(), minlength=len(classes))
        share = pixels / max(1, pixels.sum())
        return {name: f"{part:.2%} of pixels" for name, part in zip(classes, share, strict=True)}
    target = np.asarray(target)
    if task in ("classify", "ordinal"):
        numbers = np.bincount(target, minlength=len(classes))
        return {name: int(n) for name, n in zip(classes, numbers, strict=True)}
    describe = _finding if task == "multilabel" else _number
    return {name: describe(column) for name, column in zip(classes, target.T, strict=True)}


def _finding(labels: np.ndarray) -> str:
    missing = int((labels == MISSING).sum())
    kept = f"{int((labels == 1).sum())} yes, {int((labels == 0).sum())} no"
    return kept + (f", {missing} missing" if missing else "")


def _number(values: np.ndarray) -> str:
    known = values[~np.isnan(values)].astype(np.float64)
    if not len(known):
        return "none known"
    missing = f", {len(values) - len(known)} missing" if len(known) < len(values) else ""
    spread = f"{known.mean():.4g} ± {known.std():.3g}"
    return f"{spread} ({known.min():.4g} to {known.max():.4g}){missing}"
