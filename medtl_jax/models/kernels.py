"""Convolutions in the form that is fastest on each platform.

XLA's CPU backend runs grouped convolutions 15 to 40 times slower than the same arithmetic
written as shifted multiply-adds, leaves one of two cores idle in many dense ones, and takes up to
14 times as long as PyTorch for the gradients of their kernels. GPU and TPU keep
`lax.conv_general_dilated`. The choice is made at lowering time by `jax.lax.platform_dependent`,
inside one custom gradient for each operation, so that the branch itself is never differentiated.

The CPU forms are made for one CPU device: cut into pieces, a batch that is spread over several
moves between them, which costs time, not correctness.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from medtl_jax.models.products import pointwise_conv
from medtl_jax.models.windows import Padding, output_size, pad_image, sum_over_windows, window_of
from medtl_jax.models.winograd import tiles_of, winograd_conv, winograd_kernel_gradient

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's "SAME" padding `(low, high)` of one axis: the odd pixel goes to the end."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _lax_conv(x, kernel, stride, padding, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=_LAYOUT,
        feature_group_count=groups,
    )


def _lax_gradients(x, kernel, dy, stride, padding, groups=1):
    _, pullback = jax.vjp(lambda x, w: _lax_conv(x, w, stride, padding, groups), x, kernel)
    return pullback(dy)


def conv(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """Dense convolution: `[b, h, w, c]` and `[kh, kw, c, o]` -> `[b, h', w', o]`.

    `padding` is `((top, bottom), (left, right))` in pixels of zeros. On CPU a 3x3 layer of stride 1
    that is wide enough runs by F(2x2, 3x3), another one in pieces of the batch.
    """
    if kernel.shape[:2] == (1, 1) and not any(map(any, padding)):
        return pointwise_conv(x[:, ::stride, ::stride], kernel)
    return _dense_conv(x, kernel, stride, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dense_conv(x, kernel, stride, padding):
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, w: _dense_on_cpu(x, w, stride, padding),
        default=lambda x, w: _lax_conv(x, w, stride, padding),
    )


def _dense_forward(x, kernel, stride, padding):
    return _dense_conv(x, kernel, stride, padding), (x, kernel)


def _dense_backward(stride, padding, residuals, dy):
    def on_cpu(x, kernel, dy):
        return (
            _dense_input_gradient(x.shape, kernel, dy, stride, padding),
            _dense_kernel_gradient(x, kernel, dy, stride, padding),
        )

    return lax.platform_dependent(
        *residuals,
        dy,
        cpu=on_cpu,
        default=lambda x, w, dy: _lax_gradients(x, w, dy, stride, padding),
    )


_dense_conv.defvjp(_dense_forward, _dense_backward)


# Where F(2x2, 3x3) wins over the plain sum (measured): its matrix products need this many rows
# and channels to pay for the transforms.
_WINOGRAD_TILES = 1024
_WINOGRAD_CHANNELS = 96
_NARROWEST_TILES = 32


def _takes_tiles(kernel, stride):
    """Whether F(2x2, 3x3) computes this convolution, and in numbers fine enough for it."""
    return kernel.shape[:2] == (3, 3) and stride == 1 and kernel.dtype in (jnp.float32, jnp.float64)


def _is_wide(x_shape, kernel, padding):
    """Whether a 3x3 layer has channels and tiles enough, and few tiles that reach over the edge."""
    rows, columns = tiles_of(x_shape, padding)
    height, width = output_size(x_shape, (3, 3), 1, padding)
    return (
        x_shape[0] * rows * columns >= _WINOGRAD_TILES
        and min(kernel.shape[2:]) >= _WINOGRAD_CHANNELS
        and 4 * rows * columns <= 1.25 * height * width
    )


# XLA:CPU runs a convolution with fewer weights than this on one core (inferred from timings);
# in pieces of the batch, its scheduler runs several at once.
_WEIGHTS_OF_ALL_CORES = 147_456
_PIECES = 4
_LEAST_WORK = 10_000_000


def _pieces(batch, work, weights):
    """In how many pieces of the batch a convolution of `work` multiply-adds should run."""
    if weights >= _WEIGHTS_OF_ALL_CORES:
        return 1
    return max(1, min(_PIECES, batch, work // _LEAST_WORK))


def _bounds(batch, pieces):
    """The first and last example (exclusive) of each piece: sizes differ by one at most."""
    edges = [batch * i // pieces for i in range(pieces + 1)]
    return list(itertools.pairwise(edges))


def _over_pieces(function: Callable, x: jax.Array, pieces: int) -> jax.Array:
    """`function(x)` `[b, ...]`, computed on pieces of the batch."""
    if pieces == 1:
        return function(x)
    return jnp.concatenate([function(x[a:b]) for a, b in _bounds(x.shape[0], pieces)])


# On maps of up to this many output pixels XLA:CPU's convolution is up to 100 times slower than the
# same sum as one matrix product (512 channels, 2x2 pixels: 281 ms against 3), and never faster.
_SMALL_MAP = 25


def _is_small(x_shape, kernel, stride, padding):
    return math.prod(output_size(x_shape, kernel.shape[:2], stride, padding)) <= _SMALL_MAP


def _patches_times_kernel(x, kernel, stride, padding):
    """The convolution as one matrix product: the pixels under each output pixel side by side."""
    rows, columns, c, o = kernel.shape
    height, width = output_size(x.shape, (rows, columns), stride, padding)
    padded = pad_image(x, padding)
    taps = itertools.product(range(rows), range(columns))
    patches = [window_of(padded, i, j, height, width, stride) for i, j in taps]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(rows * columns * c, o)


def _dense_on_cpu(x, kernel, stride, padding):
    if _is_small(x.shape, kernel, stride, padding):
        return _patches_times_kernel(x, kernel, stride, padding)
    if _takes_tiles(kernel, stride) and _is_wide(x.shape, kernel, padding):
        return winograd_conv(x, kernel, padding)
    size = math.prod(output_size(x.shape, kernel.shape[:2], stride, padding))
    pieces = _pieces(x.shape[0], x.shape[0] * size * kernel.size, kernel.size)
    return _over_pieces(lambda x: _lax_conv(x, kernel, stride, padding), x, pieces)


def _dense_input_gradient(x_shape, kernel, dy, stride, padding):
    """Gradient for x: at stride 1 the convolution of dy with the kernel turned by 180 degrees."""
    if stride == 1 and all(
        max(pads) < extent for pads, extent in zip(padding, kernel.shape[:2], strict=True)
    ):
        turned = kernel[::-1, ::-1].swapaxes(2, 3)
        rest = tuple(
            (extent - 1 - low, extent - 1 - high)
            for extent, (low, high) in zip(kernel.shape[:2], padding, strict=True)
        )
        return _dense_on_cpu(dy, turned, 1, rest)

    small = _is_small(x_shape, kernel, stride, padding)
    forward = _patches_times_kernel if small else _lax_conv

    def gradient(dy):
        shape = jax.ShapeDtypeStruct((dy.shape[0], *x_shape[1:]), dy.dtype)
        transpose = jax.linear_transpose(lambda x: forward(x, kernel, stride, padding), shape)
        return transpose(dy)[0]

    if small:
        return gradient(dy)
    pieces = _pieces(dy.shape[0], math.prod(dy.shape[:3]) * kernel.size, kernel.size)
    return _over_pieces(gradient, dy, pieces)


# XLA:CPU's convolution for a kernel's gradient runs 2 to 3 times faster over this many pixels at
# once than over the whole batch (measured). Each piece takes time to compile.
_PIXELS = 3136
_MOST_PIECES = 32


def _dense_kernel_gradient(x, kernel, dy, stride, padding):
    """Gradient for the kernel: by tiles where the map is wide, else over a few examples a time."""
    # On a large map one example is more than fits the cache: there tiles win in narrow layers too.
    large = math.prod(dy.shape[1:3]) > _PIXELS and min(kernel.shape[2:]) >= _NARROWEST_TILES
    if _takes_tiles(kernel, stride) and (large or _is_wide(x.shape, kernel, padding)):
        return winograd_kernel_gradient(x, dy, padding)
    pixels = math.prod(dy.shape[:3])
    pieces = min(x.shape[0], math.ceil(pixels / _PIXELS), _MOST_PIECES)

    def gradient(x, dy):
        transpose = jax.linear_transpose(lambda w: _lax_conv(x, w, stride, padding), kernel)
        return transpose(dy)[0]

    parts = [gradient(x[a:b], dy[a:b]) for a, b in _bounds(x.shape[0], pieces)]
    return functools.reduce(operator.add, parts)


def _depthwise_shifted(x, kernel, stride, padding):
    k = kernel.shape[0]
    height, width = output_size(x.shape, (k, k), stride, padding)
    padded = pad_image(x, padding)
    taps = (
        window_of(padded, i, j, height, width, stride) * kernel[i, j, 0]
        for i in range(k)
        for j in range(k)
    )
    return functools.reduce(operator.add, taps)


def _depthwise_kernel_gradient(x, kernel_shape, dy, stride, padding):
    """Gradient for the kernel as one variadic reduction: all k*k sums in a single pass."""
    k = kernel_shape[0]
    padded = pad_image(x, padding)
    height, width = dy.shape[1:3]
    products = tuple(
        window_of(padded, i, j, height, width, stride) * dy for i in range(k) for j in range(k)
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
        def term(i, j, window):
            return window * kernel[i, j, 0]

        return (
            sum_over_windows(term, (dy,), x.shape, kernel.shape[0], stride, padding),
            _depthwise_kernel_gradient(x, kernel.shape, dy, stride, padding),
        )

    return lax.platform_dependent(
        *residuals,
        dy,
        cpu=on_cpu,
        default=lambda x, w, dy: _lax_gradients(x, w, dy, stride, padding, x.shape[-1]),
    )


depthwise_conv.defvjp(_depthwise_forward, _depthwise_backward)
