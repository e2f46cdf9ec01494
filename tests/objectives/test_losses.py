"""The losses by hand, against PyTorch, coral-pytorch, scikit-learn and SciPy, and under padding."""

import functools
import json
import pathlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
from hypothesis import strategies as st

from medtl_jax.errors import UserError
from medtl_jax.objectives import losses
from medtl_jax.training.devices import data_mesh

# Made by make_losses.py, beside this file.
TORCH = json.loads(pathlib.Path(__file__).with_name("losses.json").read_text())
LOGITS = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32) * 2
LABELS = np.array([0, 2, 1, 1, 0, 2, 2], np.int32)
ONES = np.ones(3, np.float32)


def mean(term, logits, target, **batch):
    """Sum over count, as the step divides."""

    @jax.jit
    def divided(logits, batch):
        total, count = term({"logits": logits}, batch, None, None)
        return total / jnp.maximum(count, 1e-12)

    return divided(logits, {"target": jnp.asarray(target), **batch})


def mean_loss(weights=ONES, smoothing=0.0, logits=LOGITS, labels=LABELS, **batch):
    term = losses.cross_entropy(np.asarray(weights, np.float32), smoothing)
    return float(mean(term, logits, labels, **batch))


def array(name, dtype=np.float32):
    return np.array(TORCH[name], dtype)


def check_against_torch(term, target, name):
    """Value and gradient with respect to the logits."""
    both = jax.jit(jax.value_and_grad(lambda z: mean(term, z, target)))
    value, slope = both(jnp.asarray(array("logits")))
    np.testing.assert_allclose(value, TORCH[name], rtol=2e-6)
    np.testing.assert_allclose(slope, TORCH[f"{name}_gradient"], rtol=1e-5, atol=1e-7)


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
    term = losses.cross_entropy(array("positive_weights"))
    check_against_torch(term, array("labels", np.int32), "weighted")


def test_smoothing_and_weights_together():
    weights, smoothing = np.array([0.5, 2.0, 1.0]), 0.3
    log_probability = scipy.special.log_softmax(LOGITS.astype(np.float64), -1)
    each = [
        -sum((0.7 * (c == label) + 0.1) * row[c] for c in range(3))
        for row, label in zip(log_probability, LABELS, strict=True)
    ]
    wanted = np.average(each, weights=weights[LABELS])
    np.testing.assert_allclose(mean_loss(weights, smoothing), wanted, rtol=1e-5)


def test_huge_logits_stay_finite():
    logits = np.array([[1e4, -1e4, 0.0]], np.float32)
    assert mean_loss(logits=logits, labels=np.array([1], np.int32)) == pytest.approx(2e4)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_impossible_smoothing_is_refused(smoothing):
    with pytest.raises(UserError, match=r"train.label_smoothing=.* must lie in 0 <= s < 1"):
        losses.cross_entropy(ONES, smoothing)


def test_logit_adjustment_equals_torch():
    adjustment = (1.5 * np.log(TORCH["prior"])).astype(np.float32)
    term = losses.cross_entropy(np.ones(4, np.float32), adjustment=adjustment)
    check_against_torch(term, array("labels", np.int32), "adjusted")


def test_focal_loss_of_classes_equals_torch():
    term = losses.cross_entropy(np.ones(4, np.float32), focal_gamma=2.0)
    check_against_torch(term, array("labels", np.int32), "softmax_focal")


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradients_of_certain_answers_are_finite(gamma):
    """A probability that rounds to 1 has a focal factor of 0, with an infinite slope below 1."""
    logits = jnp.array([[200.0, 0.0], [0.0, 200.0]])
    classes = losses.cross_entropy(ONES[:2], focal_gamma=gamma)
    findings = losses.binary_cross_entropy(ONES[:2], focal_gamma=gamma)
    for term, target in ((classes, [0, 0]), (findings, [[1, 1], [0, 0]])):
        slope = jax.jit(jax.grad(lambda z, term=term, target=target: mean(term, z, target)))(logits)
        assert np.isfinite(slope).all()


def test_weighted_binary_cross_entropy_equals_torch():
    term = losses.binary_cross_entropy(array("positive_weights"))
    check_against_torch(term, array("present", np.int8), "bce")


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_of_findings_equals_torchvision(gamma):
    term = losses.binary_cross_entropy(np.ones(4, np.float32), focal_gamma=gamma)
    check_against_torch(term, array("present", np.int8), f"focal_{gamma}")


def test_unknown_findings_do_not_count_by_hand():
    # -ln sigmoid(0) = ln 2 for the one known entry of each row; the others would cost much.
    logits = np.array([[0.0, 9.0], [-9.0, 0.0]], np.float32)
    target = np.array([[1, -1], [-1, 0]], np.int8)
    term = losses.binary_cross_entropy(ONES[:2])
    assert float(mean(term, logits, target)) == pytest.approx(np.log(2))
    assert float(mean(term, logits, np.full((2, 2), -1, np.int8))) == 0.0


def test_corn_equals_the_authors_code():
    term = losses.ordinal(np.ones(5, np.float32), "corn")
    check_against_torch(term, array("ranks", np.int32), "corn")


def test_corn_probabilities_give_the_ranks_of_the_authors_code():
    """Their rank is the number of products P(y > j) above one half."""
    log_probability = losses.ordinal_log_probabilities(jnp.asarray(array("logits")), "corn")
    above = 1 - np.cumsum(np.exp(log_probability), -1)[:, :-1]
    np.testing.assert_array_equal((above > 0.5).sum(-1), TORCH["corn_labels"])


def test_cumulative_link_by_hand():
    """Thresholds of a logistic variable: class probabilities are differences of its CDF."""
    # softplus(ln(e^g - 1)) = g: gaps of 1.5 and 0.25 below the first cumulative logit, 0.7.
    logits = np.array([[0.7, np.log(np.expm1(1.5)), np.log(np.expm1(0.25))]], np.float32)
    above = scipy.stats.logistic.cdf([np.inf, 0.7, -0.8, -1.05, -np.inf])
    wanted = above[:-1] - above[1:]
    found = np.exp(losses.ordinal_log_probabilities(jnp.asarray(logits), "cumulative"))
    np.testing.assert_allclose(found[0], wanted, rtol=1e-6)
    for rank in range(4):
        term = losses.ordinal(np.ones(4, np.float32), "cumulative")
        loss = mean(term, logits, np.array([rank], np.int32))
        np.testing.assert_allclose(loss, -np.log(wanted[rank]), rtol=1e-6)


@hypothesis.given(
    st.sampled_from(losses.ORDINAL), st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=6)
)
def test_ordinal_probabilities_are_a_distribution(kind, row):
    found = jax.jit(losses.ordinal_log_probabilities, static_argnums=1)(np.float32([row]), kind)
    assert np.isfinite(found).all() and found.shape == (1, len(row) + 1)
    np.testing.assert_allclose(np.exp(np.asarray(found, np.float64)).sum(), 1, atol=2e-5)


@pytest.mark.parametrize("kind", losses.ORDINAL)
def test_two_ordered_classes_are_logistic_regression(kind):
    logits, labels = np.array([[-1.3], [0.4]], np.float32), np.array([0, 1], np.int32)
    probability = scipy.special.expit(logits[:, 0].astype(np.float64))
    loss = mean(losses.ordinal(ONES[:2], kind), logits, labels)
    np.testing.assert_allclose(loss, sklearn.metrics.log_loss(labels, probability), rtol=1e-6)


def test_weights_of_ordered_classes_scale_their_examples():
    weights = np.array([1.0, 2.0, 0.5, 3.0, 1.0], np.float32)
    logits, ranks = array("logits"), array("ranks", np.int32)
    found = mean(losses.ordinal(weights, "corn"), logits, ranks)
    single = losses.ordinal(np.ones(5, np.float32), "corn")
    each = [mean(single, logits[i : i + 1], ranks[i : i + 1]) for i in range(6)]
    # Of the four steps, rank y is asked about min(y + 1, 4).
    members = np.array([1, 4, 3, 2, 4, 4]) * weights[ranks]
    np.testing.assert_allclose(found, np.average(each, weights=members), rtol=1e-6)


# Two images of two pixels, three classes; certain or even answers, so that sums are easy.
PIXELS = np.log(
    np.array(
        [[[[0.5, 0.5, 1e-9], [1e-9, 1.0, 1e-9]]], [[[0.2, 0.2, 0.6], [0.5, 0.25, 0.25]]]],
        np.float32,
    )
)
MASKS = np.array([[[0, 1]], [[2, 1]]], np.uint8)


def test_soft_dice_by_hand():
    # Class 1: overlap 1 + 0.25, p 0.5 + 1 + 0.2 + 0.25, t 2. Class 2: 0.6; 0.6 + 0.25; 1.
    wanted = 1 - (2 * 1.25 / 3.95 + 2 * 0.6 / 1.85) / 2
    np.testing.assert_allclose(mean(losses.soft_dice(3), PIXELS, MASKS), wanted, rtol=1e-6)


def test_soft_dice_leaves_out_classes_that_the_batch_has_not():
    masks = np.where(MASKS == 2, 0, MASKS)
    np.testing.assert_allclose(
        mean(losses.soft_dice(3), PIXELS, masks), 1 - 2 * 1.25 / 3.95, rtol=1e-6
    )
    total, count = losses.soft_dice(3)(
        {"logits": PIXELS}, {"target": jnp.zeros_like(MASKS)}, None, None
    )
    assert (float(total), float(count)) == (0, 0)


def test_soft_dice_of_the_right_answer_is_nothing():
    certain = 50.0 * np.eye(3, dtype=np.float32)[MASKS]
    assert float(mean(losses.soft_dice(3), certain, MASKS)) == pytest.approx(0, abs=1e-6)


def test_cross_entropy_of_pixels_by_hand():
    wanted = -(np.log(0.5) + np.log(1.0) + np.log(0.6) + np.log(0.25)) / 4
    np.testing.assert_allclose(mean(losses.cross_entropy(ONES), PIXELS, MASKS), wanted, rtol=1e-6)


def test_a_sum_of_terms_adds_their_means():
    first, second = losses.cross_entropy(ONES), losses.soft_dice(3)
    wanted = mean(first, PIXELS, MASKS) + 0.3 * mean(second, PIXELS, MASKS)
    np.testing.assert_allclose(
        mean(losses.add(first, 0.3, second), PIXELS, MASKS), wanted, rtol=1e-6
    )


@pytest.mark.parametrize("delta", [0.5, 1.5])
def test_huber_equals_torch(delta):
    zero, one = np.zeros(4), np.ones(4)
    check_against_torch(losses.huber(zero, one, delta), array("wanted"), f"huber_{delta}")


def test_huber_standardises_and_leaves_out_what_is_unknown():
    # Standardised targets 1.5 and -1 (and two unknown); errors -0.5 and 3 with delta 1.
    term = losses.huber(np.array([10.0, 0.0]), np.array([4.0, 0.5]), 1.0)
    target = np.array([[16.0, np.nan], [np.nan, -0.5]], np.float32)
    logits = jnp.array([[1.0, 7.0], [7.0, 2.0]])
    value, slope = jax.value_and_grad(lambda z: mean(term, z, target))(logits)
    np.testing.assert_allclose(value, (0.125 + 2.5) / 2, rtol=1e-6)
    np.testing.assert_allclose(slope, [[-0.25, 0], [0, 0.5]], rtol=1e-6)


RNG = np.random.default_rng(1)
WEIGHTS = np.array([0.5, 2.0, 1.0], np.float32)
NUMBERS = np.where(RNG.random((7, 3)) < 0.3, np.nan, RNG.normal(5, 3, (7, 3))).astype(np.float32)
IMAGES = RNG.normal(0, 2, (7, 4, 5, 3)).astype(np.float32)
PADDED = {
    "classify": (losses.cross_entropy(WEIGHTS, 0.1, focal_gamma=1.0), LOGITS, LABELS),
    "multilabel": (
        losses.binary_cross_entropy(WEIGHTS, focal_gamma=2.0),
        LOGITS,
        RNG.integers(-1, 2, (7, 3)).astype(np.int8),
    ),
    "corn": (losses.ordinal(WEIGHTS, "corn"), LOGITS[:, :2], LABELS),
    "cumulative": (losses.ordinal(WEIGHTS, "cumulative"), LOGITS[:, :2], LABELS),
    "segment": (
        losses.add(losses.cross_entropy(WEIGHTS), 0.7, losses.soft_dice(3)),
        IMAGES,
        RNG.integers(0, 3, (7, 4, 5)).astype(np.uint8),
    ),
    "regress": (losses.huber(np.full(3, 5.0), np.full(3, 2.0)), LOGITS, NUMBERS),
}


@functools.cache
def compiled(name):
    term, *_ = PADDED[name]
    return jax.jit(lambda logits, target, **batch: mean(term, logits, target, **batch))


@pytest.mark.parametrize("name", PADDED)
@hypothesis.settings(max_examples=8)
@hypothesis.given(mask=st.lists(st.booleans(), min_size=4, max_size=4))
def test_masked_examples_are_as_if_left_out(name, mask):
    _, logits, target = PADDED[name]
    logits, target, kept = logits[:4], target[:4], np.array(mask)
    padded = compiled(name)(logits, target, mask=kept)
    if kept.any():
        np.testing.assert_allclose(padded, compiled(name)(logits[kept], target[kept]), rtol=2e-5)
    else:
        assert float(padded) == 0.0


@pytest.mark.parametrize("name", PADDED)
def test_one_device_and_four_agree(name):
    _, logits, target = PADDED[name]
    parts = [jax.device_put(array[:4], data_mesh(4).batched) for array in (logits, target)]
    assert len(parts[0].sharding.device_set) == 4
    whole = compiled(name)(logits[:4], target[:4])
    np.testing.assert_allclose(compiled(name)(*parts), whole, rtol=1e-5)


@pytest.mark.parametrize("name", PADDED)
def test_outputs_of_another_shape_are_refused(name):
    term, logits, target = PADDED[name]
    with pytest.raises(ValueError, match=r"logits are \(.*\), the loss wants \("):
        mean(term, logits[..., :1], target)
