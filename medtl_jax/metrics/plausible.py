"""Which values a metric can have beside the other metrics of its row.

Every number is a closed interval of exact fractions, all the values that round to what is printed,
and every answer holds for all of them. Precision, recall, Dice, IoU, ... are fractions of 1 here.

What is impossible depends on what was averaged. F1 = 2PR / (P + R) holds for one class; for means
of F1, P and R over the same classes, folds or runs only P + R - 1 <= F1 <= 2PR / (P + R), as the
harmonic mean is concave and, on the unit square, nowhere below P + R - 1. In the same way
IoU = D / (2 - D) is convex in Dice, so means over the same images obey D / (2 - D) <= IoU <= D, and
means of squares are never below squares of means: MSE >= MAE^2 and MSE >= RMSE^2.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from fractions import Fraction

ZERO, ONE = Fraction(0), Fraction(1)

# What a relation asks for beyond means taken alike. `Relation.needs` holds these.
ONE_RUN, KNOWN_RUNS = "one run", "how many runs"
TWO_CLASSES = "one positive class and one test set"

_ROOT_DIGITS = 10**15


@dataclasses.dataclass(frozen=True)
class Span:
    """All values from `low` to `high`, both included; without an end where `high` is None."""

    low: Fraction
    high: Fraction | None

    def meets(self, other: "Span") -> bool:
        """Whether both have a value in common."""
        below = self.high is not None and self.high < other.low
        above = other.high is not None and other.high < self.low
        return not (below or above)

    def within(self, other: "Span") -> "Span | None":
        """The part that lies in `other`, None where there is none."""
        if not self.meets(other):
            return None
        ends = [end for end in (self.high, other.high) if end is not None]
        return Span(max(self.low, other.low), min(ends) if ends else None)


UNIT, SIGNED = Span(ZERO, ONE), Span(-ONE, ONE)
POSITIVE, ANY = Span(ZERO, None), (Span(ZERO, None),)
# No number in a cell is lower: `table_check` reads none with so many digits.
_LOWEST = Fraction(-(10**120))

RANGES: Mapping[str, Span] = {
    **dict.fromkeys(
        ("accuracy", "precision", "recall", "specificity", "npv", "f1", "balanced_accuracy"), UNIT
    ),
    **dict.fromkeys(("auc", "ap", "dice", "iou", "prevalence", "ece"), UNIT),
    **dict.fromkeys(("mcc", "kappa", "correlation"), SIGNED),
    "r2": Span(_LOWEST, ONE),
    "brier": Span(ZERO, Fraction(2)),
    **dict.fromkeys(("mae", "mse", "rmse", "range", "hd95"), POSITIVE),
    **dict.fromkeys(("n", "positives", "negatives", "runs", "tp", "fp", "fn", "tn"), POSITIVE),
}
COUNTS = frozenset(("n", "positives", "negatives", "runs", "tp", "fp", "fn", "tn"))
ERRORS = frozenset(("mae", "mse", "rmse", "range", "hd95"))
# May be printed as percent. The Brier score and R2 are not: nobody's percent of them is clear.
SHARES = frozenset(name for name, span in RANGES.items() if span in (UNIT, SIGNED))


@dataclasses.dataclass(frozen=True)
class Relation:
    """What the metrics `given` say about the metric `judged`.

    Attributes:
      judged: the metric whose cell is flagged.
      given: metrics that must be known.
      possible: `(judged, *given) -> spans`; the judged metric lies in one of them.
      where: for which averages that is so, a text.
      needs: of `ONE_RUN`, `KNOWN_RUNS` and `TWO_CLASSES`, what must be known of the row; without
        it a contradiction is worth a note and no more.
      otherwise: what a number that contradicts a relation with `needs` can still be.
    """

    judged: str
    given: tuple[str, ...]
    possible: Callable[..., tuple[Span, ...]]
    where: str
    needs: frozenset[str] = frozenset()
    otherwise: str = ""


def harmonic_mean(precision: Fraction, recall: Fraction) -> Fraction:
    """2PR / (P + R), 0 where both are 0."""
    total = precision + recall
    return 2 * precision * recall / total if total else ZERO


def dice_to_iou(dice: Fraction) -> Fraction:
    """IoU of one image from its Dice, D / (2 - D)."""
    return dice / (2 - dice)


def root_above(value: Fraction) -> Fraction:
    """A fraction not below the square root of `value`, above it by at most 1e-14."""
    scaled = math.ceil(value * _ROOT_DIGITS**2)
    return Fraction(math.isqrt(scaled) + 1, _ROOT_DIGITS)


def _f1_of_means(_: Span, p: Span, r: Span) -> tuple[Span, ...]:
    return (Span(max(ZERO, p.low + r.low - 1), harmonic_mean(p.high, r.high)),)


def _f1_of_one(_: Span, p: Span, r: Span) -> tuple[Span, ...]:
    return (Span(harmonic_mean(p.low, r.low), harmonic_mean(p.high, r.high)),)


def _iou(_: Span, dice: Span) -> tuple[Span, ...]:
    return (Span(dice_to_iou(dice.low), dice.high),)


def _mse(_: Span, mae: Span) -> tuple[Span, ...]:
    return (Span(mae.low**2, None),)


def _mse_in_range(_: Span, mae: Span, largest: Span) -> tuple[Span, ...]:
    # |e| <= largest, so e^2 <= |e| largest.
    return (Span(ZERO, mae.high * largest.high),)


def _rmse(_: Span, mae: Span) -> tuple[Span, ...]:
    return (Span(mae.low, None),)


def _rmse_in_range(_: Span, mae: Span, largest: Span) -> tuple[Span, ...]:
    return (Span(ZERO, root_above(mae.high * largest.high)),)


def _mse_of_mean_rmse(_: Span, rmse: Span) -> tuple[Span, ...]:
    return (Span(rmse.low**2, None),)


def _mse_of_one_rmse(_: Span, rmse: Span) -> tuple[Span, ...]:
    return (Span(rmse.low**2, rmse.high**2),)


def _between(_: Span, first: Span, second: Span) -> tuple[Span, ...]:
    return (Span(min(first.low, second.low), max(first.high, second.high)),)


def _middle(_: Span, first: Span, second: Span) -> tuple[Span, ...]:
    return (Span((first.low + second.low) / 2, (first.high + second.high) / 2),)


def _accuracy(_: Span, recall: Span, specificity: Span, prevalence: Span) -> tuple[Span, ...]:
    shares = (prevalence.low, prevalence.high)
    low = min(part * recall.low + (1 - part) * specificity.low for part in shares)
    high = max(part * recall.high + (1 - part) * specificity.high for part in shares)
    return (Span(low, high),)


def _predictive(found: tuple[Fraction, ...], missed: tuple[Fraction, ...]) -> tuple[Span, ...]:
    """The span of found / (found + missed), both from their worst to their best end."""
    totals = [right + wrong for right, wrong in zip(found, missed, strict=True)]
    if 0 in totals:
        return (UNIT,)
    low, high = (right / total for right, total in zip(found, totals, strict=True))
    return (Span(low, high),)


def _precision(_: Span, recall: Span, specificity: Span, prevalence: Span) -> tuple[Span, ...]:
    return _predictive(
        (prevalence.low * recall.low, prevalence.high * recall.high),
        ((1 - prevalence.low) * (1 - specificity.low), (1 - prevalence.high) * _rest(specificity)),
    )


def _npv(_: Span, recall: Span, specificity: Span, prevalence: Span) -> tuple[Span, ...]:
    return _predictive(
        ((1 - prevalence.high) * specificity.low, (1 - prevalence.low) * specificity.high),
        (prevalence.high * (1 - recall.low), prevalence.low * _rest(recall)),
    )


def _rest(share: Span) -> Fraction:
    return 1 - share.high


def _whole_cases(judged: Span, cases: Span, runs: Span) -> tuple[Span, ...]:
    """The shares of whole cases next to `judged`; the cases of all runs are counted together."""
    count = cases.low * runs.low
    if not count:
        return ANY
    first, last = math.floor(judged.low * count), math.ceil(judged.high * count)
    shares = (Fraction(first) / count, Fraction(last) / count)
    if last - first > 1:  # A whole number lies between them.
        return (Span(*shares),)
    return tuple(Span(share, share) for share in shares)


def _sum(_: Span, *parts: Span) -> tuple[Span, ...]:
    total = sum((part.low for part in parts), ZERO)
    return (Span(total, total),)


def _part_of(_: Span, whole: Span) -> tuple[Span, ...]:
    return (Span(ZERO, whole.high),)


def _from_counts(metric: str) -> Callable[..., tuple[Span, ...]]:
    def possible(_: Span, *counts: Span) -> tuple[Span, ...]:
        tp, fp, fn, tn = (count.low for count in counts)
        total = tp + fp + fn + tn
        if not total:
            return ANY
        sides = [_one_side(metric, *side) for side in ((tp, fp, fn, tn), (tn, fn, fp, tp))]
        if None in sides:
            # What a program makes of 0 / 0 is its own affair: 0, 1, or a mean without the class.
            return ANY
        one, other = sides
        share = (tp + fn) / total
        values = {one, (one + other) / 2, share * one + (1 - share) * other}
        if metric in ("precision", "recall", "specificity", "npv", "f1"):
            values.add((tp + tn) / total)  # micro
        if metric == "f1":
            values.update(_f1_of_macro(*(count.low for count in counts)))
        return tuple(Span(value, value) for value in sorted(values))

    return possible


def _f1_of_macro(tp: Fraction, fp: Fraction, fn: Fraction, tn: Fraction) -> set[Fraction]:
    """The harmonic mean of macro precision and macro recall, which some call macro F1."""
    precision = (_ratio(tp, tp + fp), _ratio(tn, tn + fn))
    recall = (_ratio(tp, tp + fn), _ratio(tn, tn + fp))
    if None in precision + recall:
        return set()
    return {harmonic_mean(sum(precision) / 2, sum(recall) / 2)}


def _one_side(metric: str, tp: Fraction, fp: Fraction, fn: Fraction, tn: Fraction):
    """The metric with this side as the positive class, None where it is 0 / 0."""
    if metric == "balanced_accuracy":
        parts = (_ratio(tp, tp + fn), _ratio(tn, tn + fp))
        return None if None in parts else sum(parts) / 2
    above, below = {
        "accuracy": (tp + tn, tp + fp + fn + tn),
        "precision": (tp, tp + fp),
        "recall": (tp, tp + fn),
        "specificity": (tn, tn + fp),
        "npv": (tn, tn + fn),
        "f1": (2 * tp, 2 * tp + fp + fn),
    }[metric]
    return _ratio(above, below)


def _ratio(above: Fraction, below: Fraction) -> Fraction | None:
    return above / below if below else None


_ALIKE = "one class, or means over classes, folds or runs taken alike"
_ERRORS_ALIKE = "errors of the same cases in the same unit, or means over runs"
_TABLE = ("tp", "fp", "fn", "tn")
_POINT = frozenset((TWO_CLASSES,))
_ONE_TABLE = frozenset((ONE_RUN, TWO_CLASSES))
_CASES = frozenset((KNOWN_RUNS, TWO_CLASSES))
_MEAN = "a mean over classes, folds or runs"
_NOT_TWO = "a mean over classes or over test sets that differ"

RELATIONS: tuple[Relation, ...] = (
    Relation("n", ("positives", "negatives"), _sum, "their sum"),
    Relation("n", _TABLE, _sum, "their sum"),
    Relation("positives", ("n",), _part_of, "a part of it"),
    Relation("negatives", ("n",), _part_of, "a part of it"),
    Relation("positives", ("tp", "fn"), _sum, "their sum"),
    Relation("negatives", ("fp", "tn"), _sum, "their sum"),
    *(
        Relation(name, _TABLE, _from_counts(name), "of one class, micro, macro or weighted")
        for name in ("accuracy", "precision", "recall", "specificity", "npv", "f1")
    ),
    Relation("balanced_accuracy", _TABLE, _from_counts("balanced_accuracy"), "two classes"),
    Relation("f1", ("precision", "recall"), _f1_of_means, _ALIKE),
    Relation("f1", ("precision", "recall"), _f1_of_one, "one class in one run", _ONE_TABLE, _MEAN),
    Relation("iou", ("dice",), _iou, "one image, or means over the same images and classes"),
    Relation("mse", ("mae",), _mse, _ERRORS_ALIKE),
    Relation("rmse", ("mae",), _rmse, _ERRORS_ALIKE),
    Relation("mse", ("mae", "range"), _mse_in_range, "no error above the range"),
    Relation("rmse", ("mae", "range"), _rmse_in_range, "no error above the range"),
    Relation("mse", ("rmse",), _mse_of_mean_rmse, _ERRORS_ALIKE),
    Relation(
        "mse",
        ("rmse",),
        _mse_of_one_rmse,
        "errors of one run",
        frozenset((ONE_RUN,)),
        "a mean over runs or outputs",
    ),
    Relation("accuracy", ("recall", "specificity"), _between, "it lies between", _POINT, _NOT_TWO),
    Relation(
        "accuracy",
        ("recall", "specificity", "prevalence"),
        _accuracy,
        "their mean by prevalence",
        _POINT,
        _NOT_TWO,
    ),
    Relation(
        "balanced_accuracy",
        ("recall", "specificity"),
        _middle,
        "the mean of both, two classes",
        _POINT,
        "one of more than two classes",
    ),
    Relation(
        "precision",
        ("recall", "specificity", "prevalence"),
        _precision,
        "Bayes, one run",
        _ONE_TABLE,
        _MEAN,
    ),
    Relation(
        "npv", ("recall", "specificity", "prevalence"), _npv, "Bayes, one run", _ONE_TABLE, _MEAN
    ),
    Relation(
        "accuracy",
        ("n", "runs"),
        _whole_cases,
        "whole cases, each right or wrong",
        frozenset((KNOWN_RUNS,)),
        "a mean over runs, folds or labels",
    ),
    Relation("recall", ("positives", "runs"), _whole_cases, "whole cases", _CASES, _MEAN),
    Relation("specificity", ("negatives", "runs"), _whole_cases, "whole cases", _CASES, _MEAN),
)
