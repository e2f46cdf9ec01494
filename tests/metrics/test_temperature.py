import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special
from sklearn.linear_model import LogisticRegression

from medtl_jax.metrics.temperature import (
    HIGHEST,
    LOWEST,
    Temperature,
    apply_temperature,
    fit_temperature,
)


def nll(target, score):
    return -np.log(score.astype(np.float64)[np.arange(len(target)), target]).mean()


def draws(n, k, factor, seed):
    """Labels drawn from softmax(z), and the scores of a network whose logits are `factor` z."""
    rng = np.random.default_rng(seed)
    z = rng.normal(scale=1.5, size=(n, k))
    target = np.array([rng.choice(k, p=p) for p in special.softmax(z, axis=1)])
    return target, special.softmax(factor * z, axis=1).astype(np.float32)


@pytest.mark.parametrize("task", ["classify", "ordinal"])
def test_three_classes_by_hand(task):
    # 0.8 against 0.1 twice is a logit ahead by ln 8. Right in 2 of 3 images: the best
    # probability is 2/3 against 1/6 twice, ahead by ln 4, so T = ln 8 / ln 4.
    score = np.tile(np.array([[0.8, 0.1, 0.1]], np.float32), (30, 1))
    target = np.repeat([0, 1], [20, 10])
    (found,) = fit_temperature(task, target, score)
    assert found.value == pytest.approx(1.5, abs=1e-4) and found.reason == ""
    after = apply_temperature(task, score, (found,))
    np.testing.assert_allclose(after, np.tile([2 / 3, 1 / 6, 1 / 6], (30, 1)), atol=1e-5)
    assert after.dtype == np.float32


def test_a_finding_by_hand_with_missing_labels():
    # 0.9 is ahead by ln 9; present in 3 of 4 images whose label is known: ln 3, so T = 2.
    # The second finding is said to be less likely than it is: 0.6 (ln 1.5) for 9 of 10.
    score = np.tile(np.array([[0.9, 0.6]], np.float32), (40, 1))
    target = np.stack([np.repeat([1, 0, -1], [24, 8, 8]), np.repeat([1, 0], [36, 4])], 1)
    found = fit_temperature("multilabel", target.astype(np.int8), score)
    want = [2, math.log(1.5) / math.log(9)]
    assert [t.value for t in found] == pytest.approx(want, abs=1e-4)
    after = apply_temperature("multilabel", score, found)
    np.testing.assert_allclose(after, np.tile([0.75, 0.9], (40, 1)), atol=1e-5)


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_the_factor_of_the_logits_comes_back(factor):
    target, score = draws(6000, 4, factor, 0)
    (found,) = fit_temperature("classify", target, score)
    assert found.value == pytest.approx(factor, rel=0.06)
    assert nll(target, apply_temperature("classify", score, (found,))) <= nll(target, score)


def test_findings_equal_logistic_regression_through_the_origin():
    target, score = draws(400, 2, 1.5, 1)
    (found,) = fit_temperature("multilabel", target[:, None], score[:, 1:])
    odds = special.logit(score[:, 1:].astype(np.float64))
    fit = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(odds, target)
    assert found.value == pytest.approx(1 / fit.coef_[0, 0], rel=1e-4)
    # Two classes are one finding.
    (pair,) = fit_temperature("classify", target, score)
    assert found.value == pytest.approx(pair.value, rel=1e-4)


@given(st.integers(2, 40), st.integers(2, 5), st.floats(0.2, 5), st.integers(0, 2**32 - 1))
def test_nll_never_rises_on_the_images_it_is_fitted_to(n, k, factor, seed):
    target, score = draws(n, k, factor, seed)
    (found,) = fit_temperature("classify", target, score)
    assert found.value == 1 if found.reason else LOWEST < found.value < HIGHEST
    after = apply_temperature("classify", score.astype(np.float64), (found,))
    assert nll(target, after) <= nll(target, score) + 1e-9


@given(st.floats(LOWEST, HIGHEST), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_scaling_keeps_the_order_and_the_sum(value, k, seed):
    score = np.random.default_rng(seed).dirichlet(np.full(k, 0.3), 20)
    after = apply_temperature("classify", score, (Temperature(value),))
    np.testing.assert_allclose(after.sum(axis=1), 1, atol=1e-12)
    top = score.argmax(axis=1)
    np.testing.assert_array_equal(after[np.arange(20), top], after.max(axis=1))
    logits = np.log(np.maximum(score, 1e-30))
    possible = score.min(axis=1) > 1e-30
    want = special.softmax(logits / value, axis=1)
    np.testing.assert_allclose(after[possible], want[possible], atol=1e-12)


@pytest.mark.parametrize(
    ("task", "shape", "dtype"),
    [
        ("classify", (5, 3), np.float32),
        ("multilabel", (5, 3), np.float32),
        ("segment", (2, 4, 4, 3), np.float16),
    ],
)
def test_a_temperature_of_one_is_the_identity(task, shape, dtype):
    score = np.random.default_rng(0).dirichlet(np.ones(shape[-1]), shape[:-1]).astype(dtype)
    ones = [Temperature(1.0)] * (shape[1] if task == "multilabel" else 1)
    after = apply_temperature(task, score, ones)
    np.testing.assert_array_equal(after, score)
    assert after.dtype == dtype and after is not score
    # And close to one nothing jumps, though 0 and 1 have no logarithm and no odds.
    score.reshape(-1, shape[-1])[0] = np.eye(shape[-1])[0]
    nearly = apply_temperature(task, score, [Temperature(1.0001)] * len(ones))
    np.testing.assert_allclose(nearly, score, atol=1e-3)


def test_masks_have_one_temperature_for_all_pixels():
    # As for three classes above: each image has the same share of wrong pixels.
    score = np.full((3, 8, 8, 3), 0.1, np.float16)
    score[..., 0] = 0.8
    target = np.zeros((3, 8, 8), np.uint8)
    target.reshape(3, 64)[:, :16] = 2
    (found,) = fit_temperature("segment", target, score)
    # Right in 3 of 4 pixels: ahead by ln 6.
    assert found.value == pytest.approx(math.log(8) / math.log(6), abs=2e-3)
    after = apply_temperature("segment", score, (found,))
    assert after.dtype == np.float16 and after.shape == score.shape
    np.testing.assert_allclose(after[..., 0].astype(float), 0.75, atol=1e-3)


def test_pixels_are_drawn_from_every_image_and_always_the_same(monkeypatch):
    monkeypatch.setattr("medtl_jax.metrics.temperature.MOST_PIXELS", 4000)
    target, score = draws(20 * 32 * 32, 2, 2.0, 3)
    target = target.reshape(20, 32, 32).astype(np.uint8)
    score = score.reshape(20, 32, 32, 2).astype(np.float16)
    first, again = (fit_temperature("segment", target, score)[0] for _ in range(2))
    assert first == again
    assert first.value == pytest.approx(2, rel=0.1)
    monkeypatch.setattr("medtl_jax.metrics.temperature.MOST_PIXELS", 10**6)
    assert fit_temperature("segment", target, score)[0].value != first.value


@pytest.mark.parametrize(
    ("target", "score", "words"),
    [
        ([0, 0, 0], [[0.7, 0.3], [0.6, 0.4], [0.2, 0.8]], "all validation labels are the same"),
        ([0, 0, 1], [[0.7, 0.3], [0.6, 0.4], [0.2, 0.8]], "every validation label is told right"),
        ([0, 0, 1], [[0.5, 0.5]] * 3, "all classes have the same probability"),
        # Wrong more often than right: any T is worse than the next higher one.
        ([1, 1, 0], [[0.9, 0.1]] * 3, "not in 0.05..20"),
    ],
)
def test_where_there_is_no_best_temperature_it_is_one_and_says_why(target, score, words):
    target, score = np.array(target), np.array(score, np.float32)
    (found,) = fit_temperature("classify", target, score)
    assert found.value == 1 and words in found.reason
    np.testing.assert_array_equal(apply_temperature("classify", score, (found,)), score)


def test_findings_without_known_labels_or_positives():
    score = np.array([[0.2, 0.3, 0.9], [0.7, 0.4, 0.8], [0.1, 0.6, 0.7]], np.float32)
    target = np.array([[-1, 0, 1], [-1, 0, 1], [-1, 0, 0]], np.int8)
    found = fit_temperature("multilabel", target, score)
    assert [bool(t.reason) for t in found] == [True, True, False]
    assert found[0].reason == "no validation label is known"
    assert found[1].reason == "all validation labels are the same"
    assert found[0].value == found[1].value == 1 != found[2].value


def test_certain_and_wrong_gives_finite_numbers():
    target = np.array([0, 1, 1, 0, 1] * 4)
    score = np.tile(np.array([[1, 0], [0, 1], [0, 1], [1, 0], [1, 0]], np.float32), (4, 1))
    (found,) = fit_temperature("classify", target, score)
    # 0 stands for 2^-126, ahead by 126 ln 2: far more than four right of five allow.
    assert found.reason.startswith("the best temperature is not in")
    # The float32 just below 1 is 1 - 2^-24, so 1 stands for 1 - 2^-25: present in 3 of 4.
    target, score = np.array([[1], [1], [1], [0]], np.int8), np.ones((4, 1), np.float32)
    (found,) = fit_temperature("multilabel", target, score)
    assert found.value == pytest.approx(25 * math.log(2) / math.log(3), rel=1e-4)
    np.testing.assert_allclose(apply_temperature("multilabel", score, (found,)), 0.75, atol=1e-4)


@pytest.mark.parametrize(
    ("task", "target", "score", "words"),
    [
        ("regress", [0.0], [[1.0]], "a task with probabilities"),
        ("classify", [0, 1], [[0.5, 0.5]], "does not fit"),
        ("multilabel", [0], [[0.5]], "does not fit"),
        ("segment", [0], [[0.5, 0.5]], "shape"),
        ("classify", [0, 2], [[0.5, 0.5]] * 2, "labels in 0..1"),
        ("classify", [0, -1], [[0.5, 0.5]] * 2, "labels in 0..1"),
        ("classify", [0, 1], [[np.nan, 0.5]] * 2, "NaN"),
    ],
)
def test_arguments_that_do_not_hold_together(task, target, score, words):
    with pytest.raises(ValueError, match=words):
        fit_temperature(task, np.array(target), np.array(score))


def test_another_number_of_temperatures():
    with pytest.raises(ValueError, match="want 2 temperatures, got 1"):
        apply_temperature("multilabel", np.full((3, 2), 0.5), (Temperature(2.0),))
