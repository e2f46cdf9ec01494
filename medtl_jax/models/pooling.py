"""Pooling and response normalisation with PyTorch's arithmetic, fast on each platform.

XLA's CPU backend takes 10 to 20 times as long for the gradient of `reduce_window` as for the same
sums written as shifted reads; GPU and TPU keep `reduce_window`.
"""

import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from medtl_jax.models.windows import Padding, output_size, pad_image, sum_over_windows, window_of

NO_PADDING: Padding = ((0, 0), (0, 0))


def _pooled_size(size: int, window: int, stride: int, padding: tuple[int, int], ceil: bool) -> int:
    """Output pixels along one axis, by torch's rule for `ceil_mode`."""
    span = size + sum(padding) - window
    count = (-(-span // stride) if ceil else span // stride) + 1
    # The last window must start inside the image or its left padding.
    if ceil and (count - 1) * stride >= size + padding[0]:
        count -= 1
    if count < 1:
        raise ValueError(
            f"a {window}-pixel pooling window does not fit {size} pixels with padding {padding}"
        )
    return count


def _covering_padding(
    x: jax.Array, window: int, stride: int, padding: Padding, ceil: bool
) -> Padding:
    """`padding`, grown at the end so that the windows cover the image exactly."""
    result = []
    for size, (low, high) in zip(x.shape[1:3], padding, strict=True):
        count = _pooled_size(size, window, stride, (low, high), ceil)
        result.append((low, max(high, (count - 1) * stride + window - size - low)))
    return tuple(result)


def max_pool(
    x: jax.Array, window: int, stride: int, padding: Padding = NO_PADDING, ceil: bool = False
) -> jax.Array:
    """Maxima over windows: `[b, h, w, c]` -> `[b, h', w', c]`, as torch's `MaxPool2d`.

    Padding counts as -inf; `ceil` is torch's `ceil_mode`. NaN goes through. Of equal maxima the
    first of the window, row by row, receives the gradient.
    """
    return _max_pool(x, window, stride, _covering_padding(x, window, stride, padding, ceil))


def _reduce_window_max(x, window, stride, padding):
    # A NumPy scalar: a traced start would hide from JAX that this is the differentiable maximum.
    return lax.reduce_window(
        x,
        np.array(-np.inf, x.dtype),
        lax.max,
        (1, window, window, 1),
        (1, stride, stride, 1),
        ((0, 0), *padding, (0, 0)),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x, window, stride, padding):
    return lax.platform_dependent(
        x,
        cpu=lambda x: _maxima(x, window, stride, padding)[0],
        default=lambda x: _reduce_window_max(x, window, stride, padding),
    )


def _max_pool_forward(x, window, stride, padding):
    def elsewhere(x):
        y = _reduce_window_max(x, window, stride, padding)
        return y, jnp.zeros(y.shape, _tap_type(window))

    y, taps = lax.platform_dependent(
        x, cpu=lambda x: _maxima(x, window, stride, padding), default=elsewhere
    )
    return y, (x, taps)


def _max_pool_backward(window, stride, padding, residuals, dy):
    def on_cpu(x, taps, dy):
        def term(i, j, taps, dy):
            return jnp.where(taps == i * window + j, dy, jnp.zeros((), dy.dtype))

        return sum_over_windows(term, (taps, dy), x.shape, window, stride, padding)

    def elsewhere(x, taps, dy):
        del taps
        _, pullback = jax.vjp(lambda x: _reduce_window_max(x, window, stride, padding), x)
        return pullback(dy)[0]

    return (lax.platform_dependent(*residuals, dy, cpu=on_cpu, default=elsewhere),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _tap_type(window):
    """The smallest integers that number the taps of a window: their traffic is what costs."""
    return jnp.int8 if window * window <= 127 else jnp.int32


def _maxima(x, window, stride, padding):
    """The maxima and the number i * window + j of the tap (i, j) that each was read from."""
    height, width = output_size(x.shape, (window, window), stride, padding)
    padded = pad_image(x, padding, -jnp.inf)
    number = _tap_type(window)

    def best_of(values, taps):
        best, tap = values[0], taps[0]
        for value, other in zip(values[1:], taps[1:], strict=True):
            # The first of equal values stays; `maximum` lets NaN through.
            best, tap = jnp.maximum(best, value), jnp.where(value > best, other, tap)
        return best, tap

    # First along the rows, then along the columns: 2 * window comparisons and not window^2. The
    # barrier keeps XLA from computing the first ones again for each of the second.
    lines = [
        lax.slice_in_dim(padded, j, j + stride * (width - 1) + 1, stride, axis=2)
        for j in range(window)
    ]
    columns = [jnp.full(lines[0].shape, j, number) for j in range(window)]
    best, tap = lax.optimization_barrier(best_of(lines, columns))

    def row(values, i):
        return lax.slice_in_dim(values, i, i + stride * (height - 1) + 1, stride, axis=1)

    return best_of(
        [row(best, i) for i in range(window)],
        [row(tap, i) + jnp.asarray(i * window, number) for i in range(window)],
    )


def avg_pool(
    x: jax.Array,
    window: int,
    stride: int,
    padding: Padding = NO_PADDING,
    ceil: bool = False,
    count_padding: bool = True,
) -> jax.Array:
    """Means over windows: `[b, h, w, c]` -> `[b, h', w', c]`, as torch's `AvgPool2d`.

    Each sum is divided by the pixels of its window that lie in the padded image, or, without
    `count_padding`, in the image itself. `ceil` is torch's `ceil_mode`.
    """
    covering = _covering_padding(x, window, stride, padding, ceil)
    height, width = output_size(x.shape, (window, window), stride, covering)
    counts = [
        _window_counts(size, count, window, stride, pads, count_padding)
        for size, count, pads in zip(x.shape[1:3], (height, width), padding, strict=True)
    ]
    weights = 1.0 / np.outer(*counts)[None, :, :, None]
    return _sum_pool(x, window, stride, covering) * jnp.asarray(weights, x.dtype)


def _reduce_window_sum(x, window, stride, padding):
    return lax.reduce_window(
        x,
        np.zeros((), x.dtype),
        lax.add,
        (1, window, window, 1),
        (1, stride, stride, 1),
        ((0, 0), *padding, (0, 0)),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _sum_pool(x, window, stride, padding):
    def on_cpu(x):
        height, width = output_size(x.shape, (window, window), stride, padding)
        padded = pad_image(x, padding)
        taps = itertools.product(range(window), repeat=2)
        return functools.reduce(
            operator.add, (window_of(padded, i, j, height, width, stride) for i, j in taps)
        )

    return lax.platform_dependent(
        x, cpu=on_cpu, default=lambda x: _reduce_window_sum(x, window, stride, padding)
    )


def _sum_pool_forward(x, window, stride, padding):
    # The gradient needs the shape of x alone; the array is dropped by the compiler.
    return _sum_pool(x, window, stride, padding), x


def _sum_pool_backward(window, stride, padding, x, dy):
    def on_cpu(dy):
        return sum_over_windows(lambda i, j, dy: dy, (dy,), x.shape, window, stride, padding)

    def elsewhere(dy):
        shape = jax.ShapeDtypeStruct(x.shape, dy.dtype)
        transpose = jax.linear_transpose(
            lambda x: _reduce_window_sum(x, window, stride, padding), shape
        )
        return transpose(dy)[0]

    return (lax.platform_dependent(dy, cpu=on_cpu, default=elsewhere),)


_sum_pool.defvjp(_sum_pool_forward, _sum_pool_backward)


def _window_counts(size, count, window, stride, padding, count_padding):
    """Pixels of each window along one axis that count in its mean."""
    low, high = padding
    starts = np.arange(count) * stride - low
    first, last = (-low, size + high) if count_padding else (0, size)
    return np.minimum(starts + window, last) - np.maximum(starts, first)


def adaptive_avg_pool(x: jax.Array, size: int) -> jax.Array:
    """Means over `size` x `size` bins: `[b, h, w, c]` -> `[b, size, size, c]`.

    Torch's `AdaptiveAvgPool2d`: bin i of n covers the pixels from floor(i h / n) to
    ceil((i + 1) h / n), so bins overlap where n does not divide h, and repeat where h < n.
    """
    if x.shape[1:3] == (size, size):
        return x
    rows, columns = (jnp.asarray(_bin_weights(full, size), x.dtype) for full in x.shape[1:3])
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x, precision="highest")


def _bin_weights(size: int, bins: int) -> np.ndarray:
    """`[bins, size]`: row i holds 1 / length over the pixels of bin i."""
    weights = np.zeros((bins, size))
    for i in range(bins):
        first, last = i * size // bins, -(-(i + 1) * size // bins)
        weights[i, first:last] = 1 / (last - first)
    return weights


def local_response_norm(x: jax.Array, size: int, alpha: float, beta: float, k: float) -> jax.Array:
    """`x / (k + alpha / size * s)^beta`, s the sum of squares over `size` channels around each.

    Krizhevsky et al. 2012, with alpha divided by the size as in Caffe and torch; `[b, h, w, c]`.
    """
    channel = np.arange(x.shape[-1])
    offset = channel[:, None] - channel[None, :]
    # On CPU the product with a banded matrix halves the time of the gradient of shifted sums, and
    # the power by its logarithm takes a quarter of `power`.
    band = (offset >= -(size // 2)) & (offset <= size - 1 - size // 2)
    total = jnp.matmul(jnp.square(x), jnp.asarray(band, x.dtype), precision="highest")
    return x * jnp.exp(-beta * jnp.log(k + alpha / size * total))
