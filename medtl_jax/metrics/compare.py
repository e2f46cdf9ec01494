"""Paired comparison of runs that predicted the same images: differences, p-values, verdicts.

Each difference is that of a run minus the first. Its interval is the middle of the differences in
a paired bootstrap: both runs are scored on the same draws, of whole patients where patients are
known, with tails widened to Student's t (Hesterberg 2015).

The p-value comes from elsewhere, so that it may say another thing than the interval at the border:

- for `auc`, DeLong's test (`metrics.delong`), held to a t distribution where positives are few;
  where it has no variance, a permutation test of the ranks;
- for the accuracy of one label an image, McNemar's exact test, unless a patient has several
  images: binomial odds need independent images;
- for other means over the images a permutation test: for each patient or image a coin decides
  whether the two runs' predictions change places, which is the sign-flip test of a mean;
- for what is no mean (precision, F1, kappa, correlations, ...) the difference over its jackknife
  standard error. Exchanging predictions would not do: two runs of one precision that call unlike
  numbers of images are no exchangeable ones (Chung & Romano 2013);
- a median has no test.

A verdict is given for the primary metrics alone, by p-values adjusted by Holm (1979) over these
metrics and all runs: of a dozen metrics one or the other would differ by chance too often.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import stats

from medtl_jax.errors import UserError
from medtl_jax.metrics import multilabel, segmentation
from medtl_jax.metrics.delong import auc_test
from medtl_jax.metrics.intervals import MOST_UNDEFINED, bootstrap_counts, counts_without
from medtl_jax.metrics.paired_tests import (
    coins,
    holm,
    jackknife_test,
    mcnemar,
    permutation,
    rank_permutation,
)
from medtl_jax.metrics.pairing import Predicted, align, units_of
from medtl_jax.metrics.scores import Cases, prepare
from medtl_jax.metrics.uncertainty import overall_scores, weighted_scores

_PRIMARY = {
    "classify": ("auc", "accuracy"),
    "ordinal": ("quadratic_kappa",),
    "segment": ("dice",),
}
_LOWER = ("mae", "mse", "rmse", "median_error", "hd95", "nll", "ece", "brier")
# The best bias is 0: neither more nor less of it is better.
_WITHOUT_DIRECTION = ("bias",)
_WITHOUT_TEST = ("median_error",)
# Sums over the images, divided by what the truth alone decides.
_MEANS = (
    "accuracy", "balanced_accuracy", "recall", "specificity", "exact_match", "mae", "mse", "brier",
    "nll",
)  # fmt: skip
_ONE_LABEL = ("classify", "ordinal")
# Parts of the split that the jackknife leaves out in turn, where there are more units.
_PARTS = 1000
DELONG, MCNEMAR, PERMUTATION = "DeLong", "McNemar, exact", "permutation"
RANKS, JACKKNIFE = "permutation of ranks", "jackknife t"
BETTER, WORSE, UNDEFINED = "better", "worse", "undefined"
_Values = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Difference:
    """One metric of two runs.

    Attributes:
      first, second: its values; NaN where undefined.
      difference: second - first.
      interval: bootstrap interval of the difference, None where there is none.
      p: two-sided; NaN where there is no test.
      adjusted: p after Holm, at least `p`; NaN for a metric that is not primary.
      test: how p was found, `""` where it was not.
      verdict: of the second run, for a primary metric: `better`, `worse` or `cannot tell at
        n = ...`; `undefined` where the difference is; `""` for every other metric.
      reason: why there is no interval or no test.
    """

    first: float
    second: float
    difference: float
    interval: tuple[float, float] | None
    p: float
    adjusted: float
    test: str
    verdict: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two runs on the same images, `metrics` by name; `primary` names those with a verdict."""

    first: str
    second: str
    metrics: dict[str, Difference]
    primary: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Two runs with their cases; `unit` int `[n]` is the image or patient that is drawn."""

    runs: tuple[Predicted, Predicted]
    cases: tuple[Cases, Cases]
    unit: np.ndarray

    @property
    def task(self) -> str:
        return self.runs[0].task

    @property
    def units(self) -> int:
        return int(self.unit.max()) + 1

    def samples(self, counts: np.ndarray) -> tuple[_Values, _Values]:
        """The metrics of both runs in the samples `counts` `[n, r]`, `[r]` each."""
        first, second = (_samples(self.task, cases, counts) for cases in self.cases)
        return first, second


def compare_runs(
    runs: Sequence[Predicted],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    tolerance: float = 2.0,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[Comparison]:
    """Returns the comparison of every further run with the first, over all overall metrics.

    Args:
      runs: at least two; the order of their images does not matter.
      resamples: draws of the bootstrap, and coin series of the permutation test.
      level: of the intervals; a verdict needs an adjusted p of at most 1 - `level`.
      seed: of the draws; the same seed gives the same numbers, and all runs the same draws.
      tolerance: pixels, of the normalised surface distance.
      advance: is told how many of all draws are done.

    Raises:
      UserError: the runs differ in task, classes, images, targets or patients; predictions that
        are none.
      ValueError: fewer than two runs; `resamples` or `level` out of range.
    """
    if len(runs) < 2 or resamples < 1 or not 0 < level < 1:
        raise ValueError(f"want two runs, resamples, a level: {len(runs)}, {resamples}, {level}")
    runs = align(runs)
    unit = units_of(runs[0])
    cases = [_prepare(run, tolerance) for run in runs]
    total = (len(runs) - 1) * resamples
    found = []
    for other in range(1, len(runs)):
        pair = _Pair((runs[0], runs[other]), (cases[0], cases[other]), unit)
        told = functools.partial(_tell, advance, (other - 1) * resamples, total)
        found.append(_differences(pair, resamples, level, seed, told))
    primary = primary_metrics(runs[0].task, runs[0].classes, found[0])
    noun = "images" if runs[0].patients is None else "patients"
    judged = _judge(primary, found, 1 - level, f"n = {unit.max() + 1} {noun}")
    return [
        Comparison(runs[0].name, other.name, metrics, primary)
        for other, metrics in zip(runs[1:], judged, strict=True)
    ]


def _tell(advance: Callable[[int, int], None], earlier: int, total: int, done: int) -> None:
    advance(earlier + done, total)


def primary_metrics(
    task: str, classes: Sequence[str], metrics: dict[str, Difference]
) -> tuple[str, ...]:
    """Returns the metrics that get a verdict.

    Of findings it is the AUC of the frequent ones, where there are any: that of a handful of
    images is mostly chance. Of several numbers it is the error of each, which have no common unit.

    Args:
      task: one of `catalog.TASKS`.
      classes: names.
      metrics: of any comparison of these runs; which findings are frequent is the truth's matter.
    """
    if task == "multilabel":
        frequent = metrics.get("auc_frequent")
        return ("auc",) if frequent is None or frequent.verdict == UNDEFINED else ("auc_frequent",)
    if task == "regress":
        return ("mae",) if len(classes) == 1 else tuple(f"mae/{name}" for name in classes)
    return _PRIMARY[task]


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of `metric` is the better one."""
    return _plain(metric) in _LOWER


def _plain(metric: str) -> str:
    return metric.partition("/")[0].removesuffix("_micro")


def _prepare(run: Predicted, tolerance: float) -> Cases:
    try:
        return prepare(run.task, run.target, run.score, run.classes, tolerance=tolerance)
    except ValueError as error:
        raise UserError(f"the predictions of {run.name} are damaged: {error}") from error


def _samples(task: str, cases: Cases, counts: np.ndarray) -> _Values:
    """The metrics that are compared, `[r]` each, of the samples `counts` `[n, r]`."""
    found = {
        name: value
        for name, value in overall_scores(task, cases, counts).items()
        if name not in _WITHOUT_DIRECTION
        # With one label an image the micro averages are the accuracy.
        and not (task in _ONE_LABEL and name.endswith("_micro"))
    }
    if task == "regress" and len(cases.classes) > 1:
        errors = weighted_scores(task, cases, counts)["mae"]
        found |= {f"mae/{name}": row for name, row in zip(cases.classes, errors, strict=True)}
    return found


def _differences(
    pair: _Pair, resamples: int, level: float, seed: int, advance: Callable[[int], None]
) -> dict[str, Difference]:
    """Every overall metric of two runs, with p as it is before Holm and no verdict yet."""
    values = pair.samples(np.ones((len(pair.unit), 1)))
    drawn, swapped = _resampled(pair, values, resamples, seed, advance)
    tests = _tests(pair, values, swapped, resamples, seed)
    found = {}
    for name in values[0]:
        a, b = (float(value[name][0]) for value in values)
        if math.isnan(b - a):
            found[name] = Difference(a, b, b - a, None, math.nan, math.nan, "", UNDEFINED)
            continue
        p, test, untested = tests[name]
        interval, unknown = _interval(name, b - a, drawn[name], level, pair.units)
        reason = "; ".join(dict.fromkeys(filter(None, (unknown, untested))))
        found[name] = Difference(a, b, b - a, interval, p, math.nan, test, "", reason)
    return found


def _resampled(
    pair: _Pair, values: tuple[_Values, _Values], resamples: int, seed: int, advance
) -> tuple[_Values, _Values]:
    """Differences in the bootstrap's draws, and those of means after exchanges; `[r]` each."""
    both, exchanged = _both(pair), _exchanged(pair, values[0])
    drawn, swapped, done = [], [], 0
    rng = np.random.default_rng((seed, 1))
    for counts in bootstrap_counts(pair.units, 2 * len(pair.unit), resamples, seed):
        drawn.append(_gaps(*pair.samples(counts[pair.unit])))
        coin = rng.integers(0, 2, counts.shape)[pair.unit]
        second = _samples(pair.task, both, np.concatenate([coin, 1 - coin]))
        # Of a mean, what one side gains the other loses.
        sums = {name: values[0][name] + values[1][name] for name in exchanged}
        swapped.append({name: 2 * second[name] - sums[name] for name in exchanged})
        done += counts.shape[1]
        advance(done)
    return _joined(drawn), _joined(swapped)


def _both(pair: _Pair) -> Cases:
    """The images of both runs `[2 n]`: a sample of one run counts the other's images 0 times."""
    if pair.task == "segment":
        # Distances between surfaces take longest: they are not computed again.
        return segmentation.joined(pair.cases)
    target, score = (
        np.concatenate([getattr(run, name) for run in pair.runs]) for name in ("target", "score")
    )
    return prepare(pair.task, target, score, pair.runs[0].classes)


def _exchanged(pair: _Pair, names: Iterable[str]) -> list[str]:
    """The metrics that are means over the same images in both runs."""
    chosen = [name for name in names if _plain(name) in _MEANS]
    if pair.task == "segment":
        first, second = (cases.images for cases in pair.cases)
        chosen += [
            name
            for name in segmentation.PER_IMAGE
            if name in names and np.array_equal(np.isnan(first[name]), np.isnan(second[name]))
        ]
    return chosen


def _gaps(first: _Values, second: _Values) -> _Values:
    return {name: second[name] - first[name] for name in first}


def _joined(parts: list[_Values]) -> _Values:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _interval(
    name: str, difference: float, drawn: np.ndarray, level: float, units: int
) -> tuple[tuple[float, float] | None, str]:
    """The interval of a difference from the drawn ones, or None and why."""
    if units == 1:
        return None, "one image or patient only"
    defined = drawn[~np.isnan(drawn)]
    missing = len(drawn) - len(defined)
    if missing > MOST_UNDEFINED * len(drawn):
        return None, f"undefined in {missing} of {len(drawn)} resamples: too few images"
    if not np.ptp(defined) > 1e-12 * max(1.0, abs(difference)):
        return None, "no resample differs, which does not mean certainty"
    reach = stats.t.ppf((1 + level) / 2, units - 1) * math.sqrt(units / (units - 1))
    if name == "ece":
        # A draw's error is too high, the more so the better the run: only the spread is of use.
        low, high = difference + np.array([-reach, reach]) * defined.std()
    else:
        low, high = np.quantile(defined, stats.norm.cdf([-reach, reach]))
    return (float(min(low, difference)), float(max(high, difference))), ""


def _tests(
    pair: _Pair, values: tuple[_Values, _Values], swapped: _Values, resamples: int, seed: int
) -> dict[str, tuple[float, str, str]]:
    """`{metric: (p, how it was found, why not)}` of every metric."""
    gaps = {name: float(gap[0]) for name, gap in _gaps(*values).items()}
    found = _exact_tests(pair, resamples, seed)
    found |= {
        name: (permutation(gaps[name], draws), PERMUTATION, "")
        for name, draws in swapped.items()
        if name not in found
    }
    rest = [name for name in gaps if name not in found and _plain(name) not in _WITHOUT_TEST]
    parts, share = [], []
    for counts in counts_without(pair.units, len(pair.unit), seed, _PARTS) if rest else ():
        kept = counts[pair.unit]
        parts.append(_gaps(*pair.samples(kept)))
        share.append(1 - kept.mean(axis=0))
    for name in rest:
        without = np.concatenate([part[name] for part in parts])
        p = jackknife_test(gaps[name], without, np.concatenate(share))
        why = "no test: undefined or unchanged without one image or patient"
        found[name] = (p, "", why) if math.isnan(p) else (p, JACKKNIFE, "")
    return {name: (math.nan, "", "no test for a median") for name in gaps} | found


def _exact_tests(pair: _Pair, resamples: int, seed: int) -> dict[str, tuple[float, str, str]]:
    """The tests of the metrics that have one of their own."""
    first, second = pair.runs
    found = {}
    if pair.task in _ONE_LABEL:
        truth = np.eye(len(first.classes), dtype=np.int64)[first.target]
        # With two classes the AUC is that of class 1.
        columns = {"auc": np.arange(len(first.classes)) if len(first.classes) > 2 else [1]}
        if pair.units == len(pair.unit):
            right = [run.score.argmax(axis=1) == run.target for run in pair.runs]
            found["accuracy"] = (mcnemar(*right), MCNEMAR, "")
    elif pair.task == "multilabel":
        truth = first.target
        both = (truth == 1).any(axis=0) & (truth == 0).any(axis=0)
        columns = {"auc": both, "auc_frequent": multilabel.frequent(pair.cases[0])}
    else:
        return {}
    for name, chosen in columns.items():
        given = truth[:, chosen], first.score[:, chosen], second.score[:, chosen]
        known = [(given[0] == value).any(axis=0).all() for value in (0, 1)]
        # Nothing to test where no finding has an AUC: the metric itself is undefined.
        if not given[0].size or not all(known):
            continue
        p = auc_test(*given, pair.unit, small_sample=True)[2]
        found[name] = (p, DELONG, "")
        if math.isnan(p):
            p = rank_permutation(*given, coins(pair.unit, resamples, seed))
            found[name] = (p, RANKS, "")
    return found


def _judge(
    primary: Sequence[str], found: Sequence[dict[str, Difference]], alpha: float, size: str
) -> list[dict[str, Difference]]:
    """The differences of all runs with adjusted p-values and verdicts; `size` is `n = ...`."""
    judged = [dict(metrics) for metrics in found]
    family = [(run, name) for run in range(len(found)) for name in primary if name in found[run]]
    adjusted = holm([found[run][name].p for run, name in family])
    for (run, name), p in zip(family, adjusted, strict=True):
        one = found[run][name]
        verdict = one.verdict or _verdict(name, one.difference, p, alpha, size)
        judged[run][name] = dataclasses.replace(one, adjusted=p, verdict=verdict)
    return judged


def _verdict(name: str, difference: float, p: float, alpha: float, size: str) -> str:
    # NaN, no test, decides nothing.
    if not p <= alpha:
        return f"cannot tell at {size}"
    return BETTER if (difference < 0) == lower_is_better(name) else WORSE
