"""Test-time augmentation: what the network says of several views of an image, averaged.

The first view is the image itself, the others are drawn by the transforms of the section
`augment`. Of a segmentation they are drawn by those that leave each pixel whole: flips and quarter
turns, which the scores of the pixels can be moved back from without interpolation, and intensities.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medtl_jax.augment import geometry, intensity
from medtl_jax.augment.policy import Augment, active_transforms, make_augment, make_placements
from medtl_jax.data.catalog import Array
from medtl_jax.data.loader import evaluation_batches
from medtl_jax.data.streams import is_streamed, stream_batches
from medtl_jax.errors import UserError
from medtl_jax.keys import named_key
from medtl_jax.models.registry import ModelSpec
from medtl_jax.training.devices import DataMesh
from medtl_jax.training.inference import Predict, Reduce, fetched, joined
from medtl_jax.training.step import eval_step

# What moves every pixel onto a pixel, and can be undone.
_UNDONE = ("flip_horizontal", "flip_vertical", "quarter_turns")
# What takes pixels away: nothing is left to tell their class by.
_HOLES = ("cutout",)

# `fn(variables, images [b, h, w, c]) -> logits [b, ...]`.
_Apply = Callable[..., jax.Array]


def view_transforms(augment: Mapping, masks: bool) -> dict[str, float]:
    """`{name: strength}` of the transforms of `config.augment` by which views are drawn.

    Args:
      augment: `config.augment`.
      masks: whether a class is predicted for each pixel.

    Raises:
      UserError: as `policy.active_transforms`.
    """
    on = active_transforms(augment)
    return {name: on[name] for name in on if _keeps_pixels(name)} if masks else on


def _keeps_pixels(name: str) -> bool:
    return name in _UNDONE or (name not in geometry.LIMITS and name not in _HOLES)


def _view_settings(augment: Mapping, masks: bool) -> Mapping:
    """The `config.augment` by which views are drawn.

    Where RandAugment would draw more transforms than masks leave, it draws all of these.
    """
    if not masks:
        return augment
    # These are the strengths at RandAugment's magnitude.
    on = view_transforms(augment, masks)
    left = len([name for name in on if name not in _UNDONE])
    return {**on, "randaugment": min(augment.get("randaugment", 0), left)}


def check_views(augment: Mapping, count: int, masks: bool, channels: int | None = None) -> None:
    """UserError where `count` views are wanted, and not to be had of images of so many channels.

    `channels` None: not known yet. `augment` and `masks` are as for `view_transforms`.
    """
    if not count:
        return
    if count == 1:
        raise UserError("eval.tta=1 would be the image alone; set 0 for that, or 2 or more views")
    on = view_transforms(augment, masks)
    if not on:
        needed = (
            "flips, quarter turns and intensities, all that masks can be moved back from"
            if masks
            else "transforms of the section augment"
        )
        raise UserError(f"eval.tta={count} draws views by {needed}: all are 0 here; set eval.tta=0")
    colour = [f"augment.{name}" for name in on if name in intensity.COLOUR]
    if channels == 1 and colour:
        raise UserError(
            f"eval.tta={count} would change colours ({', '.join(colour)}), and these images are "
            "grey; set eval.tta=0"
        )


def make_view_predict(
    model: nn.Module,
    spec: ModelSpec,
    mesh: DataMesh,
    batch_size: int,
    *,
    augment: Mapping,
    views: int,
    seed: int,
    ids: Sequence[str],
    masks: bool = False,
    finish: Reduce = lambda mean: mean,
) -> Predict:
    """`fn(variables, images uint8 [n, h, w, c], then)` that averages over `views` of each image.

    It is as `inference.make_predict` describes, but `then` is called with the logits of each view
    of a batch, and the mean of what it makes of them is returned. An image's views depend on the
    seed and its id alone: they are the same in any batch, and among any other images.

    Args:
      model, spec, mesh, batch_size: as for `make_predict`.
      augment: `config.augment`; images are not mixed.
      views: of each image, the image itself among them, at least 2.
      seed: of the draws.
      ids: of the n images.
      masks: whether the logits are of pixels, `[b, h, w, k]`; they are moved back to where their
        pixels were.
      finish: called with each batch of the means; what it makes of them is returned in their
        place, so that those of all pixels of a split need not be held together.

    Raises:
      UserError: as `check_views`.
    """
    check_views(augment, views, masks)
    settings = _view_settings(augment, masks)
    step = functools.partial(
        _pixel_step if masks else _image_step,
        apply=functools.partial(eval_step, model=model, spec=spec),
        augment=make_augment(settings),
        **({"placements": make_placements(settings)} if masks else {}),
    )
    step = jax.jit(step, out_shardings=mesh.replicated)
    key, words = named_key(jax.random.key(seed), "views"), _id_words(ids)

    def logits(variables, images: Array) -> Iterator[jax.Array]:
        for batch in _batches({"image": images, "word": words}, batch_size):
            placed = jax.device_put(batch, mesh.batched)
            for view in range(views):
                keys = (key, np.int32(view), placed["word"])
                yield step(variables, placed["image"], keys)

    def predict(variables, images: Array, then: Reduce = lambda logits: logits):
        # They may come from a checkpoint, which knows nothing of these devices.
        variables = jax.device_put(variables, mesh.replicated)
        scores = map(then, fetched(logits(variables, images)))
        return joined(map(finish, _means(scores, views)), len(images))

    return predict


def _id_words(ids: Sequence[str]) -> np.ndarray:
    """uint32 `[n]`, by which the draws of the images differ; two that share one draw alike."""
    digests = (hashlib.sha256(str(name).encode()).digest() for name in ids)
    return np.array([int.from_bytes(digest[:4], "little") for digest in digests], np.uint32)


def _batches(arrays: Mapping[str, Array], batch_size: int) -> Iterable[dict[str, np.ndarray]]:
    """The batches of `loader.evaluation_batches`."""
    indices = evaluation_batches(len(arrays["image"]), batch_size).indices
    if is_streamed(arrays["image"]):
        return stream_batches(arrays, indices)
    return ({name: array[rows] for name, array in arrays.items()} for rows in indices)


def _keys(key: jax.Array, view: jax.Array, words: jax.Array) -> jax.Array:
    """A key for each image `[b]` of this view."""
    fold_in = functools.partial(jax.random.fold_in, jax.random.fold_in(key, view))
    return jax.vmap(fold_in)(words)


def _image_step(
    variables, images: jax.Array, keys: tuple, *, apply: _Apply, augment: Augment
) -> jax.Array:
    """The logits of one view; `keys` are the arguments of `_keys`. View 0 is the image itself."""

    def one(key, image):
        # A batch of its own: the draw then does not know of its place among the others.
        return augment(key, image[None])[0][0]

    drawn = jax.vmap(one)(_keys(*keys), images)
    return apply(variables, jnp.where(keys[1] == 0, images.astype(jnp.float32), drawn))


def _pixel_step(
    variables,
    images: jax.Array,
    keys: tuple,
    *,
    apply: _Apply,
    augment: Augment,
    placements: Callable[..., geometry.Placement],
) -> jax.Array:
    """As `_image_step`, the logits of the pixels moved back to where they were."""
    logits = _image_step(variables, images, keys, apply=apply, augment=augment)

    def back(key, logits):
        placement = jax.tree.map(lambda leaf: leaf[0], placements(key, 1, images.shape[1:3]))
        if placement.matrix is None:
            return logits
        # Flips and quarter turns about the centre are orthogonal: the transpose undoes them.
        return geometry.move_image(placement.replace(matrix=placement.matrix.T), logits)

    return jnp.where(keys[1] == 0, logits, jax.vmap(back)(_keys(*keys), logits))


def _means(scores: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The mean of each `count` arrays in a row, with their dtype."""
    scores = iter(scores)
    for first in scores:
        total = first.astype(np.float32)
        for score in itertools.islice(scores, count - 1):
            total += score
        yield (total / count).astype(first.dtype)
