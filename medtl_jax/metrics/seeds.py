"""What the seeds of a strategy say together: their mean, the difference of two, and a verdict.

Two things are chance in a mean over seeds. Other test images would give other values: the standard
error `images` is that of the bootstrap, which draws images (whole patients where they are known)
and scores all networks on the same draws. Another training would give others too: the standard
error `seeds` is the standard deviation over the seeds divided by the root of their number. It has
what the seeds have of their own, which may be drawn training images, a first head, an order. Draws
from one set overlap, so that it is too small for sets of new images; and where nothing is left to
chance, as in a k-NN on all images, it is 0 and the interval is for new test images alone.

The interval adds both variances and refers to Student's t with the degrees of freedom of
Satterthwaite (1946), as studies do in which several readers see the same cases (Obuchowski &
Rockette 1995); here the readers are seeds. What a seed does on these very images is in both, so
that the interval is a little wide. A difference is taken seed by seed and draw by draw, which
removes what two strategies share: the test images, the drawn training images.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from scipy import stats

from medtl_jax.metrics.compare import (
    BETTER,
    UNDEFINED,
    WORSE,
    Difference,
    lower_is_better,
    primary_metrics,
)
from medtl_jax.metrics.intervals import MOST_UNDEFINED, bootstrap_counts
from medtl_jax.metrics.paired_tests import holm
from medtl_jax.metrics.pairing import Predicted, align, units_of
from medtl_jax.metrics.scores import Cases, prepare, scored_classes
from medtl_jax.metrics.uncertainty import overall_scores, weighted_scores

CANNOT_TELL = "cannot tell"
Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Sampled:
    """The primary metrics of one network.

    Attributes:
      values: of the test split by name; NaN where undefined.
      draws: `[r]` each, of the bootstrap's draws.
      units: images, or patients, that were drawn from.
    """

    values: Mapping[str, float]
    draws: Mapping[str, np.ndarray]
    units: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One metric, or one difference, over the seeds of a strategy.

    Attributes:
      value: mean over the seeds; NaN where one of them is undefined.
      by_seed: the value of each.
      spread: standard deviation over the seeds; NaN of one seed.
      interval: for new images and new seeds; of one seed, or of equal ones, it is `images`.
      images: for new test images, these networks.
      seeds: for new seeds, these test images; None of one seed, of no width where all are equal.
      p: two-sided, of the value 0, that of `interval`; NaN where there is none.
      reason: why there is no interval.
    """

    value: float
    by_seed: tuple[float, ...]
    spread: float
    interval: Interval | None = None
    images: Interval | None = None
    seeds: Interval | None = None
    p: float = math.nan
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Judged:
    """A difference with its p after Holm (NaN where it has none) and its verdict.

    The verdict is `better`, `worse` or `cannot tell`; `undefined` where the difference is.
    """

    estimate: Estimate
    adjusted: float
    verdict: str


def sample_runs(
    runs: Iterable[Predicted],
    *,
    resamples: int = 2000,
    seed: int = 0,
    scored: Callable[[Cases, np.ndarray], Mapping[str, np.ndarray]] | None = None,
) -> Iterator[Sampled]:
    """Yields a `Sampled` of each run, all of them on the same draws of the same images.

    Args:
      runs: may be read as they are asked for: the first one and another are held at a time.
      resamples: draws of the bootstrap.
      seed: of the draws.
      scored: `fn(cases, counts)`: the metrics to sample in the place of the primary ones, `[r]`
        each, of r weighted samples `[n, r]`.

    Raises:
      UserError: the runs differ in task, classes, images, targets or patients.
      ValueError: predictions that are none.
    """
    first, names = None, ()
    for run in runs:
        first, run = align([first or run, run])
        cases = prepare(run.task, run.target, run.score, run.classes, surfaces=False)
        own = np.ones((len(cases), 1))
        if scored is None:
            names = names or _primary(run, cases, own)
            score = functools.partial(_scores, run.task, cases, names=names)
        else:
            score = functools.partial(scored, cases)
        unit = units_of(run)
        units = int(unit.max()) + 1
        drawn = [
            score(counts[unit]) for counts in bootstrap_counts(units, len(cases), resamples, seed)
        ]
        values = score(own)
        yield Sampled(
            {name: float(values[name][0]) for name in values},
            {name: np.concatenate([part[name] for part in drawn]) for name in values},
            units,
        )


def _primary(run: Predicted, cases: Cases, counts: np.ndarray) -> tuple[str, ...]:
    """The metrics that get a verdict, as `compare.primary_metrics` names them."""
    nan = math.nan
    defined = {
        name: Difference(nan, nan, nan, None, nan, nan, "", "")
        for name, values in overall_scores(run.task, cases, counts).items()
        if not math.isnan(values[0])
    }
    return primary_metrics(run.task, run.classes, defined)


def _scores(
    task: str, cases: Cases, counts: np.ndarray, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """The metrics `names`, `[r]` each; `metric/class` is that of one class."""
    whole = overall_scores(task, cases, counts)
    rows = scored_classes(task, cases.classes)
    by_class = weighted_scores(task, cases, counts) if any("/" in name for name in names) else {}
    found = {}
    for name in names:
        metric, slash, label = name.partition("/")
        found[name] = by_class[metric][rows.index(label)] if slash else whole[metric]
    return found


def over_seeds(samples: Sequence[Sampled], metric: str, *, level: float = 0.95) -> Estimate:
    """Returns the mean of `metric` over the seeds, its intervals within the metric's range.

    Args:
      samples: one for each seed, on the same draws.
      metric: one of `Sampled.values`.
      level: of the intervals.
    """
    found = _estimate(
        [sample.values[metric] for sample in samples],
        np.stack([sample.draws[metric] for sample in samples]),
        samples[0].units,
        level,
    )
    least = -1.0 if metric.endswith("kappa") else 0.0
    most = math.inf if lower_is_better(metric) else 1.0
    within = {
        name: (max(ends[0], least), min(ends[1], most))
        for name in ("interval", "images", "seeds")
        if (ends := getattr(found, name)) is not None
    }
    return dataclasses.replace(found, **within)


def difference(
    samples: Sequence[Sampled],
    reference: Sequence[Sampled],
    metric: str,
    *,
    level: float = 0.95,
) -> Estimate:
    """Returns the mean difference of a strategy to the reference, paired by seed and by draw.

    The arguments are those of `over_seeds`, the seeds of both in the same order.
    """
    pairs = list(zip(samples, reference, strict=True))
    return _estimate(
        [one.values[metric] - other.values[metric] for one, other in pairs],
        np.stack([one.draws[metric] - other.draws[metric] for one, other in pairs]),
        samples[0].units,
        level,
    )


def _estimate(by_seed: Sequence[float], draws: np.ndarray, units: int, level: float) -> Estimate:
    """The mean of `by_seed` with its intervals; `draws` `[seeds, r]`."""
    count, value = len(by_seed), float(np.mean(by_seed))
    spread = float(np.std(by_seed, ddof=1)) if count > 1 else math.nan
    known = Estimate(value, tuple(by_seed), spread)
    if math.isnan(value):
        return dataclasses.replace(known, reason="undefined on the test split")
    means = draws.mean(axis=0)
    defined = means[~np.isnan(means)]
    missing = len(means) - len(defined)
    if units == 1 or missing > MOST_UNDEFINED * len(means):
        few = f"undefined in {missing} of {len(means)} resamples: too few images"
        reason = "one image or patient only" if units == 1 else few
        return dataclasses.replace(known, reason=reason)
    # The bootstrap's own variance is that of the images times (n - 1) / n.
    images = float(defined.var()) * units / (units - 1)
    seeds = spread**2 / count if count > 1 else 0.0
    if not images + seeds > (1e-12 * max(1.0, abs(value))) ** 2:
        p = 1.0 if value == 0 else math.nan
        reason = "no resample and no seed differs, which does not mean certainty"
        return dataclasses.replace(known, p=p, reason=reason)
    parts = images**2 / (units - 1) + (seeds**2 / (count - 1) if count > 1 else 0.0)
    error, degrees = math.sqrt(images + seeds), (images + seeds) ** 2 / parts
    return dataclasses.replace(
        known,
        interval=_around(value, error, degrees, level),
        images=_around(value, math.sqrt(images), units - 1, level),
        seeds=_around(value, math.sqrt(seeds), count - 1, level) if count > 1 else None,
        p=float(2 * stats.t.sf(abs(value) / error, degrees)),
    )


def _around(value: float, error: float, degrees: float, level: float) -> Interval:
    reach = float(stats.t.ppf((1 + level) / 2, degrees)) * error
    return value - reach, value + reach


def judge(
    differences: Mapping[str, Mapping[str, Estimate]], *, level: float = 0.95
) -> dict[str, dict[str, Judged]]:
    """Returns the verdict of each difference, `{strategy: {metric: Judged}}`.

    The p-values of all strategies and metrics given are adjusted together (Holm 1979): give those
    of one fraction of the labels.
    """
    family = [(name, metric) for name, found in differences.items() for metric in found]
    adjusted = holm([differences[name][metric].p for name, metric in family])
    judged: dict[str, dict[str, Judged]] = {name: {} for name in differences}
    for (name, metric), p in zip(family, adjusted, strict=True):
        found = differences[name][metric]
        verdict = _verdict(metric, found.value, p, 1 - level)
        judged[name][metric] = Judged(found, p, verdict)
    return judged


def _verdict(metric: str, change: float, p: float, alpha: float) -> str:
    if math.isnan(change):
        return UNDEFINED
    # NaN, no test, decides nothing.
    if not p <= alpha:
        return CANNOT_TELL
    return BETTER if (change < 0) == lower_is_better(metric) else WORSE


def pick(validation: Mapping[str, Sequence[float | None]], more_is_better: bool) -> str:
    """Returns the strategy with the best mean validation value, the first of equals.

    `""` where no strategy has one; a strategy with a seed without a value (None, or no finite
    number) is not picked.

    Args:
      validation: of each strategy, one value for each seed.
      more_is_better: what the best is.
    """
    means = {
        name: float(np.mean(values))
        for name, values in validation.items()
        if all(value is not None and math.isfinite(value) for value in values)
    }
    sign = 1 if more_is_better else -1
    return max(means, key=lambda name: sign * means[name], default="")
