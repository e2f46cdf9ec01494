import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl_jax.data.catalog import MISSING
from medtl_jax.metrics import rejection
from medtl_jax.metrics.rejection import (
    AREAS,
    image_errors,
    rejection_curve,
    rejection_scores,
)
from medtl_jax.metrics.scores import prepare


def values(found):
    return {name: entry["value"] for name, entry in found.items()}


def test_by_hand():
    # By certainty: right, wrong, right, wrong.
    uncertainty, error = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 1, 0, 1])
    curve = rejection_curve(uncertainty, error)
    np.testing.assert_allclose(curve.rejected, [0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(curve.error, [1 / 2, 1 / 3, 1 / 2, 0])
    np.testing.assert_allclose(curve.oracle, [1 / 2, 1 / 3, 0, 0])
    found = values(rejection_scores(uncertainty, error, resamples=20))
    area, oracle = (4 / 3) / 4, (5 / 6) / 4
    assert found == pytest.approx(
        {"area": area, "area_random": 0.5, "area_oracle": oracle,
         "gain": (0.5 - area) / (0.5 - oracle)}
    )  # fmt: skip


def test_ties_are_the_mean_over_their_orders():
    uncertainty, error = np.array([1.0, 2, 2, 2, 3]), np.array([0.0, 1, 0, 3, 1])
    orders = [[0, *middle, 4] for middle in itertools.permutations([1, 2, 3])]
    curves = [rejection_curve(np.argsort(order), error).error for order in orders]
    np.testing.assert_allclose(rejection_curve(uncertainty, error).error, np.mean(curves, axis=0))


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_areas_are_means_of_the_curves_of_repeated_images(n, most, seed):
    rng = np.random.default_rng(seed)
    uncertainty, error = rng.integers(0, most, n).astype(float), rng.integers(0, 3, n).astype(float)
    counts = rng.integers(0, 3, (n, 4))
    counts[0] += 1
    drawn = rejection._areas(uncertainty, error, counts)
    for r in range(4):
        rows = np.repeat(np.arange(n), counts[:, r])
        curve = rejection_curve(uncertainty[rows], error[rows])
        assert drawn["area"][r] == pytest.approx(curve.error.mean())
        assert drawn["area_oracle"][r] == pytest.approx(curve.oracle.mean())
        assert drawn["area_random"][r] == pytest.approx(error[rows].mean())
    # Nothing is better than the oracle.
    assert (drawn["area_oracle"] <= drawn["area"] + 1e-9).all()


def test_the_gain_of_the_oracle_and_of_chance():
    rng = np.random.default_rng(0)
    error = (rng.random(2000) < 0.3).astype(float)
    oracle = rejection_scores(error, error, resamples=200)["gain"]
    assert oracle["value"] == pytest.approx(1)
    chance = rejection_scores(rng.random(2000), error, resamples=300)["gain"]
    low, high = chance["ci95"]
    assert low < 0 < high and high - low < 0.5
    constant = rejection_scores(np.zeros(2000), error, resamples=50)["gain"]
    assert constant["value"] == pytest.approx(0, abs=1e-9)
    assert rejection_scores(-error, error, resamples=50)["gain"]["value"] < -0.5


def test_whole_patients_are_drawn():
    rng = np.random.default_rng(0)
    error, uncertainty = np.repeat(rng.random(30), 8), np.repeat(rng.random(30), 8)
    patients = np.repeat(np.arange(30), 8).astype(str)
    images = rejection_scores(uncertainty, error, resamples=300)["area"]
    whole = rejection_scores(uncertainty, error, patients, resamples=300)["area"]
    assert whole["value"] == images["value"] and whole["n_patients"] == 30 and whole["n"] == 240
    width = [np.ptp(entry["ci95"]) for entry in (images, whole)]
    # Eight images that are alike are one: the interval is wider by about the root of eight.
    assert 2 < width[1] / width[0] < 4
    # One image each of the same patients has the same values, drawn alike.
    single = rejection_scores(uncertainty[::8], error[::8], resamples=300)["area"]
    assert single["value"] == pytest.approx(whole["value"], rel=0.1)


def test_the_same_seed_gives_the_same_numbers():
    rng = np.random.default_rng(0)
    uncertainty, error = rng.random(50), rng.integers(0, 2, 50)
    first, second = (rejection_scores(uncertainty, error, resamples=100) for _ in range(2))
    assert first == second and tuple(first) == AREAS
    assert "ci90" in rejection_scores(uncertainty, error, resamples=100, level=0.9)["area"]


def test_undefined_is_none_with_a_reason():
    found = rejection_scores(np.arange(5.0), np.ones(5), resamples=50)
    assert found["gain"]["value"] is None and "alike" in found["gain"]["reason"]
    assert found["area"]["value"] == pytest.approx(1) and found["area"]["ci95"] is None
    unknown = rejection_scores(np.arange(4.0), np.array([0, np.nan, 1, np.nan]), resamples=50)
    assert unknown["area"]["n"] == 2
    for uncertainty, error, text in [
        (np.zeros(2), np.zeros(3), "two arrays"),
        (np.zeros(2), np.full(2, math.nan), "no image"),
        (np.full(2, math.nan), np.zeros(2), "finite"),
        (np.zeros(2), np.array([-1, 0]), "finite"),
    ]:
        with pytest.raises(ValueError, match=text):
            rejection_curve(uncertainty, error)
    with pytest.raises(ValueError, match="resamples"):
        rejection_scores(np.zeros(2), np.zeros(2), resamples=0)
    with pytest.raises(ValueError, match="patient for each"):
        rejection_scores(np.zeros(2), np.zeros(2), np.zeros(3))


def test_errors_of_images_by_task():
    score = np.array([[0.7, 0.3], [0.4, 0.6]])
    for task in ("classify", "ordinal"):
        cases = prepare(task, np.array([1, 1]), score, ["a", "b"])
        np.testing.assert_array_equal(image_errors(task, cases), [1, 0])
    target = np.array([[1, 0], [MISSING, 0], [MISSING, MISSING]], np.int8)
    cases = prepare("multilabel", target, np.array([[0.2, 0.1], [0.9, 0.8], [0, 0]]), ["a", "b"])
    np.testing.assert_array_equal(image_errors("multilabel", cases), [0.5, 1, np.nan])
    target = np.array([[1.0, np.nan], [2, 3]])
    cases = prepare("regress", target, np.array([[3.0, 1], [2, 2]]), ["a", "b"])
    np.testing.assert_array_equal(image_errors("regress", cases), [[2, np.nan], [0, 1]])
    # Masks: class 1 half found (Dice 2/3), class 2 only predicted (0); then nothing but background.
    truth = np.array([[[1, 1], [0, 0]], [[0, 0], [0, 0]]])
    called = np.array([[[1, 0], [0, 2]], [[0, 0], [0, 0]]])
    cases = prepare("segment", truth, np.eye(3)[called], ["b", "x", "y"], surfaces=False)
    np.testing.assert_allclose(image_errors("segment", cases), [1 - (2 / 3 + 0) / 2, 0])
