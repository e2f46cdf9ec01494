"""The order in which a split's images are drawn, as indices into device-resident arrays."""

import dataclasses

import numpy as np


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Steps that come closest to one pass over the examples, at least 1."""
    return max(1, round(examples / batch_size))


def training_indices(
    seed: int, first_step: int, steps: int, examples: int, batch_size: int
) -> np.ndarray:
    """int32 `[steps, batch_size]`: which examples each step sees.

    The steps read one endless stream of random permutations of the split, so that no example is
    dropped and all are seen equally often; a batch may span the end of one permutation and the
    start of the next. The stream is a pure function of the seed: any step can be drawn alone.
    """
    start, stop = first_step * batch_size, (first_step + steps) * batch_size
    passes = range(start // examples, -(-stop // examples))
    stream = np.concatenate(
        [np.random.default_rng([seed, p]).permutation(examples) for p in passes]
    )
    offset = start - passes.start * examples
    return stream[offset : offset + stop - start].reshape(steps, batch_size).astype(np.int32)


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
