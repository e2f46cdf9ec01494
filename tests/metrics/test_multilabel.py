import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from medtl_jax.data.catalog import MISSING
from medtl_jax.metrics.scores import Score, task_scores

NAMES = ("effusion", "nodule", "hernia", "oedema")
UNKNOWN = MISSING


def predictions(n, k, seed, missing=0.2):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 2, (n, k))
    target[rng.random((n, k)) < missing] = MISSING
    return target.astype(np.int8), np.round(rng.random((n, k)), 1)


def test_hand_computed_with_missing_labels():
    target = np.array([[1, 1], [1, 0], [0, UNKNOWN], [0, 0], [UNKNOWN, 0]], np.int8)
    score = np.array([[0.9, 0.6], [0.5, 0.2], [0.7, 0.9], [0.1, 0.6], [0.9, 0.4]])
    result = task_scores("multilabel", target, score, ("a", "b"))
    # Above 0.5: a of images 0, 2 (and 4, unknown); b of 0, 3 (and 2, unknown).
    want = {
        "accuracy/a": 1 / 2, "accuracy/b": 3 / 4, "accuracy": 5 / 8,
        "precision/a": 1 / 2, "precision/b": 1 / 2, "precision": 1 / 2,
        "recall/a": 1 / 2, "recall/b": 1, "recall": 3 / 4,
        "specificity/a": 1 / 2, "specificity/b": 2 / 3, "specificity": 7 / 12,
        "f1/a": 1 / 2, "f1/b": 2 / 3, "f1": 7 / 12,
        "accuracy_micro": 5 / 8, "precision_micro": 2 / 4, "recall_micro": 2 / 3,
        "specificity_micro": 3 / 5, "f1_micro": 4 / 7,
        "auc/a": 3 / 4, "auc/b": 2.5 / 3, "auc": (3 / 4 + 2.5 / 3) / 2,
        "pr_auc/a": (1 + 2 / 3) / 2, "pr_auc/b": 1 / 2,
        # Complete images: 0 right, 1 wrong in a, 3 wrong in b.
        "exact_match": 1 / 3,
        "brier/a": (0.01 + 0.25 + 0.49 + 0.01) / 4,
        "nll/a": -math.log(0.9 * 0.5 * 0.3 * 0.9) / 4,
        # No two scores of a share a bin; of b the two of 0.6 do: |1 - 1.2|.
        "ece/a": (0.1 + 0.5 + 0.7 + 0.1) / 4, "ece/b": (0.2 + 0.2 + 0.4) / 4,
    }  # fmt: skip
    for name, value in want.items():
        assert result[name].value == pytest.approx(value, abs=1e-12), name
        assert result[name].reason == ""
    assert result["auc/a"].n == result["auc/b"].n == 4
    assert result["auc"].n == 5 and result["exact_match"].n == 3
    assert math.isnan(result["auc_frequent"].value)
    assert result["auc_frequent"].reason == (
        "no finding with 20 images that have it and 20 that do not"
    )


@pytest.mark.parametrize("seed", range(3))
def test_values_equal_scikit_learn_on_the_known_labels(seed):
    target, score = predictions(150, 4, seed)
    result = task_scores("multilabel", target, score, NAMES)
    references = {
        "accuracy": lambda t, c, s: sk.accuracy_score(t, c),
        "precision": lambda t, c, s: sk.precision_score(t, c),
        "recall": lambda t, c, s: sk.recall_score(t, c),
        "specificity": lambda t, c, s: sk.recall_score(t, c, pos_label=0),
        "f1": lambda t, c, s: sk.f1_score(t, c),
        "auc": lambda t, c, s: sk.roc_auc_score(t, s),
        "pr_auc": lambda t, c, s: sk.average_precision_score(t, s),
        "brier": lambda t, c, s: sk.brier_score_loss(t, s),
        "nll": lambda t, c, s: -np.log(np.clip(np.where(t == 1, s, 1 - s), 1e-7, 1 - 1e-7)).mean(),
    }
    for metric, reference in references.items():
        values = []
        for i, name in enumerate(NAMES):
            known = target[:, i] >= 0
            truth, found = target[known, i], score[known, i]
            values.append(reference(truth, found > 0.5, found))
            entry = result[f"{metric}/{name}"]
            assert entry == Score(pytest.approx(values[-1], abs=1e-12), known.sum())
        assert result[metric].value == pytest.approx(np.mean(values), abs=1e-12)
    known = target >= 0
    for metric in ("precision", "recall", "f1"):
        want = getattr(sk, f"{metric}_score")(target[known], score[known] > 0.5)
        assert result[f"{metric}_micro"].value == pytest.approx(want, abs=1e-12)
    # Each finding has more than 20 of both kinds here.
    assert result["auc_frequent"].value == pytest.approx(result["auc"].value, abs=1e-12)


def test_an_average_names_the_findings_it_leaves_out():
    target, score = predictions(60, 4, 0, missing=0)
    target[:, 1], target[:, 2], target[:, 3] = 0, 1, UNKNOWN
    score[0] = [0.9, 0.9, 0.1, 0.9]
    result = task_scores("multilabel", target, score, NAMES)
    for name in ("auc", "auc_frequent"):
        assert result[name].value == pytest.approx(result["auc/effusion"].value, abs=1e-12)
    assert result["auc"].reason == "over 1 of 4 findings, without nodule, hernia, oedema"
    assert result["auc/nodule"].reason == "'nodule' is present in no image"
    assert result["auc/hernia"].reason == "'hernia' is absent from no image"
    assert result["auc/oedema"] == Score(
        pytest.approx(math.nan, nan_ok=True), 0, "'oedema' is known of no image"
    )
    assert result["recall"].reason == "over 2 of 4 findings, without nodule, oedema"
    assert result["specificity"].reason == "over 2 of 4 findings, without hernia, oedema"
    assert result["nll"].reason == "over 3 of 4 findings, without oedema"
    # F1 of a finding that is never present is 0 by count, and yet the average is without it.
    assert result["f1/nodule"].value == 0
    want = (result["f1/effusion"].value + result["f1/hernia"].value) / 2
    assert result["f1"].value == pytest.approx(want)
    assert result["f1"].reason == "over 2 of 4 findings, without nodule, oedema"


def test_precision_of_what_is_never_predicted_is_undefined_and_the_average_too():
    target = np.array([[1, 0], [0, 1]], np.int8)
    score = np.array([[0.9, 0.1], [0.2, 0.1]])
    result = task_scores("multilabel", target, score, ("a", "b"))
    assert math.isnan(result["precision"].value)
    assert result["precision"].reason == "'b' was predicted in no image"
    assert result["precision_micro"].value == 1


def test_nothing_known_at_all():
    target, score = np.full((3, 2), UNKNOWN, np.int8), np.full((3, 2), 0.5)
    result = task_scores("multilabel", target, score, ("a", "b"))
    for name, entry in result.items():
        assert math.isnan(entry.value) and entry.reason, name
    assert result["f1_micro"].reason == "no finding is known of any image"
    assert result["auc"].reason == "over 0 of 2 findings, without a, b"
    assert result["exact_match"].reason == "no image has every finding known"


def test_one_finding_is_enough():
    result = task_scores(
        "multilabel", np.array([[1], [0]], np.int8), np.array([[0.9], [0.2]]), ("a",)
    )
    assert result["auc"].value == result["auc/a"].value == result["exact_match"].value == 1


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_small_splits_never_warn_and_undefined_values_have_a_reason(n, k, seed):
    target, score = predictions(n, k, seed, missing=0.4)
    result = task_scores("multilabel", target, score, NAMES[:k])
    for name, entry in result.items():
        assert math.isnan(entry.value) or 0 <= entry.value <= 17, name
        assert not math.isnan(entry.value) or entry.reason, name
        if "/" in name:
            assert bool(entry.reason) == math.isnan(entry.value), name


@pytest.mark.parametrize(
    ("target", "score", "classes", "words"),
    [
        ([[1, 0]], [[0.5]], ("a",), r"\[n, k\]"),
        ([1], [0.5], ("a",), r"\[n, k\]"),
        ([[2]], [[0.5]], ("a",), "targets in -1..1"),
        ([[1.0]], [[0.5]], ("a",), "integer"),
        ([[1]], [[1.5]], ("a",), "probabilities"),
        ([[1]], [[np.nan]], ("a",), "NaN"),
        ([[1]], [[0.5]], ("a", "b"), "1 different class names"),
    ],
)
def test_arguments_that_do_not_hold_together(target, score, classes, words):
    with pytest.raises(ValueError, match=words):
        task_scores("multilabel", np.array(target), np.array(score), classes)
