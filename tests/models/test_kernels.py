"""The hand-written convolutions against XLA's own, forward and both gradients."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from medtl_jax.models import kernels


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [
        (4, 3, 1, (1, 1)),
        (5, 5, 1, (2, 2)),
        (4, 3, 2, (0, 1)),  # the odd pixel goes to the end
        (5, 3, 2, (1, 1)),
        (4, 5, 2, (1, 2)),
        (224, 3, 2, (0, 1)),
        (161, 3, 2, (1, 1)),
        (7, 1, 1, (0, 0)),
        (7, 1, 2, (0, 0)),  # a stride wider than the kernel needs none
        (3, 2, 3, (0, 0)),
        (1, 5, 2, (2, 2)),
    ],
)
def test_same_padding_by_hand(size, kernel, stride, expected):
    assert kernels.same_padding(size, kernel, stride) == expected


@hypothesis.given(st.integers(1, 300), st.integers(1, 11), st.integers(1, 4))
def test_same_padding_gives_the_ceiling(size, kernel, stride):
    low, high = kernels.same_padding(size, kernel, stride)
    assert low >= 0 and high - low in (0, 1)
    assert (size + low + high - kernel) // stride + 1 == -(-size // stride)


def reference(x, kernel, stride, padding, groups):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def compare(function, expected, x, kernel):
    """Outputs and vjp of two functions of (x, kernel), on a random cotangent."""

    @functools.partial(jax.jit, static_argnums=0)
    def both(f, x, kernel):
        y, pullback = jax.vjp(f, x, kernel)
        dy = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return y, *pullback(dy)

    found, wanted = both(function, x, kernel), both(expected, x, kernel)
    for name, a, b in zip(("y", "dx", "dkernel"), found, wanted, strict=True):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(a, b, atol=2e-6 * max(scale, 1.0), rtol=2e-5, err_msg=name)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def compare_depthwise(x, kernel, stride, padding):
    compare(
        lambda x, w: kernels.depthwise_conv(x, w, stride, padding),
        lambda x, w: reference(x, w, stride, padding, x.shape[-1]),
        x,
        kernel,
    )


def compare_stem(x, kernel, stride, padding):
    compare(
        lambda x, w: kernels.stem_conv(x, w, stride, padding),
        lambda x, w: reference(x, w, stride, padding, 1),
        x,
        kernel,
    )


def same(x, k, stride):
    return tuple(kernels.same_padding(x.shape[axis], k, stride) for axis in (1, 2))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_depthwise_equals_lax(k, stride):
    # One odd and one even side: at stride 2 the padding of the even one is asymmetric.
    x, kernel = normal(0, 2, 7, 10, 3), normal(1, k, k, 1, 3)
    compare_depthwise(x, kernel, stride, same(x, k, stride))


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_takes_any_padding(stride):
    compare_depthwise(normal(0, 1, 6, 5, 2), normal(1, 3, 3, 1, 2), stride, ((0, 2), (1, 0)))


def in_numpy(x, kernel, stride, padding, product):
    """The sum over the taps in float64, and what its transpose makes of a cotangent."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    k, (top, left) = kernel.shape[0], (padding[0][0], padding[1][0])
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = ((padded.shape[axis] - k) // stride + 1 for axis in (1, 2))
    rows = [slice(i, i + (height - 1) * stride + 1, stride) for i in range(k)]
    columns = [slice(j, j + (width - 1) * stride + 1, stride) for j in range(k)]
    taps = [(i, j) for i in range(k) for j in range(k)]
    pixels, weights, result = product

    def weight(i, j):
        return kernel[i, j].squeeze(0) if weights == "c" else kernel[i, j]

    y = sum(
        np.einsum(f"{pixels},{weights}->{result}", padded[:, rows[i], columns[j]], weight(i, j))
        for i, j in taps
    )
    dy = np.sin(np.arange(y.size)).reshape(y.shape)
    dpadded, dkernel = np.zeros_like(padded), np.zeros_like(kernel)
    for i, j in taps:
        window = (slice(None), rows[i], columns[j])
        dpadded[window] += np.einsum(f"{result},{weights}->{pixels}", dy, weight(i, j))
        pairs = np.einsum(f"{pixels},{result}->{weights}", padded[window], dy)
        dkernel[i, j] = pairs.reshape(kernel.shape[2:])
    return y, dpadded[:, top : top + x.shape[1], left : left + x.shape[2]], dkernel


def compare_with_numpy(function, x, kernel, wanted):
    @jax.jit
    def found(x, kernel):
        y, pullback = jax.vjp(function, x, kernel)
        dy = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return y, *pullback(dy)

    for a, b in zip(found(x, kernel), wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(b).max(), 1.0))


shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))


@hypothesis.given(shapes, st.sampled_from([1, 3, 5]), st.integers(1, 3))
@hypothesis.settings(max_examples=8)
def test_depthwise_equals_numpy_on_any_shape(shape, k, stride):
    x, kernel = normal(2, *shape), normal(3, k, k, 1, shape[-1])
    padding = same(x, k, stride)
    wanted = in_numpy(x, kernel, stride, padding, ("bhwc", "c", "bhwc"))
    compare_with_numpy(
        lambda x, w: kernels.depthwise_conv(x, w, stride, padding), x, kernel, wanted
    )


@hypothesis.given(shapes, st.sampled_from([3, 5]), st.integers(1, 2))
@hypothesis.settings(max_examples=6)
def test_stem_equals_numpy_on_any_shape(shape, k, stride):
    x, kernel = normal(2, *shape), normal(3, k, k, shape[-1], 2)
    padding = same(x, k, stride)
    wanted = in_numpy(x, kernel, stride, padding, ("bhwc", "co", "bhwo"))
    compare_with_numpy(lambda x, w: kernels.stem_conv(x, w, stride, padding), x, kernel, wanted)


@pytest.mark.parametrize(("k", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_stem_equals_lax(k, stride):
    x, kernel = normal(0, 2, 7, 10, 3), normal(1, k, k, 3, 4)
    compare_stem(x, kernel, stride, same(x, k, stride))


def test_pointwise_equals_lax():
    compare(
        kernels.pointwise_conv,
        lambda x, w: reference(x, w, 1, "VALID", 1),
        normal(0, 2, 5, 4, 6),
        normal(1, 1, 1, 6, 3),
    )


@pytest.mark.parametrize(
    ("function", "kernel_shape"),
    [
        (lambda x, w: kernels.depthwise_conv(x, w, 2, ((0, 1), (0, 1))), (3, 3, 1, 3)),
        (lambda x, w: kernels.stem_conv(x, w, 2, ((0, 1), (0, 1))), (3, 3, 3, 4)),
        (kernels.pointwise_conv, (1, 1, 3, 5)),
    ],
    ids=["depthwise", "stem", "pointwise"],
)
def test_vmap_over_the_batch_changes_nothing(function, kernel_shape):
    x, kernel = normal(0, 3, 6, 6, 3), normal(1, *kernel_shape)

    def gradients(f):
        return jax.grad(lambda x, w: jnp.square(f(x, w)).sum(), argnums=(0, 1))(x, kernel)

    def mapped(x, w):
        return jax.vmap(lambda one: function(one[None], w)[0])(x)

    chex.assert_trees_all_close(
        jax.jit(lambda: (mapped(x, kernel), gradients(mapped)))(),
        jax.jit(lambda: (function(x, kernel), gradients(function)))(),
        rtol=1e-5,
        atol=1e-5,
    )


def test_bfloat16_stays_bfloat16():
    x, kernel = normal(0, 1, 6, 6, 2).astype(jnp.bfloat16), jnp.ones((3, 3, 1, 2), jnp.bfloat16)

    def f(x, w):
        return kernels.depthwise_conv(x, w, 1, ((1, 1), (1, 1)))

    y, pullback = jax.vjp(f, x, kernel)
    assert {leaf.dtype for leaf in (y, *pullback(y))} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(
        y.astype(jnp.float32),
        reference(x.astype(jnp.float32), jnp.ones((3, 3, 1, 2)), 1, "SAME", 2),
        atol=0.1,
    )


def test_cpu_program_of_depthwise_has_no_convolution():
    def program(f):
        gradient = jax.grad(lambda x, w: jnp.square(f(x, w)).sum(), argnums=(0, 1))
        shapes = (jax.ShapeDtypeStruct((2, 8, 8, 16), jnp.float32),)
        shapes += (jax.ShapeDtypeStruct((3, 3, 1, 16), jnp.float32),)
        return jax.jit(gradient).lower(*shapes).compile().as_text()

    padding = ((1, 1), (1, 1))
    assert "convolution(" in program(lambda x, w: reference(x, w, 1, padding, 16))
    ours = program(lambda x, w: kernels.depthwise_conv(x, w, 1, padding))
    assert "convolution(" not in ours and "feature_group_count" not in ours
