"""Convolutions in the form that is fastest on each platform.

XLA's CPU backend runs grouped convolutions 15 to 40 times slower than the same arithmetic
written as shifted multiply-adds, and 3-channel ones several times slower than patches times
a matrix. GPU and TPU keep `lax.conv_general_dilated`. The choice is made at lowering time by
`jax.lax.platform_dependent`, inside one custom gradient for each operation, so that the branch
itself is never differentiated.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax

Padding = tuple[tuple[int, int], tuple[int, int]]

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's "SAME" padding `(low, high)` of one axis: the odd pixel goes to the end."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


@jax.custom_vjp
def pointwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """1x1 convolution, stride 1: `[b, h, w, c]` and `[1, 1, c, o]` -> `[b, h, w, o]`.

    A matrix product on every platform: XLA:CPU's convolution computes the weight gradient of
    this case 8 to 16 times slower. The gradient is written out because the transpose that
    autodiff makes of a product, `(dy^T x)^T`, runs 2 to 5 times slower on CPU than `x^T dy`.
    """
    c, o = kernel.shape[2:]
    return (x.reshape(-1, c) @ kernel.reshape(c, o)).reshape(*x.shape[:3], o)


def _pointwise_forward(x, kernel):
    return pointwise_conv(x, kernel), (x, kernel)


def _pointwise_backward(residuals, dy):
    x, kernel = residuals
    c, o = kernel.shape[2:]
    rows, dy = x.reshape(-1, c), dy.reshape(-1, o)
    kernel_gradient = lax.dot_general(rows, dy, (((0,), (0,)), ((), ())))
    return (dy @ kernel.reshape(c, o).T).reshape(x.shape), kernel_gradient.reshape(kernel.shape)


pointwise_conv.defvjp(_pointwise_forward, _pointwise_backward)


def _lax_conv(x, kernel, stride, padding, groups):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=_LAYOUT,
        feature_group_count=groups,
    )


def _pad(x, padding):
    (top, bottom), (left, right) = padding
    padded = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    # Without the barrier XLA fuses the padding into each of the k*k reads below.
    return lax.optimization_barrier(padded)


def _window(x, i, j, height, width, stride):
    """Every `stride`-th pixel of `x` from row i and column j: `[b, height, width, c]`."""
    b, _, _, c = x.shape
    last = (b, i + (height - 1) * stride + 1, j + (width - 1) * stride + 1, c)
    return lax.slice(x, (0, i, j, 0), last, (1, stride, stride, 1))


def _output_size(x, kernel_size, stride, padding):
    return tuple(
        (x.shape[1 + axis] + sum(padding[axis]) - kernel_size) // stride + 1 for axis in (0, 1)
    )


def _depthwise_shifted(x, kernel, stride, padding):
    k = kernel.shape[0]
    height, width = _output_size(x, k, stride, padding)
    padded = _pad(x, padding)
    taps = (
        _window(padded, i, j, height, width, stride) * kernel[i, j, 0]
        for i in range(k)
        for j in range(k)
    )
    return functools.reduce(operator.add, taps)


def _depthwise_input_gradient(x_shape, kernel, dy, stride, padding):
    """Gradient for x, one output phase at a time.

    y[o] = sum_i x[s*o + i - p] w[i], so x[s*q + a] receives dy[q + (a + p - i) // s] w[i] from
    the taps i with (a + p - i) divisible by s: s*s dense sums instead of one over a dilated dy.
    """
    b, height, width, c = x_shape
    k, s = kernel.shape[0], stride
    rows, columns = -(-height // s), -(-width // s)
    margin = k
    grown = _pad(
        dy,
        tuple(
            (margin, max(0, count + k - dy.shape[axis]))
            for axis, count in ((1, rows), (2, columns))
        ),
    )

    def phase(a, c_):
        terms = []
        for i in range(k):
            for j in range(k):
                di, dj = a + padding[0][0] - i, c_ + padding[1][0] - j
                if di % s == 0 and dj % s == 0:
                    window = _window(grown, margin + di // s, margin + dj // s, rows, columns, 1)
                    terms.append(window * kernel[i, j, 0])
        if not terms:
            return jnp.zeros((b, rows, columns, c), dy.dtype)
        return functools.reduce(operator.add, terms)

    if s == 1:
        return phase(0, 0)
    lines = [jnp.stack([phase(a, e) for e in range(s)], axis=3) for a in range(s)]
    full = jnp.stack(lines, axis=2).reshape(b, rows * s, columns * s, c)
    return full[:, :height, :width]


def _depthwise_kernel_gradient(x, kernel_shape, dy, stride, padding):
    """Gradient for the kernel as one variadic reduction: all k*k sums in a single pass."""
    k = kernel_shape[0]
    padded = _pad(x, padding)
    height, width = dy.shape[1:3]
    products = tuple(
        _window(padded, i, j, height, width, stride) * dy for i in range(k) for j in range(k)
    )
    zeros = tuple(jnp.zeros((), dy.dtype) for _ in products)
    sums = lax.reduce(
        products, zeros, lambda a, b: tuple(map(operator.add, a, b)), dimensions=(1, 2)
    )
    return jnp.stack([part.sum(0) for part in sums]).reshape(kernel_shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """Depthwise convolution: `[b, h, w, c]` and `[k, k, 1, c]` -> `[b, h', w', c]`."""
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, w: _depthwise_shifted(x, w, stride, padding),
        default=lambda x, w: _lax_conv(x, w, stride, padding, x.shape[-1]),
    )


def _depthwise_forward(x, kernel, stride, padding):
    return depthwise_conv(x, kernel, stride, padding), (x, kernel)


def _depthwise_backward(stride, padding, residuals, dy):
    def on_cpu(x, kernel, dy):
        return (
            _depthwise_input_gradient(x.shape, kernel, dy, stride, padding),
            _depthwise_kernel_gradient(x, kernel.shape, dy, stride, padding),
        )

    def elsewhere(x, kernel, dy):
        _, pullback = jax.vjp(lambda x, w: _lax_conv(x, w, stride, padding, x.shape[-1]), x, kernel)
        return pullback(dy)

    return lax.platform_dependent(*residuals, dy, cpu=on_cpu, default=elsewhere)


depthwise_conv.defvjp(_depthwise_forward, _depthwise_backward)


def _patches(x, k, stride, padding):
    """The k*k*c pixels under each output pixel: `[b, h', w', k*k*c]`."""
    height, width = _output_size(x, k, stride, padding)
    padded = _pad(x, padding)
    return jnp.concatenate(
        [_window(padded, i, j, height, width, stride) for i in range(k) for j in range(k)], axis=-1
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def stem_conv(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """Dense convolution of an input with few channels: `[k, k, c, o]` -> `[b, h', w', o]`."""
    k, _, c, o = kernel.shape
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, w: _patches(x, k, stride, padding) @ w.reshape(k * k * c, o),
        default=lambda x, w: _lax_conv(x, w, stride, padding, 1),
    )


def _stem_forward(x, kernel, stride, padding):
    return stem_conv(x, kernel, stride, padding), (x, kernel)


def _stem_backward(stride, padding, residuals, dy):
    def on_cpu(x, kernel, dy):
        patches = _patches(x, kernel.shape[0], stride, padding)
        kernel_gradient = jnp.einsum("bhwp,bhwo->po", patches, dy).reshape(kernel.shape)
        _, pullback = jax.vjp(lambda x: _lax_conv(x, kernel, stride, padding, 1), x)
        return *pullback(dy), kernel_gradient

    def elsewhere(x, kernel, dy):
        _, pullback = jax.vjp(lambda x, w: _lax_conv(x, w, stride, padding, 1), x, kernel)
        return pullback(dy)

    return lax.platform_dependent(*residuals, dy, cpu=on_cpu, default=elsewhere)


stem_conv.defvjp(_stem_forward, _stem_backward)
