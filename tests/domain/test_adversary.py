"""Gradient reversal, the ramp, and the adversarial terms by hand and against NumPy in float64."""

import functools

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import strategies as st

from medtl_jax.domain import alignment
from medtl_jax.domain.adversary import (
    Discriminator,
    MapDiscriminator,
    cdan,
    condition,
    dann,
    ramp,
    reverse_gradient,
    without_discriminator,
)
from medtl_jax.errors import UserError
from medtl_jax.models import registry
from medtl_jax.models.classic import BaselineCNN
from medtl_jax.objectives.losses import cross_entropy


class Linear(nn.Module):
    """A discriminator `x @ kernel`, without a bias."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, use_bias=False, name="dense")(x)[:, 0]


def linear(kernel):
    """`params` with the `kernel` `[d]` of a `Linear`."""
    return {"discriminator": {"dense": {"kernel": jnp.asarray(kernel, jnp.float32)[:, None]}}}


def batches(source, target, strength, mask=None, target_mask=None):
    """`(out, batch)` of two sets of arrays."""
    side = {"out": {name: jnp.asarray(x) for name, x in target.items()}}
    batch = {"target_domain": side, "adaptation": jnp.float32(strength)}
    if mask is not None:
        batch["mask"], side["mask"] = jnp.asarray(mask), jnp.asarray(target_mask)
    return {name: jnp.asarray(x) for name, x in source.items()}, batch


@functools.partial(jax.jit, static_argnums=0)
def gradients(term, out, batch, params):
    """`(loss, accuracy, by the source's out, by the target's, by the discriminator's params)`."""

    def loss(out, target_out, params):
        both = {**batch, "target_domain": {**batch["target_domain"], "out": target_out}}
        judgement = term.judge(out, both, params)
        value, count = term(out, both, params, None)
        return value / count, (judgement.loss, judgement.accuracy)

    target_out = batch["target_domain"]["out"]
    (value, (same, accuracy)), found = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(
        out, target_out, params
    )
    return (value, same), accuracy, *found


@hypothesis.settings(max_examples=20)
@hypothesis.given(
    st.lists(st.integers(1, 3), max_size=3),
    st.sampled_from([jnp.float32, jnp.bfloat16]),
    # XLA takes numbers below the least normal one for 0.
    st.just(0.0) | st.floats(2**-20, 4, width=32),
    st.integers(0, 10**6),
)
def test_reversal_is_identity_forward_and_minus_the_strength_backward(shape, dtype, strength, seed):
    generator = np.random.default_rng(seed)
    x, cotangent = (jnp.asarray(generator.standard_normal(shape), dtype) for _ in range(2))
    y, pullback = jax.vjp(reverse_gradient, x, jnp.float32(strength))
    assert y.dtype == dtype and np.asarray(y).tobytes() == np.asarray(x).tobytes()
    by_x, by_strength = pullback(cotangent)
    wanted = (-np.float32(strength) * np.asarray(cotangent, np.float32)).astype(dtype)
    assert by_x.dtype == dtype and by_strength == 0
    np.testing.assert_array_equal(by_x, wanted)


def test_reversal_within_a_function_by_hand():
    # y = 3 x^2, z = 5 y reversed by 0.5: dz/dx = -0.5 * 5 * 6 x, at x = 2 it is -30, not 60.
    def z(x, strength):
        return 5 * reverse_gradient(3 * x**2, strength)

    assert z(2.0, 0.5) == 60
    assert jax.grad(z)(2.0, 0.5) == -30
    # A traced strength, one program for all of them.
    slope = jax.jit(jax.grad(z))
    found = [float(slope(2.0, jnp.float32(strength))) for strength in (0.0, 0.5, 1.0)]
    assert found == [0, -30, -60] and slope._cache_size() == 1


@pytest.mark.parametrize(
    ("step", "total", "options", "wanted"),
    [
        (0, 100, {}, 0.0),
        (10, 100, {}, 0.4621171573),  # 2 / (1 + e^-1) - 1
        (50, 100, {}, 0.9866142982),  # 2 / (1 + e^-5) - 1
        (100, 100, {}, 0.9999092043),
        (10, 20, {"peak": 0.1, "gamma": 4.0}, 0.0761594156),  # 0.1 (2 / (1 + e^-2) - 1)
    ],
)
def test_ramp(step, total, options, wanted):
    for at in (step, jnp.int32(step)):
        found = jax.jit(lambda at: ramp(at, total, **options))(at)
        assert (found.shape, found.dtype) == ((), jnp.float32)
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)


def test_dann_by_hand():
    """The discriminator descends; the features get the opposite times the strength."""
    # w = 0.5, source 1, targets -2 and 4: the logits are 0.5, -1, 2. The losses are
    # softplus(-0.5), softplus(-1) and softplus(2), of which the last alone is told wrong.
    source, target = {"features": [[1.0]]}, {"features": [[-2.0], [4.0]]}
    out, batch = batches(source, target, 0.25)
    values, accuracy, by_out, by_target, by_params = gradients(
        dann(Linear()), out, batch, linear([0.5])
    )
    losses = np.log1p(np.exp([-0.5, -1.0, 2.0]))
    np.testing.assert_allclose(values, 0.5 * losses[0] + 0.25 * (losses[1] + losses[2]), rtol=1e-6)
    assert accuracy == 0.75
    slopes = np.array([-0.5, 0.25, 0.25]) * scipy.special.expit([-0.5, -1.0, 2.0])
    np.testing.assert_allclose(
        by_params["discriminator"]["dense"]["kernel"][0, 0], slopes @ [1, -2, 4], rtol=1e-5
    )
    np.testing.assert_allclose(by_out["features"], [[-0.25 * 0.5 * slopes[0]]], rtol=1e-5)
    found = by_target["features"][:, 0]
    np.testing.assert_allclose(found, -0.25 * 0.5 * slopes[1:], rtol=1e-5)


rng = np.random.default_rng(0)
FEATURES = [rng.standard_normal((n, 3)).astype(np.float32) for n in (6, 4)]
LOGITS = [2 * rng.standard_normal((n, 2)).astype(np.float32) for n in (6, 4)]
KERNEL = rng.standard_normal(6).astype(np.float32)
SOURCE, TARGET = ({"features": FEATURES[side], "logits": LOGITS[side]} for side in (0, 1))


def cdan_by_numpy(features, logits, entropy_weights, held=None, kernel=KERNEL):
    """Loss of both domains, each weight and its sum held where `held` gives logits for them."""
    total = 0
    for x, z, fixed, sign in zip(features, logits, held or logits, (1, -1), strict=True):
        x, kernel = x.astype(np.float64), kernel.astype(np.float64)
        g = scipy.special.softmax(fixed.astype(np.float64), axis=1)
        judged = np.stack([np.outer(a, b).ravel() for a, b in zip(x, g, strict=True)]) @ kernel
        loss = np.logaddexp(0, -sign * judged)

        def weight(z):
            p = scipy.special.softmax(np.asarray(z, np.float64), axis=1)
            return 1 + np.exp(-scipy.stats.entropy(p, axis=1))

        moving = weight(z) if entropy_weights else np.ones(len(z))
        total += (moving * loss).sum() / (weight(fixed).sum() if entropy_weights else len(z)) / 2
    return total


def differences(value, x, step=1e-5):
    """The gradient of `value` of a float64 array, by central differences."""
    x, gradient = np.asarray(x, np.float64), np.zeros(np.shape(x))
    for index in np.ndindex(x.shape):
        sides = []
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * step
            sides.append(value(moved))
        gradient[index] = (sides[0] - sides[1]) / (2 * step)
    return gradient


@pytest.mark.parametrize("entropy_weights", [False, True])
def test_cdan_equals_numpy(entropy_weights):
    """Value, and gradients: reversed for features and entropies, as it is for the discriminator.

    The probabilities that condition the features have none.
    """
    term = cdan(Linear(), entropy_weights=entropy_weights)
    out, batch = batches(SOURCE, TARGET, 0.6)
    values, _, by_out, by_target, by_params = gradients(term, out, batch, linear(KERNEL))
    reference = functools.partial(cdan_by_numpy, entropy_weights=entropy_weights, held=LOGITS)
    np.testing.assert_allclose(values, reference(FEATURES, LOGITS), rtol=1e-5)
    found = by_params["discriminator"]["dense"]["kernel"][:, 0]
    wanted = differences(lambda kernel: reference(FEATURES, LOGITS, kernel=kernel), KERNEL)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    for index, side in enumerate((by_out, by_target)):

        def moved(pair, x, index=index):
            return [x if i == index else y for i, y in enumerate(pair)]

        wanted = differences(
            lambda x, moved=moved: reference(moved(FEATURES, x), LOGITS), FEATURES[index]
        )
        np.testing.assert_allclose(side["features"], -0.6 * wanted, rtol=1e-4, atol=1e-6)
        wanted = differences(
            lambda z, moved=moved: reference(FEATURES, moved(LOGITS, z)), LOGITS[index]
        )
        assert wanted.any() == entropy_weights
        np.testing.assert_allclose(side["logits"], -0.6 * wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [dann, functools.partial(cdan, entropy_weights=True)])
def test_padding_does_not_count(make):
    term, params = make(Linear()), linear(KERNEL[: 3 if make is dann else 6])
    wanted = gradients(term, *batches(SOURCE, TARGET, 1.0), params)

    def padded(side):
        return {name: np.concatenate([x, 7 * x[:2]]) for name, x in side.items()}

    masks = [np.arange(n + 2) < n for n in (6, 4)]
    found = gradients(term, *batches(padded(SOURCE), padded(TARGET), 1.0, *masks), params)
    for one in found[2:4]:
        assert all(not x[-2:].any() for x in one.values())
    cut = (*found[:2], *({k: x[:-2] for k, x in side.items()} for side in found[2:4]), found[4])
    for a, b in zip(jax.tree.leaves(cut), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_product_that_is_too_wide_is_projected():
    """The projection keeps inner products in expectation, and is the same every time."""
    f, g = FEATURES[0], scipy.special.softmax(LOGITS[0], axis=1)
    exact = condition(f, g, widest=6)
    np.testing.assert_allclose(exact, np.einsum("bd,bk->bdk", f, g).reshape(6, 6), rtol=1e-6)
    project = jax.jit(lambda f, g, seed: condition(f, g, 5, 2**14, seed), static_argnums=2)
    found = project(f, g, 0)
    assert found.shape == (6, 2**14)
    gram, wanted = (np.asarray(x) @ np.asarray(x).T for x in (found, exact))
    np.testing.assert_allclose(gram, wanted, atol=0.08 * np.abs(wanted).max())
    np.testing.assert_allclose(found, condition(f, g, 5, 2**14, 0), atol=1e-7)
    assert np.abs(found - project(f, g, 1)).max() > 0.1


def test_conditioning_maps_is_refused():
    with pytest.raises(ValueError, match=r"CDAN: want \[b, d\] and \[b, k\]"):
        condition(jnp.zeros((2, 3)), jnp.zeros((2, 4, 4, 3)))


SHAPES = (("features", (5,)), ("logits", (3,)), ("stage1", (6, 4, 5)))


@pytest.mark.parametrize("reads", ["features", "logits", "stage1"])
def test_discriminators_start_undecided_about_all_that_they_can_read(reads):
    """At the entropy of a coin, of vectors `[b, d]` or of each part of a map."""
    out = {name: rng.standard_normal((4, *shape)).astype(np.float32) for name, shape in SHAPES}
    maps = out[reads].ndim == 4
    term = dann(MapDiscriminator((8,)) if maps else Discriminator(16), reads)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for name, x in out.items()}
    params = {"discriminator": term.initialize(shapes, jax.random.key(0))}
    values, accuracy, by_out, _, by_params = gradients(term, *batches(out, out, 1.0), params)
    # He's initialisation of a map's last convolution is not as near 0.
    np.testing.assert_allclose(values, np.log(2), atol=0.4 if maps else 0.02)
    assert accuracy == 0.5  # Of equal batches.
    assert np.any(by_out[reads]) and all(np.any(x) for x in jax.tree.leaves(by_params))
    assert not any(np.any(x) for name, x in by_out.items() if name != reads)


def test_shapes_of_the_discriminators():
    def shape(module, *image):
        x = jnp.zeros((2, *image))
        return jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), x))[0].shape

    assert shape(Discriminator(), 7) == (2,)
    assert shape(MapDiscriminator(), 32, 20, 3) == (2, 4, 3)
    assert shape(MapDiscriminator(), 1, 1, 3) == (2, 1, 1)


@pytest.mark.parametrize(
    ("module", "shape"), [(Discriminator, (9, 6, 5)), (MapDiscriminator, (5,))]
)
def test_a_discriminator_of_other_axes_is_refused(module, shape):
    term = dann(module(), "stage1")
    with pytest.raises(ValueError, match=r"the discriminator wants \[b, .*\], not \(4, "):
        term.initialize({"stage1": jnp.zeros((4, *shape))}, jax.random.key(0))


def test_what_the_network_does_not_give_is_one_line():
    out = {"features": jnp.zeros((4, 5)), "logits": jnp.zeros((4, 3))}
    with pytest.raises(UserError, match="cannot read 'stage9' of the network; choose from feat"):
        dann(Discriminator(), "stage9").initialize(out, jax.random.key(0))
    with pytest.raises(UserError, match="cannot read nothing of the network"):
        alignment.check_reads(out, ())
    alignment.check_reads(out, ("features", "logits"))


def test_the_loss_of_the_output_of_a_segmentation():
    """The discriminator of the output reads probabilities of the pixels, whatever the logits."""
    term = dann(MapDiscriminator((4,)), "logits")
    logits = rng.standard_normal((2, 8, 8, 3)).astype(np.float32)
    params = {"discriminator": term.initialize({"logits": logits}, jax.random.key(1))}
    losses = [
        gradients(term, *batches({"logits": x}, {"logits": logits[:1]}, 1.0), params)[0][0]
        for x in (logits, logits + 5, 2 * logits)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert abs(losses[0] - losses[2]) > 1e-4


def all_alignments(*arguments):
    """The sum of the terms without a discriminator, and the count 1."""
    terms = (
        alignment.align_mmd(),
        alignment.align_coral(),
        alignment.minimize_confusion(),
        alignment.minimize_entropy(),
    )
    return sum(term(*arguments)[0] for term in terms), jnp.ones(())


ADAPTATION = {
    "dann": dann(Discriminator(8)),
    "cdan+e, projected": cdan(Discriminator(8), entropy_weights=True, widest=8, projected=8),
    "alignments": all_alignments,
}


@pytest.fixture(scope="module")
def shared_gradients():
    """`fn(term or None, strength) -> (gradients of the network, of the discriminator)`."""
    model = BaselineCNN(3, widths=(3, 4), dropout=0.0)
    images = np.random.default_rng(3).standard_normal((10, 8, 8, 3), np.float32)
    variables = registry.initialize(model, 8, jax.random.key(0))
    labels = jnp.array([0, 1, 2, 0, 1, 2], jnp.int32)
    supervised = cross_entropy(np.ones(3, np.float32))

    def forward(params, image):
        variables_of = {**variables, "params": params}
        (logits, out), _ = model.apply(variables_of, image, True, mutable=["batch_stats"])
        return {**out, "logits": logits}

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(term, strength, discriminator):
        def loss(network, discriminator):
            params = {**network, "discriminator": discriminator}
            out = forward(params, images[:6])
            batch = {"target": labels, "adaptation": strength}
            value, count = supervised(out, batch, params, None)
            if term is None:
                return value / count
            batch["target_domain"] = {"out": forward(params, images[6:])}
            adaptation, ones = term(out, batch, params, None)
            return value / count + adaptation / ones

        return jax.grad(loss, argnums=(0, 1))(variables["params"], discriminator)

    def run(term, strength):
        out = jax.eval_shape(forward, variables["params"], images[:6])
        discriminator = {}
        if hasattr(term, "initialize"):
            discriminator = term.initialize(out, jax.random.key(1))
        return gradient(term, jnp.float32(strength), discriminator)

    return run


@pytest.mark.parametrize("name", ADAPTATION)
def test_without_strength_the_network_learns_as_without_the_term(name, shared_gradients):
    """To the bit, through a real network; and the discriminator learns all the same."""
    term = ADAPTATION[name]
    plain, _ = shared_gradients(None, 0.0)
    found, discriminator = shared_gradients(term, 0.0)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(a, b)
    moved, same = shared_gradients(term, 0.5)
    assert (
        max(
            np.abs(a - b).max()
            for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(plain), strict=True)
        )
        > 1e-5
    )
    for a, b in zip(jax.tree.leaves(discriminator), jax.tree.leaves(same), strict=True):
        assert np.any(a)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_the_network_alone():
    variables = {"params": {"stem": 1, "discriminator": 2, "head": 3}, "batch_stats": {"stem": 4}}
    assert without_discriminator(variables) == {
        "params": {"stem": 1, "head": 3},
        "batch_stats": {"stem": 4},
    }
