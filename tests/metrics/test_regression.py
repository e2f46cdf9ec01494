import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from medtl_jax.metrics.scores import task_scores


def test_hand_computed():
    target = np.array([[1, 10], [2, np.nan], [3, 30], [6, 20]], np.float32)
    score = np.array([[2, 12], [2, 99], [2, 26], [8, 21]], np.float32)
    result = task_scores("regress", target, score, ("size", "age"))
    want = {
        "mae/size": 1, "mse/size": 6 / 4, "rmse/size": math.sqrt(1.5),
        "median_error/size": 1, "bias/size": 2 / 4,
        # Truth 1 2 3 6 about 3: 4 + 1 + 0 + 9; prediction 2 2 2 8 about 3.5: 27, product 16.
        "r2/size": 1 - 6 / 14, "pearson/size": 18 / math.sqrt(14 * 27),
        "mae/age": 7 / 3, "median_error/age": 2, "bias/age": -1 / 3, "mae": (1 + 7 / 3) / 2,
    }  # fmt: skip
    for name, value in want.items():
        assert result[name].value == pytest.approx(value, abs=1e-12), name
    assert (result["mae/size"].n, result["mae/age"].n, result["mae"].n) == (4, 3, 4)


@pytest.mark.parametrize("seed", range(4))
def test_values_equal_scikit_learn_and_scipy(seed):
    rng = np.random.default_rng(seed)
    target = rng.normal(50, 15, (81 + seed, 2))
    score = target + rng.normal(2, 9, target.shape)
    target[rng.random(target.shape) < 0.1] = np.nan
    result = task_scores("regress", target, score, ("a", "b"))
    for i, name in enumerate(("a", "b")):
        known = ~np.isnan(target[:, i])
        truth, predicted = target[known, i], score[known, i]
        want = {
            "mae": sk.mean_absolute_error(truth, predicted),
            "mse": sk.mean_squared_error(truth, predicted),
            "rmse": sk.root_mean_squared_error(truth, predicted),
            "r2": sk.r2_score(truth, predicted),
            "median_error": sk.median_absolute_error(truth, predicted),
            "pearson": stats.pearsonr(truth, predicted).statistic,
            "bias": np.mean(predicted - truth),
        }
        assert {f"{metric}/{name}" for metric in want} <= result.keys()
        for metric, value in want.items():
            assert result[f"{metric}/{name}"].value == pytest.approx(value, abs=1e-12), metric
    assert result["pearson"].value == pytest.approx(
        (result["pearson/a"].value + result["pearson/b"].value) / 2
    )


def test_undefined_values_say_why():
    target = np.array([[5, 1, np.nan], [5, 2, np.nan]])
    score = np.array([[1.0, 7, 0], [2, 7, 0]])
    result = task_scores("regress", target, score, ("flat", "guess", "gone"))
    assert result["r2/flat"].reason == result["pearson/flat"].reason == "'flat' has one value only"
    assert result["pearson/guess"].reason == "every prediction of 'guess' is the same"
    assert result["r2/guess"].value == 1 - (36 + 25) / 0.5
    for metric in ("mae", "r2", "median_error"):
        assert math.isnan(result[f"{metric}/gone"].value) and result[f"{metric}/gone"].n == 0
        assert result[f"{metric}/gone"].reason == "'gone' is known of no image"
    assert result["mae"].reason == "'gone' is known of no image"
    assert result["r2"].reason == "'flat' has one value only; 'gone' is known of no image"


@settings(max_examples=40)
@given(st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_small_splits_never_warn(n, seed):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 3, (n, 2)).astype(np.float32)
    target[rng.random((n, 2)) < 0.3] = np.nan
    result = task_scores("regress", target, rng.integers(0, 3, (n, 2)), ("a", "b"))
    for name, entry in result.items():
        assert bool(entry.reason) == math.isnan(entry.value), name
        assert name.partition("/")[0] != "pearson" or not abs(entry.value) > 1


@pytest.mark.parametrize(
    ("target", "score", "words"),
    [
        ([[1.0, 2.0]], [[1.0]], r"\[n, k\]"),
        ([[np.inf]], [[1.0]], "infinity"),
        ([[1.0]], [[np.nan]], "NaN"),
    ],
)
def test_arguments_that_do_not_hold_together(target, score, words):
    with pytest.raises(ValueError, match=words):
        task_scores("regress", np.array(target), np.array(score), ("a",))
