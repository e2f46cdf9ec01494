"""Discrepancies and answers' entropies against NumPy and SciPy in float64, and by hand."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats
from hypothesis import strategies as st

from medtl_jax.domain import alignment
from medtl_jax.objectives.losses import ordinal_log_probabilities

WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
rng = np.random.default_rng(0)
SOURCE = rng.standard_normal((7, 3)).astype(np.float32)
TARGET = (1.5 * rng.standard_normal((5, 3)) + 0.7).astype(np.float32)
LOGITS = 2 * rng.standard_normal((6, 4)).astype(np.float32)


def mmd_by_numpy(source, target, median=None):
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if median is None:
        pooled = np.concatenate([source, target])
        median = np.median(scipy.spatial.distance.pdist(pooled, "sqeuclidean"))

    def kernel(x, y):
        square = scipy.spatial.distance.cdist(x, y, "sqeuclidean")
        return np.mean([np.exp(-square / (width * median)) for width in WIDTHS], axis=0).mean()

    return kernel(source, source) + kernel(target, target) - 2 * kernel(source, target)


def coral_by_numpy(source, target):
    difference = np.cov(source.astype(np.float64).T) - np.cov(target.astype(np.float64).T)
    return np.square(difference).sum() / (4 * source.shape[1] ** 2)


def compiled(discrepancy):
    """`fn(source, target, source_weight, target_weight) -> (value, gradients of both)`."""
    found = jax.jit(jax.value_and_grad(discrepancy, argnums=(0, 1)))
    return lambda x, y, *weights: found(jnp.asarray(x), jnp.asarray(y), *weights)


REFERENCES = {
    "mmd": (compiled(alignment.multi_kernel_mmd), mmd_by_numpy),
    "coral": (compiled(alignment.coral), coral_by_numpy),
}
both = pytest.mark.parametrize("name", REFERENCES)


def differences(value, x, step=1e-5):
    """The gradient of `value` of a float64 array, by central differences."""
    x, gradient = np.asarray(x, np.float64), np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        sides = []
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * step
            sides.append(value(moved))
        gradient[index] = (sides[0] - sides[1]) / (2 * step)
    return gradient


@both
def test_equals_numpy_for_batches_of_two_sizes(name):
    found, reference = REFERENCES[name]
    wanted = reference(SOURCE, TARGET)
    assert wanted > 0.05
    np.testing.assert_allclose(found(SOURCE, TARGET)[0], wanted, rtol=1e-5)
    np.testing.assert_allclose(found(TARGET, SOURCE)[0], wanted, rtol=1e-5)


@both
def test_is_0_on_equal_batches_in_whatever_order(name):
    found, _ = REFERENCES[name]
    for other in (SOURCE, SOURCE[::-1]):
        value, slopes = found(SOURCE, other)
        np.testing.assert_allclose(value, 0, atol=1e-7)
        assert max(np.abs(slope).max() for slope in slopes) < 1e-6


@both
def test_padding_does_not_count(name):
    found, reference = REFERENCES[name]
    padded = np.concatenate([SOURCE, np.full((4, 3), 1e3, np.float32)])
    weight = np.array([1] * 7 + [0] * 4, np.float32)
    value, (slope, other) = found(padded, TARGET, weight, None)
    np.testing.assert_allclose(value, reference(SOURCE, TARGET), rtol=1e-5)
    _, (wanted, wanted_other) = found(SOURCE, TARGET)
    np.testing.assert_allclose(slope[:7], wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(slope[7:], 0)
    np.testing.assert_allclose(other, wanted_other, rtol=1e-4, atol=1e-6)


def test_gradient_of_mmd_holds_the_median():
    pooled = np.concatenate([SOURCE, TARGET]).astype(np.float64)
    median = np.median(scipy.spatial.distance.pdist(pooled, "sqeuclidean"))
    wanted = differences(lambda x: mmd_by_numpy(x, TARGET, median), SOURCE)
    _, (found, _) = REFERENCES["mmd"][0](SOURCE, TARGET)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    moving = differences(lambda x: mmd_by_numpy(x, TARGET), SOURCE)
    assert np.abs(moving - wanted).max() > 1e-4


def test_gradient_of_coral():
    wanted = differences(lambda x: coral_by_numpy(x, TARGET), SOURCE)
    _, (found, _) = REFERENCES["coral"][0](SOURCE, TARGET)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_mmd_by_hand():
    # One row each, at the distance 2: m = 4, k(s, t) = exp(-1 / w) of the widths w.
    source, target = np.array([[0.0]], np.float32), np.array([[2.0]], np.float32)
    mmd = jax.jit(functools.partial(alignment.multi_kernel_mmd, widths=(1.0, 2.0)))
    found = mmd(source, target)
    np.testing.assert_allclose(found, 2 - (np.exp(-1) + np.exp(-0.5)), rtol=1e-6)


def test_coral_by_hand():
    # Variances 2 and 8, covariances 0: (6^2) / (4 * 2^2), as the other variances are 0.
    source = np.array([[0, 1], [2, 1]], np.float32)
    target = np.array([[5, 3], [9, 3]], np.float32)
    np.testing.assert_allclose(REFERENCES["coral"][0](source, target)[0], 36 / 16, rtol=1e-6)


@both
@pytest.mark.parametrize("rows", [1, 6])
def test_one_row_or_rows_all_the_same_have_finite_gradients(name, rows):
    found, _ = REFERENCES[name]
    same = np.full((rows, 3), 2.0, np.float32)
    for other in (same, TARGET):
        value, slopes = found(same, other)
        assert np.isfinite(value) and all(np.isfinite(slope).all() for slope in slopes)


@jax.jit
def median_distance(x, weight):
    return alignment.median_of_pairs(alignment.squared_distances(x, weight), weight)


@hypothesis.given(st.integers(2, 7), st.integers(0, 10**6))
def test_median_is_that_of_the_pairs_that_count(rows, seed):
    generator = np.random.default_rng(seed)
    x = generator.integers(-3, 4, (7, 2)).astype(np.float32)
    weight = generator.permutation(np.arange(7) < rows).astype(np.float32)
    wanted = np.median(scipy.spatial.distance.pdist(x[weight > 0], "sqeuclidean"))
    np.testing.assert_allclose(median_distance(x, weight), wanted, rtol=1e-5, atol=1e-5)


def test_median_of_no_pairs_is_0():
    assert median_distance(SOURCE, jnp.eye(7)[2]) == 0


def test_distances_far_from_the_origin_keep_their_digits():
    x = SOURCE + np.float32(1000)
    wanted = scipy.spatial.distance.cdist(x, x, "sqeuclidean")
    found = jax.jit(alignment.squared_distances)(x, jnp.ones(7))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def confusion_by_numpy(logits, temperature=2.5, entropy=None):
    y = scipy.special.softmax(logits.astype(np.float64) / temperature, axis=1)
    entropy = scipy.stats.entropy(y, axis=1) if entropy is None else entropy
    weight = 1 + np.exp(-entropy)
    c = y.T @ np.diag(len(y) * weight / weight.sum()) @ y
    c /= c.sum(1, keepdims=True)
    return (c.sum() - np.trace(c)) / len(c)


@jax.jit
def confusion_and_gradient(logits, weight=None):
    def value(logits):
        return alignment.class_confusion(jax.nn.log_softmax(logits / 2.5), weight)

    return jax.value_and_grad(value)(logits)


def test_confusion_and_its_gradient_equal_numpy():
    value, slope = confusion_and_gradient(LOGITS)
    np.testing.assert_allclose(value, confusion_by_numpy(LOGITS), rtol=1e-5)
    y = scipy.special.softmax(LOGITS.astype(np.float64) / 2.5, axis=1)
    entropy = scipy.stats.entropy(y, axis=1)
    wanted = differences(lambda x: confusion_by_numpy(x, entropy=entropy), LOGITS)
    np.testing.assert_allclose(slope, wanted, rtol=1e-4, atol=1e-6)


def test_confusion_of_sure_and_of_unsure_answers():
    sure = 200 * np.eye(4, dtype=np.float32)
    np.testing.assert_allclose(confusion_and_gradient(sure)[0], 0, atol=1e-6)
    unsure = np.zeros((5, 4), np.float32)
    np.testing.assert_allclose(confusion_and_gradient(unsure)[0], 3 / 4, rtol=1e-6)


def test_a_class_that_no_answer_takes_counts_as_it_does_in_float64():
    logits = np.concatenate([3 * LOGITS, np.full((6, 1), -400, np.float32)], axis=1)
    value, slope = confusion_and_gradient(logits)
    np.testing.assert_allclose(value, confusion_by_numpy(logits), rtol=1e-5)
    assert np.isfinite(slope).all()


def test_padding_does_not_count_in_the_confusion():
    padded = np.concatenate([LOGITS, 9 * LOGITS[:2]])
    weight = np.array([1] * 6 + [0] * 2, np.float32)
    value, slope = confusion_and_gradient(padded, weight)
    np.testing.assert_allclose(value, confusion_by_numpy(LOGITS), rtol=1e-5)
    assert np.isfinite(slope).all() and not slope[6:].any()


def batches(strength=1.0, mask=None, **entries):
    """`(out, batch, None, None)` of a term; each entry is a pair `(of the source, of the target)`.

    The source's labels are there, the target has none.
    """
    source = {name: jnp.asarray(pair[0]) for name, pair in entries.items()}
    target = {"out": {name: jnp.asarray(pair[1]) for name, pair in entries.items()}}
    if mask is not None:
        target["mask"] = jnp.asarray(mask)
    batch = {"target": jnp.zeros(7, jnp.int32), "target_domain": target}
    return source, {**batch, "adaptation": jnp.float32(strength)}, None, None


def of_term(term, *arguments):
    """`(sum, count)`, compiled."""
    return jax.jit(term, static_argnums=(2, 3))(*arguments)


TERMS = {
    "mmd": (alignment.align_mmd(), mmd_by_numpy(SOURCE, TARGET)),
    "coral": (alignment.align_coral(), coral_by_numpy(SOURCE, TARGET)),
    "mcc": (alignment.minimize_confusion(), confusion_by_numpy(LOGITS)),
    "mcc at 1": (alignment.minimize_confusion(1.0), confusion_by_numpy(LOGITS, 1.0)),
    "entropy": (
        alignment.minimize_entropy(),
        scipy.stats.entropy(scipy.special.softmax(LOGITS, axis=1), axis=1).mean(),
    ),
}


@pytest.mark.parametrize("name", TERMS)
def test_terms_are_their_functions_times_the_strength(name):
    term, wanted = TERMS[name]
    entries = {"features": (SOURCE, TARGET), "logits": (LOGITS[:, ::-1], LOGITS)}
    for strength in (0.0, 0.25, 1.0):
        total, count = of_term(term, *batches(strength, **entries))
        np.testing.assert_allclose(total, strength * wanted, rtol=1e-5)
        assert (count, total.dtype) == (1, jnp.float32)


@pytest.mark.parametrize("make", [alignment.align_mmd, alignment.align_coral])
def test_maps_are_averaged_and_layers_added(make):
    maps = [
        np.stack([x - 1, x + 1, x + 2, x - 2], 1).reshape(-1, 2, 2, 3) for x in (SOURCE, TARGET)
    ]
    maps = tuple(jnp.asarray(x, jnp.bfloat16) for x in maps)
    rounded = tuple(np.asarray(x.astype(jnp.float32)).mean((1, 2)) for x in maps)
    entries = {"stage2": maps, "features": (SOURCE, TARGET)}
    _, reference = REFERENCES["mmd" if make is alignment.align_mmd else "coral"]
    found, _ = of_term(make(("stage2", "features")), *batches(**entries))
    wanted = reference(*rounded) + reference(SOURCE, TARGET)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_entropy_of_pixels_and_of_ranks():
    pixels = 3 * np.random.default_rng(4).standard_normal((3, 2, 5, 4)).astype(np.float32)
    mask = [True, False, True]
    term = alignment.minimize_entropy()
    found, _ = of_term(term, *batches(mask=mask, logits=(pixels, pixels)))
    probability = scipy.special.softmax(pixels[[0, 2]].astype(np.float64), axis=-1)
    np.testing.assert_allclose(found, scipy.stats.entropy(probability, axis=-1).mean(), rtol=1e-5)
    # Three ranks from logits 0, 0: 1/2, 1/4, 1/4, the entropy of which is 1.5 bits.
    ranks = functools.partial(ordinal_log_probabilities, kind="corn")
    logits = np.zeros((4, 2), np.float32)
    found, _ = of_term(alignment.minimize_entropy(ranks), *batches(logits=(logits, logits)))
    np.testing.assert_allclose(found, 1.5 * np.log(2), rtol=1e-6)


def test_the_terms_of_answers_say_nothing_of_the_source():
    logits = (LOGITS, LOGITS[::-1])
    for term in (alignment.minimize_confusion(), alignment.minimize_entropy()):
        out, batch, *rest = batches(logits=logits)
        found = jax.jit(jax.grad(lambda out, t=term, b=batch, r=rest: t(out, b, *r)[0]))(out)
        np.testing.assert_array_equal(found["logits"], 0)
