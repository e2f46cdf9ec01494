import math
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from medtl_jax.metrics.scores import Score, confusion, task_scores

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "medmnist_evaluator.npz"
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
    result = task_scores("classify", target, score, ("a", "b", "c"))
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
        # Precision where recall rises: a at 1/1, 2/2 and 3/4 (after 0.5); b at 1/1 and, with the
        # tie at 0.4, 2/3; c at 1/1.
        "pr_auc/a": 11 / 12, "pr_auc/b": 5 / 6, "pr_auc/c": 1, "pr_auc": 11 / 12,
        "balanced_accuracy": 13 / 18,
        # Margins 3 2 1 of both: chance agreement 14 / 36.
        "kappa": (4 / 6 - 14 / 36) / (1 - 14 / 36), "mcc": (24 - 14) / (36 - 14),
        "precision_micro": 4 / 6, "recall_micro": 4 / 6, "f1_micro": 4 / 6,
        # Bins of a fifteenth: 0.8; 0.6 and 0.6 (the bin up to 0.6); 0.4; 0.5; 0.7.
        "ece": (0.2 + 0.8 + 0.4 + 0.5 + 0.3) / 6,
        "brier": (0.06 + 0.26 + 0.74 + 0.24 + 0.62 + 0.14) / 6,
        "nll": -math.log(0.8 * 0.6 * 0.3 * 0.6 * 0.4 * 0.7) / 6,
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
    result = task_scores("classify", target, score, NAMES)
    want = {
        "accuracy": sk.accuracy_score(target, predicted),
        "precision": sk.precision_score(target, predicted, average="macro"),
        "recall": sk.balanced_accuracy_score(target, predicted),
        "f1": sk.f1_score(target, predicted, average="macro"),
        "auc": sk.roc_auc_score(target, score, multi_class="ovr", average="macro"),
        "pr_auc": sk.average_precision_score(np.eye(4)[target], score, average="macro"),
        "balanced_accuracy": sk.balanced_accuracy_score(target, predicted),
        "mcc": sk.matthews_corrcoef(target, predicted),
        "kappa": sk.cohen_kappa_score(target, predicted),
        "precision_micro": sk.precision_score(target, predicted, average="micro"),
        "recall_micro": sk.recall_score(target, predicted, average="micro"),
        "f1_micro": sk.f1_score(target, predicted, average="micro"),
        "nll": -np.log(np.clip(score[np.arange(150), target], 1e-7, 1 - 1e-7)).mean(),
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
    result = task_scores("classify", target, score, ("no", "yes"))
    want = sk.roc_auc_score(target, score[:, 1])
    assert result["auc"].value == result["auc/no"].value == result["auc/yes"].value == want
    assert result["specificity/yes"].value == result["recall/no"].value


def test_class_absent_from_the_truth():
    target = np.array([0, 0, 1, 1])
    score = np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]])
    result = task_scores("classify", target, score, ("a", "b", "gone"))
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
    result = task_scores("classify", target, score, ("a", "b"))
    assert math.isnan(result["precision/b"].value) and math.isnan(result["precision"].value)
    assert result["precision"].reason == "no image was predicted as 'b'"
    assert result["recall/b"].value == result["f1/b"].value == 0
    assert result["recall"].value == 0.5
    assert result["auc"].value == 1


def test_macro_reason_names_every_undefined_class():
    target, score = np.array([0, 0]), np.array([[0.8, 0.1, 0.1], [0.9, 0.05, 0.05]])
    result = task_scores("classify", target, score, ("a", "b", "c"))
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
    result = task_scores("classify", target, score, NAMES[:k])
    lowest = {"mcc": -1, "kappa": -1}
    highest = {"brier": 2, "nll": -math.log(1e-7)}
    for name, entry in result.items():
        inside = lowest.get(name, 0) <= entry.value <= highest.get(name, 1) + 1e-12
        assert math.isnan(entry.value) != inside, name
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
        task_scores("classify", target, np.array(score), classes)


def test_binary_pr_auc_is_that_of_class_one():
    target, score = predictions(90, 2, 8)
    result = task_scores("classify", target, score, ("no", "yes"))
    want = [sk.average_precision_score(target == i, score[:, i]) for i in range(2)]
    assert result["pr_auc"].value == result["pr_auc/yes"].value == pytest.approx(want[1], abs=1e-12)
    assert result["pr_auc/no"].value == pytest.approx(want[0], abs=1e-12) != want[1]


@pytest.mark.parametrize("seed", range(3))
def test_ordinal_values_equal_scikit_learn(seed):
    target, score = predictions(120, 4, seed)
    predicted = score.argmax(axis=1)
    result = task_scores("ordinal", target, score, NAMES)
    want = sk.cohen_kappa_score(target, predicted, weights="quadratic")
    assert result["quadratic_kappa"].value == pytest.approx(want, abs=1e-12)
    assert result["mae"].value == pytest.approx(sk.mean_absolute_error(target, predicted))
    plain = task_scores("classify", target, score, NAMES)
    assert result.keys() - plain.keys() == {"quadratic_kappa", "mae"}
    assert all(result[name] == entry for name, entry in plain.items())


def test_calibration_error_and_brier_equal_plain_loops():
    target, score = predictions(200, 3, 5)
    confidence, predicted = score.max(axis=1), score.argmax(axis=1)
    error = 0.0
    for low in range(15):
        rows = [i for i in range(200) if low / 15 < confidence[i] <= (low + 1) / 15]
        if rows:
            right = sum(predicted[i] == target[i] for i in rows)
            error += abs(right - sum(confidence[i] for i in rows)) / 200
    brier = sum((score[i, c] - (target[i] == c)) ** 2 for i in range(200) for c in range(3)) / 200
    result = task_scores("classify", target, score, NAMES[:3])
    assert result["ece"].value == pytest.approx(error, abs=1e-12)
    assert result["brier"].value == pytest.approx(brier, abs=1e-12)


def test_brier_score_of_two_classes_is_that_of_scikit_learn():
    target, score = predictions(120, 2, 3)
    found = task_scores("classify", target, score, ("no", "yes"))["brier"].value
    assert found == pytest.approx(sk.brier_score_loss(target, score[:, 1]), abs=1e-12)
    finding = task_scores("multilabel", target[:, None], score[:, 1:], ("yes",))["brier"].value
    assert found == pytest.approx(finding, abs=1e-12)
    several = task_scores("classify", *predictions(120, 3, 3), ("a", "b", "c"))["brier"].value
    truth, score = predictions(120, 3, 3)
    want = sk.brier_score_loss(truth, score, labels=[0, 1, 2], scale_by_half=False)
    assert several == pytest.approx(want, abs=1e-12)


def test_certain_and_wrong_has_a_finite_nll():
    result = task_scores("classify", np.array([0, 1]), np.array([[1.0, 0], [1, 0]]), ("a", "b"))
    assert result["nll"].value == pytest.approx(-math.log(1e-7) / 2, rel=1e-6)


def test_agreement_of_a_single_class_is_undefined():
    score = np.array([[0.9, 0.1], [0.8, 0.2]])
    result = task_scores("ordinal", np.array([0, 0]), score, ("a", "b"))
    for name in ("mcc", "kappa", "quadratic_kappa"):
        assert math.isnan(result[name].value)
        assert result[name].reason == "every image is of class 'a'"
    assert result["balanced_accuracy"].reason == "no image of class 'b'"
    assert result["mae"].value == 0
    result = task_scores("ordinal", np.array([0, 1]), score, ("a", "b"))
    assert result["mcc"].reason == "every image was predicted as 'a'"
    # Chance explains all of the agreement.
    assert result["kappa"].value == result["quadratic_kappa"].value == 0


@pytest.mark.parametrize(
    ("task", "recorded"),
    [
        ("classify", "multi-class"),
        ("ordinal", "ordinal-regression"),
        ("classify", "binary-class"),
        ("multilabel", "multi-label, binary-class"),
    ],
)
def test_auc_and_accuracy_equal_those_of_medmnist(task, recorded):
    with np.load(GOLDEN) as file:
        target, score = file[f"{recorded}/target"].astype(np.int32), file[f"{recorded}/score"]
        auc, accuracy = file[f"{recorded}/auc_acc"]
    names = [f"c{i}" for i in range(score.shape[1])]
    target = target if task == "multilabel" else target[:, 0]
    result = task_scores(task, target, score, names)
    assert result["auc"].value == pytest.approx(auc, abs=1e-12)
    assert result["accuracy"].value == pytest.approx(accuracy, abs=1e-12)


def padded(task, seed, n=30):
    """Random arguments of a task, the rows that count, and names."""
    rng = np.random.default_rng(seed)
    mask = rng.random(n) < 0.7
    mask[0] = True
    if task == "segment":
        target = rng.integers(0, 3, (n, 5, 6)).astype(np.uint8)
        score = rng.dirichlet(np.ones(3), (n, 5, 6)).astype(np.float16)
    elif task == "multilabel":
        target, score = rng.integers(-1, 2, (n, 3)).astype(np.int8), rng.random((n, 3))
    elif task == "regress":
        target, score = rng.normal(size=(n, 3)), rng.normal(size=(n, 3))
        target[rng.random((n, 3)) < 0.2] = np.nan
    else:
        target, score = rng.integers(0, 3, n), rng.dirichlet(np.ones(3), n)
    return target, score, mask, ("a", "b", "c")


@pytest.mark.parametrize("task", ["classify", "ordinal", "multilabel", "segment", "regress"])
@pytest.mark.parametrize("seed", range(3))
def test_padding_changes_nothing(task, seed):
    target, score, mask, names = padded(task, seed)
    kept = task_scores(task, target[mask], score[mask], names)
    # What padding holds does not matter, not even that it is no probability.
    score[~mask] = np.nan
    result = task_scores(task, target, score, names, mask=mask)
    assert repr(result) == repr(kept)
    score[~mask] = 1 / 3
    assert repr(result) != repr(task_scores(task, target, score, names))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.zeros(30, bool), "leaves no image"),
        (np.ones(29, bool), "bool mask for 30"),
        (np.ones(30, int), "bool mask"),
    ],
)
def test_a_mask_that_does_not_fit(mask, words):
    target, score, _, names = padded("classify", 0)
    with pytest.raises(ValueError, match=words):
        task_scores("classify", target, score, names, mask=mask)


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="'detect'"):
        task_scores("detect", np.zeros(1), np.zeros((1, 2)), ("a", "b"))
