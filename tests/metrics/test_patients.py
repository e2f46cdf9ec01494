import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtl_jax.metrics.patients import by_patient

SCORE = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.4, 0.6]], np.float32)
PATIENTS = np.array(["p2", "p1", "p2", "p3"])
NAN = np.nan


def test_classes_hand_computed():
    found = by_patient("classify", np.array([0, 1, 0, 1], np.int32), SCORE, PATIENTS)
    assert found.ids.tolist() == ["p1", "p2", "p3"] and found.reason == ""
    assert found.target.tolist() == [1, 0, 1] and found.target.dtype == np.int32
    # p2: the mean of (0.9, 0.1) and (0.5, 0.5).
    np.testing.assert_allclose(found.score, [[0.2, 0.8], [0.7, 0.3], [0.4, 0.6]], rtol=1e-6)
    assert found.score.dtype == np.float32


@pytest.mark.parametrize("task", ["classify", "ordinal"])
def test_patients_whose_images_differ_are_counted_and_nothing_comes_back(task):
    patients = np.array(["a", "a", "b", "b"])
    found = by_patient(task, np.array([0, 1, 1, 1]), SCORE, patients)
    assert found.target is None and found.score is None
    assert found.reason == "1 of 2 patients have images of more than one class"


def test_findings_hand_computed():
    #                  any-of                       p1 knows only its first image's second label
    target = np.array([[0, -1], [1, 0], [-1, -1], [-1, 1], [0, -1]], np.int8)
    score = np.array([[0.1, 0.2], [0.7, 0.4], [0.3, 0.6], [0.5, 0.9], [0.2, 0.2]], np.float32)
    found = by_patient("multilabel", target, score, np.array(["a", "a", "b", "c", "c"]))
    assert found.target.tolist() == [[1, 0], [-1, -1], [0, 1]] and found.target.dtype == np.int8
    want = [
        [0.4, 0.4],  # both images; the one whose label is known
        [0.3, 0.6],  # no label is known: all images
        [0.2, 0.9],
    ]
    np.testing.assert_allclose(found.score, want, rtol=1e-6)


def test_numbers_hand_computed():
    target = np.array([[60.0, 1.0], [64.0, NAN], [NAN, NAN], [50.0, 2.0]], np.float32)
    score = np.array([[61.0, 1.5], [67.0, 9.0], [40.0, 3.0], [52.0, 2.5]], np.float32)
    found = by_patient("regress", target, score, np.array(["a", "a", "b", "c"]))
    np.testing.assert_allclose(found.target, [[62, 1], [NAN, NAN], [50, 2]])
    np.testing.assert_allclose(found.score, [[64, 1.5], [40, 3], [52, 2.5]])
    assert found.target.dtype == found.score.dtype == np.float32


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_means_equal_a_loop_over_patients(n, most, seed):
    rng = np.random.default_rng(seed)
    patients, score = rng.integers(0, most, n).astype(str), rng.dirichlet(np.ones(3), n)
    target = rng.integers(-1, 2, (n, 3)).astype(np.int8)
    found = by_patient("multilabel", target, score, patients)
    assert found.ids.tolist() == sorted(set(patients))
    for row, patient in enumerate(found.ids):
        for column in range(3):
            mine = patients == patient
            known = mine & (target[:, column] >= 0)
            labels = target[known, column]
            want = -1 if not len(labels) else int((labels == 1).any())
            assert found.target[row, column] == want
            used = known if known.any() else mine
            assert found.score[row, column] == pytest.approx(score[used, column].mean(), abs=1e-12)


@given(st.permutations(range(6)))
def test_the_order_of_the_images_does_not_matter(order):
    order = np.array(order)
    rng = np.random.default_rng(0)
    patients, score = np.array(list("aabbcc")), rng.dirichlet(np.ones(2), 6)
    target = np.array([0, 0, 1, 1, 0, 0])
    found = by_patient("ordinal", target[order], score[order], patients[order])
    np.testing.assert_array_equal(found.ids, ["a", "b", "c"])
    np.testing.assert_array_equal(found.target, [0, 1, 0])
    np.testing.assert_allclose(found.score, score.reshape(3, 2, 2).mean(axis=1), atol=1e-12)


@pytest.mark.parametrize(
    ("task", "target", "score", "patients", "words"),
    [
        ("segment", np.zeros((1, 2, 2)), np.zeros((1, 2, 2, 2)), ["a"], "one row of scores"),
        ("classify", np.zeros((2, 2), int), SCORE[:2], ["a", "b"], "does not fit"),
        ("regress", np.zeros(2), SCORE[:2], ["a", "b"], "does not fit"),
        ("classify", np.zeros(2, int), SCORE[:2], ["a"], "a patient for each of 2"),
        ("classify", np.zeros(0, int), SCORE[:0], [], "a patient for each of 0"),
    ],
)
def test_arguments_that_do_not_hold_together(task, target, score, patients, words):
    with pytest.raises(ValueError, match=words):
        by_patient(task, target, score, np.array(patients))
