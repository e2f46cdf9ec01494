"""From counts, or bootstrap draws, to an interval.

A proportion of independent images has the score interval (Wilson 1927): draws of a split with few
errors hardly differ, and those of one without an error not at all. (Of 100 images of which 1 % are
told wrong there is no error in 37 % of the splits.) Everything else is drawn.

Draw as many images as there are, with replacement, score the draw, repeat. Images of one patient
are alike, so where patients are known whole patients are drawn (cluster bootstrap; Field & Welsh
2007): drawing images would make the interval too narrow.

The interval is BCa, bias-corrected and accelerated (Efron 1987; Efron & Tibshirani 1993, ch. 14),
with the tails widened from the normal to Student's t (Hesterberg 2015), which a split of few
patients needs: the middle 95 % of the draws alone miss the truth too often, and nearly always on
one side.
The calibration error, whose draws are all too high, has the basic interval instead (Davison &
Hinkley 1997, ch. 5.2). Every interval is widened to hold the value itself, where it does not.

Draws that are all alike say nothing of the next sample. A proportion of 0 or 1 then has the exact
interval (Clopper & Pearson 1934) for as many patients as it counts; anything else has none.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from scipy import special, stats

# Counts held at a time (image x resample): 16 MiB as float64, whatever the split's size.
CHUNK = 2**21
# An interval over the remaining resamples is biased once many are left out.
MOST_UNDEFINED = 0.05
# Parts of the split that are left out in turn to find the acceleration: its error then is 0.003,
# of an effect near 0.05.
_PARTS = 200


@dataclasses.dataclass(frozen=True)
class Share:
    """A proportion of images as counts.

    Attributes:
      hits: images that count as 1.
      size: all images counted.
      units: patients that have one of them; `size` where each image is drawn by itself.
    """

    hits: int
    size: int
    units: int


@dataclasses.dataclass(frozen=True)
class Draws:
    """Values of all metrics by name.

    Attributes:
      bootstrap: `[r]` each, of the draws.
      without: `[p]` each, with one part of the split left out in turn.
      units: images, or patients, that were drawn.
      shares: of the metrics that are proportions of images.
    """

    bootstrap: dict[str, np.ndarray]
    without: dict[str, np.ndarray]
    units: int
    shares: dict[str, Share] = dataclasses.field(default_factory=dict)


def share_of(hit: np.ndarray, counted: np.ndarray, unit: np.ndarray) -> Share:
    """Returns the share of `hit` among the `counted` images, bool `[n]`; `unit` is int `[n]`."""
    return Share(int((hit & counted).sum()), int(counted.sum()), len(np.unique(unit[counted])))


def bootstrap_counts(units: int, images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields how often each unit is drawn, int64 `[units, r]`, until `resamples` are drawn.

    Every column sums to `units`. `images` (at least `units`) bounds r, so that a chunk of
    counts spread over the images stays within `CHUNK` numbers.
    """
    rng = np.random.default_rng(seed)
    width = max(1, CHUNK // images)
    for start in range(0, resamples, width):
        r = min(width, resamples - start)
        drawn = rng.integers(0, units, size=(r, units)) * r + np.arange(r)[:, None]
        yield np.bincount(drawn.ravel(), minlength=units * r).reshape(units, r)


def counts_without(units: int, images: int, seed: int, most: int = _PARTS) -> Iterator[np.ndarray]:
    """Yields 0 for the units of one part and 1 for the others, `[units, r]`, for every part.

    A part is one unit; where there are more than `most`, a random share of them (delete-a-group
    jackknife), so that there are `most` parts.
    """
    part = np.random.default_rng(seed).permutation(units) % most
    width = max(1, CHUNK // images)
    for start in range(0, min(units, most), width):
        parts = np.arange(start, min(start + width, units, most))
        yield (part[:, None] != parts).astype(np.int64)


def interval_of(
    draws: Draws, name: str, value: float, level: float, by_patient: bool
) -> tuple[list[float] | None, str]:
    """Returns `([low, high], "")` of one metric, or None and why there is none.

    Args:
      draws: of all metrics.
      name: of the metric; `ece` and `ece/...` have the basic interval.
      value: of the whole split, not NaN.
      level: coverage, between 0 and 1.
      by_patient: whether the units are patients, for the reason.
    """
    if draws.units == 1:
        return None, f"one {'patient' if by_patient else 'image'} only"
    share = draws.shares.get(name)
    if share is not None and share.units == share.size:
        return _of_share(share.hits, share.size, level, "wilson"), ""
    drawn = draws.bootstrap[name]
    defined = drawn[~np.isnan(drawn)]
    missing = len(drawn) - len(defined)
    if missing > MOST_UNDEFINED * len(drawn):
        return None, f"undefined in {missing} of {len(drawn)} resamples: too few images"
    if not np.ptp(defined) > 1e-12 * max(1.0, abs(value)):
        if share is None or 0 < share.hits < share.size:
            return None, "no resample differs, which does not mean certainty"
        return _of_share(share.units if share.hits else 0, share.units, level, "exact"), ""
    student = _student(level, draws.units)
    if name.partition("/")[0] == "ece":
        # The error of a finite sample is too high, that of a draw from it once more; mirrored at
        # the value the draws lie as far below it as they were above.
        tails = special.ndtr([student, -student])
        low, high = np.maximum(2 * value - np.quantile(defined, tails), 0)
    else:
        tails = bca_tails(defined, value, draws.without[name], student)
        low, high = np.quantile(defined, tails)
    return [float(min(low, value)), float(max(high, value))], ""


def _of_share(hits: int, size: int, level: float, method: str) -> list[float]:
    found = stats.binomtest(hits, size).proportion_ci(level, method)
    # The score interval of 0 or 1 may end a rounding beyond it.
    return [min(float(found.low), hits / size), max(float(found.high), hits / size)]


def _student(level: float, units: int) -> float:
    """How many of the bootstrap's own standard errors an interval reaches to either side."""
    return special.stdtrit(units - 1, (1 + level) / 2) * math.sqrt(units / (units - 1))


def bca_tails(drawn: np.ndarray, value: float, without: np.ndarray, reach: float) -> np.ndarray:
    """Returns the two quantiles of the draws between which the BCa interval lies, `[2]`.

    Efron & Tibshirani 1993, equations 14.10, 14.14 and 14.15.

    Args:
      drawn: `[r]`, the metric in each draw.
      value: of the whole split.
      without: `[p]`, the metric with one part of the split left out; NaN where undefined.
      reach: of the interval to either side in standard errors, 1.96 for 95 %.
    """
    # A draw equal to the value (within rounding) lies half below it: discrete metrics tie.
    tied = np.isclose(drawn, value, rtol=1e-9, atol=1e-12)
    below = ((drawn < value) & ~tied).mean() + tied.mean() / 2
    edge = 0.5 / len(drawn)
    bias = special.ndtri(np.clip(below, edge, 1 - edge))
    known = without[~np.isnan(without)]
    influence = known.sum() / max(len(known), 1) - known
    squares = (influence**2).sum()
    acceleration = (influence**3).sum() / (6 * squares**1.5) if squares > 1e-20 else 0.0
    shifted = bias + np.array([-reach, reach])
    # The transformation has a pole; beyond it lies the end of the draws.
    scale = 1 - acceleration * shifted
    ends = np.where(shifted < 0, -math.inf, math.inf)
    return special.ndtr(np.where(scale > 0, bias + shifted / np.maximum(scale, 1e-9), ends))
