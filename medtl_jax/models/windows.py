"""Reads and sums over the windows of a feature map, shared by convolution and pooling."""

import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Padding = tuple[tuple[int, int], tuple[int, int]]


def pad_image(x: jax.Array, padding: Padding, value: float = 0) -> jax.Array:
    """`x` `[b, h, w, c]` with `padding` around the rows and columns, as a map of its own."""
    if not any(map(any, padding)):
        return x
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=value)
    # Without the barrier XLA fuses the padding into each of the reads that follow.
    return lax.optimization_barrier(padded)


def window_of(x: jax.Array, i: int, j: int, height: int, width: int, stride: int) -> jax.Array:
    """Every `stride`-th pixel of `x` from row i and column j: `[b, height, width, c]`."""
    b, _, _, c = x.shape
    last = (b, i + (height - 1) * stride + 1, j + (width - 1) * stride + 1, c)
    return lax.slice(x, (0, i, j, 0), last, (1, stride, stride, 1))


def output_size(
    shape: Sequence[int], window: Sequence[int], stride: int, padding: Padding
) -> tuple[int, int]:
    """Rows and columns that a `window` (height, width) leaves of a map `[b, h, w, c]`."""
    height, width = (
        (size + sum(pads) - extent) // stride + 1
        for size, pads, extent in zip(shape[1:3], padding, window, strict=True)
    )
    return height, width


def sum_over_windows(
    term: Callable[..., jax.Array],
    outputs: Sequence[jax.Array],
    shape: Sequence[int],
    window: int,
    stride: int,
    padding: Padding,
) -> jax.Array:
    """What each input pixel `[b, h, w, c]` of `shape` receives from the windows that cover it.

    `term(i, j, *pixels)` is the part of the windows that see the pixel as their tap (i, j), with
    `pixels` read from `outputs` `[b, h', w', c]` (zero beyond their edges).

    Output o covers the input pixels s o + i - p, so the pixel s q + a belongs to the outputs
    q + (a + p - i) / s of the taps i with (a + p - i) divisible by s: s * s dense sums, one for
    each phase (a, e) of the pixels, instead of one over an output spread out with zeros.
    """
    b, height, width, c = shape
    rows, columns = -(-height // stride), -(-width // stride)
    grown = [
        pad_image(
            y,
            (
                (window, max(0, rows + window - y.shape[1])),
                (window, max(0, columns + window - y.shape[2])),
            ),
        )
        for y in outputs
    ]

    def phase(a, e):
        terms = []
        for i in range(window):
            for j in range(window):
                di, dj = a + padding[0][0] - i, e + padding[1][0] - j
                if di % stride == 0 and dj % stride == 0:
                    corner = window + di // stride, window + dj // stride
                    reads = [window_of(y, *corner, rows, columns, 1) for y in grown]
                    terms.append(term(i, j, *reads))
        if not terms:
            return jnp.zeros((b, rows, columns, c), outputs[-1].dtype)
        return functools.reduce(operator.add, terms)

    if stride == 1:
        return phase(0, 0)
    phases = [[phase(a, e) for e in range(stride)] for a in range(stride)]
    return interleave(phases)[:, :height, :width]


def interleave(phases: Sequence[Sequence[jax.Array]]) -> jax.Array:
    """`[b, n h, m w, c]` whose pixel (n i + a, m j + e) is pixel (i, j) of `phases[a][e]`."""
    lines = [jnp.stack(line, axis=3) for line in phases]
    b, height, width, _, c = lines[0].shape
    full = jnp.stack(lines, axis=2)
    return full.reshape(b, height * len(phases), width * len(phases[0]), c)
