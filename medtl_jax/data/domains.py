"""A second domain beside the data: the target of an adaptation, held against the source.

The target's labels may score a network and nothing else. What trains or chooses gets
`unlabelled(split)`, in which no label is left.
"""

import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from medtl_jax.data.catalog import Array, Dataset, DataSpec, Split
from medtl_jax.data.loader import training_indices
from medtl_jax.data.streams import Streamed, is_streamed
from medtl_jax.errors import UserError

# Images looked at together: streamed ones are decoded for it.
_BLOCK = 64
# From so many times on the sizes of the domains are worth a note.
_UNEQUAL = 10
# Up to this share of its test images may be among the target's training images: published sets
# have a few images twice.
_TWICE = 0.01

# The digest of an image, None of one value throughout, by domain and channels and then by its id.
Seen = dict[tuple[str, int], dict[str, bytes | None]]


@dataclasses.dataclass(frozen=True)
class Domains:
    """Two sets that can be trained on side by side.

    Attributes:
      source, target: with the same task, classes and number of channels.
      notes: what was done to make them so, and what one has to know of them.
    """

    source: Dataset
    target: Dataset
    notes: tuple[str, ...]

    @property
    def scored(self) -> tuple[str, ...]:
        """The splits of the target whose labels are known, by which a network can be scored."""
        return tuple(name for name, split in self.target.splits.items() if has_labels(split))


def has_labels(split: Split) -> bool:
    """Returns whether a split has targets: one of `unlabelled`, or read without them, has none."""
    return 0 not in split.target.shape[1:]


def unlabelled(split: Split) -> Split:
    """Returns the split's images with nothing that says what they show.

    The target is int8 `[n, 0]`, which has the length that a set needs and no value. Masks and
    other arrays are gone, and the ids are numbers, since a path often has its class in it.
    """
    ids = np.array([f"{row:06d}" for row in range(len(split))])
    return Split(split.images, np.zeros((len(split), 0), np.int8), ids, split.patients)


def target_indices(
    seed: int, first_step: int, steps: int, examples: int, batch_size: int
) -> np.ndarray:
    """Returns int32 `[steps, batch_size]`: the target images that each step sees.

    They are those of `loader.training_indices` in an order of their own. With the source's order,
    two sets of one length would give each step the same rows of both, and so of two sets that are
    sorted alike the same classes: the target's labels would be in the batches.

    Args:
      seed: of the run, 0 or more.
      first_step, steps, examples, batch_size: as for `loader.training_indices`.
    """
    own = np.random.SeedSequence((seed, zlib.crc32(b"target"))).generate_state(1)
    return training_indices(int(own[0]), first_step, steps, examples, batch_size)


def check_domains(source: Dataset, target: Dataset, seen: Seen | None = None) -> Domains:
    """Returns both sets with the same classes in the same order and the same number of channels.

    The target's labels are mapped where its classes stand in another order. Grey images beside
    colour ones are repeated in three channels, without a copy of them.

    Images are compared pixel by pixel, at the size they were read at. An image of one value
    throughout, such as an empty scan, tells nothing and is not counted.

    Args:
      source: with labels; its splits `train` and, where there is one, `val` are compared.
      target: `train` and, where its labels are to score a network, `test`; any of them may have
        no labels (see `has_labels`).
      seen: the images that earlier calls have looked at, for calls with draws from the same two
        sets: only others are decoded. It is changed here; None keeps nothing.

    Raises:
      UserError: another task; classes of other names, or ranks in another order; a target without
        training images; a target that has all training images of the source among its own; more
        than a few of the target's test images among its training images, or one among the images
        that the source trains or chooses on.
      ValueError: the sets were read at different sizes.
    """
    if source.spec.task != target.spec.task:
        raise UserError(
            f"the source {source.spec.name} is for task={source.spec.task} and the target "
            f"{target.spec.name} for task={target.spec.task}: choose sets of one task"
        )
    if "train" not in target.splits or not len(target.splits["train"]):
        raise UserError(f"the target {target.spec.name} has no training images to adapt to")
    sizes = {part.images.shape[1:3] for half in (source, target) for part in half.splits.values()}
    if len(sizes) > 1:
        raise ValueError(f"source and target were read at different sizes: {sizes}")
    target, mapped = _mapped(source.spec, target)
    source, target, widened = _same_channels(source, target)
    shared = _check_images_differ(source, target, {} if seen is None else seen)
    notes = mapped + widened + shared + _size_note(source, target)
    return Domains(source, target, notes)


def _mapped(like: DataSpec, target: Dataset) -> tuple[Dataset, tuple[str, ...]]:
    """The target with its classes in the order of the source's, and a note where they moved."""
    names = target.spec.classes
    if names == like.classes:
        return target, ()
    if sorted(names) != sorted(like.classes):
        raise other_classes(like, target.spec.name, names)
    if like.task == "ordinal":
        raise UserError(
            f"the ranks of the source {like.name} ({', '.join(like.classes)}) and the target "
            f"{target.spec.name} ({', '.join(names)}) are in different orders: name those of the "
            "target in data.classes, from the lowest to the highest"
        )
    splits = {
        name: _reordered(like, names, split) if has_labels(split) else split
        for name, split in target.splits.items()
    }
    note = f"the target's classes ({', '.join(names)}) are put into the source's order"
    return Dataset(dataclasses.replace(target.spec, classes=like.classes), splits), (note,)


def other_classes(like: DataSpec, name: str, names: Sequence[str]) -> UserError:
    """Returns the error for classes `names` of the target `name` that are not those of `like`."""
    return UserError(
        f"the classes of the source {like.name} ({', '.join(like.classes)}) and of the target "
        f"{name} ({', '.join(names)}) have different names: rename one set's classes to the other's"
    )


def _reordered(like: DataSpec, names: Sequence[str], split: Split) -> Split:
    """The split whose classes, findings or numbers `names` are put into the order of `like`."""
    if like.task in ("multilabel", "regress"):
        columns = [names.index(name) for name in like.classes]
        return dataclasses.replace(split, target=split.target[:, columns])
    places = np.array([like.classes.index(name) for name in names])
    if like.task != "segment":
        return dataclasses.replace(split, target=places[split.target].astype(np.int32))
    lookup = functools.partial(np.take, places.astype(np.uint8))
    extra = {
        name: _each(lookup, array, array.shape[1:]) if name == "mask2" else array
        for name, array in split.extra.items()
    }
    masks = _each(lookup, split.target, split.target.shape[1:])
    return dataclasses.replace(split, target=masks, extra=extra)


def _each(change: Callable[[np.ndarray], np.ndarray], array: Array, row: tuple[int, ...]) -> Array:
    """The array with `change` made to its rows, which become `row`; a streamed one stays so."""
    if not is_streamed(array):
        return change(array)
    return Streamed(range(len(array)), lambda index: change(array[index]), row)


def _widened(images: Array, channels: int) -> Array:
    """Images of so many channels, grey ones repeated; nothing is copied or decoded."""
    if images.shape[-1] == channels:
        return images
    row = (*images.shape[1:-1], channels)

    def repeat(pixels: np.ndarray) -> np.ndarray:
        return np.broadcast_to(pixels, (*pixels.shape[:-1], channels))

    return _each(repeat, images, row)


def with_channels(splits: Mapping[str, Split], channels: int) -> dict[str, Split]:
    """Returns the splits with so many channels, grey images repeated without a copy of them."""
    return {
        name: dataclasses.replace(split, images=_widened(split.images, channels))
        for name, split in splits.items()
    }


def most_channels(splits: Iterable[Split]) -> int:
    """Returns 3 where a split has colour images, else 1."""
    return max(split.images.shape[-1] for split in splits)


def _same_channels(source: Dataset, target: Dataset) -> tuple[Dataset, Dataset, tuple[str, ...]]:
    """Both sets with the most channels of any split, and a note where grey images were repeated."""
    both, notes = {"source": source, "target": target}, []
    channels = most_channels(split for half in both.values() for split in half.splits.values())
    for whose, half in both.items():
        if any(split.images.shape[-1] != channels for split in half.splits.values()):
            notes.append(f"the {whose}'s images are grey, repeated in three channels")
        both[whose] = Dataset(half.spec, with_channels(half.splits, channels))
    return both["source"], both["target"], tuple(notes)


def _check_images_differ(source: Dataset, target: Dataset, seen: Seen) -> tuple[str, ...]:
    """Notes where images are in both domains, or in both splits of the target.

    Raises:
      UserError: as `check_domains`.
    """
    train, val = (_digests(source, name, "source", seen) for name in ("train", "val"))
    goal, tested = (_digests(target, name, "target", seen) for name in ("train", "test"))
    # Of one set the source may be less than the target: drawn, or without the images of its `val`.
    if train and train.keys() <= goal.keys():
        raise UserError(
            f"all training images of the source {source.spec.name} are among those of the target "
            f"{target.spec.name}: name another set as the target"
        )
    for name, learned in (("train", train), ("val", val)):
        if both := sorted(learned.keys() & tested.keys()):
            raise UserError(
                f"{len(both)} test images of the target {target.spec.name} are in the split "
                f"{name} of the source {source.spec.name}, the first is {tested[both[0]]} "
                f"({learned[both[0]]} there): remove them from one of the sets"
            )
    twice = _check_tested_alone(target, goal, tested)
    common, chosen = (len(found.keys() & goal.keys()) for found in (train, val))
    notes = [f"{common} images are in the training images of both domains"] if common else []
    if chosen:
        notes.append(
            f"{chosen} validation images of the source are in the training images of the target"
        )
    return (*notes, *twice)


def _check_tested_alone(
    target: Dataset, goal: Mapping[bytes, str], tested: Mapping[bytes, str]
) -> tuple[str, ...]:
    """A note on the few test images that the target also trains on; UserError for more."""
    both = sorted(goal.keys() & tested.keys())
    if not both:
        return ()
    what = (
        f"{len(both)} of {len(target.splits['test'])} test images of the target "
        f"{target.spec.name} are in its training images, the first is {tested[both[0]]} "
        f"({goal[both[0]]} there)"
    )
    if len(both) > _TWICE * len(target.splits["test"]):
        raise UserError(f"{what}: remove them from one of its splits")
    return (what,)


def _digests(dataset: Dataset, name: str, whose: str, seen: Seen) -> dict[bytes, str]:
    """The id of an image by the digest of its pixels, without images of one value throughout.

    Empty for a split that is not there. Images that are not `seen` yet are added to it.
    """
    if name not in dataset.splits:
        return {}
    split = dataset.splits[name]
    ids, known = split.ids.tolist(), seen.setdefault((whose, split.images.shape[-1]), {})
    new = [row for row, one in enumerate(ids) if one not in known]
    for start in range(0, len(new), _BLOCK):
        rows = new[start : start + _BLOCK]
        for row, pixels in zip(rows, np.ascontiguousarray(split.images[rows]), strict=True):
            tells = (pixels != pixels.flat[0]).any()
            digest = hashlib.blake2b(pixels, digest_size=16).digest() if tells else None
            known[ids[row]] = digest
    found: dict[bytes, str] = {}
    for one in ids:
        if known[one] is not None:
            found.setdefault(known[one], one)
    return found


def _size_note(source: Dataset, target: Dataset) -> tuple[str, ...]:
    """A note where one domain is much larger than the other."""
    ours, theirs = len(source.splits["train"]), len(target.splits["train"])
    if max(ours, theirs) < _UNEQUAL * min(ours, theirs):
        return ()
    return (
        f"an epoch passes once over {ours} source images and {ours / theirs:.3g} times over "
        f"{theirs} target images",
    )
