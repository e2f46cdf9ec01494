"""Grad-CAM: where in an image the evidence for a score lies, and a check of such maps."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from medtl_jax.data.catalog import Array
from medtl_jax.errors import UserError
from medtl_jax.models.inputs import InputSpec, normalize
from medtl_jax.models.registry import ModelSpec, initialize
from medtl_jax.objectives.losses import ordinal_log_probabilities
from medtl_jax.objectives.task import Task

# Positions a side that a map needs to say where something is.
_FINE_ENOUGH = 7
# In place of a target: the output that is largest.
_LARGEST = -1


@dataclasses.dataclass(frozen=True)
class RandomisedCheck:
    """Maps of a trained network beside those of the same network with random weights.

    Attributes:
      maps: float32 `[n, h, w]` in 0..1, of the trained network.
      randomised: float32 `[n, h, w]` in 0..1, of the same output of the random one.
      correlation: float64 `[n]`, Spearman's, of the two; NaN where one of them is constant.
    """

    maps: np.ndarray
    randomised: np.ndarray
    correlation: np.ndarray

    @property
    def defined(self) -> int:
        """The number of images whose correlation is defined."""
        return int(np.isfinite(self.correlation).sum())

    @property
    def mean(self) -> float:
        """The mean of the defined correlations, NaN without any."""
        return float(np.nanmean(self.correlation)) if self.defined else float("nan")


def grad_cam(
    model: nn.Module,
    variables,
    spec: ModelSpec,
    images: Array,
    target: int | np.ndarray | None,
    task: Task,
    stage: str | None = None,
    *,
    batch_size: int = 8,
) -> np.ndarray:
    """float32 maps `[n, h, w]` in 0..1 of what speaks for a score, 1 at the place of the most.

    Grad-CAM (Selvaraju et al. 2017, equations 1 and 2): the channels of a stage's map, weighted
    by the spatial mean of the score's derivative with respect to them, are added up. What is
    negative becomes 0, the rest is interpolated to the image's size and divided by its largest
    value; where nothing is positive the map is 0 everywhere.

    The score is a logit (`classify`, `multilabel`), a standardised number (`regress`) or the
    expected rank (`ordinal`).

    Args:
      variables: `{"params", "batch_stats"}`.
      images: uint8 `[n, h, w, c]`, as the data set has them.
      target: index of the output, one for all images or int `[n]`. None: the output that is
        largest in each image, the only number of `regress`, or the expected rank of `ordinal`,
        which takes no other.
      stage: whose map is read; None for `default_stage`.
      batch_size: images at a time.

    Raises:
      UserError: the task is `segment`, or there is no such stage.
      ValueError: `target` is none that the task has.
    """
    reader = _reader(model, variables, spec, images, task, stage)
    return _maps(reader, variables, images, _targets(target, task, len(images)), batch_size)[0]


def randomised_check(
    model: nn.Module,
    variables,
    spec: ModelSpec,
    images: Array,
    target: int | np.ndarray | None,
    task: Task,
    stage: str | None = None,
    *,
    seed: int = 0,
    batch_size: int = 8,
) -> RandomisedCheck:
    """The maps of `grad_cam`, and those of the same network after all its weights are drawn anew.

    The model parameter randomisation test (Adebayo et al. 2018): a map that the weights hardly
    change shows the image's edges, not what the network has learnt. Both maps are of one output,
    the trained network's. The random network's batch norms get the statistics of the first batch;
    without, the values of an untrained deep network grow or vanish from layer to layer.

    Arguments and errors are those of `grad_cam`; `seed` is of the drawn weights.
    """
    reader = _reader(model, variables, spec, images, task, stage)
    maps, chosen = _maps(reader, variables, images, _targets(target, task, len(images)), batch_size)
    drawn = _random_variables(reader, images[:batch_size], jax.random.key(seed))
    randomised, _ = _maps(reader, drawn, images, chosen, batch_size)
    correlation = [_spearman(a, b) for a, b in zip(maps, randomised, strict=True)]
    return RandomisedCheck(maps, randomised, np.asarray(correlation, np.float64))


def default_stage(model: nn.Module, variables, height: int, width: int) -> str:
    """The deepest stage with a map of 7x7 positions or more; without any, the deepest.

    `height` and `width` are those of the images.
    """
    return _deepest_fine(_map_shapes(model, variables, height, width))


@dataclasses.dataclass(frozen=True)
class _Reader:
    """What a compiled program of maps depends on besides arrays: the network and what is read."""

    model: nn.Module
    read: InputSpec
    task: Task
    stage: str
    shape: tuple[int, ...]


def _reader(model, variables, spec, images, task, stage) -> _Reader:
    if task.name == "segment":
        raise UserError("Grad-CAM is of one score an image; a mask shows itself where it looks")
    shapes = _map_shapes(model, variables, *images.shape[1:3])
    stage = stage or _deepest_fine(shapes)
    if stage not in shapes:
        raise UserError(f"no stage {stage!r} to explain; those with a map are {', '.join(shapes)}")
    return _Reader(model, spec.input, task, stage, shapes[stage])


def _map_shapes(model, variables, height, width) -> dict[str, tuple[int, ...]]:
    """stage -> `(h, w, c)` of its map, in forward order; nothing is computed."""
    order = []

    def out(variables, image):
        found = model.apply(variables, image)[1]
        order.extend(found)  # the order that a dictionary loses on its way through JAX
        return found

    image = jax.ShapeDtypeStruct((1, height, width, model.in_chans), jnp.float32)
    found = jax.eval_shape(out, variables, image)
    return {name: found[name].shape[1:] for name in order if found[name].ndim == 4}


def _deepest_fine(shapes: dict[str, tuple[int, ...]]) -> str:
    fine = [stage for stage, shape in shapes.items() if min(shape[:2]) >= _FINE_ENOUGH]
    return (fine or list(shapes))[-1]


def _targets(target: int | np.ndarray | None, task: Task, count: int) -> np.ndarray:
    """int32 `[count]` outputs to explain, `_LARGEST` where the network shall choose."""
    several_numbers = task.name == "regress" and task.outputs > 1
    if target is None and several_numbers:
        raise ValueError(f"which of {', '.join(task.classes)} to explain? Give a target")
    if target is None:
        return np.full(count, _LARGEST, np.int32)
    if task.name == "ordinal":
        raise ValueError("ordinal: the expected rank is explained; the target must be None")
    chosen = np.asarray(target)
    valid = chosen.dtype.kind in "iu" and chosen.shape in ((), (count,))
    if not valid or not ((chosen >= 0) & (chosen < task.outputs)).all():
        raise ValueError(
            f"target must be an index below {task.outputs}, or one for each of {count} images"
        )
    return np.broadcast_to(chosen.astype(np.int32), (count,))


def _maps(reader, variables, images, target, batch_size) -> tuple[np.ndarray, np.ndarray]:
    """Maps `[n, h, w]` and the outputs `[n]` that they explain."""
    size = min(batch_size, len(images))
    maps, chosen = np.empty(images.shape[:3], np.float32), np.empty(len(images), np.int32)
    for start in range(0, len(images), size or 1):
        rows = slice(start, start + size)
        batch = np.asarray(images[rows])
        count = len(batch)
        # The last batch is filled up with its first image: one program serves all.
        fill = np.r_[:count, np.zeros(size - count, np.intp)]
        found = _batch_of_maps(reader, variables, batch[fill], target[rows][fill])
        maps[rows], chosen[rows] = (np.asarray(part)[:count] for part in found)
    return maps, chosen


@functools.partial(jax.jit, static_argnums=0)
def _batch_of_maps(reader: _Reader, variables, images, target) -> tuple[jax.Array, jax.Array]:
    """`_maps` of one batch, on the device."""
    image = normalize(images, reader.read)

    def total(tap):
        logits, out = reader.model.apply(variables, image, taps={reader.stage: tap})
        chosen = jnp.where(target == _LARGEST, logits.argmax(-1).astype(jnp.int32), target)
        # Images do not touch each other in evaluation: the sum has the derivatives of each.
        return _scores(reader.task, logits, chosen).sum(), (out[reader.stage], chosen)

    tap = jnp.zeros((len(images), *reader.shape), jnp.float32)
    gradient, (maps, chosen) = jax.grad(total, has_aux=True)(tap)
    weights = gradient.mean((1, 2), keepdims=True)
    cam = nn.relu((weights * maps.astype(jnp.float32)).sum(-1))
    cam = jax.image.resize(cam, images.shape[:3], "linear")
    peak = cam.max((1, 2), keepdims=True)
    # A division by way of the reciprocal can end just above 1.
    return jnp.minimum(cam / jnp.where(peak > 0, peak, 1.0), 1.0), chosen


def _scores(task: Task, logits: jax.Array, chosen: jax.Array) -> jax.Array:
    """The scores `[b]` to explain, of logits `[b, outputs]`."""
    if task.name == "ordinal":
        probability = jnp.exp(ordinal_log_probabilities(logits, task.ordinal))
        return probability @ jnp.arange(len(task.classes), dtype=jnp.float32)
    return jnp.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0]


def _random_variables(reader: _Reader, images: Array, key: jax.Array) -> dict:
    """First values of all parameters, with the batch norms' statistics of `images`."""
    drawn = initialize(reader.model, images.shape[1], key)
    # A momentum of 0 stores the batch's own statistics.
    plain = reader.model.clone(momentum=0.0, dropout=0.0, drop_path=0.0, auxiliary=False)

    @jax.jit
    def statistics(variables, images):
        image = normalize(images, reader.read)
        return plain.apply(variables, image, True, mutable=["batch_stats"])[1]

    moved = statistics(drawn, np.asarray(images)).get("batch_stats", {})
    return {"params": drawn["params"], "batch_stats": {**drawn["batch_stats"], **moved}}


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two maps; NaN where one is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(stats.spearmanr(a.ravel(), b.ravel()).statistic)
