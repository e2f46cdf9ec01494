"""Pooling and response normalisation against numbers that PyTorch 2.13 gives."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from medtl_jax.models import pooling

IMAGE = (np.arange(35) * 13 % 29).astype(np.float32).reshape(1, 5, 7, 1)


def around(pixels):
    return (pixels, pixels), (pixels, pixels)


def value_and_gradient(function, x, dy=None):
    """`function(x)` and what x receives for the cotangent `dy`, by default 1, 2, 3, ..."""

    @jax.jit
    def both(x):
        y, pullback = jax.vjp(function, x)
        counting = jnp.arange(1, y.size + 1).reshape(y.shape).astype(y.dtype)
        return y, *pullback(counting if dy is None else jnp.full(y.shape, dy, y.dtype))

    return both(x)


# window, stride, padding, ceil; then the maxima; then, for the cotangent 1, 2, 3, ..., what each
# pixel receives; then the means, with the padding counted and without.
CASES = [
    (
        (3, 2, 1, False),
        [[17, 26, 27, 24], [25, 25, 27, 28], [25, 26, 26, 23]],
        {(0, 2): 2, (1, 1): 1, (1, 4): 10, (1, 6): 4, (2, 6): 8, (3, 1): 20, (4, 3): 21}
        | {(4, 5): 12},
        [
            [3.7778, 9.0, 10.2222, 6.8889],
            [9.6667, 14.6667, 14.8889, 11.1111],
            [5.8889, 10.5556, 11.7778, 5.7778],
        ],
        [
            [8.5, 13.5, 15.3333, 15.5],
            [14.5, 14.6667, 14.8889, 16.6667],
            [13.25, 15.8333, 17.6667, 13.0],
        ],
    ),
    (
        (3, 2, 0, True),
        [[26, 27, 28], [25, 26, 28]],
        {(0, 2): 1, (1, 4): 2, (2, 6): 9, (3, 1): 4, (4, 3): 5},
        [[10.5556, 14.0, 17.4444], [12.1111, 12.3333, 12.5556]],
        [[10.5556, 14.0, 17.4444], [12.1111, 12.3333, 12.5556]],
    ),
    (
        (2, 2, 0, True),  # the last windows hang over the edge
        [[17, 26, 27, 24], [25, 22, 19, 28], [16, 26, 23, 7]],
        {(0, 2): 2, (1, 1): 1, (1, 4): 3, (1, 6): 4, (2, 6): 8, (3, 1): 5, (3, 3): 6}
        | {(3, 5): 7, (4, 0): 9, (4, 3): 10, (4, 5): 11, (4, 6): 12},
        [[8.5, 12.75, 17.0, 22.0], [16.5, 13.5, 10.5, 15.5], [8.0, 19.5, 16.5, 7.0]],
        [[8.5, 12.75, 17.0, 22.0], [16.5, 13.5, 10.5, 15.5], [8.0, 19.5, 16.5, 7.0]],
    ),
    (
        (2, 3, 1, True),  # a stride wider than the window: pixels that no window sees
        [[0, 26, 20], [12, 22, 28]],
        {(0, 0): 1, (0, 2): 2, (0, 6): 3, (2, 6): 6, (3, 0): 4, (3, 3): 5},
        [[0.0, 9.0, 6.75], [5.0, 13.5, 16.25]],
        [[0.0, 18.0, 13.5], [10.0, 13.5, 16.25]],
    ),
]


@pytest.mark.parametrize(("arguments", "maxima", "gradient", "counted", "clipped"), CASES)
def test_pools_give_torchs_numbers(arguments, maxima, gradient, counted, clipped):
    window, stride, padding, ceil = arguments

    def pooled(x):
        return pooling.max_pool(x, window, stride, around(padding), ceil)

    y, dx = map(np.asarray, value_and_gradient(pooled, IMAGE))
    np.testing.assert_array_equal(y[0, ..., 0], maxima)
    received = {tuple(at): dx[0, *at, 0] for at in np.argwhere(dx[0, ..., 0]).tolist()}
    assert received == gradient
    for count_padding, means in ((True, counted), (False, clipped)):
        y = jax.jit(pooling.avg_pool, static_argnums=range(1, 6))(
            IMAGE, window, stride, around(padding), ceil, count_padding
        )
        np.testing.assert_allclose(y[0, ..., 0], means, atol=6e-5)


@pytest.mark.parametrize(
    ("size", "means"),
    [
        (3, [[10.1667, 16.8333, 18.6667], [11.3333, 11.5556, 15.0], [12.5, 14.3333, 11.3333]]),
        (
            4,
            [
                [8.5, 13.5, 15.3333, 15.5],
                [12.5, 12.6667, 14.5, 19.5],
                [16.5, 16.6667, 13.6667, 16.25],
                [13.25, 15.8333, 17.6667, 13.0],
            ],
        ),
        (
            6,  # more bins than rows: some repeat
            [
                [6.5, 19.5, 18.0, 16.5, 15.0, 13.5],
                [8.5, 14.25, 12.75, 18.5, 17.0, 15.5],
                [12.5, 11.0, 9.5, 15.25, 13.75, 19.5],
                [16.5, 15.0, 13.5, 12.0, 10.5, 16.25],
                [13.25, 11.75, 17.5, 16.0, 14.5, 13.0],
                [8.0, 6.5, 19.5, 18.0, 16.5, 15.0],
            ],
        ),
    ],
)
def test_adaptive_pool_gives_torchs_numbers(size, means):
    y = pooling.adaptive_avg_pool(IMAGE, size)
    np.testing.assert_allclose(y[0, ..., 0], means, atol=6e-5)


def test_adaptive_pool_of_the_same_size_is_the_identity():
    x = jnp.asarray(IMAGE[:, :, :5])
    assert pooling.adaptive_avg_pool(x, 5) is x


@pytest.mark.parametrize(
    ("size", "normed", "gradient"),
    [
        (
            5,
            [-1.198152, -0.798768, -0.390795, 0.0, 0.390795, 0.598140, 0.897209, 1.214543],
            [-0.121369, 0.451600, 1.082542, 1.754765, 1.624399, 0.439899, 0.061708, 0.055014],
        ),
        (
            4,  # an even window reaches one channel further down than up
            [-1.141932, -0.742175, -0.371088, 0.0, 0.468274, 0.742175, 0.807924, 1.095136],
            [-0.186194, 0.364283, 1.143022, 1.873098, 1.774663, 0.509036, -0.212164, 0.284458],
        ),
    ],
)
def test_response_norm_gives_torchs_numbers(size, normed, gradient):
    def norm(x):
        return pooling.local_response_norm(x, size, 0.5, 0.75, 2.0)

    x = np.arange(-3, 5, dtype=np.float32).reshape(1, 1, 1, 8)
    y, dx = value_and_gradient(norm, x)
    np.testing.assert_allclose(y.ravel(), normed, atol=2e-6)
    np.testing.assert_allclose(dx.ravel(), gradient, atol=5e-6)


def test_first_of_equal_maxima_receives_the_gradient():
    x = np.zeros((1, 4, 4, 1), np.float32)
    x[0, [1, 2], [2, 1], 0] = 1
    _, dx = value_and_gradient(lambda x: pooling.max_pool(x, 3, 1), x, 1)
    np.testing.assert_array_equal(np.nonzero(dx[0, ..., 0]), [[1], [2]])


def test_nan_reaches_every_window_that_sees_it():
    x = np.zeros((1, 4, 4, 1), np.float32)
    x[0, 0, 3, 0] = np.nan
    y, _ = value_and_gradient(lambda x: pooling.max_pool(x, 3, 1), x)
    alone = jax.jit(lambda x: pooling.max_pool(x, 3, 1))(x)
    for pooled in (y, alone):
        np.testing.assert_array_equal(pooled[..., 0], [[[0, np.nan], [0, 0]]])


@pytest.mark.parametrize("pool", [pooling.max_pool, pooling.avg_pool])
@hypothesis.given(
    st.integers(3, 12), st.integers(3, 12), st.integers(1, 3), st.integers(1, 3), st.data()
)
@hypothesis.settings(max_examples=4)
def test_pools_equal_reduce_window_on_any_shape(pool, height, width, window, stride, data):
    padding = around(data.draw(st.integers(0, window // 2)))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, height, width, 3)), jnp.float32)
    start, join = (-jnp.inf, jax.lax.max) if pool is pooling.max_pool else (0.0, jax.lax.add)

    def expected(x):
        shape, strides = (1, window, window, 1), (1, stride, stride, 1)
        total = jax.lax.reduce_window(x, start, join, shape, strides, ((0, 0), *padding, (0, 0)))
        return total if pool is pooling.max_pool else total / window**2

    @jax.jit
    def both(x):
        found, back = jax.vjp(lambda x: pool(x, window, stride, padding), x)
        wanted, pullback = jax.vjp(expected, x)
        dy = jnp.sin(jnp.arange(found.size, dtype=jnp.float32)).reshape(found.shape)
        return (found, *back(dy)), (wanted, *pullback(dy))

    for found, wanted in zip(*both(x), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_pools_keep_bfloat16():
    x = jnp.asarray(IMAGE, jnp.bfloat16)
    for pool in (pooling.max_pool, pooling.avg_pool):
        y, dx = value_and_gradient(lambda x, pool=pool: pool(x, 3, 2, around(1)), x)
        assert y.dtype == dx.dtype == jnp.bfloat16
    assert pooling.adaptive_avg_pool(x, 3).dtype == jnp.bfloat16
    assert pooling.local_response_norm(x, 5, 1e-4, 0.75, 1.0).dtype == jnp.bfloat16


def test_a_window_larger_than_the_map_is_refused():
    with pytest.raises(ValueError, match="7-pixel pooling window does not fit 5 pixels"):
        pooling.max_pool(jnp.asarray(IMAGE), 7, 2)


def test_cpu_gradient_of_max_pool_scatters_nothing():
    def program(f):
        gradient = jax.grad(lambda x: jnp.square(f(x)).sum())
        shape = jax.ShapeDtypeStruct((2, 8, 8, 16), jnp.float32)
        return jax.jit(gradient).lower(shape).as_text()

    def plain(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")

    assert "select_and_scatter" in program(plain)
    assert "select_and_scatter" not in program(lambda x: pooling.max_pool(x, 3, 2, around(1)))
