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


@hypothesis.given(shapes, st.sampled_from([1, 3, 5]), st.integers(1, 3))
@hypothesis.settings(max_examples=4)
def test_conv_equals_numpy_on_any_shape(shape, k, stride):
    x, kernel = normal(2, *shape), normal(3, k, k, shape[-1], 2)
    padding = same(x, k, stride)
    wanted = in_numpy(x, kernel, stride, padding, ("bhwc", "co", "bhwo"))
    compare_with_numpy(lambda x, w: kernels.conv(x, w, stride, padding), x, kernel, wanted)


def compare_exactly(function, expected, x_shape, kernel_shape):
    """Outputs and vjp of two functions of (x, kernel) in float64, to 1e-12 of the largest."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, kernel = (jnp.asarray(rng.standard_normal(shape)) for shape in (x_shape, kernel_shape))

        @functools.partial(jax.jit, static_argnums=0)
        def both(f, x, kernel):
            y, pullback = jax.vjp(f, x, kernel)
            return y, *pullback(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

        found, wanted = both(function, x, kernel), both(expected, x, kernel)
    for name, a, b in zip(("y", "dx", "dkernel"), found, wanted, strict=True):
        assert a.dtype == b.dtype == np.float64
        np.testing.assert_allclose(a, b, atol=1e-12 * np.abs(b).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "stride", "padding"),
    [
        ((8, 23, 24, 96), (3, 3, 96, 97), 1, ((1, 1), (1, 1))),  # tiles, one side odd
        ((8, 24, 26, 98), (3, 3, 98, 96), 1, ((0, 0), (2, 1))),  # likewise, unpadded rows
        ((2, 57, 58, 33), (3, 3, 33, 32), 1, ((1, 1), (0, 0))),  # tiles in one gradient alone
        ((5, 31, 30, 40), (3, 3, 40, 41), 1, ((1, 1), (1, 1))),  # pieces of the batch
        ((5, 31, 30, 40), (3, 3, 40, 41), 2, ((1, 1), (0, 1))),
        ((3, 40, 41, 3), (7, 7, 3, 8), 2, ((3, 3), (2, 3))),  # a stem
        ((4, 2, 2, 40), (3, 3, 40, 33), 1, ((1, 1), (1, 1))),  # maps of a few pixels
        ((4, 5, 4, 9), (3, 3, 9, 7), 2, ((1, 1), (0, 1))),
        ((4, 4, 4, 9), (1, 7, 9, 7), 1, ((0, 0), (3, 3))),
        ((2, 9, 8, 5), (1, 7, 5, 6), 1, ((0, 0), (3, 3))),
        ((2, 9, 8, 5), (7, 1, 5, 6), 1, ((3, 3), (0, 0))),
        ((2, 9, 8, 5), (3, 3, 5, 6), 2, ((0, 0), (0, 0))),
        ((2, 9, 8, 5), (3, 3, 5, 6), 1, ((3, 4), (0, 1))),  # more padding than the kernel needs
        ((2, 9, 8, 5), (1, 1, 5, 6), 1, ((0, 0), (0, 0))),
        ((2, 9, 8, 5), (1, 1, 5, 6), 2, ((0, 0), (0, 0))),
        ((2, 9, 8, 5), (1, 1, 5, 6), 2, ((1, 0), (0, 2))),
        ((16, 28, 28, 20), (1, 1, 20, 30), 1, ((0, 0), (0, 0))),  # a product in pieces
    ],
)
def test_conv_equals_lax_to_rounding(x_shape, kernel_shape, stride, padding):
    compare_exactly(
        lambda x, w: kernels.conv(x, w, stride, padding),
        lambda x, w: reference(x, w, stride, padding, 1),
        x_shape,
        kernel_shape,
    )


@pytest.mark.parametrize(
    ("shape", "k", "stride", "padding"),
    [
        ((2, 9, 8, 5), 3, 2, ((1, 1), (1, 1))),
        ((2, 7, 11, 5), 5, 2, ((2, 2), (2, 2))),
        ((2, 7, 11, 5), 5, 1, ((0, 0), (0, 0))),
        ((2, 10, 7, 5), 3, 3, ((0, 2), (1, 0))),
    ],
)
def test_depthwise_equals_lax_to_rounding(shape, k, stride, padding):
    compare_exactly(
        lambda x, w: kernels.depthwise_conv(x, w, stride, padding),
        lambda x, w: reference(x, w, stride, padding, shape[-1]),
        shape,
        (k, k, 1, shape[-1]),
    )


def test_tiles_keep_the_accuracy_of_float32():
    # The transforms add up to four numbers of like size: a few bits at most.
    x, kernel = normal(0, 6, 28, 28, 96), normal(1, 3, 3, 96, 96)
    padding = ((1, 1), (1, 1))
    program = jax.jit(lambda x, w: kernels.conv(x, w, 1, padding))
    assert "convolution" not in program.lower(x, kernel).as_text()
    exact, _, _ = in_numpy(x, kernel, 1, padding, ("bhwc", "co", "bhwo"))
    found = np.asarray(program(x, kernel), np.float64)
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 5e-7


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
        (lambda x, w: kernels.conv(x, w, 2, ((0, 1), (0, 1))), (3, 3, 3, 4)),
        (kernels.pointwise_conv, (1, 1, 3, 5)),
    ],
    ids=["depthwise", "dense", "pointwise"],
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


@pytest.mark.parametrize(
    ("function", "groups", "x_shape", "kernel_shape"),
    [
        (kernels.depthwise_conv, 2, (1, 6, 6, 2), (3, 3, 1, 2)),
        (kernels.conv, 1, (1, 6, 6, 2), (3, 3, 2, 4)),
        (kernels.conv, 1, (8, 24, 24, 96), (3, 3, 96, 96)),  # wide: too coarse for tiles
    ],
)
def test_bfloat16_stays_bfloat16(function, groups, x_shape, kernel_shape):
    x, kernel = (normal(i, *s).astype(jnp.bfloat16) for i, s in enumerate((x_shape, kernel_shape)))
    padding = ((1, 1), (1, 1))

    @jax.jit
    def both(x, kernel):
        y, pullback = jax.vjp(lambda x, w: function(x, w, 1, padding), x, kernel)
        return y, *pullback(y)

    y, *gradients = both(x, kernel)
    assert {leaf.dtype for leaf in (y, *gradients)} == {jnp.dtype(jnp.bfloat16)}
    wanted = reference(*(a.astype(jnp.float32) for a in (x, kernel)), 1, padding, groups)
    error = jnp.linalg.norm((y.astype(jnp.float32) - wanted).ravel())
    assert error < 0.01 * jnp.linalg.norm(wanted.ravel())


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(("function", "c"), [(kernels.conv, 96), (kernels.depthwise_conv, 1)])
def test_other_platforms_keep_one_convolution_for_each_product(platform, function, c):
    def all_three(x, kernel, dy):
        y, pullback = jax.vjp(lambda x, w: function(x, w, 1, ((1, 1), (1, 1))), x, kernel)
        return y, *pullback(dy)

    x, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 24, 24, 96), (3, 3, c, 96)))
    exported = jax.export.export(jax.jit(all_three), platforms=[platform])(x, kernel, x)
    assert exported.mlir_module().count("stablehlo.convolution") == 3


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
