"""What one metric of one split is: a value for each class, and the average over them."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from medtl_jax.metrics.weighted import ratio


@dataclasses.dataclass(frozen=True)
class Score:
    """One metric: its value (NaN where undefined), images counted, and a reason.

    The reason says why a value is undefined, or which classes an average leaves out.
    """

    value: float
    n: int
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Column:
    """One metric over k classes, or k = 1 where it has no classes.

    Attributes:
      values: float64 `[k]`, NaN where undefined.
      n: int `[k]`, images counted.
      reasons: k texts, empty where the value is defined.
      by_class: whether the k values are reported beside their average.
    """

    values: np.ndarray
    n: np.ndarray
    reasons: tuple[str, ...]
    by_class: bool = True


def column(values, n, reasons: Sequence[str], *, by_class: bool = True) -> Column:
    """Returns the column; `reasons` are only kept where a value is NaN, `n` may be one number."""
    values = np.asarray(values, np.float64).reshape(-1)
    kept = tuple(
        text if math.isnan(value) else "" for value, text in zip(values, reasons, strict=True)
    )
    return Column(values, np.broadcast_to(np.asarray(n), values.shape), kept, by_class)


def single(value, n: int, reason: str = "") -> Column:
    """Returns the column of a metric without classes; `reason` is kept if the value is NaN."""
    return column(value, n, (reason,), by_class=False)


def macro(values: np.ndarray, left_out: np.ndarray | bool = False) -> np.ndarray:
    """Returns the means over the classes, `[r]`: NaN where a class that counts is undefined.

    Averaging only what happens to be defined would compare runs over different sets of classes;
    so a class is left out only where `left_out` says that the truth cannot define its value.

    Args:
      values: float64 `[k, r]`.
      left_out: bool, broadcast to `[k, r]`.
    """
    counted = np.broadcast_to(~np.asarray(left_out), values.shape)
    return ratio(np.where(counted, values, 0).sum(axis=0), counted.sum(axis=0))


def named_scores(
    columns: dict[str, Column],
    left_out: dict[str, np.ndarray],
    classes: Sequence[str],
    n: int,
    noun: str,
) -> dict[str, Score]:
    """Returns the averages of all metrics, then `metric/class` of those that have classes.

    Args:
      columns: of each metric.
      left_out: bool `[k, 1]` of the metrics whose average leaves classes out.
      classes: names, one a row.
      n: images of the split, the `n` of an average.
      noun: what `classes` are, in the reason of an average that leaves some out; `""` where that
        is the metric's convention, whatever the split, and needs no reason.
    """
    averages, single_classes = {}, {}
    for metric, found in columns.items():
        if not found.by_class:
            averages[metric] = Score(float(found.values[0]), int(found.n[0]), found.reasons[0])
            continue
        out = left_out.get(metric, np.zeros((len(classes), 1), bool))
        value = float(macro(found.values[:, None], out)[0])
        reason = _macro_reason(found.reasons, out[:, 0], classes, noun)
        averages[metric] = Score(value, n, reason)
        for row, name in enumerate(classes):
            single_classes[f"{metric}/{name}"] = Score(
                float(found.values[row]), int(found.n[row]), found.reasons[row]
            )
    return averages | single_classes


def _macro_reason(
    reasons: Sequence[str], out: np.ndarray, classes: Sequence[str], noun: str
) -> str:
    undefined = [text for text, left in zip(reasons, out, strict=True) if text and not left]
    if undefined or not noun or not out.any():
        return "; ".join(undefined)
    without = ", ".join(name for name, left in zip(classes, out, strict=True) if left)
    return f"over {(~out).sum()} of {len(classes)} {noun}, without {without}"
