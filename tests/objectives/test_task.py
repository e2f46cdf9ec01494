"""The losses by hand, against scikit-learn and under padding."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import sklearn.metrics
import sklearn.utils.class_weight

from medtl_jax.errors import UserError
from medtl_jax.objectives.task import class_weights, cross_entropy

LOGITS = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32) * 2
LABELS = np.array([0, 2, 1, 1, 0, 2, 2], np.int32)
ONES = np.ones(3, np.float32)


def mean_loss(weights=ONES, smoothing=0.0, logits=LOGITS, labels=LABELS, **batch):
    term = cross_entropy(np.asarray(weights, np.float32), smoothing)
    batch = {"label": jnp.asarray(labels), **batch}
    total, count = term({"logits": jnp.asarray(logits)}, batch, None, None)
    return float(total) / float(count)


def test_two_classes_by_hand():
    # softmax of (ln 3, 0) is (3/4, 1/4).
    logits, labels = np.log([[3.0, 1.0]]).astype(np.float32), np.array([1], np.int32)
    np.testing.assert_allclose(mean_loss(ONES[:2], 0.0, logits, labels), np.log(4), rtol=1e-6)
    # With smoothing 0.2 the target is (0.1, 0.9).
    wanted = 0.1 * np.log(4 / 3) + 0.9 * np.log(4)
    np.testing.assert_allclose(mean_loss(ONES[:2], 0.2, logits, labels), wanted, rtol=1e-6)


def test_equals_scikit_learn():
    probability = scipy.special.softmax(LOGITS.astype(np.float64), -1)
    np.testing.assert_allclose(
        mean_loss(), sklearn.metrics.log_loss(LABELS, probability), rtol=1e-5
    )


def test_class_weights_make_a_weighted_mean_as_in_torch():
    weights = np.array([0.5, 2.0, 1.0])
    probability = scipy.special.softmax(LOGITS.astype(np.float64), -1)
    wanted = sklearn.metrics.log_loss(LABELS, probability, sample_weight=weights[LABELS])
    np.testing.assert_allclose(mean_loss(weights), wanted, rtol=1e-5)


def test_smoothing_and_weights_together():
    weights, smoothing = np.array([0.5, 2.0, 1.0]), 0.3
    log_probability = scipy.special.log_softmax(LOGITS.astype(np.float64), -1)
    losses = [
        -sum((0.7 * (c == label) + 0.1) * row[c] for c in range(3))
        for row, label in zip(log_probability, LABELS, strict=True)
    ]
    wanted = np.average(losses, weights=weights[LABELS])
    np.testing.assert_allclose(mean_loss(weights, smoothing), wanted, rtol=1e-5)


def test_masked_examples_do_not_count():
    mask = jnp.array([True, True, False, True, False, True, False])
    kept = np.asarray(mask)
    weights = [0.5, 2.0, 1.0]
    padded = mean_loss(weights, 0.1, mask=mask)
    np.testing.assert_allclose(
        padded, mean_loss(weights, 0.1, LOGITS[kept], LABELS[kept]), rtol=1e-6
    )


def test_huge_logits_stay_finite():
    logits = np.array([[1e4, -1e4, 0.0]], np.float32)
    assert mean_loss(logits=logits, labels=np.array([1], np.int32)) == pytest.approx(2e4)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_impossible_smoothing_is_refused(smoothing):
    with pytest.raises(UserError, match=r"train.label_smoothing=.* must lie in 0 <= s < 1"):
        cross_entropy(ONES, smoothing)


def test_balanced_weights_equal_scikit_learn():
    wanted = sklearn.utils.class_weight.compute_class_weight(
        "balanced", classes=np.arange(3), y=LABELS
    )
    found = class_weights(LABELS, 3, "balanced")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_array_equal(class_weights(LABELS, 4, "none"), np.ones(4))


def test_mistakes_of_class_weights_are_named():
    with pytest.raises(UserError, match=r"train.class_weights='even' is not known; choose 'none'"):
        class_weights(LABELS, 3, "even")
    with pytest.raises(UserError, match=r"needs training images of every class; class 3 has none"):
        class_weights(LABELS, 4, "balanced")
