import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from medtl_jax.data.catalog import MISSING
from medtl_jax.metrics.diversity import diversity


def test_by_hand():
    # Who is right, of ten images: both in 4, the first alone in 3, the second alone in 1, none 2.
    target = np.zeros(10, int)
    first = np.repeat([0, 0, 1, 1], [4, 3, 1, 2])
    second = np.repeat([0, 1, 0, 1], [4, 3, 1, 2])
    scores = np.stack([np.eye(2)[first], np.eye(2)[second]])
    found = diversity("classify", target, scores)
    assert found["disagreement"].mean == pytest.approx(0.4)
    assert found["q"].mean == pytest.approx((4 * 2 - 3 * 1) / (4 * 2 + 3 * 1))
    # Agreement .6, by chance .7 * .5 + .3 * .5.
    assert found["kappa"].mean == pytest.approx(0.1 / 0.5)
    assert all(measure.reason == "" for measure in found.values())


@given(st.integers(2, 4), st.integers(2, 4), st.integers(4, 60), st.integers(0, 2**32 - 1))
@settings(max_examples=15)
def test_kappa_equals_scikit_learn(m, k, n, seed):
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.ones(k), (m, n))
    scores[:, 0], scores[:, 1] = np.eye(k)[0], np.eye(k)[1]  # no member calls one class alone
    target, labels = rng.integers(0, k, n), scores.argmax(axis=-1)
    found = diversity("ordinal", target, scores)
    for i in range(m):
        for j in range(m):
            want = cohen_kappa_score(labels[i], labels[j])
            assert found["kappa"].pairs[i, j] == pytest.approx(want)
            assert found["disagreement"].pairs[i, j] == pytest.approx(
                (labels[i] != labels[j]).mean()
            )
    pairs = [found["kappa"].pairs[i, j] for i in range(m) for j in range(i)]
    assert found["kappa"].mean == pytest.approx(np.mean(pairs))
    order = rng.permutation(m)
    again = diversity("ordinal", target, scores[order])
    for name, measure in found.items():
        np.testing.assert_allclose(again[name].pairs, measure.pairs[np.ix_(order, order)])


def test_findings_are_measured_one_by_one_where_they_are_known():
    rng = np.random.default_rng(0)
    scores, target = rng.random((2, 50, 2)), rng.integers(0, 2, (50, 2))
    target[30:, 1] = MISSING
    found = diversity("multilabel", target, scores)
    called = scores > 0.5
    kappas = [cohen_kappa_score(*called[:, :50, 0]), cohen_kappa_score(*called[:, :30, 1])]
    assert found["kappa"].mean == pytest.approx(np.mean(kappas))
    differ = called[0] != called[1]
    want = (differ[:, 0].mean() + differ[:30, 1].mean()) / 2
    assert found["disagreement"].mean == pytest.approx(want)
    target[:, 1] = MISSING
    less = diversity("multilabel", target, scores)
    assert less["disagreement"].mean == pytest.approx(differ[:, 0].mean())
    assert less["disagreement"].reason == (
        "undefined for 1 pairs of members in 2 questions: no label is known"
    )


def test_pixels_count_together():
    rng = np.random.default_rng(0)
    scores, target = rng.dirichlet(np.ones(3), (2, 3, 4, 5)), rng.integers(0, 3, (3, 4, 5))
    found = diversity("segment", target, [member.astype(np.float16) for member in scores])
    flat = diversity("classify", target.ravel(), scores.reshape(2, -1, 3).astype(np.float16))
    for name, measure in flat.items():
        np.testing.assert_array_equal(found[name].pairs, measure.pairs)


def test_undefined_is_nan_with_a_reason():
    scores = np.tile(np.array([0.9, 0.1]), (2, 6, 1))
    found = diversity("classify", np.zeros(6, int), scores)
    assert found["disagreement"].mean == 0
    assert math.isnan(found["kappa"].mean) and "same one class" in found["kappa"].reason
    assert math.isnan(found["q"].mean) and "undefined for 1 pairs" in found["q"].reason
    # Two members that err alike, and one that is never wrong: one of three pairs has a Q.
    labels = np.array([[0, 0, 1], [0, 0, 1], [0, 0, 0]])
    some = diversity("classify", np.zeros(3, int), np.eye(2)[labels])["q"]
    assert some.mean == 1 and some.reason.startswith("undefined for 2 pairs")


def test_errors_of_numbers_correlate():
    rng = np.random.default_rng(0)
    target = rng.normal(60, 10, (40, 2))
    scores = target + rng.normal(0, 3, (3, 40, 2)) + rng.normal(0, 3, (40, 2))
    target[:10, 1] = np.nan
    found = diversity("regress", target, scores)["error_correlation"]
    errors = scores - target
    want = (np.corrcoef(errors[..., 0]) + np.corrcoef(errors[:, 10:, 1])) / 2
    np.testing.assert_allclose(found.pairs, want)
    alike = np.zeros((2, 40, 2))
    alike[1] = 5  # another constant error does not change the correlation
    assert diversity("regress", target, alike)["error_correlation"].mean == pytest.approx(1)


def test_arrays_that_do_not_hold_together():
    scores, target = np.full((2, 4, 2), 0.5), np.zeros(4, int)
    with pytest.raises(ValueError, match="two members"):
        diversity("classify", target, scores[:1])
    with pytest.raises(ValueError, match="does not fit"):
        diversity("classify", target[:3], scores)
    with pytest.raises(ValueError, match="targets in"):
        diversity("classify", target + 2, scores)
