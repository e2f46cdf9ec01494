"""Which members of an ensemble are on which device, and their arrays put there."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = Any


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which members are on which device.

    Attributes:
      devices: those in use, as few as the members need without one waiting for another.
      rows: of each device, the same number of members; the last is repeated to fill up.
    """

    devices: tuple[jax.Device, ...]
    rows: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def sharding(self) -> NamedSharding:
        """Of arrays whose leading axis is that of the devices."""
        return NamedSharding(Mesh(np.array(self.devices), ("member",)), PartitionSpec("member"))

    @property
    def width(self) -> int:
        """Members of a device."""
        return len(self.rows[0])

    def turns(self) -> list["Layout"]:
        """Layouts of one member a device, which together are this one."""
        return [
            Layout(self.devices, tuple((row[place],) for row in self.rows))
            for place in range(self.width)
        ]

    def places(self) -> dict[int, tuple[int, int]]:
        """Member -> device and row of its result, once for each."""
        found: dict[int, tuple[int, int]] = {}
        for device, row in enumerate(self.rows):
            for place, member in enumerate(row):
                found.setdefault(member, (device, place))
        return found


def make_layout(count: int, devices: Sequence[jax.Device]) -> Layout:
    """The layout of `count` members, on fewer than, as many as, or more than there are devices."""
    width = -(-count // len(devices))
    used = -(-count // width)
    rows = [
        tuple(min(first * width + place, count - 1) for place in range(width))
        for first in range(used)
    ]
    return Layout(tuple(devices[:used]), tuple(rows))


def divided(layout: Layout, trees: Sequence[Tree]) -> Tree:
    """The trees of all members as one, each on its device, with axes of devices and of members."""
    parts = []
    for device, row in zip(layout.devices, layout.rows, strict=True):
        own = jax.device_put([trees[member] for member in row], device)
        parts.append(_stacked(own))
    return _assembled(parts, layout.sharding)


def copied(layout: Layout, tree: Tree) -> Tree:
    """The tree on each device, with a leading axis of the devices."""
    parts = [_raised(jax.device_put(tree, device)) for device in layout.devices]
    return _assembled(parts, layout.sharding)


def member_of(tree: Tree, device: int, place: int) -> Tree:
    """The tree of one member, on the device where it is."""

    def shard(leaf):
        shards = leaf.addressable_shards
        return next(s for s in shards if (s.index[0].start or 0) == device).data

    return _picked(jax.tree.map(shard, tree), jnp.int32(place))


# A whole tree at a time: leaf by leaf the calls take longer than what they do.
@jax.jit
def _stacked(trees: list[Tree]) -> Tree:
    """The trees as one, with an axis of one device and one of the trees."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves)[None], *trees)


@jax.jit
def _raised(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf[None], tree)


@jax.jit
def _picked(tree: Tree, place: jax.Array) -> Tree:
    return jax.tree.map(lambda leaf: leaf[0, place], tree)


def _assembled(parts: list[Tree], sharding: NamedSharding) -> Tree:
    """The trees of the devices, whose leading axes are 1, as one."""

    def of_all(*leaves):
        shape = (len(leaves), *leaves[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, list(leaves))

    return jax.tree.map(of_all, *parts)
