"""A validation split taken from the training split: stratified by class, patients kept whole."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, train_test_split

_MOST_FOLDS = 20


def carve(
    labels: Sequence[str], patients: Sequence[str] | None, fraction: float, seed: int
) -> np.ndarray:
    """Returns the sorted indices (int64) of about `fraction` of the images, stratified by class.

    With `patients`, no patient is in both parts, and the fraction is k / m, k of the m folds of
    scikit-learn's StratifiedGroupKFold (m up to 20, and no more than the rarest class or the
    number of patients allows). The same arguments give the same indices.

    Args:
      labels: class of each image.
      patients: patient of each image, None where they are not known.
      fraction: part to take, between 0 and 1.
      seed: seed of the shuffle.

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
    if lost:
        raise ValueError(f"it would take every image of class '{min(lost)}'")
    return chosen


def _whole_patients(
    labels: Sequence[str], patients: Sequence[str], fraction: float, seed: int
) -> np.ndarray:
    limit = min(_MOST_FOLDS, len(set(patients)), *Counter(labels).values())
    if limit < 2:
        raise ValueError("a class has one image only, or all images are of one patient")

    def taken(folds: int) -> int:
        return min(max(round(fraction * folds), 1), folds - 1)

    folds = min(range(2, limit + 1), key=lambda m: (abs(taken(m) / m - fraction), m))
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    parts = [part for _, part in splitter.split(np.zeros(len(labels)), labels, patients)]
    return np.concatenate(parts[: taken(folds)])
