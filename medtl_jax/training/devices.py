"""The mesh over which a batch is divided, and what lives where on it."""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medtl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DataMesh:
    """A one-axis mesh `data`: parameters and image sets replicated, batches divided."""

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


def data_mesh(count: int = 0) -> DataMesh:
    """The mesh over the first `count` devices, all of them for 0. UserError if too many."""
    devices = jax.devices()
    if not 0 <= count <= len(devices):
        raise UserError(f"train.devices={count}, but this machine has {len(devices)}; 0 takes all")
    return DataMesh(Mesh(np.array(devices[: count or len(devices)]), ("data",)))


def check_batch_size(name: str, batch_size: int, mesh: DataMesh) -> None:
    """UserError unless the batch is positive and divides evenly over the mesh."""
    count = mesh.mesh.devices.size
    if batch_size < 1 or batch_size % count:
        raise UserError(f"{name}={batch_size} must be a positive multiple of the {count} device(s)")
