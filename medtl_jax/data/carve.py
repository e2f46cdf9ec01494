"""Parts taken from a set: stratified, with patients kept whole; one fraction, or k folds."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, train_test_split

from medtl_jax.data.strata import fewest, pool_rare

_MOST_FOLDS = 20


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Which images of a table without splits are for test.

    Attributes:
      fraction: part of the images, between 0 and 1; not used with folds.
      folds: k > 1 divides the table into k parts; 0 does not.
      fold: number of the part that is for test, 0 to k - 1.
      seed: of the shuffle.
    """

    fraction: float = 0.2
    folds: int = 0
    fold: int = 0
    seed: int = 0


def carve(
    labels: Sequence[str],
    patients: Sequence[str] | None,
    fraction: float,
    seed: int,
    *,
    every_class: bool = True,
) -> np.ndarray:
    """Returns the sorted indices (int64) of about `fraction` of the images, stratified by class.

    With `patients`, no patient is in both parts, and the fraction is k / m, k of the m folds of
    scikit-learn's StratifiedGroupKFold (m up to 20, and no more than the rarest class or the
    number of patients allows). Classes too rare for such a fraction are pooled for that, unless
    all of them are. The same arguments give the same indices.

    Args:
      labels: class (or other stratum) of each image.
      patients: patient of each image, None where they are not known.
      fraction: part to take, between 0 and 1.
      seed: seed of the shuffle.
      every_class: whether every class has to keep images.

    Raises:
      ValueError: too few images or patients of some class, or a class would lose all its images.
    """
    if patients is None:
        chosen = train_test_split(
            np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=seed
        )[1]
    else:
        chosen = _whole_patients(labels, patients, fraction, seed)
    chosen = np.sort(chosen)
    kept = np.setdiff1d(np.arange(len(labels)), chosen)
    lost = set(labels) - {labels[index] for index in kept}
    if every_class and lost:
        raise ValueError(f"it would take every image of class '{min(lost)}'")
    return chosen


def draw_test(labels: Sequence[str], patients: Sequence[str] | None, plan: HeldOut) -> np.ndarray:
    """Returns the sorted indices (int64) of the images for test, by `plan`.

    The parts of `fold` = 0 to `folds` - 1 are disjoint and make up the whole table. Strata too
    small for a share in every part are pooled first.

    Args:
      labels: stratum of each image.
      patients: patient of each image, None where they are not known; each is in one part.
      plan: what to draw.

    Raises:
      ValueError: too few images or patients.
    """
    if plan.folds < 2:
        pooled = pool_rare(labels, fewest(plan.fraction))
        return carve(pooled, patients, plan.fraction, plan.seed, every_class=False)
    units = len(labels) if patients is None else len(set(patients))
    if units < plan.folds:
        what = "images" if patients is None else "patients"
        raise ValueError(f"{units} {what} are too few for {plan.folds} folds")
    splitter = StratifiedKFold if patients is None else StratifiedGroupKFold
    parts = splitter(plan.folds, shuffle=True, random_state=plan.seed).split(
        np.zeros(len(labels)), pool_rare(labels, plan.folds), patients
    )
    chosen = [part for _, part in parts][plan.fold]
    if not len(chosen):
        raise ValueError(f"fold {plan.fold} has no images")
    return np.sort(chosen)


def _whole_patients(
    labels: Sequence[str], patients: Sequence[str], fraction: float, seed: int
) -> np.ndarray:
    pooled = pool_rare(labels, fewest(fraction))
    labels = pooled if len(set(pooled)) > 1 else labels
    limit = min(_MOST_FOLDS, len(set(patients)), *Counter(labels).values())
    if limit < 2:
        raise ValueError("a class has one image only, or all images are of one patient")

    def taken(folds: int) -> int:
        return min(max(round(fraction * folds), 1), folds - 1)

    folds = min(range(2, limit + 1), key=lambda m: (abs(taken(m) / m - fraction), m))
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    parts = [part for _, part in splitter.split(np.zeros(len(labels)), labels, patients)]
    return np.concatenate(parts[: taken(folds)])
