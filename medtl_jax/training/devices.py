"""The mesh over which a batch is divided, and what lives where on it."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medtl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DataMesh:
    """A one-axis mesh `data`: parameters and image sets replicated, batches divided.

    The devices may be those of several processes, each of which runs the same program.
    """

    mesh: Mesh

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of state and of the device-resident images."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batched(self) -> NamedSharding:
        """The sharding of indices `[b]`: their leading axis over the devices."""
        return NamedSharding(self.mesh, PartitionSpec("data"))

    @property
    def batched_epoch(self) -> NamedSharding:
        """The sharding of indices `[steps, b]`."""
        return NamedSharding(self.mesh, PartitionSpec(None, "data"))

    @property
    def scans(self) -> bool:
        """Whether an epoch runs as one `lax.scan`: on CPU, convolutions in a scan are slow."""
        return self.mesh.devices.flat[0].platform != "cpu"

    def place(self, tree: Any, sharding: NamedSharding) -> Any:
        """The arrays of `tree`, which every process has as a whole, with one of these shardings.

        They may lie on the host or, on whichever devices, where all of this process's are.
        """
        if sharding.is_fully_addressable:
            return jax.device_put(tree, sharding)
        return jax.tree.map(lambda leaf: _place(leaf, sharding), tree)

    def own_rows(self, size: int) -> slice:
        """The rows of a batch of `size` that lie on devices of this process."""
        shards = self.batched.addressable_devices_indices_map((size,)).values()
        bounds = [rows.indices(size) for (rows,) in shards]
        return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))

    def place_rows(self, batch: Any, size: int) -> Any:
        """Arrays of batches of `size`, `batched`, of which `batch` has the `own_rows` alone."""
        if self.batched.is_fully_addressable:
            return jax.device_put(batch, self.batched)
        return jax.tree.map(
            lambda rows: jax.make_array_from_process_local_data(
                self.batched, rows, (size, *rows.shape[1:])
            ),
            batch,
        )


def _place(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    # Put there by jax, the values would be compared between the processes, for every batch.
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def data_mesh(count: int = 0) -> DataMesh:
    """The mesh over the first `count` devices, those of all processes for 0.

    UserError for more than there are, or for some of those of several processes: all of them
    compute.
    """
    # In this order the rows of a process are next to each other.
    devices = sorted(jax.devices(), key=lambda device: device.process_index)
    if jax.process_count() > 1 and count not in (0, len(devices)):
        raise UserError(
            f"train.devices={count}, but {jax.process_count()} processes have {len(devices)} "
            "devices, and all of them compute: set it to 0"
        )
    if not 0 <= count <= len(devices):
        raise UserError(f"train.devices={count}, but this machine has {len(devices)}; 0 takes all")
    return DataMesh(Mesh(np.array(devices[: count or len(devices)]), ("data",)))


def check_batch_size(name: str, batch_size: int, mesh: DataMesh, parts: int = 1) -> None:
    """UserError unless the batch is positive and divides evenly over the mesh.

    With `parts` > 1 those of each device have to divide evenly into so many, see
    `config.train.accumulate`.
    """
    count = mesh.mesh.devices.size
    if parts > 1 and batch_size % (parts * count):
        raise UserError(
            f"{name}={batch_size} must be a multiple of train.accumulate={parts} times the "
            f"{count} device(s)"
        )
    if batch_size < 1 or batch_size % count:
        raise UserError(f"{name}={batch_size} must be a positive multiple of the {count} device(s)")
