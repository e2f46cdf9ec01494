import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from medtl_jax.metrics.scores import Score, classification_scores, confusion

NAMES = ("normal", "benign", "malignant", "artefact")


def predictions(n, k, seed, digits=2):
    """Random targets and probabilities; few digits make many ties."""
    rng = np.random.default_rng(seed)
    score = np.round(rng.dirichlet(np.ones(k), size=n), digits)
    return rng.integers(0, k, n), score / score.sum(axis=1, keepdims=True)


def test_hand_computed_three_classes():
    #  truth      0    0    0    1    1    2
    #  predicted  0    0    1    1    0    2
    target = np.array([0, 0, 0, 1, 1, 2])
    score = np.array(
        [[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.3, 0.4, 0.3], [0.2, 0.6, 0.2], [0.5, 0.4, 0.1],
         [0.1, 0.2, 0.7]]
    )  # fmt: skip
    result = classification_scores(target, score, ("a", "b", "c"))
    want = {
        "accuracy": 4 / 6,
        "precision/a": 2 / 3, "precision/b": 1 / 2, "precision/c": 1,
        "recall/a": 2 / 3, "recall/b": 1 / 2, "recall/c": 1,
        "specificity/a": 2 / 3, "specificity/b": 3 / 4, "specificity/c": 1,
        "f1/a": 2 / 3, "f1/b": 1 / 2, "f1/c": 1,
        # a: 0.8 and 0.6 beat 0.2, 0.5, 0.1; 0.3 beats two of them. b: 0.6 beats four,
        # 0.4 beats three and ties with one. c: 0.7 beats all.
        "auc/a": 8 / 9, "auc/b": 7.5 / 8, "auc/c": 1,
        "precision": 13 / 18, "recall": 13 / 18, "specificity": 29 / 36, "f1": 13 / 18,
        "auc": (8 / 9 + 7.5 / 8 + 1) / 3,
    }  # fmt: skip
    assert result.keys() == want.keys()
    for name, value in want.items():
        assert result[name].value == pytest.approx(value, abs=1e-12), name
        assert result[name] == Score(result[name].value, 6, "")
    np.testing.assert_array_equal(confusion(target, score), [[2, 1, 0], [1, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize("seed", range(4))
def test_macro_values_equal_scikit_learn(seed):
    target, score = predictions(150, 4, seed, digits=1)
    predicted = score.argmax(axis=1)
    result = classification_scores(target, score, NAMES)
    want = {
        "accuracy": sk.accuracy_score(target, predicted),
        "precision": sk.precision_score(target, predicted, average="macro"),
        "recall": sk.balanced_accuracy_score(target, predicted),
        "f1": sk.f1_score(target, predicted, average="macro"),
        "auc": sk.roc_auc_score(target, score, multi_class="ovr", average="macro"),
        "specificity": np.mean(
            [sk.recall_score(target == c, predicted == c, pos_label=False) for c in range(4)]
        ),
    }
    for name, value in want.items():
        assert result[name].value == pytest.approx(value, abs=1e-12), name
    for i, name in enumerate(NAMES):
        assert result[f"auc/{name}"].value == pytest.approx(
            sk.roc_auc_score(target == i, score[:, i]), abs=1e-12
        )


def test_binary_auc_is_that_of_class_one():
    target, score = predictions(90, 2, 7)
    result = classification_scores(target, score, ("no", "yes"))
    want = sk.roc_auc_score(target, score[:, 1])
    assert result["auc"].value == result["auc/no"].value == result["auc/yes"].value == want
    assert result["specificity/yes"].value == result["recall/no"].value


def test_class_absent_from_the_truth():
    target = np.array([0, 0, 1, 1])
    score = np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]])
    result = classification_scores(target, score, ("a", "b", "gone"))
    for name in ("recall/gone", "auc/gone", "recall", "auc"):
        assert math.isnan(result[name].value)
        assert result[name].reason == "no image of class 'gone'"
    # It was predicted once, wrongly: precision and F1 are 0 by count, specificity 3 of 4.
    assert result["precision/gone"] == result["f1/gone"] == Score(0.0, 4)
    assert result["specificity/gone"].value == 0.75
    assert result["accuracy"].value == 0.5


def test_class_never_predicted():
    target = np.array([0, 1, 1])
    score = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    result = classification_scores(target, score, ("a", "b"))
    assert math.isnan(result["precision/b"].value) and math.isnan(result["precision"].value)
    assert result["precision"].reason == "no image was predicted as 'b'"
    assert result["recall/b"].value == result["f1/b"].value == 0
    assert result["recall"].value == 0.5
    assert result["auc"].value == 1


def test_macro_reason_names_every_undefined_class():
    target, score = np.array([0, 0]), np.array([[0.8, 0.1, 0.1], [0.9, 0.05, 0.05]])
    result = classification_scores(target, score, ("a", "b", "c"))
    assert result["recall"].reason == "no image of class 'b'; no image of class 'c'"
    assert result["specificity"].reason == result["specificity/a"].reason
    assert result["specificity/a"].reason == "every image is of class 'a'"
    assert result["f1/c"].reason == "class 'c' is neither present nor predicted"
    for entry in result.values():
        assert bool(entry.reason) == math.isnan(entry.value)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(2, 4), st.integers(0, 2**32 - 1))
def test_small_splits_never_warn_and_stay_in_range(n, k, seed):
    target, score = predictions(n, k, seed)
    result = classification_scores(target, score, NAMES[:k])
    for name, entry in result.items():
        assert math.isnan(entry.value) != (0 <= entry.value <= 1), name
        assert bool(entry.reason) == math.isnan(entry.value)
    table = confusion(target, score)
    assert table.sum() == n and result["accuracy"].value == np.trace(table) / n
    np.testing.assert_array_equal(table.sum(axis=1), np.bincount(target, minlength=k))


@pytest.mark.parametrize(
    ("target", "score", "classes", "words"),
    [
        ([0, 1], [[0.5, 0.5]], ("a", "b"), "target \\[n\\] and score"),
        ([], np.empty((0, 2)), ("a", "b"), "at least one image"),
        ([0], [[1.0]], ("a",), "two classes"),
        ([0], [[0.5, 0.5]], ("a",), "2 different class names"),
        ([0], [[0.5, 0.5]], ("a", "a"), "2 different class names"),
        ([0.0], [[0.5, 0.5]], ("a", "b"), "integer targets"),
        ([2], [[0.5, 0.5]], ("a", "b"), "targets in 0..1"),
        ([-1], [[0.5, 0.5]], ("a", "b"), "targets in 0..1"),
        ([0], [[np.nan, 0.5]], ("a", "b"), "NaN"),
        ([0], [[-3.0, 4.0]], ("a", "b"), "probabilities"),
        ([0], [[0.5, 0.1]], ("a", "b"), "probabilities"),
    ],
)
def test_arguments_that_do_not_hold_together(target, score, classes, words):
    target = np.array(target, int if not target else None)
    with pytest.raises(ValueError, match=words):
        classification_scores(target, np.array(score), classes)
