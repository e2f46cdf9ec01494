"""Outputs of the network for a whole split, each example exactly once."""

import functools
from collections.abc import Callable, Iterable, Iterator

import flax.linen as nn
import jax
import numpy as np

from medtl_jax.data.loader import evaluation_batches
from medtl_jax.data.streams import is_streamed, stream_batches
from medtl_jax.models.registry import ModelSpec
from medtl_jax.training.devices import DataMesh
from medtl_jax.training.step import LOGITS, eval_step

# `fn(variables, images, then)`, see `make_predict`.
Predict = Callable[..., np.ndarray]
Reduce = Callable[[np.ndarray], np.ndarray]


def make_predict(
    model: nn.Module,
    spec: ModelSpec,
    mesh: DataMesh,
    batch_size: int,
    start: str = "",
    output: str = LOGITS,
) -> Predict:
    """`fn(variables, images uint8 [n, h, w, c]) -> logits [n, ...]`, as `step.eval_step` has them.

    The last batch is padded and its padding thrown away, so one compiled program serves every
    split. Images may be a NumPy array, lie on the device, or be streamed. A third argument
    `then` is called with the logits of each batch; what it makes of them, `[b, ...]`, is returned
    in their place, so that the logits of all pixels of a split are never held together. With
    `start` the images are maps before that part of the network, see `Backbone`; `output` is as in
    `step.eval_step`.
    """
    streamed_step, resident_step = _programs(model, spec, mesh, start, output)

    def predict(variables, images, then: Reduce = lambda logits: logits):
        # They may come from a checkpoint, which knows nothing of these devices.
        variables = mesh.place(variables, mesh.replicated)
        batches = evaluation_batches(len(images), batch_size)
        if is_streamed(images):
            own = batches.indices[:, mesh.own_rows(batch_size)]
            parts = (
                streamed_step(variables, mesh.place_rows(batch["image"], batch_size))
                for batch in stream_batches({"image": images}, own)
            )
        else:
            images = mesh.place(images, mesh.replicated)
            parts = (
                resident_step(variables, images, mesh.place(rows, mesh.batched))
                for rows in batches.indices
            )
        return joined(map(then, fetched(parts)), len(images))

    return predict


# Networks of the same fields, as the members of an ensemble, share what is compiled.
@functools.lru_cache(maxsize=16)
def _programs(model: nn.Module, spec: ModelSpec, mesh: DataMesh, start: str, output: str):
    """`eval_step` of images, and of rows of images that lie on the device."""
    step = functools.partial(eval_step, model=model, spec=spec, start=start, output=output)
    streamed = jax.jit(step, out_shardings=mesh.replicated)
    resident = jax.jit(
        lambda variables, images, rows: step(variables, images[rows]), out_shardings=mesh.replicated
    )
    return streamed, resident


def is_finite(values: np.ndarray) -> bool:
    """Whether `values` `[n, ...]` hold no NaN and no infinity, looked at row by row."""
    return all(np.isfinite(row).all() for row in values)


def joined(parts: Iterable[np.ndarray], count: int) -> np.ndarray:
    """The first `count` rows of the parts; what follows them is padding."""
    found, start = None, 0
    for part in parts:
        if found is None:
            found = np.empty((count, *part.shape[1:]), part.dtype)
        stop = min(start + len(part), count)
        found[start:stop] = part[: stop - start]
        start = stop
    return found


def fetched(parts: Iterable[jax.Array]) -> Iterator[np.ndarray]:
    """The parts on the host, each fetched while the device works on the one after it."""
    before = None
    for part in parts:
        if before is not None:
            yield np.asarray(before)
        before = part
    yield np.asarray(before)
