"""Exact statistics of the batch norms, computed from training images after training.

Running averages lag behind the weights and weigh the last batches most. Here each batch's own
statistics are averaged with the weights as they are ("precise BN", Wu & Johnson 2021, section 3).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from medtl_jax.data.catalog import Array
from medtl_jax.data.streams import Streamed, stream_batches
from medtl_jax.models.inputs import normalize
from medtl_jax.models.registry import ModelSpec
from medtl_jax.training.devices import DataMesh

# `fn(variables, images, *batches)`, see `make_reestimate`.
Reestimate = Callable[..., dict[str, Any]]
# Path of a norm -> its statistic `[c]`.
Moments = dict[tuple[str, ...], jax.Array]


@flax.struct.dataclass
class _Totals:
    """Of the batches so far: their images, the means of their moments, the spread of the means.

    A batch weighs as many images as it has. The spread is the variance of the batches' means about
    their mean, so `var + spread` is `E[var_b + mean_b^2] - mean^2` without the difference of two
    large numbers (Welford 1962).
    """

    count: jax.Array
    mean: Moments
    var: Moments
    spread: Moments


def make_reestimate(
    model: nn.Module,
    spec: ModelSpec,
    stages: Collection[str],
    mesh: DataMesh,
    start: str = "",
) -> Reestimate:
    """`fn(variables, images, *batches) -> variables` with exact statistics of norms in `stages`.

    Each batch passes in training mode through these stages, without dropout or drop-path, and in
    evaluation mode through all others, whose statistics stay as they are to the bit. The mean and
    variance that come out are those of all batches together as they were normalised: for the first
    norm, of all the examples. `variables` is returned as it is where `stages` have no norms.

    Args:
      model: its `momentum`, `dropout` and `drop_path` are without effect.
      spec: the images' normalisation.
      stages: names as in `variables["params"]`.
      mesh: over which a batch is divided; one that does not divide evenly is on every device.
      start: the images are the maps `[n, h, w, c]` before this stage, see `Backbone`.

    `fn` takes the images, uint8 `[n, h, w, c]` or maps, on the host, on the device or streamed,
    and as `batches` their indices, int `[m, b]` for each b, see `batches_of_all`. The memory in use
    does not grow with m. The result depends on the arguments alone, and on the number of devices
    up to rounding. It raises ValueError where there are no batches, and where the norms of a stage
    in `stages` are not run (they come before `start`).
    """
    model = model.clone(momentum=0.0, dropout=0.0, drop_path=0.0)

    def moments(variables, x) -> tuple[Moments, Moments]:
        x = x if start else normalize(x, spec.input)
        frozen = tuple(stage for stage in variables["params"] if stage not in stages)
        # The one dropout left, of GoogLeNet's auxiliary heads, has no norm after it.
        rngs = {"dropout": jax.random.key(0)}
        _, moved = model.apply(
            variables, x, True, frozen, start=start, rngs=rngs, mutable=["batch_stats"]
        )
        old, new = (_of_stages(tree["batch_stats"], stages) for tree in (variables, moved))
        # A norm that is not run hands its statistics back as the same objects.
        idle = sorted({path[0] for path in new if new[path] is old[path]})
        if idle:
            raise ValueError(f"the norms of {', '.join(idle)} are not run (start={start!r})")
        return _split(new)

    @jax.jit
    def step(variables, totals, x):
        return _merged(totals, len(x), *moments(variables, x))

    def reestimate(variables, images, *batches):
        statistics = _of_stages(variables["batch_stats"], stages)
        if not any(map(len, batches)):
            raise ValueError("no batches to compute the statistics from")
        if not statistics:
            return variables
        totals = jax.device_put(_no_totals(statistics), mesh.replicated)
        placed = jax.device_put(dict(variables), mesh.replicated)
        for x in _taken(images, batches, mesh):
            before, totals = totals, step(placed, totals, x)
            # Without waiting, the batches of steps not yet run would pile up.
            jax.block_until_ready(before)
        found = flatten_dict(variables["batch_stats"]) | _statistics(totals)
        return {**variables, "batch_stats": unflatten_dict(found)}

    return reestimate


def batches_of_all(count: int, size: int, seed: int) -> tuple[np.ndarray, ...]:
    """int32 `[m, size]` and `[1, r]`: each of `count` images once, in a random order.

    r < `size` are left after the whole batches; what would be empty is not there.
    """
    # Of a set in the order of its classes, a batch would be of one class.
    order = np.random.default_rng(seed).permutation(count).astype(np.int32)
    whole = count // size * size
    parts = order[:whole].reshape(-1, size), order[None, whole:]
    return tuple(part for part in parts if part.size)


def _of_stages(batch_stats: Mapping, stages: Collection[str]) -> dict[tuple[str, ...], jax.Array]:
    flat = flatten_dict(batch_stats)
    return {path: leaf for path, leaf in flat.items() if path[0] in stages}


def _split(statistics: Mapping[tuple[str, ...], jax.Array]) -> tuple[Moments, Moments]:
    """The means and the variances among flat statistics, by the paths of their norms."""
    mean, var = (
        {path[:-1]: leaf for path, leaf in statistics.items() if path[-1] == name}
        for name in ("mean", "var")
    )
    return mean, var


def _no_totals(statistics: Mapping[tuple[str, ...], jax.Array]) -> _Totals:
    mean, var = jax.tree.map(jnp.zeros_like, _split(statistics))
    return _Totals(jnp.zeros((), jnp.float32), mean, var, jax.tree.map(jnp.zeros_like, mean))


def _merged(totals: _Totals, images: int, mean: Moments, var: Moments) -> _Totals:
    """The totals with one more batch, of so many images."""
    count = totals.count + images
    weight = images / count

    def average(old, new):
        return jax.tree.map(lambda o, n: o + (n - o) * weight, old, new)

    new_mean = average(totals.mean, mean)
    products = jax.tree.map(lambda m, o, n: (m - o) * (m - n), mean, totals.mean, new_mean)
    return _Totals(
        count, new_mean, average(totals.var, var), spread=average(totals.spread, products)
    )


def _statistics(totals: _Totals) -> dict[tuple[str, ...], jax.Array]:
    found = {(*path, "mean"): mean for path, mean in totals.mean.items()}
    for path, var in totals.var.items():
        found[(*path, "var")] = var + totals.spread[path]
    return found


def _taken(
    images: Array | jax.Array, batches: Iterable[np.ndarray], mesh: DataMesh
) -> Iterator[jax.Array]:
    """The rows of the images at each row of all `batches`, placed on the mesh."""
    if isinstance(images, jax.Array):
        images = jax.device_put(images, mesh.replicated)
    for indices in batches:
        even = indices.shape[1] % mesh.mesh.devices.size == 0
        placing = mesh.batched if even else mesh.replicated
        if isinstance(images, Streamed):
            taken = (batch["image"] for batch in stream_batches({"image": images}, indices))
        elif isinstance(images, jax.Array):
            taken = (images[jax.device_put(rows, placing)] for rows in indices)
        else:
            taken = (images[rows] for rows in indices)
        for x in taken:
            yield jax.device_put(x, placing)
