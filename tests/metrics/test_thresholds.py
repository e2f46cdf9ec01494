import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from medtl_jax.errors import UserError
from medtl_jax.metrics.thresholds import (
    POINT_METRICS,
    POINTS,
    Threshold,
    fit_thresholds,
    operating_scores,
    question_names,
    questions,
)
from medtl_jax.metrics.uncertainty import score_with_intervals

BINARY = ("no", "yes")
# From the highest probability down: + + - + - -, so Youden's index is 1/3, 2/3, 1/3, 2/3, 1/3, 0.
PROBABILITY = np.array([0.9, 0.8, 0.7, 0.6, 0.3, 0.1])
TARGET = np.array([1, 1, 0, 1, 0, 0])


def pair(probability):
    return np.stack([1 - probability, probability], axis=1)


def random_case(n, seed):
    """Binary labels, at least one of each kind, and probabilities with ties."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 2, n)
    target[:2] = 0, 1
    return target, np.clip(np.round(0.3 * target + 0.7 * rng.random(n), 1), 0, 1)


def test_points_by_hand():
    found = fit_thresholds("classify", TARGET, pair(PROBABILITY), BINARY, 0.95)
    # 0.8 and 0.6 have the same index: the higher one. All three positives are above 0.6.
    assert found == {"yes": {"youden": Threshold(0.8), "sensitivity": Threshold(0.6)}}
    lower = fit_thresholds("classify", TARGET, pair(PROBABILITY), BINARY, 2 / 3)
    assert lower["yes"]["sensitivity"] == Threshold(0.8)


@given(st.integers(2, 60), st.floats(0.05, 1), st.integers(0, 2**32 - 1))
def test_points_equal_the_roc_curve_of_scikit_learn(n, sensitivity, seed):
    target, probability = random_case(n, seed)
    fpr, tpr, cuts = sk.roc_curve(target, probability, drop_intermediate=False)
    found = fit_thresholds("classify", target, pair(probability), BINARY, sensitivity)["yes"]
    best = (tpr - fpr).max()
    if found["youden"].reason:
        assert best <= 1e-12 or np.ptp(probability) == 0
    else:
        place = np.flatnonzero(np.isclose(tpr - fpr, best, rtol=0, atol=1e-12))[0]
        assert found["youden"].value == cuts[place]
    if not found["sensitivity"].reason:
        assert found["sensitivity"].value == cuts[np.argmax(tpr >= sensitivity - 1e-9)]


def test_a_sensitivity_that_is_a_whole_number_of_images_is_reached_exactly():
    # In floating point 0.07 * 100 is more than 7.
    probability = np.arange(1, 102) / 102
    target = np.append([0], np.ones(100, int))
    found = fit_thresholds("classify", target, pair(probability), BINARY, 0.07)["yes"]
    assert found["sensitivity"].value == probability[-7]


def test_questions_of_each_task():
    score = np.array([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]])
    names, target = ("a", "b", "c"), np.array([0, 2])
    each = questions("classify", target, score, names)
    assert tuple(each) == names == question_names("classify", names)
    assert each["c"].truth.tolist() == [False, True] and each["c"].known.all()
    np.testing.assert_array_equal(each["b"].probability, [0.25, 0.125])
    ranks = questions("ordinal", target, score, names)
    assert tuple(ranks) == (">=b", ">=c") == question_names("ordinal", names)
    np.testing.assert_array_equal(ranks[">=b"].probability, [0.5, 0.875])
    assert ranks[">=b"].truth.tolist() == [False, True]
    findings = questions("multilabel", np.array([[1, 0, -1], [-1, 1, 0]]), score, names)
    assert tuple(findings) == names == question_names("multilabel", names)
    assert findings["a"].truth.tolist() == [True, False]
    assert findings["a"].known.tolist() == [True, False]
    assert question_names("classify", BINARY) == ("yes",)
    for task in ("segment", "regress"):
        assert (
            questions(task, target, score, names)
            == {}
            == fit_thresholds(task, target, score, names, 0.9)
        )


def test_missing_labels_do_not_move_a_threshold():
    target = np.array([[1], [1], [-1], [0], [1], [0], [-1], [0]], np.int8)
    probability = np.array([0.9, 0.8, 0.75, 0.7, 0.6, 0.3, 0.2, 0.1])
    found = fit_thresholds("multilabel", target, probability[:, None], ("f",), 0.95)["f"]
    assert found == {"youden": Threshold(0.8), "sensitivity": Threshold(0.6)}


def test_where_there_is_no_threshold_it_says_why():
    def points(target, probability):
        target = np.array(target, np.int8)[:, None]
        return fit_thresholds("multilabel", target, np.array(probability)[:, None], ("f",), 0.9)[
            "f"
        ]

    for target in ([0, 0, 0], [-1, 0, -1], [-1, -1, -1]):
        found = points(target, [0.1, 0.2, 0.3])
        assert set(found.values()) == {Threshold(None, "no validation image is positive")}
    found = points([0, 1, 1], [0.2, 0.2, 0.2])
    reason = "all validation images have the same probability"
    assert set(found.values()) == {Threshold(None, reason)}
    found = points([1, 1, -1], [0.2, 0.3, 0.9])
    assert found["youden"] == Threshold(None, "no validation image is negative")
    assert found["sensitivity"] == Threshold(0.2)
    found = points([1, 0, 0], [0.1, 0.5, 0.6])
    assert found["youden"].reason == "no threshold is better than chance on validation"
    assert found["sensitivity"] == Threshold(0.1)


@pytest.mark.parametrize("sensitivity", [0, -0.1, 1.01, float("nan")])
def test_a_sensitivity_that_cannot_be_asked_for(sensitivity):
    with pytest.raises(UserError, match=r"eval\.target_sensitivity=.* must lie in 0 < s <= 1"):
        fit_thresholds("classify", TARGET, pair(PROBABILITY), BINARY, sensitivity)


@pytest.mark.parametrize(
    ("task", "target", "score", "classes", "words"),
    [
        ("classify", [0, 1], [[0.5, 0.5]], BINARY, "want score"),
        ("classify", [0], [[0.5, 0.5]], ("a", "b", "c"), "want score"),
        ("multilabel", [0], [[0.5, 0.5]], BINARY, "want score"),
        ("ordinal", [], np.zeros((0, 2)), BINARY, "at least one image"),
        ("classify", [0], [[np.nan, 0.5]], BINARY, "finite"),
    ],
)
def test_arguments_that_do_not_hold_together(task, target, score, classes, words):
    with pytest.raises(ValueError, match=words):
        fit_thresholds(task, np.array(target), np.array(score), classes, 0.9)


def both(value):
    """The same threshold at both points of one question."""
    return {point: Threshold(value) for point in POINTS}


def test_scores_at_a_point_by_hand():
    # At 0.65: + + - above, + - - below.
    thresholds = {"yes": {"youden": Threshold(0.65), "sensitivity": Threshold(0.1)}}
    found = operating_scores(
        "classify", TARGET, pair(PROBABILITY), BINARY, thresholds, resamples=50
    )
    assert set(found) == {f"{metric}@{point}" for metric in POINT_METRICS for point in POINTS}
    for metric in POINT_METRICS:
        assert found[f"{metric}@youden"]["value"] == pytest.approx(2 / 3)
        assert found[f"{metric}@youden"]["n"] == 6 and "n_patients" not in found[f"{metric}@youden"]
    # At 0.1, the lowest probability: everything is called positive, the equal one too.
    want = {"recall": 1, "specificity": 0, "precision": 0.5, "npv": None, "f1": 2 / 3}
    for metric, value in want.items():
        assert found[f"{metric}@sensitivity"]["value"] == value
    assert found["npv@sensitivity"]["reason"] == "no image below the threshold"
    assert found["npv@sensitivity"]["ci95"] is None
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("task", ["classify", "ordinal", "multilabel"])
def test_scores_equal_scikit_learn(task):
    rng = np.random.default_rng(4)
    names, score = ("a", "b", "c"), rng.dirichlet(np.ones(3), 200)
    several = task == "multilabel"
    target = rng.integers(-1, 2, (200, 3)) if several else rng.integers(0, 3, 200)
    asked = questions(task, target, score, names)
    thresholds = {name: both(0.2 + 0.1 * i) for i, name in enumerate(asked)}
    found = operating_scores(task, target, score, names, thresholds, resamples=20)
    assert len(found) == len(asked) * len(POINTS) * len(POINT_METRICS)
    for name, question in asked.items():
        truth = question.truth[question.known]
        called = question.probability[question.known] >= thresholds[name]["youden"].value
        want = {
            "recall": sk.recall_score(truth, called),
            "specificity": sk.recall_score(~truth, ~called),
            "precision": sk.precision_score(truth, called),
            "npv": sk.precision_score(~truth, ~called),
            "f1": sk.f1_score(truth, called),
            "accuracy": sk.accuracy_score(truth, called),
        }
        for metric, value in want.items():
            entry = found[f"{metric}@youden/{name}"]
            assert entry["value"] == pytest.approx(value, abs=1e-12)
            assert entry["n"] == len(truth)


@pytest.mark.parametrize("clustered", [False, True])
def test_intervals_are_those_of_the_same_metric_elsewhere(clustered):
    # With two classes the class with the highest probability is a threshold of one half.
    target, probability = random_case(120, 8)
    probability = np.where(probability == 0.5, 0.55, probability)
    patients = np.arange(120) // 3 if clustered else None
    given = (target, pair(probability), BINARY)
    settings = {"resamples": 200, "seed": 5, "level": 0.9}
    want = score_with_intervals("classify", *given, patients, **settings)
    found = operating_scores("classify", *given, {"yes": both(0.5)}, patients, **settings)
    for name in ("recall", "specificity", "precision", "f1"):
        assert found[f"{name}@youden"]["value"] == pytest.approx(want[f"{name}/yes"]["value"])
        assert found[f"{name}@youden"]["ci90"] == pytest.approx(want[f"{name}/yes"]["ci90"])
    assert found["accuracy@youden"]["ci90"] == pytest.approx(want["accuracy"]["ci90"])
    assert found["npv@youden"]["ci90"] == pytest.approx(want["precision/no"]["ci90"])
    assert found["recall@youden"].get("n_patients") == (40 if clustered else None)


def test_patients_with_a_known_label_are_counted():
    target = np.array([[1, -1], [0, -1], [1, 0], [0, 1]], np.int8)
    score = np.array([[0.9, 0.1], [0.2, 0.3], [0.4, 0.6], [0.3, 0.7]])
    patients = np.array(["p", "p", "q", "q"])
    thresholds = {"x": both(0.35), "y": both(0.65)}
    found = operating_scores(
        "multilabel", target, score, ("x", "y"), thresholds, patients, resamples=20
    )
    assert found["accuracy@youden/x"]["n_patients"] == 2 and found["accuracy@youden/x"]["n"] == 4
    entry = found["accuracy@youden/y"]
    assert entry["value"] == 1 and entry["n"] == 2 and entry["n_patients"] == 1
    assert entry["ci95"] is None and entry["reason"] == "one patient only"


def test_a_point_that_does_not_exist_says_why_at_each_metric():
    thresholds = {"yes": {"youden": Threshold(None, "no such"), "sensitivity": Threshold(0.5)}}
    found = operating_scores(
        "classify", TARGET, pair(PROBABILITY), BINARY, thresholds, resamples=20
    )
    for metric in POINT_METRICS:
        assert found[f"{metric}@youden"] == {
            "value": None,
            "ci95": None,
            "n": 6,
            "reason": "no such",
        }
        assert found[f"{metric}@sensitivity"]["value"] is not None


def test_why_a_metric_is_undefined():
    def at_half(target, probability):
        target, score = np.array(target)[:, None], np.array(probability)[:, None]
        found = operating_scores(
            "multilabel", target, score, ("f",), {"f": both(0.5)}, resamples=20
        )
        return {m: found[f"{m}@youden/f"].get("reason") for m in POINT_METRICS}

    found = at_half([0, 0, 0], [0.1, 0.2, 0.3])
    assert found["recall"] == "no positive image"
    assert found["precision"] == "no image at or above the threshold"
    assert found["f1"] == "no positive image, and none at or above the threshold"
    assert found["specificity"] is found["accuracy"] is found["npv"] is None
    found = at_half([1, 1, -1], [0.6, 0.7, 0.1])
    assert found["specificity"] == "no negative image"
    assert found["npv"] == "no image below the threshold"
    assert at_half([-1, -1], [0.6, 0.7])["accuracy"] == "no label is known"


def test_f1_of_one_positive_has_no_interval():
    # A third of the draws miss it, and with no image called positive either there is no F1.
    target, score = np.array([[1], [0], [0], [0]]), np.array([[0.9], [0.1], [0.2], [0.3]])
    found = operating_scores("multilabel", target, score, ("f",), {"f": both(0.5)}, resamples=200)
    assert "too few images" in found["f1@youden/f"]["reason"]
    assert found["f1@youden/f"]["ci95"] is None
    # A proportion does not need them: one of one, by the score interval.
    assert found["recall@youden/f"]["ci95"] == pytest.approx([0.2065, 1], abs=5e-5)


@pytest.mark.parametrize("task", ["segment", "regress"])
def test_tasks_without_questions_have_no_points(task):
    assert operating_scores(task, np.zeros(2), np.zeros((2, 1)), ("a",), {}) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"thresholds": {"no": both(0.5)}}, "want thresholds of"),
        ({"patients": np.array(["a"])}, "a patient for each of 6"),
        ({"resamples": 0}, "resamples >= 1"),
        ({"level": 1.0}, "0 < level < 1"),
    ],
)
def test_scores_of_arguments_that_do_not_hold_together(change, words):
    arguments = {"thresholds": {"yes": both(0.5)}, "resamples": 10} | change
    with pytest.raises(ValueError, match=words):
        operating_scores("classify", TARGET, pair(PROBABILITY), BINARY, **arguments)
