"""Batch norm and renorm against hand-made numbers, float64 NumPy, flax.linen and torch."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as stored
import test_frozen

from medtl_jax.models import registry
from medtl_jax.models.norms import (
    STORED,
    BatchNorm,
    InDomain,
    Renorm,
    batch_moments,
    normalize_batch,
)

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


def finite_differences(loss, *arguments):
    """The gradient of `loss` of float64 arrays, with respect to each of them."""
    arguments = [np.asarray(argument, np.float64) for argument in arguments]
    for position, argument in enumerate(arguments):
        gradient = np.zeros_like(argument)
        for index in np.ndindex(argument.shape):
            sides = []
            for step in (1e-6, -1e-6):
                moved = [a.copy() for a in arguments]
                moved[position][index] += step
                sides.append(loss(*moved))
            gradient[index] = (sides[0] - sides[1]) / 2e-6
        yield gradient


def test_forward_equals_numpy(x):
    x = jnp.asarray(x)
    moments = batch_moments(x)
    found = normalize_batch(x, *moments, jnp.asarray(SCALE), jnp.asarray(BIAS), EPS)
    for a, b in zip((found, *moments), reference(x, SCALE, BIAS), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_gradient_equals_finite_differences(x):
    weight = np.sin(np.arange(x.size)).reshape(x.shape)

    def loss(x, scale, bias):
        y = normalize_batch(x, *batch_moments(x), scale, bias, EPS)
        return (y * jnp.asarray(weight, jnp.float32)).sum()

    found = jax.grad(loss, argnums=(0, 1, 2))(*map(jnp.asarray, (x, SCALE, BIAS)))
    wanted = finite_differences(lambda *a: (reference(*a)[0] * weight).sum(), x, SCALE, BIAS)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


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


def step_of(update, x, scale, bias, statistics, cotangent, eps=EPS, dtype=jnp.float32):
    """`(y, (dx, dscale, dbias), moved)` of one step of training."""

    def apply(x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": statistics}
        norm = BatchNorm(0.9, eps, dtype)
        return norm.apply(variables, x, update=update, mutable=["batch_stats"])

    @jax.jit
    def step(*inputs):
        y, pullback, moved = jax.vjp(apply, *inputs, has_aux=True)
        return y, pullback(jnp.asarray(cotangent, y.dtype)), moved["batch_stats"]

    return step(*map(jnp.asarray, (x, scale, bias)))


STATISTICS = {"mean": jnp.array([0.9, -2.5]), "var": jnp.array([0.7, 30.0])}


def test_stored_is_true_and_equals_false_to_the_bit(x):
    cotangent = np.cos(np.arange(x.size)).reshape(x.shape)
    arguments = (x, SCALE, BIAS, STATISTICS, cotangent)
    assert STORED
    found, wanted = step_of(STORED, *arguments), step_of(False, *arguments)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(found[2]["mean"], STATISTICS["mean"])


def test_renorm_with_limits_1_and_0_is_batch_norm(x):
    cotangent = np.cos(np.arange(x.size)).reshape(x.shape)
    arguments = (x, SCALE, BIAS, STATISTICS, cotangent)
    found, wanted = step_of(Renorm(1.0, 0.0), *arguments), step_of(True, *arguments)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


# Three values -3, 0, 3 in each channel: mean 0, variance 6, with eps 3 the deviation is 3 and the
# normalised values are -1, 0, 1. The stored deviations are 2 and 6, so that r = 3/2 and 1/2, and
# d = (0 + 1) / 2 = 1/2 and (0 - 3) / 6 = -1/2. With limits of 1.2 and 0.25 they are 1.2 and
# 1 / 1.2 = 5/6, and 1/4 and -1/4. For the cotangent 1, 0, 0 (mean 1/3, mean of its product with
# the normalised values -1/3) dx is scale * r / 3 times (1/3, -1/3, 0), as r and d are held.
RENORM_CASES = {
    "inside": (Renorm(3.0, 5.0), [1.5, 0.5], [0.5, -0.5]),
    "beyond": (Renorm(1.2, 0.25), [1.2, 5 / 6], [0.25, -0.25]),
}


@pytest.mark.parametrize("case", RENORM_CASES)
def test_renorm_by_hand(case):
    limits, r, d = RENORM_CASES[case]
    x = np.repeat(np.array([-3.0, 0.0, 3.0], np.float32), 2).reshape(3, 1, 1, 2)
    scale, bias = np.array([2.0, 3.0], np.float32), np.array([10.0, 20.0], np.float32)
    statistics = {"mean": jnp.array([-1.0, 3.0]), "var": jnp.array([1.0, 33.0])}
    cotangent = np.zeros((3, 1, 1, 2))
    cotangent[0] = 1
    y, (dx, dscale, dbias), moved = step_of(limits, x, scale, bias, statistics, cotangent, eps=3.0)
    r, d = np.array(r), np.array(d)
    wanted = np.stack([d - r, d, d + r]) * scale + bias
    if case == "inside":  # as with the stored statistics: (x + 1) / 2 and (x - 3) / 6
        np.testing.assert_allclose(wanted, [[8, 17], [11, 18.5], [14, 20]])
    np.testing.assert_allclose(y[:, 0, 0], wanted, rtol=1e-6)
    slope = scale * r / 3
    np.testing.assert_allclose(dx[:, 0, 0], [slope / 3, -slope / 3, 0 * slope], atol=1e-6)
    np.testing.assert_allclose(dscale, d - r, rtol=1e-6)
    np.testing.assert_allclose(dbias, [1.0, 1.0], rtol=1e-6)
    # 0.9 of the stored and 0.1 of the batch's.
    np.testing.assert_allclose(moved["mean"], [-0.9, 2.7], rtol=1e-6)
    np.testing.assert_allclose(moved["var"], [1.5, 30.3], rtol=1e-6)


@pytest.mark.parametrize("limits", [(3.0, 5.0), (1.1, 0.05)])
def test_gradient_of_renorm(x, limits):
    r_max, d_max = limits
    cotangent = np.cos(np.arange(x.size)).reshape(x.shape)
    mean, var = (np.asarray(STATISTICS[name], np.float64) for name in ("mean", "var"))
    _, batch_mean, batch_var = reference(x, SCALE, BIAS)
    sigma = np.sqrt(var + EPS)
    r = np.clip(np.sqrt(batch_var + EPS) / sigma, 1 / r_max, r_max)
    d = np.clip((batch_mean - mean) / sigma, -d_max, d_max)

    def plain(x, scale, bias):
        axes = (0, 1, 2)
        deviation = jnp.sqrt(x.var(axes) + EPS)
        stored = jnp.sqrt(STATISTICS["var"] + EPS)
        r = jax.lax.stop_gradient(jnp.clip(deviation / stored, 1 / r_max, r_max))
        d = jax.lax.stop_gradient((x.mean(axes) - STATISTICS["mean"]) / stored)
        d = jnp.clip(d, -d_max, d_max)
        y = ((x - x.mean(axes)) / deviation * r + d) * scale + bias
        return (y * jnp.asarray(cotangent, jnp.float32)).sum()

    def held(x, scale, bias):
        normed = reference(x, 1, 0)[0]
        return (((normed * r + d) * scale + bias) * cotangent).sum()

    y, found, _ = step_of(Renorm(*limits), x, SCALE, BIAS, STATISTICS, cotangent)
    np.testing.assert_allclose((y * cotangent).sum(), held(x, SCALE, BIAS), rtol=1e-4)
    by_jax = jax.jit(jax.grad(plain, argnums=(0, 1, 2)))(*map(jnp.asarray, (x, SCALE, BIAS)))
    by_differences = finite_differences(held, x, SCALE, BIAS)
    for a, b, c in zip(found, by_jax, by_differences, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-4)


def test_renorm_in_bfloat16_keeps_float32_statistics(x):
    narrow = jnp.asarray(x, jnp.bfloat16)
    arguments = (SCALE, BIAS, STATISTICS, np.cos(np.arange(x.size)).reshape(x.shape))
    y, (dx, dscale, _), moved = step_of(Renorm(1.5, 0.5), narrow, *arguments, dtype=jnp.bfloat16)
    assert (y.dtype, dx.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert {leaf.dtype for leaf in (dscale, *moved.values())} == {jnp.dtype("float32")}
    wanted, (wide_dx, *_), exact = step_of(Renorm(1.5, 0.5), narrow.astype(jnp.float32), *arguments)
    np.testing.assert_allclose(y.astype(jnp.float32), wanted, atol=0.02, rtol=0.01)
    np.testing.assert_allclose(dx.astype(jnp.float32), wide_dx, atol=0.02, rtol=0.02)
    for name, value in exact.items():
        np.testing.assert_array_equal(moved[name], value)


def test_new_limits_do_not_compile_again(x):
    variables = {"params": {"scale": jnp.asarray(SCALE), "bias": jnp.asarray(BIAS)}}
    variables["batch_stats"] = STATISTICS

    @jax.jit
    def apply(x, limits):
        return BatchNorm(0.9, EPS).apply(variables, x, update=limits, mutable=["batch_stats"])[0]

    limits = [Renorm(jnp.float32(r), jnp.float32(d)) for r, d in ((1, 0), (1.3, 0.2), (3, 5))]
    outputs = [apply(jnp.asarray(x), one) for one in limits]
    assert apply._cache_size() == 1
    assert all(abs(a - b).max() > 0.05 for a, b in itertools.pairwise(outputs))


OTHER = {"mean": jnp.array([-0.4, 1.5]), "var": jnp.array([2.5, 0.2])}
POLICIES = {"train": True, "frozen": False, "stored": STORED, "renorm": Renorm(1.3, 0.4)}


def bits(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), tree)


def gradients_of(update, params, statistics, x, **fields):
    """`(by the parameters, by x, y, moved statistics)` of one step of training."""
    weight = jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    @jax.jit
    def step(params, x):
        def loss(params, x):
            norm = BatchNorm(0.75, EPS, **fields)
            variables = {"params": params, "batch_stats": statistics}
            y, moved = norm.apply(variables, x, update=update, mutable=["batch_stats"])
            return (y * weight).sum(), (y, moved["batch_stats"])

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (by_params, by_x), (y, moved) = step(params, jnp.asarray(x))
    return by_params, by_x, y, moved


@pytest.mark.parametrize("domain", [0, 1])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_domain_is_a_norm_of_its_own(x, policy, affine, domain):
    """To the bit the result, the gradients and the statistics of a plain norm, and no others."""
    first = {"scale": jnp.asarray(SCALE), "bias": jnp.asarray(BIAS)}
    second = {"scale": jnp.array([0.7, 2.0]), "bias": jnp.array([1.0, 0.0])}
    update = POLICIES[policy]
    by_params, by_x, y, moved = gradients_of(
        InDomain(1, update) if domain else update,
        {**first, "domain1": second} if affine else first,
        {**STATISTICS, "domain1": OTHER},
        x,
        domains=2,
        domain_affine=affine,
    )
    plain = (second if affine and domain else first), (OTHER if domain else STATISTICS)
    wanted = gradients_of(update, *plain, x)
    by_second, moved_second = by_params.pop("domain1", None), moved.pop("domain1")
    assert bits((by_x, y)) == bits(wanted[1:3])
    assert bits(moved_second if domain else moved) == bits(wanted[3])
    assert bits(moved if domain else moved_second) == bits(STATISTICS if domain else OTHER)
    assert bits(by_second if affine and domain else by_params) == bits(wanted[0])
    if affine:
        assert not any(map(np.any, (by_params if domain else by_second).values()))
    assert (bits(wanted[3]) == bits(plain[1])) == (policy in ("frozen", "stored"))


@pytest.mark.parametrize("affine", [False, True])
def test_variables_of_three_domains_begin_alike(x, affine):
    norm = BatchNorm(0.9, EPS, domains=3, domain_affine=affine)
    for update in (True, InDomain(2, True)):
        variables = norm.init(jax.random.key(0), jnp.asarray(x), update=update)
        statistics, params = variables["batch_stats"], variables["params"]
        assert set(statistics) == {"mean", "var", "domain1", "domain2"}
        assert set(params) == {"scale", "bias", *(("domain1", "domain2") if affine else ())}
        for tree in (statistics, statistics["domain1"], statistics["domain2"]):
            np.testing.assert_array_equal(tree["mean"], [0, 0])
            np.testing.assert_array_equal(tree["var"], [1, 1])


def test_in_domain_is_as_true_as_what_it_holds():
    assert all(InDomain(1, update) for update in (True, STORED, Renorm(1.0, 0.0)))
    assert not InDomain(1, False)


def test_a_domain_that_the_norm_does_not_have_is_refused(x):
    norm = BatchNorm(0.9, EPS, domains=2)
    with pytest.raises(ValueError, match="domain 2 of a norm that knows 2"):
        norm.init(jax.random.key(0), jnp.asarray(x), update=InDomain(2, True))


@functools.partial(jax.jit, static_argnums=(0, 1))
def step_in_domain(model, frozen, variables, image):
    rngs = {"dropout": jax.random.key(1)}
    _, moved = model.apply(
        variables, image, True, frozen, domain=1, rngs=rngs, mutable=["batch_stats"]
    )
    return moved["batch_stats"]


SLOW = ("googlenet", "inception_v3")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name in test_frozen.FAMILIES
    ],
)
def test_statistics_do_not_leak_into_the_other_domain(name):
    """In a member of each family: all norms of the domain's stages move, and nothing else."""
    fields = test_frozen.FAMILIES[name]
    model, spec = registry.create_model(name, 3, momentum=0.5, domains=2, **fields)
    size = spec.smallest_input
    image = jax.random.normal(jax.random.key(2), (4, size, size, 3))
    frozen = ("stem", "stage2", "aux1")
    variables = test_frozen.drawn(registry.variable_shapes(model, size))
    after = step_in_domain(model, frozen, variables, image)
    before = jax.tree_util.tree_leaves_with_path(variables["batch_stats"])
    moved = jax.tree_util.tree_leaves_with_path(after)
    domains = set()
    for (path, old), (same_path, new) in zip(before, moved, strict=True):
        assert path == same_path
        own = path[-2].key == "domain1"
        domains.add(own)
        same = np.asarray(old).tobytes() == np.asarray(new).tobytes()
        assert same == (not own or path[0].key in frozen), path
    assert domains == {True, False} and len(before) % 4 == 0
