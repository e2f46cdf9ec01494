"""Error and rejection: how far an uncertainty tells which predictions are wrong.

The images are sorted by uncertainty and the most uncertain rejected (left to a person, say). The
curve is the mean error of the j images that are kept, j = n down to 1, over the share that is
rejected (Nadeem et al. 2009). Its area is the mean of these n numbers (AURC, Geifman, Uziel &
El-Yaniv 2019), less is better. An uncertainty that knows nothing has the mean error everywhere
(`area_random`); one that knew the errors would reject by them (`area_oracle`). The `gain`

    (area_random - area) / (area_random - area_oracle)

is 1 for the oracle, 0 for chance and negative below it (Malinin 2019). Among images of equal
uncertainty the order is chance, and the curve is the mean over all orders.
"""

import dataclasses
import math

import numpy as np

from medtl_jax.metrics import multilabel, segmentation
from medtl_jax.metrics.intervals import Draws, bootstrap_counts, counts_without, interval_of
from medtl_jax.metrics.scores import Cases
from medtl_jax.metrics.weighted import ratio

AREAS = ("area", "area_random", "area_oracle", "gain")


@dataclasses.dataclass(frozen=True)
class Curve:
    """The mean error of what is kept; float64 `[n]` each.

    Attributes:
      rejected: share of the images that is rejected, 0, 1/n, ..., 1 - 1/n.
      error: mean error of the others, the most uncertain being rejected first.
      oracle: likewise, the largest errors being rejected first.
    """

    rejected: np.ndarray
    error: np.ndarray
    oracle: np.ndarray


def image_errors(task: str, cases: Cases) -> np.ndarray:
    """Returns the error of each image, float64 `[n]`, of `regress` `[n, k]`; NaN where unknown.

    `classify`, `ordinal`: 1 where the argmax is wrong, else 0. `multilabel`: the share of the known
    findings that are called wrong. `segment`: 1 less the mean Dice of the classes that are in the
    true or the predicted mask, 0 where both are empty. `regress`: the absolute error of each number
    in its own units.

    Args:
      task: of `catalog.TASKS`.
      cases: of `scores.prepare`.
    """
    if task == "multilabel":
        return _share_wrong(cases)
    if task == "segment":
        return _lost_dice(cases)
    if task == "regress":
        return np.abs(cases.score - cases.target)
    return (cases.predicted != cases.target).astype(np.float64)


def _share_wrong(cases: multilabel.Cases) -> np.ndarray:
    wrong = (cases.called != cases.target) & cases.known
    return ratio(wrong.sum(axis=1).astype(np.float64), cases.known.sum(axis=1))


def _lost_dice(cases: segmentation.Cases) -> np.ndarray:
    dice = cases.images["dice"]
    defined = ~np.isnan(dice)
    lost = np.where(defined, 1 - dice, 0).sum(axis=1)
    return lost / np.maximum(defined.sum(axis=1), 1)


def rejection_curve(uncertainty: np.ndarray, error: np.ndarray) -> Curve:
    """Returns the curve of the images whose error is known.

    Args:
      uncertainty: `[n]`, higher for predictions that are more likely wrong.
      error: `[n]`, 0 or more, NaN where unknown.

    Raises:
      ValueError: shapes that do not fit, no known error, an uncertainty that is not finite.
    """
    uncertainty, error, _ = _checked(uncertainty, error, None)
    n = len(error)
    return Curve(np.arange(n) / n, _kept(uncertainty, error), _kept(error, error))


def _kept(order: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Mean error of the n, n - 1, ..., 1 images with the lowest `order`, expected over ties."""
    _, group, size = np.unique(order, return_inverse=True, return_counts=True)
    mean = np.bincount(group, weights=error) / size
    expected = np.cumsum(np.repeat(mean, size))
    return (expected / np.arange(1, len(error) + 1))[::-1]


def rejection_scores(
    uncertainty: np.ndarray,
    error: np.ndarray,
    patients: np.ndarray | None = None,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, dict]:
    """Returns `{"area", "area_random", "area_oracle", "gain"}`, entries as in `metrics.json`.

    An entry is `{"value", "ci95", "n"}` (`ci90` for `level=0.9`), with `n_patients` where patients
    are known, and None with a `reason` for what is undefined: the gain where no order could be
    better than another, an interval see `intervals`. Areas are in units of the error.

    Args:
      uncertainty: `[n]`, higher for predictions that are more likely wrong.
      error: `[n]`, 0 or more; images where it is NaN are left out, and `n` counts the others.
      patients: of each image `[n]`; whole patients are then drawn.
      resamples, level, seed: of the bootstrap.

    Raises:
      ValueError: as `rejection_curve`; `resamples` or `level` out of range.
    """
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"want resamples >= 1 and 0 < level < 1, got {resamples}, {level}")
    uncertainty, error, patients = _checked(uncertainty, error, patients)
    n = len(error)
    unit = np.arange(n) if patients is None else np.unique(patients, return_inverse=True)[1]
    units = int(unit.max()) + 1
    bootstrap, without = (
        _drawn(uncertainty, error, (counts[unit] for counts in chunks))
        for chunks in (
            bootstrap_counts(units, n, resamples, seed),
            counts_without(units, n, seed),
        )
    )
    draws = Draws(bootstrap, without, units)
    found = {}
    for name, values in _areas(uncertainty, error, np.ones((n, 1), np.int64)).items():
        value, interval = float(values[0]), None
        reason = "all errors are alike, no order is better than another"
        if not math.isnan(value):
            interval, reason = interval_of(draws, name, value, level, patients is not None)
        found[name] = {
            "value": None if math.isnan(value) else value,
            f"ci{100 * level:g}": interval,
            "n": n,
            **({} if patients is None else {"n_patients": units}),
            **({"reason": reason} if reason else {}),
        }
    return found


def _drawn(uncertainty, error, chunks) -> dict[str, np.ndarray]:
    parts = [_areas(uncertainty, error, counts) for counts in chunks]
    return {name: np.concatenate([part[name] for part in parts]) for name in AREAS}


def _areas(uncertainty: np.ndarray, error: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """`AREAS` of r samples, `[r]` each; `counts` int `[n, r]`, how often each has each image."""
    area, oracle = _area(uncertainty, error, counts), _area(error, error, counts)
    random = ratio(error @ counts, counts.sum(axis=0).astype(np.float64))
    possible = random - oracle
    # Errors that are all alike leave a difference of rounding.
    possible = np.where(possible > 1e-12 * np.abs(random), possible, 0)
    return dict(zip(AREAS, (area, random, oracle, ratio(random - area, possible)), strict=True))


def _area(order: np.ndarray, error: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean over j of the mean error of the j images with the lowest `order`, `[r]`.

    In a run of t equal ones with errors that sum to s, after C images with errors E, the expected
    mean error is (E + j s / t) / (C + j), j = 1..t, which sums to s + (E - C s / t) (H(C + t) -
    H(C)), with the harmonic numbers H.
    """
    by_order = np.argsort(order, kind="stable")
    starts = np.flatnonzero(np.diff(order[by_order], prepend=-np.inf))
    drawn = counts[by_order]
    size = np.add.reduceat(drawn, starts, axis=0)
    sums = np.add.reduceat(drawn * error[by_order, None], starts, axis=0)
    last = np.cumsum(size, axis=0)
    first, errors_before = last - size, np.cumsum(sums, axis=0) - sums
    total = last[-1]
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, total.max() + 1))])
    rate = np.divide(sums, size, out=np.zeros_like(sums), where=size > 0)
    runs = sums + (errors_before - first * rate) * (harmonic[last] - harmonic[first])
    return ratio(runs.sum(axis=0), total.astype(np.float64))


def _checked(
    uncertainty: np.ndarray, error: np.ndarray, patients: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The arguments where the error is known, float64; ValueError if they do not fit."""
    uncertainty, error = np.asarray(uncertainty, np.float64), np.asarray(error, np.float64)
    if error.ndim != 1 or uncertainty.shape != error.shape:
        raise ValueError(f"want two arrays [n], got {uncertainty.shape}, {error.shape}")
    if patients is not None and np.shape(patients) != error.shape:
        raise ValueError(f"want a patient for each of {len(error)} images, got {len(patients)}")
    known = ~np.isnan(error)
    if not known.any():
        raise ValueError("no image has a known error")
    uncertainty, error = uncertainty[known], error[known]
    if not (np.isfinite(uncertainty).all() and np.isfinite(error).all() and (error >= 0).all()):
        raise ValueError("want finite uncertainties, and errors that are finite and 0 or more")
    return uncertainty, error, None if patients is None else np.asarray(patients)[known]
