"""The order in which a split's images are drawn, as indices into device-resident arrays."""

import dataclasses
from collections.abc import Callable

import numpy as np


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Steps that come closest to one pass over the examples, at least 1."""
    return max(1, round(examples / batch_size))


def training_indices(
    seed: int,
    first_step: int,
    steps: int,
    examples: int,
    batch_size: int,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """int32 `[steps, batch_size]`: which examples each step sees.

    The steps read one endless stream of random permutations of the split, so that no example is
    dropped and all are seen equally often; a batch may span the end of one permutation and the
    start of the next. The stream is a pure function of the seed: any step can be drawn alone.

    With `groups`, int `[examples]`, the stream is made of rounds: each takes one example of every
    group, in random order, and a group's examples come in permutations of their own. So any
    stretch of whole rounds has every group equally often (a batch, up to two examples), and
    while the largest group is passed through once, a group of a third of its size is passed
    through three times.
    ValueError if there is not one group for each example.
    """
    start, stop = first_step * batch_size, (first_step + steps) * batch_size
    if groups is None:
        stream = _passes(start, stop, examples, lambda p: _rng(seed, p).permutation(examples))
    elif groups.shape != (examples,):
        raise ValueError(f"want groups [{examples}], got {groups.shape}")
    else:
        stream = _balanced(seed, start, stop, groups)
    return stream.reshape(steps, batch_size).astype(np.int32)


def _rng(*words: int) -> np.random.Generator:
    return np.random.default_rng(words)


def _passes(start: int, stop: int, length: int, draw: Callable[[int], np.ndarray]) -> np.ndarray:
    """Rows `start` to `stop` of the stream `draw(0), draw(1), ...`, each of `length` rows."""
    passes = range(start // length, -(-stop // length))
    offset = passes.start * length
    return np.concatenate([draw(p) for p in passes])[start - offset : stop - offset]


def _balanced(seed: int, start: int, stop: int, groups: np.ndarray) -> np.ndarray:
    """Positions `start` to `stop` of the stream of rounds, int `[stop - start]`."""
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    count, largest = len(members), max(map(len, members))
    first, last = start // count, -(-stop // count)

    def column(number):
        # Numbered from 1: to NumPy's seeding, (seed, p, 0) is (seed, p), the order's own.
        own = members[number]
        return _passes(first, last, len(own), lambda p: _rng(seed, p, number + 1).permutation(own))

    def order(p):
        return _rng(seed, p).permuted(np.tile(np.arange(count), (largest, 1)), axis=1)

    drawn = np.stack([column(number) for number in range(count)], axis=1)
    mixed = np.take_along_axis(drawn, _passes(first, last, largest, order), axis=1)
    return mixed.ravel()[start - first * count : stop - first * count]


@dataclasses.dataclass(frozen=True)
class EvalBatches:
    """Each example once: int32 indices `[m, b]` and their bool mask; padding repeats index 0."""

    indices: np.ndarray
    mask: np.ndarray


def evaluation_batches(examples: int, batch_size: int) -> EvalBatches:
    """Batches in order, the last one padded. ValueError for an empty split."""
    if examples < 1:
        raise ValueError("an empty split cannot be evaluated")
    count = -(-examples // batch_size)
    flat = np.arange(count * batch_size)
    mask = flat < examples
    indices = np.where(mask, flat, 0).astype(np.int32)
    return EvalBatches(indices.reshape(count, -1), mask.reshape(count, -1))
