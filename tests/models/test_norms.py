"""Batch norm against float64 NumPy, finite differences, flax.linen and torch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as stored

from medtl_jax.models.norms import BatchNorm, normalize_batch

EPS = 1e-3


@pytest.fixture
def x():
    rng = np.random.default_rng(0)
    return (rng.standard_normal((3, 2, 4, 2)) * [1.0, 3.0] + [0.5, -2.0]).astype(np.float32)


SCALE, BIAS = np.array([1.5, 0.5], np.float32), np.array([0.1, -0.2], np.float32)


def reference(x, scale, bias):
    x, scale, bias = (np.asarray(a, np.float64) for a in (x, scale, bias))
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / np.sqrt(var + EPS) * scale + bias, mean, var


def test_forward_equals_numpy(x):
    found = normalize_batch(jnp.asarray(x), jnp.asarray(SCALE), jnp.asarray(BIAS), EPS)
    for a, b in zip(found, reference(x, SCALE, BIAS), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_gradient_equals_finite_differences(x):
    weight = np.sin(np.arange(x.size)).reshape(x.shape)

    def loss(x, scale, bias):
        return (normalize_batch(x, scale, bias, EPS)[0] * jnp.asarray(weight, jnp.float32)).sum()

    arguments = [np.asarray(a, np.float64) for a in (x, SCALE, BIAS)]
    for position, found in enumerate(
        jax.grad(loss, argnums=(0, 1, 2))(*map(jnp.asarray, (x, SCALE, BIAS)))
    ):
        wanted = np.zeros_like(arguments[position])
        for index in np.ndindex(wanted.shape):
            sides = []
            for step in (1e-6, -1e-6):
                moved = [a.copy() for a in arguments]
                moved[position][index] += step
                sides.append((reference(*moved)[0] * weight).sum())
            wanted[index] = (sides[0] - sides[1]) / 2e-6
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("update", [True, False])
def test_equals_linen(x, update):
    ours = BatchNorm(0.9, EPS)
    theirs = nn.BatchNorm(use_running_average=not update, momentum=0.9, epsilon=EPS)
    variables = {
        "params": {"scale": jnp.asarray(SCALE), "bias": jnp.asarray(BIAS)},
        "batch_stats": {"mean": jnp.array([0.3, -1.0]), "var": jnp.array([2.0, 0.5])},
    }
    weight = jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def loss(params, x, apply):
        y, moved = apply({**variables, "params": params}, x)
        return (y * weight).sum(), (y, moved["batch_stats"])

    def run(apply):
        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return gradient(variables["params"], jnp.asarray(x), apply)

    found = run(lambda v, x: ours.apply(v, x, update=update, mutable=["batch_stats"]))
    wanted = run(lambda v, x: theirs.apply(v, x, mutable=["batch_stats"]))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", stored.load_layers("batch_norm"), ids=lambda case: case.name)
def test_a_step_of_training_equals_torch(case):
    arrays = {name: jnp.asarray(array) for name, array in case.arrays.items()}
    keep = 1 - case.settings["momentum"]  # torch's momentum is the weight of the new value
    norm = BatchNorm(keep, case.settings["eps"])
    statistics = {"mean": arrays["mean"], "var": arrays["var"]}

    def apply(image, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": statistics}
        return norm.apply(variables, image, update=True, mutable=["batch_stats"])

    inputs = ("image", "scale", "bias")
    y, pullback, moved = jax.vjp(apply, *(arrays[name] for name in inputs), has_aux=True)
    np.testing.assert_allclose(y, arrays["output"], rtol=1e-5, atol=1e-5)
    for name, found in zip(inputs, pullback(arrays["cotangent"]), strict=True):
        np.testing.assert_allclose(found, arrays[f"gradient_{name}"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moved["batch_stats"]["mean"], arrays["new_mean"], rtol=1e-5)
    # torch stores n / (n - 1) of the batch's variance, here it is stored as it is (as in Flax).
    count = case.arrays["image"][..., 0].size
    old = keep * case.arrays["var"]
    expected = old + (case.arrays["new_var"] - old) * (count - 1) / count
    np.testing.assert_allclose(moved["batch_stats"]["var"], expected, rtol=1e-5)


def test_statistics_after_one_step_by_hand():
    # Channel values 1, 3: mean 2, biased variance 1. From the initial 0 and 1 at momentum 0.75:
    # mean 0.75 * 0 + 0.25 * 2 = 0.5, variance 0.75 * 1 + 0.25 * 1 = 1; for 0, 8: 1 and 4.75.
    x = jnp.array([[1.0, 0.0], [3.0, 8.0]]).reshape(2, 1, 1, 2)
    norm = BatchNorm(0.75, EPS)
    variables = norm.init(jax.random.key(0), x, update=True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], [0.0, 0.0])
    _, moved = norm.apply(variables, x, update=True, mutable=["batch_stats"])
    np.testing.assert_allclose(moved["batch_stats"]["mean"], [0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose(moved["batch_stats"]["var"], [1.0, 4.75], rtol=1e-6)


def test_without_update_the_stored_statistics_are_used_and_stay():
    stats = {"mean": jnp.array([2.0]), "var": jnp.array([4.0 - EPS])}
    variables = {"params": {"scale": jnp.array([3.0]), "bias": jnp.array([1.0])}}
    variables["batch_stats"] = stats
    x = jnp.array([2.0, 6.0]).reshape(2, 1, 1, 1)
    y, after = BatchNorm(0.9, EPS).apply(variables, x, update=False, mutable=["batch_stats"])
    np.testing.assert_allclose(y.ravel(), [1.0, 7.0], rtol=1e-6)  # (6 - 2) / 2 * 3 + 1
    for name, value in stats.items():
        assert np.asarray(after["batch_stats"][name]).tobytes() == np.asarray(value).tobytes()


@pytest.mark.parametrize("update", [True, False])
def test_bfloat16_keeps_float32_statistics(x, update):
    norm = BatchNorm(0.9, EPS, jnp.bfloat16)
    wide = jnp.asarray(x)
    variables = norm.init(jax.random.key(0), wide.astype(jnp.bfloat16), update=True)
    y, after = norm.apply(
        variables, wide.astype(jnp.bfloat16), update=update, mutable=["batch_stats"]
    )
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, after))} == {jnp.dtype("float32")}
    exact, _ = BatchNorm(0.9, EPS).apply(variables, wide, update=update, mutable=["batch_stats"])
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.05, rtol=0.02)
    if update:
        # The mean of 24 values is not rounded to bfloat16's three digits.
        rounded = np.asarray(wide.astype(jnp.bfloat16).astype(jnp.float32))
        np.testing.assert_allclose(
            after["batch_stats"]["mean"], 0.1 * rounded.mean((0, 1, 2)), rtol=1e-5
        )
