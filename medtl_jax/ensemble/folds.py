"""Parts of the validation images, to fit on some of them and to look at the others."""

from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from medtl_jax.data.strata import pool_rare


def units(count: int, patients: np.ndarray | None) -> int:
    """Returns how many units can be parted: patients, or images where patients are not known."""
    return count if patients is None else len(np.unique(patients))


def fold_numbers(
    labels: Sequence[str], folds: int, seed: int, patients: np.ndarray | None = None
) -> np.ndarray:
    """Returns the part of each image, int64 `[n]` in 0..`folds`-1, or fewer where units are few.

    The strata are shared out evenly; those with too few images for that are pooled. No patient is
    in two parts. The same arguments give the same parts.

    Args:
      labels: stratum of each of n images, see `data.strata`.
      folds: 2 or more.
      seed: of the shuffle.
      patients: of each image `[n]`, None where they are not known.

    Raises:
      ValueError: fewer than two folds or units.
    """
    folds = min(folds, units(len(labels), patients))
    if folds < 2:
        raise ValueError("want two folds, and images of two patients")
    splitter = StratifiedKFold if patients is None else StratifiedGroupKFold
    parts = splitter(folds, shuffle=True, random_state=seed).split(
        np.zeros(len(labels)), pool_rare(labels, folds), patients
    )
    numbers = np.empty(len(labels), np.int64)
    for number, (_, held) in enumerate(parts):
        numbers[held] = number
    return numbers
