"""Paired comparison: tests against closed forms, false verdicts in simulations, refusals."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from medtl_jax.errors import UserError
from medtl_jax.metrics import compare
from medtl_jax.metrics.compare import Predicted, align, compare_runs
from medtl_jax.metrics.delong import auc_test
from medtl_jax.metrics.paired_tests import (
    holm,
    jackknife_test,
    mcnemar,
    permutation,
    rank_permutation,
)
from medtl_jax.metrics.scores import task_scores

TASKS = ("classify", "ordinal", "multilabel", "segment", "regress")


def softmax(logits: np.ndarray) -> np.ndarray:
    power = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (power / power.sum(axis=-1, keepdims=True)).astype(np.float32)


def names(n: int) -> np.ndarray:
    return np.array([f"image{i:04d}" for i in range(n)])


def two_classes(rng, n: int, positives: int, gain: float = 0.0) -> list[Predicted]:
    """Two runs with half of their errors in common, the second better by `gain`."""
    target = (np.arange(n) < positives).astype(np.int32)
    noise = rng.normal(size=(3, n))
    runs = []
    for name, own, extra in (("a", noise[1], 0.0), ("b", noise[2], gain)):
        logit = (2 * target - 1) * (0.75 + extra) + 0.8 * noise[0] + 0.6 * own
        score = softmax(np.stack([-logit, logit], axis=1))
        runs.append(Predicted(name, "classify", ("no", "yes"), names(n), target, score))
    return runs


def means(rng, n: int, draw, gain: float = 0.0) -> list[Predicted]:
    """Two runs whose MAE is the mean of n values, about half of each in common."""
    common = draw(rng, n)
    target = np.zeros((n, 1), np.float32)
    runs = []
    for name, extra in (("a", 0.0), ("b", gain)):
        errors = (common + draw(rng, n)) / 2 - extra
        runs.append(Predicted(name, "regress", ("x",), names(n), target, errors[:, None]))
    return runs


def example(task: str, seed: int = 0, n: int = 60) -> list[Predicted]:
    """Two runs of any task."""
    rng = np.random.default_rng(seed)
    classes = ("one", "two", "three")
    if task == "segment":
        target = np.zeros((n, 12, 12), np.uint8)
        target[:, 2:7, 3:8], target[:, 8:, 8:] = 1, 2
        scores = [
            softmax(3 * np.eye(3)[target] + s * rng.normal(size=(n, 12, 12, 3))) for s in (1, 2)
        ]
    elif task == "regress":
        target = rng.normal(40, 10, (n, 3)).astype(np.float32)
        scores = [target + s * rng.normal(size=(n, 3)) for s in (4, 6)]
        target[::5, 1] = np.nan
    elif task == "multilabel":
        target = rng.integers(-1, 2, (n, 3)).astype(np.int8)
        scores = [1 / (1 + np.exp(-target - s * rng.normal(size=(n, 3)))) for s in (1, 2)]
    else:
        target = rng.integers(0, 3, n).astype(np.int32)
        scores = [softmax(2 * np.eye(3)[target] + s * rng.normal(size=(n, 3))) for s in (1, 2)]
    return [
        Predicted(name, task, classes, names(n), target, score.astype(np.float32))
        for name, score in zip("ab", scores, strict=True)
    ]


@pytest.mark.parametrize("task", TASKS)
def test_values_are_those_of_the_runs(task):
    first, second = example(task)
    (found,) = compare_runs([first, second], resamples=100)
    assert (found.first, found.second) == ("a", "b")
    own = [task_scores(task, r.target, r.score, r.classes) for r in (first, second)]
    wanted = {
        "classify": ("auc", "accuracy"),
        "ordinal": ("quadratic_kappa",),
        "multilabel": ("auc_frequent",),
        "segment": ("dice",),
        "regress": ("mae/one", "mae/two", "mae/three"),
    }
    assert found.primary == wanted[task] and set(found.primary) <= set(found.metrics)
    for name, difference in found.metrics.items():
        a, b = (scores[name].value for scores in own)
        assert difference.first == pytest.approx(a, abs=1e-9)
        assert difference.second == pytest.approx(b, abs=1e-9)
        assert difference.difference == pytest.approx(b - a, abs=1e-9)
        low, high = difference.interval
        assert low <= difference.difference <= high
        judged = name in found.primary
        assert bool(difference.verdict) == judged != math.isnan(difference.adjusted)
        if name == "median_error":
            assert math.isnan(difference.p) and difference.reason == "no test for a median"
        else:
            assert 0 < difference.p <= 1 and difference.test and not difference.reason
            assert not judged or difference.p <= difference.adjusted <= 1
    expected = {name for name in own[0] if "/" not in name and name != "bias"}
    if task == "regress":
        expected |= {f"mae/{name}" for name in first.classes}
    if task in ("classify", "ordinal"):
        expected = {name for name in expected if not name.endswith("_micro")}
    assert set(found.metrics) == expected


@pytest.mark.parametrize("task", TASKS)
def test_the_order_of_the_images_and_the_side_do_not_matter(task):
    first, second = example(task)
    rows = np.random.default_rng(1).permutation(len(first.ids))
    shuffled = dataclasses.replace(
        second, ids=second.ids[rows], target=second.target[rows], score=second.score[rows]
    )
    (wanted,) = compare_runs([first, second], resamples=200, seed=3)
    (found,) = compare_runs([first, shuffled], resamples=200, seed=3)
    assert repr(found) == repr(wanted)
    (turned,) = compare_runs([second, first], resamples=200, seed=3)
    opposite = {"better": "worse", "worse": "better"}
    for name, difference in wanted.metrics.items():
        other = turned.metrics[name]
        assert other.difference == pytest.approx(-difference.difference, abs=1e-12)
        assert other.p == pytest.approx(difference.p, abs=1e-12, nan_ok=True)
        assert (other.test, other.reason) == (difference.test, difference.reason)
        assert other.interval == pytest.approx((-difference.interval[1], -difference.interval[0]))
        assert other.verdict == opposite.get(difference.verdict, difference.verdict)


def test_what_is_lower_is_better():
    for name in ("mae", "mae/age", "mse", "rmse", "median_error", "hd95", "nll", "ece", "brier"):
        assert compare.lower_is_better(name)
    for name in ("accuracy", "auc", "dice", "nsd", "recall_micro", "r2", "quadratic_kappa"):
        assert not compare.lower_is_better(name)
    (found,) = compare_runs(example("regress", n=200), resamples=200)
    for name in found.primary:
        assert found.metrics[name].difference > 0 and found.metrics[name].verdict == "worse"


def test_auc_is_tested_by_delong_and_accuracy_by_mcnemar():
    first, second = two_classes(np.random.default_rng(0), 80, 30)
    (found,) = compare_runs([first, second], resamples=100)
    auc, accuracy = found.metrics["auc"], found.metrics["accuracy"]
    scores = first.score[:, 1], second.score[:, 1]
    assert auc.p == auc_test(first.target, *scores, small_sample=True)[2]
    assert auc.test == "DeLong"
    right = [run.score.argmax(axis=1) == run.target for run in (first, second)]
    assert accuracy.p == mcnemar(*right) and accuracy.test == "McNemar, exact"
    assert sorted((auc.adjusted, accuracy.adjusted)) == sorted(holm([auc.p, accuracy.p]))
    assert math.isnan(found.metrics["f1"].adjusted) and found.metrics["f1"].verdict == ""


def jackknifed(run_a, run_b, metric):
    """The t-test by plain loops: leave out one image, score both runs, compare."""
    n = len(run_a.ids)

    def gap(rows):
        values = [
            task_scores(r.task, r.target[rows], r.score[rows], r.classes)[metric].value
            for r in (run_a, run_b)
        ]
        return values[1] - values[0]

    whole = gap(np.arange(n))
    left = np.array([gap(np.delete(np.arange(n), i)) for i in range(n)])
    error = math.sqrt((n - 1) / n * np.square(left - left.mean()).sum())
    fourth = ((left - left.mean()) ** 4).sum()
    degrees = np.square(left - left.mean()).sum() ** 2 / fourth - 1
    return 2 * stats.t.sf(abs(whole) / error, degrees)


@pytest.mark.parametrize("metric", ["f1", "mcc", "pr_auc"])
def test_what_is_no_mean_is_tested_by_the_jackknife(metric):
    first, second = two_classes(np.random.default_rng(0), 40, 15)
    (found,) = compare_runs([first, second], resamples=10)
    assert found.metrics[metric].test == "jackknife t"
    assert found.metrics[metric].p == pytest.approx(jackknifed(first, second, metric), rel=1e-6)


def test_many_images_are_left_out_in_parts(monkeypatch):
    first, second = two_classes(np.random.default_rng(0), 400, 150, gain=0.1)
    whole = compare_runs([first, second], resamples=10)[0].metrics["f1"].p
    monkeypatch.setattr(compare, "_PARTS", 100)
    parts = compare_runs([first, second], resamples=10)[0].metrics["f1"].p
    assert parts != whole and parts == pytest.approx(whole, abs=0.1)


def test_an_auc_without_a_variance_is_tested_by_ranks():
    """All or nothing: 12 positives of 24, separated by the one run, all alike in the other."""
    target = (np.arange(24) < 12).astype(np.int32)
    runs = [
        Predicted(name, "classify", ("no", "yes"), names(24), target, np.stack([1 - p, p], 1))
        for name, p in (("a", np.full(24, 0.4)), ("b", np.where(target, 0.9, 0.2)))
    ]
    auc = compare_runs(runs, resamples=999)[0].metrics["auc"]
    assert (auc.first, auc.second, auc.test) == (0.5, 1, "permutation of ranks")
    assert auc.p == pytest.approx(0.001) and auc.verdict == "better"
    assert auc.interval is None and auc.reason.startswith("no resample differs")


def test_ranks_are_exchanged_within_the_known_images_only():
    """All 2^6 exchanges by hand."""
    target = np.array([1, 1, 1, 0, 0, 0, -1])[:, None]
    a = np.array([0.9, 0.2, 0.5, 0.4, 0.3, 0.8, 0.7])[:, None]
    b = np.array([30.0, 20, 25, 1, 2, 22, -5])[:, None]
    patterns = (np.arange(64)[:, None] >> np.arange(6)) & 1
    ranks = np.stack([stats.rankdata(one[:6, 0]) for one in (a, b)])

    def area(values):
        return np.mean(values[:3, None] > values[None, 3:]) + 0.5 * np.mean(
            values[:3, None] == values[None, 3:]
        )

    gaps = [
        area(np.where(flip, ranks[0], ranks[1])) - area(np.where(flip, ranks[1], ranks[0]))
        for flip in patterns
    ]
    wanted = (1 + (np.abs(gaps) >= abs(gaps[0]) - 1e-12).sum()) / 65
    coins = np.concatenate([patterns, np.zeros((64, 1), int)], axis=1).T
    assert rank_permutation(target, a, b, [coins]) == pytest.approx(wanted)
    # Other numbers in the same order are the same run.
    assert rank_permutation(target, a, np.exp(b), [coins]) == pytest.approx(wanted)


def test_the_auc_of_frequent_findings_is_what_decides():
    rng = np.random.default_rng(0)
    target = (rng.random((300, 3)) < [0.3, 0.2, 0]).astype(np.int8)
    target[7, 2] = 1
    runs = [
        Predicted(name, "multilabel", ("a", "b", "rare"), names(300), target, score)
        for name, score in (
            (name, stats.norm.cdf(rng.normal(size=(300, 3)) + gain * target))
            for name, gain in (("x", 0.0), ("y", 2.0))
        )
    ]
    (found,) = compare_runs(runs, resamples=200)
    assert found.primary == ("auc_frequent",)
    assert found.metrics["auc_frequent"].test == "DeLong"
    assert found.metrics["auc_frequent"].verdict == "better"
    # One positive has no variance, but ranks to exchange; and a third of the draws miss it.
    auc = found.metrics["auc"]
    assert auc.test == "permutation of ranks" and auc.p <= 0.01 and auc.verdict == ""
    assert auc.interval is None and "of 200 resamples: too few images" in auc.reason
    # Without a frequent finding it is the AUC of them all.
    few = [
        dataclasses.replace(run, target=run.target[:40], score=run.score[:40], ids=run.ids[:40])
        for run in runs
    ]
    assert compare_runs(few, resamples=20)[0].primary == ("auc",)


def test_the_error_of_each_number_is_judged_by_itself():
    rng = np.random.default_rng(0)
    target = rng.normal([50, 5000], [15, 1000], (120, 2))
    runs = [
        Predicted(name, "regress", ("age", "cells"), names(120), target, target + own)
        for name, own in (
            ("a", rng.normal(size=(120, 2)) * [12, 400]),
            ("b", rng.normal(size=(120, 2)) * [4, 410]),
        )
    ]
    (found,) = compare_runs(runs, resamples=500)
    assert found.primary == ("mae/age", "mae/cells")
    verdicts = {name: found.metrics[name].verdict for name in found.primary}
    assert verdicts == {"mae/age": "better", "mae/cells": "cannot tell at n = 120 images"}
    p = [found.metrics[name].p for name in found.primary]
    assert [found.metrics[name].adjusted for name in found.primary] == holm(p)
    # The mean over years and cells per microlitre is no quantity.
    assert found.metrics["mae"].verdict == ""


def test_the_auc_of_findings_leaves_out_those_that_have_none():
    first, second = example("multilabel", n=120)
    for run in (first, second):
        run.target[:, 2] = np.minimum(run.target[:, 2], 0)
    (found,) = compare_runs([first, second], resamples=100)
    wanted = auc_test(
        first.target[:, :2], first.score[:, :2], second.score[:, :2], small_sample=True
    )
    assert found.metrics["auc"].difference == pytest.approx(wanted[0], abs=1e-12)
    assert found.metrics["auc"].p == pytest.approx(wanted[2], abs=1e-12)


def test_a_metric_that_is_undefined_has_no_verdict():
    first, second = two_classes(np.random.default_rng(0), 40, 40)
    (found,) = compare_runs([first, second], resamples=100)
    auc = found.metrics["auc"]
    assert math.isnan(auc.difference) and math.isnan(auc.p) and auc.interval is None
    assert auc.verdict == "undefined"
    # It is no test, so accuracy alone is the family.
    assert found.metrics["accuracy"].adjusted == found.metrics["accuracy"].p


def test_equal_runs():
    first, _ = example("classify")
    (found,) = compare_runs([first, dataclasses.replace(first, name="b")], resamples=100)
    for name, difference in found.metrics.items():
        assert (difference.difference, difference.interval, difference.p) == (0, None, 1)
        assert difference.reason == "no resample differs, which does not mean certainty"
        assert difference.verdict == ("cannot tell at n = 60 images" * (name in found.primary))


def test_the_interval_of_a_mean_is_students():
    """Of 144 values: mean +- t s / 12."""
    first, second = means(np.random.default_rng(4), 144, lambda rng, n: rng.normal(5, 1, n))
    (found,) = compare_runs([first, second], resamples=4000)
    gap = np.abs(second.score[:, 0]) - np.abs(first.score[:, 0])
    half = stats.t.ppf(0.975, 143) * gap.std(ddof=1) / 12
    wanted = (gap.mean() - half, gap.mean() + half)
    assert found.metrics["mae"].interval == pytest.approx(wanted, abs=0.06 * half)


def test_the_permutation_test_of_a_mean_is_the_sign_flip_test():
    """All 2^10 sign patterns by hand: the p of 10 differences."""
    rng = np.random.default_rng(3)
    target, errors = np.zeros((10, 1), np.float32), rng.random((2, 10))
    runs = [
        Predicted(name, "regress", ("x",), names(10), target, own[:, None])
        for name, own in zip("ab", errors, strict=True)
    ]
    gap = errors[1] - errors[0]
    signs = 2 * ((np.arange(1024)[:, None] >> np.arange(10)) & 1) - 1
    wanted = (np.abs(signs @ gap) >= abs(gap.sum()) - 1e-12).mean()
    (found,) = compare_runs(runs, resamples=20_000)
    error = math.sqrt(wanted * (1 - wanted) / 20_000)
    assert found.metrics["mae"].p == pytest.approx(wanted, abs=4 * error)
    assert found.metrics["mae"].test == "permutation"


def test_patients_are_what_counts():
    """Each image four times over: as patients they say what one image each says."""
    first, second = means(np.random.default_rng(2), 50, lambda rng, n: rng.exponential(8, n), 2)
    rows = np.repeat(np.arange(50), 4)

    def copied(run):
        return dataclasses.replace(
            run,
            ids=names(200),
            target=run.target[rows],
            score=run.score[rows],
            patients=run.ids[rows],
        )

    once = compare_runs([first, second], resamples=2000)[0].metrics["mae"]
    found = compare_runs([copied(first), copied(second)], resamples=2000)[0].metrics["mae"]
    assert found.difference == pytest.approx(once.difference)
    assert found.interval == pytest.approx(once.interval, rel=0.1)
    assert found.p == pytest.approx(once.p, abs=0.02)
    labels = compare_runs([copied(run) for run in example("classify", n=50)], resamples=100)
    accuracy = labels[0].metrics["accuracy"]
    assert accuracy.test == "permutation", "McNemar's images must be independent"
    verdicts = {m.verdict for m in labels[0].metrics.values()} - {"better", "worse", ""}
    assert verdicts <= {"cannot tell at n = 50 patients"}


def test_one_run_that_knows_the_patients_is_enough():
    first, second = example("classify", n=20)
    known = dataclasses.replace(second, patients=np.repeat(["p", "q"], 10))
    aligned = align([first, known])
    np.testing.assert_array_equal(aligned[0].patients, known.patients)
    third = dataclasses.replace(first, name="c", patients=np.repeat(["q", "p"], 10))
    with pytest.raises(UserError, match="b and c name different patients"):
        align([first, known, third])


def test_several_runs_are_adjusted_together():
    rng = np.random.default_rng(0)
    first, second = two_classes(rng, 100, 40, gain=0.3)
    runs = [first, second, dataclasses.replace(first, name="c")]
    found = compare_runs(runs, resamples=200)
    assert [comparison.second for comparison in found] == ["b", "c"]
    alone = compare_runs([first, second], resamples=200)[0].metrics
    p = [one.metrics[name].p for one in found for name in ("auc", "accuracy")]
    adjusted = [one.metrics[name].adjusted for one in found for name in ("auc", "accuracy")]
    assert adjusted == holm(p)
    assert p[:2] == [alone["auc"].p, alone["accuracy"].p]


def test_the_draws_are_counted(monkeypatch):
    monkeypatch.setattr(compare, "overall_scores", lambda task, cases, counts: {
        "mae": np.zeros(counts.shape[1])
    })  # fmt: skip
    told = []
    first, second = example("regress", n=3000)
    third = dataclasses.replace(first, name="c")
    compare_runs([first, second, third], resamples=500, advance=lambda *both: told.append(both))
    done, totals = zip(*told, strict=True)
    assert set(totals) == {1000} and done[-1] == 1000 and len(done) > 2
    assert list(done) == sorted(set(done))


def test_holm():
    # Holm's own steps: 0.01 * 4, 0.013 * 3 below it, 0.03 * 2, 0.5 * 1.
    assert holm([0.03, 0.01, 0.5, 0.013]) == pytest.approx([0.06, 0.04, 0.5, 0.04])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    found = holm([0.04, math.nan, 0.02])
    assert found[0] == found[2] == 0.04 and math.isnan(found[1])
    assert holm([]) == []


def test_permutation():
    # 1 of 4 is as far out, and one is undefined: (1 + 2) / (1 + 4).
    assert permutation(-0.5, np.array([0.1, 0.5 - 1e-13, math.nan, -0.2])) == pytest.approx(0.6)
    assert permutation(0.5, np.zeros(99)) == pytest.approx(0.01)


def test_jackknife_of_a_mean_is_students_paired_test():
    """Its error is s / sqrt(n); of equal amounts, half up and half down, all n count."""
    gap = np.array([1.0, -1.0] * 10) + 0.3
    without = (gap.sum() - gap) / 19
    found = jackknife_test(0.3, without, np.full(20, 0.05))
    assert found == pytest.approx(stats.ttest_1samp(gap, 0).pvalue, abs=1e-12)
    # Groups of unlike size: what is left out counts by its share.
    sizes = np.array([1, 2, 3, 4])
    sums = np.array([0.4, -0.2, 1.5, 0.9])
    theta = sums.sum() / 10
    left = (sums.sum() - sums) / (10 - sizes)
    change = (sums - sizes * theta) / 10
    error = math.sqrt(np.square(change).sum() * 4 / 3)
    degrees = np.square(change).sum() ** 2 / (change**4).sum() - 1
    wanted = 2 * stats.t.sf(theta / error, max(degrees, 1))
    assert jackknife_test(theta, left, sizes / 10) == pytest.approx(wanted, abs=1e-12)


def test_jackknife_without_an_error():
    share = np.full(5, 0.2)
    assert jackknife_test(0.0, np.zeros(5), share) == 1.0
    assert math.isnan(jackknife_test(0.5, np.full(5, 0.5), share))
    assert math.isnan(jackknife_test(0.5, np.array([0.4, math.nan, 0.5, 0.6, 0.5]), share))


def test_mcnemar():
    # 2 against 8 pairs: twice the binomial tail, 2 (1 + 10 + 45) / 2^10.
    right_a = np.array([True] * 2 + [False] * 8 + [True] * 5 + [False] * 5)
    right_b = np.array([False] * 2 + [True] * 8 + [True] * 5 + [False] * 5)
    assert mcnemar(right_a, right_b) == pytest.approx(112 / 1024)
    assert mcnemar(right_b, right_a) == pytest.approx(112 / 1024)
    assert mcnemar(right_a, right_a) == 1.0


def renamed(ids: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([np.char.add("x", ids[:count]), ids[count:]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: {"ids": renamed(run.ids, 3)}, "3 of 60 are in the first only, 3 of 60 in the"),
        (
            lambda run: {"ids": run.ids[:50], "target": run.target[:50], "score": run.score[:50]},
            "10 of 60 are in the first only, 0 of 50 in the second only",
        ),
        (lambda run: {"ids": run.ids[[0, 0, *range(2, 60)]]}, "b lists 1 images twice"),
        (
            lambda run: {"ids": run.ids[:0], "target": run.target[:0], "score": run.score[:0]},
            "b has no image",
        ),
        (lambda run: {"target": (run.target + 1) % 3}, "different targets for 60 of 60 images"),
        (lambda run: {"task": "ordinal"}, r"different tasks \(classify, ordinal\)"),
        (lambda run: {"classes": ("x", "two", "three")}, "different classes"),
        (lambda run: {"score": run.score[:, :2]}, r"of b are damaged: 3 classes, .* scores \(2,\)"),
        (
            lambda run: {"target": np.stack([run.target] * 3, 1)},
            "targets of different shapes: one of them is damaged",
        ),
        (lambda run: {"score": run.score * 2}, "predictions of b are damaged: want prob"),
    ],
)
def test_runs_that_cannot_be_compared(change, words):
    first, second = example("classify")
    with pytest.raises(UserError, match=words) as caught:
        compare_runs([first, dataclasses.replace(second, **change(second))], resamples=10)
    assert "\n" not in str(caught.value)


def test_masks_of_another_size_and_unknown_numbers():
    first, second = example("segment")
    smaller = dataclasses.replace(
        second, target=second.target[:, :8, :8], score=second.score[:, :8, :8]
    )
    with pytest.raises(UserError, match=r"different sizes \(12 x 12, 8 x 8 pixels\): .* model.im"):
        compare_runs([first, smaller], resamples=10)
    first, second = example("regress")
    target = second.target.copy()
    target[1, 1] = math.nan
    with pytest.raises(UserError, match="different targets for 1 of 60"):
        compare_runs([first, dataclasses.replace(second, target=target)], resamples=10)


@pytest.mark.parametrize("options", [{"resamples": 0}, {"level": 1.0}])
def test_unusable_arguments(options):
    with pytest.raises(ValueError, match="want two runs"):
        compare_runs(example("classify"), **options)
    with pytest.raises(ValueError, match="want two runs"):
        compare_runs(example("classify")[:1])


PAIRS = 1000
# 5 % and 2.6 standard errors of 1000 pairs: exceeded by chance in one of 200.
MOST_FALSE = 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / PAIRS)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "positives"), [(100, 50), (100, 12), (150, 45)])
def test_false_verdicts_on_auc_and_accuracy(n, positives, monkeypatch):
    """The exact tests alone, so that the bootstrap of all metrics does not take the time."""
    monkeypatch.setattr(compare, "overall_scores", lambda task, cases, counts: {
        name: np.zeros(counts.shape[1]) for name in ("auc", "accuracy")
    })  # fmt: skip
    false = {"auc": 0, "accuracy": 0, "either": 0}
    for seed in range(PAIRS):
        runs = two_classes(np.random.default_rng(seed), n, positives)
        (found,) = compare_runs(runs, resamples=1)
        assert set(found.metrics) == set(found.primary)
        for name, one in found.metrics.items():
            false[name] += one.p <= 0.05
        false["either"] += any(one.adjusted <= 0.05 for one in found.metrics.values())
    assert all(count / PAIRS <= MOST_FALSE for count in false.values()), false
    assert false["auc"] / PAIRS > 0.015, "a test that never speaks would pass too"


@pytest.mark.slow
@pytest.mark.parametrize("n", [100, 150])
@pytest.mark.parametrize(
    "draw",
    [
        # 1 - Dice: mostly small, sometimes a missed object; and errors with a long tail.
        pytest.param(lambda rng, n: rng.beta(0.7, 4, n), id="dice"),
        pytest.param(lambda rng, n: rng.exponential(8, n), id="mae"),
    ],
)
def test_false_verdicts_on_means(n, draw, monkeypatch):
    """The permutation test of the MAE alone, which is the mean: the targets are 0."""
    monkeypatch.setattr(compare, "overall_scores", lambda task, cases, counts: {
        "mae": np.abs(cases.score[:, 0]) @ counts / counts.sum(axis=0)
    })  # fmt: skip
    count = 0
    for seed in range(PAIRS):
        runs = means(np.random.default_rng(seed), n, draw)
        (found,) = compare_runs(runs, resamples=199, seed=seed)
        count += found.metrics["mae"].verdict in ("better", "worse")
    assert 0.02 < count / PAIRS <= MOST_FALSE


def test_a_real_difference_is_found():
    found = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        (one,) = compare_runs(two_classes(rng, 150, 60, gain=0.5), resamples=99)
        found += one.metrics["auc"].verdict == "better"
        pair = means(rng, 150, lambda rng, n: rng.exponential(8, n), gain=1.5)
        (one,) = compare_runs(pair, resamples=99)
        found += one.metrics["mae"].verdict == "better"
    assert found >= 34


def unlike_calls(rng, n: int) -> list[Predicted]:
    """Two runs of precision 0.8 that call unlike numbers of images, 30 % against 7.5 %."""
    target = (rng.random(n) < 0.4).astype(np.int8)
    runs = []
    for name, hit, alarm in (("a", 0.6, 0.1), ("b", 0.15, 0.025)):
        called = rng.random(n) < np.where(target, hit, alarm)
        score = (0.8 * called + 0.1)[:, None]
        runs.append(Predicted(name, "multilabel", ("x",), names(n), target[:, None], score))
    return runs


def other_scale(rng, n: int) -> list[Predicted]:
    """Two runs that correlate alike, in other units."""
    target = rng.normal(size=(n, 1))
    scores = [scale * (target + rng.normal(size=(n, 1))) for scale in (1.0, 0.3)]
    return [
        Predicted(name, "regress", ("x",), names(n), target, score)
        for name, score in zip("ab", scores, strict=True)
    ]


def ranks(rng, n: int) -> list[Predicted]:
    """Two runs that tell four grades alike well."""
    target = rng.integers(0, 4, n)
    called = [np.clip(np.round(target + rng.normal(0, 0.9, n)), 0, 3).astype(int) for _ in "ab"]
    return [
        Predicted(name, "ordinal", tuple("wxyz"), names(n), target, 0.6 * np.eye(4)[c] + 0.1)
        for name, c in zip("ab", called, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "metric"),
    [
        pytest.param(lambda rng: unlike_calls(rng, 200), "precision", id="precision"),
        pytest.param(lambda rng: two_classes(rng, 100, 15), "f1", id="f1"),
        pytest.param(lambda rng: two_classes(rng, 100, 15), "pr_auc", id="pr_auc"),
        pytest.param(lambda rng: other_scale(rng, 100), "pearson", id="pearson"),
        pytest.param(lambda rng: ranks(rng, 100), "quadratic_kappa", id="quadratic_kappa"),
    ],
)
def test_false_differences_of_what_is_no_mean(draw, metric):
    count = 0
    for seed in range(400):
        (found,) = compare_runs(draw(np.random.default_rng(seed)), resamples=1)
        count += found.metrics[metric].p <= 0.05
    # 5 % and 2.6 standard errors of 400 pairs; a test that never speaks would pass otherwise.
    assert 0.005 < count / 400 <= 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / 400)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "ordinal"])
def test_one_verdict_of_any_kind_is_rare_for_equal_runs(task):
    draws = {
        "classify": lambda rng: two_classes(rng, 150, 45),
        "ordinal": lambda rng: ranks(rng, 150),
    }
    count = 0
    for seed in range(400):
        (found,) = compare_runs(draws[task](np.random.default_rng(seed)), resamples=1)
        verdicts = {one.verdict for one in found.metrics.values()}
        count += bool(verdicts & {"better", "worse"})
    assert count / 400 <= 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / 400)


@pytest.mark.slow
def test_intervals_of_differences_cover_no_difference():
    inside = {"auc": 0, "accuracy": 0, "pr_auc": 0, "brier": 0}
    for seed in range(400):
        runs = two_classes(np.random.default_rng(seed), 150, 45)
        (found,) = compare_runs(runs, resamples=300, seed=seed)
        for name in inside:
            low, high = found.metrics[name].interval
            inside[name] += low <= 0 <= high
    assert all(0.92 <= count / 400 <= 0.98 for count in inside.values()), inside
