"""3x3 convolutions of stride 1 by the minimal algorithm F(2x2, 3x3) of Lavin & Gray (2016).

Each 2x2 tile of the output comes from a 4x4 tile of the input: with the transforms
`V = B' d B` of the input, `U = G w G'` of the kernel, the products `M = V U` over channels, one
matrix product for each of the 16 positions in the tile, and `y = A' M A`. That is 2.25 times less
arithmetic than the sum over nine taps. The transforms add and halve, so the error in float32
stays within a few times that of the plain sum; bfloat16 would lose bits.

Maps are `[b, h, w, c]`, kernels `[3, 3, c, o]`.
"""

import jax
import jax.numpy as jnp

from medtl_jax.models.products import product_over_rows
from medtl_jax.models.windows import Padding, interleave, output_size, pad_image, window_of

_G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def tiles_of(shape: tuple[int, ...], padding: Padding) -> tuple[int, int]:
    """Rows and columns of 2x2 output tiles; the last ones may reach over the edge."""
    height, width = output_size(shape, (3, 3), 1, padding)
    return -(-height // 2), -(-width // 2)


def winograd_conv(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """3x3 convolution, stride 1: `[b, h, w, c]` and `[3, 3, c, o]` -> `[b, h', w', o]`."""
    height, width = output_size(x.shape, (3, 3), 1, padding)
    rows, columns = tiles_of(x.shape, padding)
    v = _input_tiles(x, padding)
    g = jnp.asarray(_G, kernel.dtype)
    u = jnp.einsum("ai,bj,ijco->abco", g, g, kernel)
    m = [[v[a][e] @ u[a, e] for e in range(4)] for a in range(4)]
    phases = _along_both(_output_transform, m)
    shape = (x.shape[0], rows, columns, kernel.shape[3])
    y = interleave([[phase.reshape(shape) for phase in line] for line in phases])
    return y[:, :height, :width]


def winograd_kernel_gradient(x: jax.Array, dy: jax.Array, padding: Padding) -> jax.Array:
    """Gradient `[3, 3, c, o]` of `winograd_conv` for its kernel: the transposed transforms."""
    rows, columns = tiles_of(x.shape, padding)
    _, height, width, o = dy.shape
    dy = pad_image(dy, ((0, 2 * rows - height), (0, 2 * columns - width)))
    phases = [
        [window_of(dy, a, e, rows, columns, 2).reshape(-1, o) for e in range(2)] for a in range(2)
    ]
    v, dm = _input_tiles(x, padding), _along_both(_output_transposed, phases)
    du = jnp.stack(
        [jnp.stack([product_over_rows(v[a][e], dm[a][e]) for e in range(4)]) for a in range(4)]
    )
    g = jnp.asarray(_G, du.dtype)
    return jnp.einsum("ai,bj,abco->ijco", g, g, du)


def _input_tiles(x, padding):
    """The 4x4 transformed tiles: 16 matrices `[b * rows * columns, c]`."""
    rows, columns = tiles_of(x.shape, padding)
    (top, _), (left, _) = padding
    _, height, width, c = x.shape
    # The tiles overlap by two pixels; the last row or column of them may need more zeros.
    below, right = 2 * rows + 2 - height - top, 2 * columns + 2 - width - left
    padded = pad_image(x, ((top, below), (left, right)))
    tiles = [[window_of(padded, a, e, rows, columns, 2) for e in range(4)] for a in range(4)]
    return [[v.reshape(-1, c) for v in line] for line in _along_both(_input_transform, tiles)]


def _along_both(transform, tile):
    """The transform of a tile (a list of its rows) along its columns and then its rows."""
    lines = [transform(line) for line in tile]
    columns = [transform(column) for column in zip(*lines, strict=True)]
    return [list(line) for line in zip(*columns, strict=True)]


def _input_transform(d):
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _output_transform(m):
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _output_transposed(y):
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]
