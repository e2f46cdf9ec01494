"""What a random division of a set keeps in proportion: the strata of each task's targets."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

CLASS_TASKS = ("classify", "ordinal")

_BINS = 10
_PER_BIN = 20
_UNKNOWN = "unknown"
_WAYS = {
    "classify": "stratified by class",
    "ordinal": "stratified by class",
    "multilabel": "stratified by the rarest finding",
    "regress": "stratified by the first target",
    "segment": "at random",
}


def strata(task: str, target: np.ndarray | None, classes: Sequence[str], count: int) -> list[str]:
    """Returns the stratum of each of `count` images.

    Classes and grades are strata. A multi-label image belongs to the rarest finding that is
    present in it. Numbers are put into up to ten bins of equal counts of the first one. Masks
    are not read for it: all of them are one stratum.

    Args:
      task: one of `catalog.TASKS`.
      target: as in `catalog.Split` (not used for masks, which may be None).
      classes: names, as in `catalog.DataSpec`.
      count: number of images.
    """
    if task in CLASS_TASKS:
        return [classes[label] for label in target.tolist()]
    if task == "multilabel":
        return _rarest_findings(target, classes)
    if task == "regress":
        return _bins(target[:, 0])
    return [""] * count


def way(task: str) -> str:
    """Returns the words for how images of a task are divided, for a note."""
    return _WAYS[task]


def pool_rare(labels: Sequence[str], minimum: int) -> list[str]:
    """Returns the strata with those of fewer than `minimum` images put together.

    What they make together joins the smallest other stratum if it is too small as well. A
    splitter of so many parts can then give a share of every stratum to each of them.

    >>> pool_rare(["a", "a", "b", "c"], 2)
    ['a', 'a', 'b + c', 'b + c']
    """
    counts = Counter(labels)
    rare = sorted(label for label, count in counts.items() if count < minimum)
    large = {label: count for label, count in counts.items() if count >= minimum}
    if rare and large and sum(counts[label] for label in rare) < minimum:
        rare.append(min(large, key=lambda label: (large[label], label)))
    pooled = " + ".join(rare)
    return [pooled if label in rare else label for label in labels]


def fewest(fraction: float) -> int:
    """Returns how many images a stratum needs for `fraction` of them, or of the rest, to be one."""
    return math.ceil(1 / min(fraction, 1 - fraction) - 1e-9)


def _rarest_findings(target: np.ndarray, classes: Sequence[str]) -> list[str]:
    positive = target == 1
    # By count, then by name: neither depends on the order of the images or of the columns.
    order = sorted(range(len(classes)), key=lambda k: (positive[:, k].sum(), classes[k]))
    first = positive[:, order].argmax(axis=1)
    return [
        classes[order[place]] if any_present else ""
        for place, any_present in zip(first.tolist(), positive.any(axis=1), strict=True)
    ]


def _bins(values: np.ndarray) -> list[str]:
    known = values[np.isfinite(values)]
    count = int(np.clip(len(known) // _PER_BIN, 1, _BINS))
    edges = np.quantile(known, np.arange(1, count) / count) if len(known) else np.empty(0)
    places = np.searchsorted(edges, values, side="right")
    return [
        str(place) if np.isfinite(value) else _UNKNOWN
        for place, value in zip(places.tolist(), values, strict=True)
    ]
