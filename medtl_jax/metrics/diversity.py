"""How differently the members of an ensemble predict: every pair of them on the same images.

Kuncheva & Whitaker 2003 compare such measures. Of predicted classes:

- `disagreement`: the share of cases that two members call differently;
- `kappa`: Cohen's kappa of what the two call (Cohen 1960), 1 for members that always agree, 0 for
  the agreement of chance;
- `q`: Yule's Q of who is right, (N11 N00 - N01 N10) / (N11 N00 + N01 N10), N11 being the number of
  cases that both have right and N10 those that only the first has: 1 for members that err on the
  same cases, 0 for independent ones, less for those that err on different ones.

A case is an image; of `segment` a pixel, background included; of `multilabel` an image in which
the finding is known, each finding by itself, and the values are means over the findings. Numbers
(`regress`) are not called, and have one measure: `error_correlation`, Pearson's, over the images
where the number is known, averaged over the numbers.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from medtl_jax.data.catalog import MISSING, Array
from medtl_jax.metrics.checks import check_labels
from medtl_jax.metrics.multilabel import THRESHOLD
from medtl_jax.metrics.weighted import ratio


@dataclasses.dataclass(frozen=True)
class Measure:
    """One measure of diversity.

    Attributes:
      pairs: float64 `[m, m]`, symmetric, NaN where undefined; a member with itself on the diagonal.
      mean: over the pairs of different members that define it; NaN where none does.
      reason: what is undefined and left out, and why, `""` if nothing is.
    """

    pairs: np.ndarray
    mean: float
    reason: str = ""


_WHY = {
    "disagreement": "no label is known",
    "kappa": "both members call every case the same one class",
    "q": "no case that both have right, or none that both have wrong, and none that one has",
    "error_correlation": "errors that are all alike, or no known number",
}


def diversity(task: str, target: Array, scores: np.ndarray | Sequence[Array]) -> dict[str, Measure]:
    """Returns `disagreement`, `kappa` and `q`, or of `regress` `error_correlation`, by name.

    Args:
      task: of `catalog.TASKS`.
      target: as in `catalog.Split`.
      scores: of m members, `[m, n, ...]` or m arrays `[n, ...]`, see `report.predict.Predictions`;
        masks are read image by image.

    Raises:
      ValueError: fewer than two members; arrays that do not hold together.
    """
    _check(task, target, scores)
    if task == "regress":
        return {"error_correlation": _measure("error_correlation", _correlations(target, scores))}
    called, right = _tables(task, target, scores)
    return {
        name: _measure(name, values)
        for name, values in (
            ("disagreement", 1 - ratio(_trace(called), _size(called))),
            ("kappa", _kappa(called)),
            ("q", _yule(right)),
        )
    }


def _check(task: str, target: Array, scores: np.ndarray | Sequence[Array]) -> None:
    shapes = {tuple(member.shape) for member in scores}
    if len(scores) < 2 or len(shapes) != 1:
        raise ValueError(f"want two members or more with scores of one shape, got {shapes}")
    (shape,) = shapes
    wanted = shape if task in ("multilabel", "regress") else shape[:-1]
    if tuple(target.shape) != wanted or not shape[0]:
        raise ValueError(f"{task}: target {target.shape} does not fit scores {shape}")


def _tables(
    task: str, target: Array, scores: np.ndarray | Sequence[Array]
) -> tuple[np.ndarray, np.ndarray]:
    """What two members call, `[m, m, q, k, k]`, and have right, `[m, m, q, 2, 2]`; float64.

    There are q questions: the findings, or 1.
    """
    count, last = len(scores), scores[0].shape[-1]
    questions, k = (last, 2) if task == "multilabel" else (1, last)
    called = np.zeros((count, count, questions, k, k))
    right = np.zeros((count, count, questions, 2, 2))
    for question, labels, truth in _cases(task, target, scores):
        hits = (labels == truth).astype(np.int64)
        for i, j in itertools.product(range(count), repeat=2):
            called[i, j, question] += _cross(labels[i], labels[j], k)
            right[i, j, question] += _cross(hits[i], hits[j], 2)
    return called, right


def _cases(
    task: str, target: Array, scores: np.ndarray | Sequence[Array]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields question, what the members call, int `[m, c]`, and the truth `[c]`, of some cases."""
    if task == "segment":
        for image in range(len(target)):
            truth = np.asarray(target[image]).ravel().astype(np.int64)
            masks = [np.asarray(member[image]).argmax(axis=-1).ravel() for member in scores]
            yield 0, np.stack(masks), truth
        return
    truth, read = np.asarray(target), np.stack([np.asarray(member[:]) for member in scores])
    if task != "multilabel":
        check_labels(truth, 0, read.shape[-1] - 1)
        yield 0, read.argmax(axis=-1), truth
        return
    check_labels(truth, MISSING, 1)
    for j in range(read.shape[-1]):
        known = truth[:, j] != MISSING
        yield j, (read[:, known, j] > THRESHOLD).astype(np.int64), truth[known, j]


def _cross(first: np.ndarray, second: np.ndarray, k: int) -> np.ndarray:
    return np.bincount(first * k + second, minlength=k * k).reshape(k, k)


def _size(tables: np.ndarray) -> np.ndarray:
    return tables.sum(axis=(-2, -1))


def _trace(tables: np.ndarray) -> np.ndarray:
    return np.trace(tables, axis1=-2, axis2=-1)


def _kappa(tables: np.ndarray) -> np.ndarray:
    size = _size(tables)
    chance = (tables.sum(axis=-1) * tables.sum(axis=-2)).sum(axis=-1)
    return ratio(_trace(tables) * size - chance, size**2 - chance)


def _yule(tables: np.ndarray) -> np.ndarray:
    same = tables[..., 0, 0] * tables[..., 1, 1]
    other = tables[..., 0, 1] * tables[..., 1, 0]
    return ratio(same - other, same + other)


def _correlations(target: Array, scores: np.ndarray | Sequence[Array]) -> np.ndarray:
    """Pearson's correlation of the errors of two members in each number, `[m, m, k]`."""
    truth = np.asarray(target).astype(np.float64)
    read = np.stack([np.asarray(member[:]) for member in scores]).astype(np.float64)
    found = []
    for j in range(truth.shape[1]):
        known = ~np.isnan(truth[:, j])
        errors = read[:, known, j] - truth[known, j]
        errors = errors - errors.sum(axis=1, keepdims=True) / max(int(known.sum()), 1)
        products = errors @ errors.T
        lengths = np.sqrt(np.diagonal(products))
        found.append(ratio(products, np.outer(lengths, lengths)))
    return np.stack(found, axis=-1)


def _measure(name: str, values: np.ndarray) -> Measure:
    """The measure of values `[m, m, q]` of q questions."""
    known = ~np.isnan(values)
    pairs = ratio(np.where(known, values, 0).sum(axis=-1), known.sum(axis=-1).astype(np.float64))
    different = np.triu_indices(len(pairs), 1)
    defined = pairs[different][~np.isnan(pairs[different])]
    missing = int((~known[different]).sum())
    reason = ""
    if missing:
        many = "" if values.shape[-1] == 1 else f" in {values.shape[-1]} questions"
        reason = f"undefined for {missing} pairs of members{many}: {_WHY[name]}"
    return Measure(pairs, float(defined.mean()) if len(defined) else math.nan, reason)
