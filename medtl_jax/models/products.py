"""Matrix products over the pixels of a feature map: the 1x1 convolution and its gradient."""

import jax
from jax import lax

# Up to this many columns on either side, XLA:CPU's `a' d` takes half the processor time in pieces
# of a few hundred rows, which stay in the cache (measured); wider ones take it whole.
_NARROW = 64
_PIECE = 128


def product_over_rows(a: jax.Array, d: jax.Array) -> jax.Array:
    """`a' d` `[m, n]` of two tall matrices `[rows, m]` and `[rows, n]`."""
    # The wider matrix stands on the right: up to twice as fast.
    if a.shape[1] > d.shape[1]:
        return product_over_rows(d, a).T
    rows = a.shape[0]
    pieces = _divisor(rows, rows // _PIECE) if d.shape[1] <= _NARROW else 1
    if pieces == 1:
        return lax.dot_general(a, d, (((0,), (0,)), ((), ())))
    a, d = (part.reshape(pieces, rows // pieces, part.shape[1]) for part in (a, d))
    return lax.dot_general(a, d, (((1,), (1,)), ((0,), (0,)))).sum(0)


def _divisor(count: int, limit: int) -> int:
    """The largest divisor of `count` up to `limit`, at least 1."""
    return next((n for n in range(limit, 1, -1) if count % n == 0), 1)


@jax.custom_vjp
def pointwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """1x1 convolution, stride 1: `[b, h, w, c]` and `[1, 1, c, o]` -> `[b, h, w, o]`.

    A matrix product on every platform: XLA:CPU's convolution computes the weight gradient of
    this case 8 to 16 times slower. The gradient is written out because the transpose that
    autodiff makes of a product, `(dy' x)'`, runs 2 to 5 times slower on CPU than `x' dy`.
    """
    c, o = kernel.shape[2:]
    return (x.reshape(-1, c) @ kernel.reshape(c, o)).reshape(*x.shape[:3], o)


def _pointwise_forward(x, kernel):
    return pointwise_conv(x, kernel), (x, kernel)


def _pointwise_backward(residuals, dy):
    x, kernel = residuals
    c, o = kernel.shape[2:]
    rows, dy = x.reshape(-1, c), dy.reshape(-1, o)
    kernel_gradient = lax.platform_dependent(
        rows, dy, cpu=product_over_rows, default=lambda a, d: a.T @ d
    )
    return (dy @ kernel.reshape(c, o).T).reshape(x.shape), kernel_gradient.reshape(kernel.shape)


pointwise_conv.defvjp(_pointwise_forward, _pointwise_backward)
