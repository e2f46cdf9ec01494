"""p-values of two runs on the same images, and their adjustment for several of them."""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from scipy import stats

from medtl_jax.metrics.intervals import CHUNK
from medtl_jax.metrics.weighted import Ranking, rank, ranking_scores


def holm(p: Sequence[float]) -> list[float]:
    """Returns the p-values adjusted for their number (Holm 1979); NaN stays and is not counted."""
    adjusted, most = [math.nan] * len(p), 0.0
    order = [i for i in np.argsort(p, kind="stable") if not math.isnan(p[i])]
    for place, i in enumerate(order):
        most = max(most, min(1.0, (len(order) - place) * p[i]))
        adjusted[i] = most
    return adjusted


def permutation(difference: float, swapped: np.ndarray) -> float:
    """Returns the two-sided p of a difference among those with exchanged runs, `[r]`.

    The difference itself counts as one of them.
    """
    # Sums in another order differ in their last digits; an undefined one counts as far out.
    nearer = np.abs(swapped) < abs(difference) * (1 - 1e-9)
    return float((1 + (~nearer).sum()) / (1 + len(swapped)))


def jackknife_test(difference: float, without: np.ndarray, share: np.ndarray) -> float:
    """Returns the two-sided p of a difference by its jackknife standard error, NaN without one.

    The difference is no mean over the images, but changes by nearly a sum of what each of them
    contributes (Efron & Tibshirani 1993, ch. 11). Its ratio to the standard error is referred to
    Student's t. Of p contributions u as many count as degrees of freedom, less one, as
    (sum u^2)^2 / sum u^4: where the runs differ in five images, it is these five that say
    something, however many others there are. Runs that never differ have p = 1.

    Args:
      difference: of all images.
      without: `[p]`, with one part of the images left out in turn.
      share: `[p]`, of the images that each part holds.
    """
    if difference == 0 and not without.any():
        return 1.0
    change = (difference - without) * (1 - share)
    change = change - change.mean()
    squares = float((change**2).sum())
    if len(change) < 2 or not squares > (1e-9 * abs(difference)) ** 2:
        return math.nan
    error = math.sqrt(squares * len(change) / (len(change) - 1))
    degrees = max(1.0, squares**2 / float((change**4).sum()) - 1)
    return float(2 * stats.t.sf(abs(difference) / error, degrees))


def coins(unit: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields 0 or 1 for each image, the same within a unit, `[n, r]`, until `resamples` are drawn.

    `unit` is int `[n]`; r is such that `[2 n, r]` numbers stay within `intervals.CHUNK`.
    """
    rng, width = np.random.default_rng((seed, 2)), max(1, CHUNK // (2 * len(unit)))
    for start in range(0, resamples, width):
        yield rng.integers(0, 2, (int(unit.max()) + 1, min(width, resamples - start)))[unit]


def rank_permutation(
    target: np.ndarray, score_a: np.ndarray, score_b: np.ndarray, exchanges: Iterable[np.ndarray]
) -> float:
    """Returns the two-sided p of a difference in (mean) AUC by exchanging ranks between the runs.

    The scores become ranks within their run first (Venkatraman & Begg 1996), so that a run with
    other probabilities but the same order is no other run.

    Args:
      target: int `[n, k]`, 1, 0, or negative where unknown; each class has both kinds.
      score_a, score_b: float `[n, k]`.
      exchanges: of `coins`: in which of them the images change places.
    """
    n, k = target.shape
    rankings = [_both_ranked(target[:, i], score_a[:, i], score_b[:, i]) for i in range(k)]

    def gap(moved: np.ndarray) -> np.ndarray:
        sides = np.concatenate([1.0 - moved, moved]), np.concatenate([moved, 1.0 - moved])
        areas = [[ranking_scores(one, side)[0] for one in rankings] for side in sides]
        return np.mean(areas[1], axis=0) - np.mean(areas[0], axis=0)

    own = float(gap(np.zeros((n, 1)))[0])
    return permutation(own, np.concatenate([gap(moved) for moved in exchanges]))


def _both_ranked(target: np.ndarray, score_a: np.ndarray, score_b: np.ndarray) -> Ranking:
    """The known images of both runs `[2 n]` in the order of their ranks within each run."""
    known = target >= 0
    ranks = np.zeros((2, len(target)))
    ranks[:, known] = stats.rankdata([score_a[known], score_b[known]], axis=1)
    twice = np.tile(target, 2)
    return rank(twice == 1, ranks.ravel(), np.flatnonzero(twice >= 0))


def mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> float:
    """Returns the two-sided p of McNemar's exact test, bool `[n]` each: which ones are right."""
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_b, only_a + only_b).pvalue)
