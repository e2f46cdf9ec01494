import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medtl_jax.metrics.scores import CLASS_METRICS, classification_scores
from medtl_jax.metrics.uncertainty import (
    bootstrap_counts,
    score_with_intervals,
    weighted_scores,
)

NAMES = ("normal", "benign", "malignant", "artefact")


def predictions(n, k, seed, skill=1.0):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, k, n)
    # One decimal: many ties.
    logit = np.round(rng.normal(size=(n, k)) + skill * np.eye(k)[target], 1)
    score = np.exp(logit)
    return target, score / score.sum(axis=1, keepdims=True)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(2, 4), st.integers(0, 2**32 - 1))
def test_weighted_scores_equal_those_of_repeated_rows(n, k, seed):
    target, score = predictions(n, k, seed)
    counts = np.random.default_rng(seed).integers(0, 3, size=(n, 5))
    counts[0] += 1
    result = weighted_scores(target, score, counts)
    for column in range(5):
        rows = np.repeat(np.arange(n), counts[:, column])
        want = classification_scores(target[rows], score[rows], NAMES[:k])
        assert result["accuracy"][0, column] == pytest.approx(want["accuracy"].value, abs=1e-9)
        for metric in CLASS_METRICS:
            values = [want[f"{metric}/{name}"].value for name in NAMES[:k]]
            np.testing.assert_allclose(result[metric][:, column], values, atol=1e-9)
            np.testing.assert_allclose(
                result[metric][:, column].mean(), want[metric].value, atol=1e-9
            )


def test_interval_equals_an_explicit_bootstrap():
    target, score = predictions(60, 3, 1)
    result = score_with_intervals(target, score, NAMES[:3], resamples=200, level=0.9, seed=5)
    counts = np.concatenate(list(bootstrap_counts(60, 60, 200, 5)), axis=1)
    values = []
    for column in counts.T:
        rows = np.repeat(np.arange(60), column)
        values.append(classification_scores(target[rows], score[rows], NAMES[:3])["f1"].value)
    np.testing.assert_allclose(result["f1"]["ci90"], np.quantile(values, [0.05, 0.95]), atol=1e-9)


def test_accuracy_interval_is_the_binomial_quantile():
    # Bootstrapping a proportion p of n draws Binomial(n, p) / n.
    target = np.zeros(400, int)
    score = np.tile([[0.9, 0.1]], (400, 1))
    score[:100] = [0.2, 0.8]
    low, high = score_with_intervals(target, score, ("a", "b"), resamples=20_000)["accuracy"][
        "ci95"
    ]
    want = stats.binom(400, 0.75).ppf([0.025, 0.975]) / 400
    assert [low, high] == pytest.approx(want, abs=2 / 400)


def test_same_seed_same_numbers_and_json():
    target, score = predictions(80, 4, 3)
    first = score_with_intervals(target, score, NAMES, resamples=100, seed=1)
    assert first == score_with_intervals(target, score, NAMES, resamples=100, seed=1)
    other = score_with_intervals(target, score, NAMES, resamples=100, seed=2)
    assert first["auc"]["ci95"] != other["auc"]["ci95"]
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    point = classification_scores(target, score, NAMES)
    assert first.keys() == point.keys()
    for name, entry in first.items():
        assert entry["value"] == point[name].value and entry["n"] == 80
        assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]
        assert "reason" not in entry and "n_patients" not in entry


def test_counts_draw_units_with_replacement():
    chunks = list(bootstrap_counts(units=30, images=2**20, resamples=5, seed=0))
    # 2^20 images leave room for two resamples in a chunk.
    assert [chunk.shape for chunk in chunks] == [(30, 2), (30, 2), (30, 1)]
    whole = np.concatenate(chunks, axis=1)
    assert (whole.sum(axis=0) == 30).all() and (whole >= 0).all()
    # The size of a chunk does not change the draws.
    np.testing.assert_array_equal(whole, next(bootstrap_counts(30, 30, 5, 0)))
    many = next(bootstrap_counts(50, 50, 4000, 1))
    # Binomial(50, 1/50): mean 1, variance 0.98.
    assert many.mean() == 1 and many.var() == pytest.approx(0.98, abs=0.02)


def test_patients_are_drawn_whole():
    # Ten patients, each all right or all wrong: accuracy can only move in steps of a tenth.
    patients = np.repeat([f"p{i}" for i in range(10)], 20)
    target = np.zeros(200, int)
    score = np.where(np.repeat(np.arange(10) < 7, 20)[:, None], [0.9, 0.1], [0.1, 0.9])
    shuffled = np.random.default_rng(0).permutation(200)
    clustered = score_with_intervals(target, score[shuffled], ("a", "b"), patients[shuffled])
    entry = clustered["accuracy"]
    assert entry["n"] == 200 and entry["n_patients"] == 10
    assert entry["value"] == pytest.approx(0.7)
    assert entry["ci95"] == pytest.approx(stats.binom(10, 0.7).ppf([0.025, 0.975]) / 10)
    images = score_with_intervals(target, score, ("a", "b"))["accuracy"]["ci95"]
    assert images[1] - images[0] < 0.5 * (entry["ci95"][1] - entry["ci95"][0])


def test_a_patient_per_image_changes_nothing_but_the_count():
    target, score = predictions(50, 2, 4)
    patients = np.array([f"{i:03d}" for i in range(50)])
    plain = score_with_intervals(target, score, ("a", "b"), resamples=50)
    clustered = score_with_intervals(target, score, ("a", "b"), patients, resamples=50)
    assert clustered == {name: entry | {"n_patients": 50} for name, entry in plain.items()}


def test_undefined_values_have_a_reason_and_no_interval():
    target, score = np.array([0, 0, 1, 1] * 5), np.tile([[0.6, 0.3, 0.1]], (20, 1))
    result = score_with_intervals(target, score, ("a", "b", "gone"), resamples=50)
    assert result["recall/gone"] == {
        "value": None,
        "ci95": None,
        "n": 20,
        "reason": "no image of class 'gone'",
    }
    assert result["precision/b"]["value"] is None and result["accuracy"]["ci95"] is not None


def test_no_interval_where_many_resamples_are_undefined():
    # One image of class 1 among 40 is missing from (39/40)^40 = 36 % of the resamples.
    target = np.array([1] + [0] * 39)
    score = np.where(np.arange(40)[:, None] < 2, [0.2, 0.8], [0.8, 0.2])
    recall = score_with_intervals(target, score, ("a", "b"), seed=3)["recall/b"]
    assert recall["value"] == 1 and recall["ci95"] is None
    missing = int(recall["reason"].split()[2])
    assert recall["reason"] == f"undefined in {missing} of 2000 resamples: too few images"
    assert missing / 2000 == pytest.approx((39 / 40) ** 40, abs=0.04)
    # Five images are missing from 0.4 %: the interval stands.
    target[:5] = 1
    assert score_with_intervals(target, score, ("a", "b"), seed=3)["recall/b"]["ci95"]


def test_one_patient_gives_no_interval():
    target, score = predictions(30, 2, 0)
    result = score_with_intervals(target, score, ("a", "b"), np.full(30, "p1"), resamples=20)
    assert result["accuracy"]["value"] is not None and result["accuracy"]["ci95"] is None
    assert result["accuracy"]["reason"] == "one patient only"


@pytest.mark.parametrize(
    "bad", [{"resamples": 0}, {"level": 1.0}, {"patients": np.array(["p"])}, {"classes": ("a",)}]
)
def test_unusable_arguments(bad):
    target, score = predictions(10, 2, 0)
    with pytest.raises(ValueError):
        score_with_intervals(target, score, **({"classes": ("a", "b")} | bad))


def test_coverage_of_the_accuracy_and_auc_intervals():
    # Two classes of unit normals one and a half apart: AUC = Phi(1.5 / sqrt 2), accuracy at
    # the middle = Phi(0.75).
    rng = np.random.default_rng(11)
    accuracy, auc = stats.norm.cdf([0.75, 1.5 / math.sqrt(2)])
    inside = np.zeros(2)
    for repeat in range(200):
        target = rng.integers(0, 2, 200)
        positive = stats.logistic.cdf(rng.normal(size=200) + 1.5 * target - 0.75)
        score = np.stack([1 - positive, positive], axis=1)
        result = score_with_intervals(target, score, ("a", "b"), resamples=300, seed=repeat)
        for i, (name, truth) in enumerate((("accuracy", accuracy), ("auc", auc))):
            low, high = result[name]["ci95"]
            inside[i] += low <= truth <= high
    assert (inside / 200 >= 0.90).all() and (inside / 200 <= 0.985).all()
