import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from sklearn.metrics import roc_auc_score

from medtl_jax.data.catalog import MISSING, TASKS
from medtl_jax.ensemble import fusion, stacking
from medtl_jax.ensemble.fusion import FUSIONS, check_fusions, crossfit, fit_fusion, fusions_of
from medtl_jax.errors import UserError


def members(task, m=3, n=24, k=3, seed=0):
    """Scores `[m, n, ...]` and the target of members that are right more often than not."""
    rng = np.random.default_rng(seed)
    if task == "regress":
        target = rng.normal(50, 10, (n, k)).astype(np.float32)
        return (target + rng.normal(0, 4, (m, n, k))).astype(np.float32), target
    if task == "multilabel":
        target = rng.integers(0, 2, (n, k)).astype(np.int8)
        logits = 2 * target - 1 + rng.normal(0, 2, (m, n, k))
        return special.expit(logits).astype(np.float32), target
    if task == "segment":
        target = rng.integers(0, k, (n, 5, 4)).astype(np.uint8)
        logits = 2 * np.eye(k)[target] + rng.normal(0, 1.5, (m, n, 5, 4, k))
        return special.softmax(logits, axis=-1).astype(np.float16), target
    target = rng.integers(0, k, n).astype(np.int32)
    logits = 2 * np.eye(k)[target] + rng.normal(0, 1.5, (m, n, k))
    return special.softmax(logits, axis=-1).astype(np.float32), target


@pytest.fixture(autouse=True)
def few_penalties(monkeypatch):
    """Stacking is tested by itself."""
    monkeypatch.setattr(stacking, "PENALTIES", (1.0, 0.01))


PAIRS = [
    (name, task, 2 if (name, task) == ("rank", "classify") else 3)
    for task in TASKS
    for name in FUSIONS
    if task in FUSIONS[name].tasks
]


def fused(name, task, scores, target=None):
    target = np.zeros(scores.shape[1:-1], np.int32) if target is None else target
    return fit_fusion(name, task, scores, target).apply(scores)


def test_mean_logit_and_vote_by_hand():
    # Image 0: two of three vote for class 0. Image 1: one vote each, class 2 has the highest mean.
    scores = np.array(
        [
            [[0.6, 0.4, 0.0], [0.5, 0.25, 0.25]],
            [[0.6, 0.3, 0.1], [0.1, 0.6, 0.3]],
            [[0.0, 0.9, 0.1], [0.1, 0.1, 0.8]],
        ],
        np.float32,
    )
    mean = [[0.4, 1.6 / 3, 0.2 / 3], [0.7 / 3, 0.95 / 3, 1.35 / 3]]
    np.testing.assert_allclose(fused("mean", "classify", scores), mean, atol=1e-6)
    vote = [[2 / 3, 1 / 3, 0], [1 / 4, 1 / 4, 2 / 4]]
    np.testing.assert_allclose(fused("vote", "classify", scores), vote, atol=1e-6)
    # Of image 1: cube roots of .005, .015 and .06, divided by their sum.
    roots = np.cbrt([0.005, 0.015, 0.06])
    found = fused("logit", "ordinal", scores)
    np.testing.assert_allclose(found[1], roots / roots.sum(), atol=1e-6)
    # A member's 0 counts as 1e-7 and rules nothing out: the cube root of .6 .6 1e-7 and of .108.
    assert found[0, 0] / found[0, 1] == pytest.approx(np.cbrt(0.36e-7 / 0.108), rel=1e-4)


def test_the_casting_vote_goes_to_a_class_that_leads():
    # Classes 0 and 1 have two votes each; class 2, with the highest mean, has one.
    scores = np.array([[0.4, 0.3, 0.3], [0.4, 0.25, 0.35], [0.2, 0.41, 0.39], [0.2, 0.41, 0.39]])
    scores = np.concatenate([scores, [[0.1, 0.1, 0.8]]])[:, None].astype(np.float32)
    # Means of classes 0 and 1: 1.3 / 5 and 1.47 / 5.
    np.testing.assert_allclose(fused("vote", "classify", scores), [[2 / 6, 3 / 6, 1 / 6]])


def test_findings_vote_and_logits_by_hand():
    scores = np.array([[[0.9, 0.4]], [[0.4, 0.3]]], np.float32)
    target = np.array([[1, MISSING]], np.int8)
    # Split on the first finding with a mean of .65; together against the second.
    np.testing.assert_allclose(fused("vote", "multilabel", scores, target), [[2 / 3, 0]])
    odds = np.sqrt([9 * 2 / 3, 2 / 3 * 3 / 7])
    found = fused("logit", "multilabel", scores, target)
    np.testing.assert_allclose(found, [odds / (1 + odds)], atol=1e-6)


def test_ranks_by_hand():
    # Ranks 1 2 3 4 and 2 1 3 4: mean places .25 .25 .625 .875. The members call 3 and 1 of 4
    # present, 2 on average: the border lies at .4375.
    present = np.array([[0.1, 0.6, 0.7, 0.8], [0.3, 0.2, 0.4, 0.9]], np.float32)
    found = fused("rank", "classify", np.stack([1 - present, present], axis=-1))
    low, high = 0.25 / 0.4375 / 2, 1 - np.array([0.375, 0.125]) / 0.5625 / 2
    np.testing.assert_allclose(found[:, 1], [low, low, *high], atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    findings = fused("rank", "multilabel", present[..., None], np.zeros((4, 1), np.int8))
    np.testing.assert_allclose(findings[:, 0], found[:, 1], atol=1e-6)


@given(st.integers(2, 5), st.integers(1, 30), st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_ranks_keep_the_order_of_the_mean_rank(m, n, seed):
    rng = np.random.default_rng(seed)
    present = rng.choice(np.linspace(0, 1, 12), (m, n)).astype(np.float32)
    found = fused("rank", "multilabel", present[..., None], np.zeros((n, 1), np.int8))[:, 0]
    plain = stats.rankdata(present, axis=1).mean(axis=0)
    np.testing.assert_array_equal(stats.rankdata(found.round(6)), stats.rankdata(plain.round(9)))
    assert (found > 0).all() and (found < 1).all()
    called = np.rint((present > 0.5).mean() * n)
    # Ties at the border are all called absent.
    assert (found > 0.5).sum() <= called <= (found >= 0.5 - 1e-6).sum()
    positive = rng.integers(0, 2, n)
    if 0 < positive.sum() < n:
        want = roc_auc_score(positive, plain.round(9))
        assert roc_auc_score(positive, found.round(6)) == pytest.approx(want)


@pytest.mark.parametrize(("name", "task", "k"), PAIRS)
def test_every_rule_of_every_task(name, task, k):
    scores, target = members(task, k=k)
    fitted = fit_fusion(name, task, scores, target)
    found = fitted.apply(scores)
    assert found.shape == scores.shape[1:] and found.dtype == scores.dtype
    if task != "regress":
        assert found.min() >= 0 and found.max() <= 1 + 1e-6
    if task not in ("regress", "multilabel"):
        sums = found.sum(axis=-1, dtype=np.float64)
        np.testing.assert_allclose(sums, 1, atol=3e-3 if task == "segment" else 1e-5)
    # The same twice, and the same for arrays that come one by one.
    again = fit_fusion(name, task, list(scores), target).apply(list(scores))
    np.testing.assert_array_equal(found, again)
    json.dumps(fitted.to_json())
    if fitted.weights is not None:
        assert fitted.weights.min() >= 0 and fitted.weights.sum() == pytest.approx(1)
        assert fitted.to_json()["weights"] == fitted.weights.tolist()
    crossed = crossfit(name, task, scores, target, folds=3)
    assert crossed.shape == found.shape and crossed.dtype == found.dtype
    assert np.array_equal(crossed, found) != FUSIONS[name].fitted


@pytest.mark.parametrize(("name", "task", "k"), PAIRS)
def test_one_member_is_its_own_fusion(name, task, k):
    scores, target = members(task, m=1, k=k)
    np.testing.assert_array_equal(fit_fusion(name, task, scores, target).apply(scores), scores[0])
    np.testing.assert_array_equal(crossfit(name, task, scores, target), scores[0])


@pytest.mark.parametrize(("name", "task", "k"), PAIRS)
def test_the_order_of_the_members_does_not_matter(name, task, k):
    scores, target = members(task, m=4, n=40, k=k, seed=1)
    order = [2, 0, 3, 1]
    first = fit_fusion(name, task, scores, target)
    second = fit_fusion(name, task, scores[order], target)
    tolerance = 2e-3 if task == "segment" else 1e-4 * (100 if task == "regress" else 1)
    np.testing.assert_allclose(
        first.apply(scores).astype(np.float64), second.apply(scores[order]), atol=tolerance
    )
    if first.weights is not None:
        np.testing.assert_allclose(first.weights[order], second.weights, atol=1e-3)


@pytest.mark.parametrize(("name", "task", "k"), PAIRS)
def test_an_image_is_fused_by_itself_unless_the_rule_says_otherwise(name, task, k):
    scores, target = members(task, k=k)
    other = members(task, k=k, seed=5)[0]
    fitted = fit_fusion(name, task, scores, target)
    rows = np.array([3, 11, 12])
    alone = np.array_equal(fitted.apply(other[:, rows]), fitted.apply(other)[rows])
    assert alone != FUSIONS[name].whole_set


@pytest.mark.parametrize(("name", "task", "k"), PAIRS)
def test_crossfit_never_sees_the_label_of_an_image_it_scores(name, task, k, monkeypatch):
    # The parts are drawn by the labels, so they are held fast here.
    part = np.arange(24) % 3
    monkeypatch.setattr(fusion, "fold_numbers", lambda *arguments: part)
    scores, target = members(task, k=k)
    held = part == 0
    changed = target.copy()
    if task == "regress":
        changed[held] = changed[held][::-1] * 2
    else:
        changed[held] = (
            1 - target[held] if k == 2 or task == "multilabel" else (target[held] + 1) % k
        )
    first, second = (crossfit(name, task, scores, labels) for labels in (target, changed))
    np.testing.assert_array_equal(first[held], second[held])
    # The images of the other parts are scored by what these labels teach.
    assert np.array_equal(first, second) != FUSIONS[name].fitted


def test_crossfit_keeps_patients_together(monkeypatch):
    scores, target = members("classify", n=40)
    patients = np.repeat(np.arange(10), 4).astype(str)
    seen = []
    original = fusion.fold_numbers
    monkeypatch.setattr(
        fusion, "fold_numbers", lambda *arguments: seen.append(original(*arguments)) or seen[0]
    )
    crossfit("weighted", "classify", scores, target, patients=patients)
    assert set(seen[0]) == set(range(5))
    assert all(len(set(seen[0][patients == name])) == 1 for name in patients)


def test_errors_of_the_user_are_one_line():
    cases = [
        (("mean", "median"), "classify", None, "there is no fusion 'median'"),
        (("mean", "mean"), "classify", None, "'mean' twice"),
        (("stacking",), "segment", None, "'stacking' is not for the task segment"),
        (("rank",), "classify", 3, "two classes or for findings, and there are 3"),
    ]
    for names, task, classes, text in cases:
        with pytest.raises(UserError, match=text) as error:
            check_fusions(names, task, classes)
        assert "\n" not in str(error.value)
    check_fusions(("mean", "rank"), "classify", 2)
    check_fusions(("rank",), "classify")
    first, target = members("segment")
    smaller = first[:, :, :4]
    with pytest.raises(UserError, match=r"model\.image_size"):
        fit_fusion("mean", "segment", [first[0], smaller[1]], target)


def test_the_fusions_of_a_task():
    assert fusions_of("classify", 2) == (
        "mean", "logit", "weighted", "vote", "rank", "stacking", "greedy",
    )  # fmt: skip
    assert "rank" not in fusions_of("classify", 3) and "rank" in fusions_of("multilabel", 3)
    assert fusions_of("regress", 1) == ("mean", "weighted", "stacking", "greedy")
    assert fusions_of("segment", 2) == ("mean", "logit", "weighted", "vote", "greedy", "staple")


@pytest.mark.parametrize("name", ["weighted", "greedy"])
@pytest.mark.parametrize("task", ["multilabel", "regress"])
def test_unknown_targets_do_not_count(name, task):
    scores, target = members(task, n=30)
    unknown = MISSING if task == "multilabel" else np.nan
    some, few = target.copy(), target[:20]
    some[20:] = unknown
    left, right = fit_fusion(name, task, scores, some), fit_fusion(name, task, scores[:, :20], few)
    np.testing.assert_allclose(left.weights, right.weights, atol=1e-6)
    with pytest.raises(UserError, match="no validation target is known"):
        fit_fusion(name, task, scores, np.full_like(target, unknown))


def test_arrays_that_do_not_hold_together():
    scores, target = members("classify")
    fitted = fit_fusion("mean", "classify", scores, target)
    with pytest.raises(ValueError, match="fitted for"):
        fitted.apply(scores[:2])
    with pytest.raises(ValueError, match="does not fit"):
        fit_fusion("mean", "classify", scores, target[:3])
    with pytest.raises(ValueError, match="probabilities"):
        fitted.apply(scores * 2)
    with pytest.raises(ValueError, match="targets in"):
        fit_fusion("weighted", "classify", scores, target + 1)
    with pytest.raises(ValueError, match="patient for each"):
        fit_fusion("mean", "classify", scores, target, patients=np.arange(2))
    with pytest.raises(UserError, match="one patient"):
        crossfit("weighted", "classify", scores, target, patients=np.zeros(len(target), int))
    with pytest.raises(ValueError, match="two folds"):
        crossfit("weighted", "classify", scores, target, folds=1)
