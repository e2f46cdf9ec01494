"""Which members of an ensemble are on which device, and their arrays put there."""

import dataclasses
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

    @property
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

    def of_all(*leaves):
        parts = []
        for device, row in zip(layout.devices, layout.rows, strict=True):
            own = [jax.device_put(leaves[member], device) for member in row]
            parts.append(jnp.stack(own)[None])
        return _assembled(parts, layout.sharding)

    return jax.tree.map(of_all, *trees)


def copied(layout: Layout, tree: Tree) -> Tree:
    """The tree on each device, with a leading axis of the devices."""

    def on_each(leaf):
        parts = [jax.device_put(leaf, device)[None] for device in layout.devices]
        return _assembled(parts, layout.sharding)

    return jax.tree.map(on_each, tree)


def _assembled(parts: list[jax.Array], sharding: NamedSharding) -> jax.Array:
    shape = (len(parts), *parts[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def member_of(tree: Tree, device: int, place: int) -> Tree:
    """The tree of one member, on the device where it is."""

    def own(leaf):
        found = next(s for s in leaf.addressable_shards if (s.index[0].start or 0) == device)
        return found.data[0, place]

    return jax.tree.map(own, tree)
