"""The steps of several members as one program over the devices."""

import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medtl_jax.ensemble.layout import Layout, copied, divided, make_layout, member_of
from medtl_jax.errors import UserError
from medtl_jax.models.backbone import HEAD
from medtl_jax.training.loop import Training, TrainingPhase
from medtl_jax.training.runner import data_bytes, mean_logs, planned_bytes
from medtl_jax.training.step import TrainState, take, train_epoch, train_step

Tree = Any

TURNS, VMAP, SCAN, UNROLL = "turns", "vmap", "scan", "unroll"

PROGRAMS = MappingProxyType(
    {
        TURNS: "one program of one member a device, called for each of them in turn",
        VMAP: "one program, whose operations have a member axis",
        SCAN: "one program, which loops over the members",
        UNROLL: "one program, in which the step stands once for each member",
    }
)
"""How the members of one device are computed."""


_MEMORY = pathlib.Path("/proc/meminfo")


class Program:
    """The steps of an epoch of some members in one phase.

    Attributes:
      mode: one of `PROGRAMS`.
      compiled: None before `compile`.
    """

    def __init__(self, trainings: Sequence[Training], phase: int, mode: str, scan: bool = True):
        first = trainings[0]
        self.mode, self._trainings = mode, trainings
        self._phase = first.phases[phase]
        parts = self._phase.parts
        # On a CPU a convolution in a scan is slow, a head is not.
        self._scan = scan and (first.mesh.scans or parts.start == HEAD)
        layout = make_layout(len(trainings), local_devices(first))
        self._rounds = layout.turns() if mode == TURNS else [layout]
        self._values = _differing([training.values for training in trainings])
        sets = [_plain(training.feed.sets) for training in trainings]
        self._shared = all(_same(sets[0], other) for other in sets[1:])
        self._data = [
            copied(each, sets[0]) if self._shared else divided(each, sets) for each in self._rounds
        ]
        self._seeds = [
            divided(each, [_key_data(training) for training in trainings]) for each in self._rounds
        ]
        self._settings = [divided(each, self._values) for each in self._rounds]
        self.compiled, self._cost = None, {}

    def compile(self, states: Sequence[TrainState], indices: Sequence[Mapping]) -> None:
        """Compiles the program for states and indices of these shapes. UserError if too large."""
        one = functools.partial(_one, phase=self._phase, scan=self._scan)
        program = _of_device(one, UNROLL if self.mode == TURNS else self.mode, self._shared)
        first = self._rounds[0]
        mapped = jax.pmap(program, devices=first.devices, donate_argnums=0)
        rows = self._placed(first, _rows(first, indices))
        given = self._arguments(0, divided(first, states), rows[0])
        self.compiled = mapped.lower(*given).compile()
        self._check_memory(len(first.devices))
        self._cost = self._planned()

    def __call__(self, states: Sequence[TrainState], indices: Sequence[Mapping], advance):
        """The states after the steps, and the mean of each log, both of each member."""
        steps = 1 if self._scan else len(indices[0]["train"])
        kept = [divided(each, states) for each in self._rounds]
        rows = [self._placed(each, _rows(each, indices)) for each in self._rounds]
        logged: list[list] = [[] for _ in self._rounds]
        for step in range(steps):
            for place, logs in enumerate(logged):
                given = self._arguments(place, kept[place], rows[place][step])
                kept[place], sums = self.compiled(*given)
                logs.append(sums)
                # Waiting for the step before this one keeps the queue short and the bar honest.
                if step:
                    jax.block_until_ready(logs[-2])
            advance(step + 1, steps)
        new: dict[int, TrainState] = {}
        means: dict[int, dict] = {}
        for each, state, logs in zip(self._rounds, kept, logged, strict=True):
            sums = jax.device_get(logs)
            for member, (device, place) in each.places().items():
                new[member] = member_of(state, device, place)
                own = [{name: value[device, place] for name, value in s.items()} for s in sums]
                means[member] = mean_logs(own)
        count = range(len(states))
        return [new[member] for member in count], [means[member] for member in count]

    def _arguments(self, place: int, state: Tree, rows: Mapping[str, jax.Array]):
        return state, self._data[place], rows, self._seeds[place], self._settings[place]

    def _placed(self, layout: Layout, rows: Mapping[str, np.ndarray]) -> list[dict]:
        """The rows of each call, on the devices."""
        if self._scan:
            calls = [dict(rows)]
        else:
            steps = range(rows["train"].shape[2])
            calls = [{name: array[:, :, i] for name, array in rows.items()} for i in steps]
        return jax.device_put(calls, layout.sharding)

    def cost(self) -> dict[str, int]:
        """`planned_bytes` of a member: its share of its device's; empty where XLA does not say."""
        return self._cost

    def _planned(self) -> dict[str, int]:
        width, held = self._rounds[0].width, data_bytes(self._trainings[0].feed)
        planned = planned_bytes(self.compiled, held if self._shared else width * held)
        return {name: value // width for name, value in planned.items()}

    def _check_memory(self, devices: int) -> None:
        memory, free = self.compiled.memory_analysis(), _free_bytes(devices)
        if memory is None or free is None:
            return
        # States and data are there already.
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        needed = devices * (memory.temp_size_in_bytes + new)
        if needed > free:
            gib = 2.0**30
            why = f" ({needed / gib:.1f} GiB are needed, {free / gib:.1f} free)"
            raise UserError(too_many(len(self._trainings), why))


def _free_bytes(devices: int) -> int | None:
    """Free memory of the devices in use together; None where the system does not say."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else devices * (limit - stats.get("bytes_in_use", 0))
    try:
        # Not the free pages: those that hold files are given back when they are wanted.
        found = re.search(r"^MemAvailable:\s+(\d+) kB", _MEMORY.read_text(), re.MULTILINE)
    except OSError:  # not a Linux
        return None
    return 1024 * int(found[1]) if found else None


def _one(
    state: TrainState,
    data: Tree,
    indices: Mapping[str, jax.Array],
    seed: jax.Array,
    values: Mapping[str, jax.Array],
    *,
    phase: TrainingPhase,
    scan: bool,
):
    """A step, or with `scan` an epoch, of one member."""
    parts = phase.varied(values) if values else phase.parts
    key = jax.random.wrap_key_data(seed)
    if scan:
        return train_epoch(state, data, indices, key, parts=parts)
    return train_step(state, take(data, indices), key, parts=parts)


def _of_device(one, mode: str, shared: bool):
    """`one` of the members of a device, over a leading axis; their data may be `shared`."""
    if mode == VMAP:
        return jax.vmap(one, in_axes=(0, None if shared else 0, 0, 0, 0))

    def pick(tree, place):
        return jax.tree.map(lambda leaf: leaf[place], tree)

    def member(place, state, data, *others):
        own = data if shared else pick(data, place)
        return one(pick(state, place), own, *(pick(tree, place) for tree in others))

    def scanned(state, data, indices, *others):
        count = len(indices["train"])
        return jax.lax.map(
            lambda place: member(place, state, data, indices, *others), jnp.arange(count)
        )

    def unrolled(state, data, indices, *others):
        count = len(indices["train"])
        found = [member(place, state, data, indices, *others) for place in range(count)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    return scanned if mode == SCAN else unrolled


def local_devices(training: Training) -> list[jax.Device]:
    """The devices of the training's mesh that belong to this process."""
    here = jax.process_index()
    return [device for device in training.mesh.mesh.devices.flat if device.process_index == here]


def _differing(values: Sequence[Mapping[str, float]]) -> list[dict[str, np.float32]]:
    """Of each member the values of those settings in which they differ."""
    keys = [key for key in values[0] if len({each[key] for each in values}) > 1]
    return [{key: np.float32(each[key]) for key in keys} for each in values]


def _key_data(training: Training) -> np.ndarray:
    return np.asarray(jax.random.key_data(jax.random.key(training.settings.seed)))


def _plain(sets: Mapping[str, Mapping]) -> dict[str, dict]:
    return {name: dict(arrays) for name, arrays in sets.items()}


def _same(first: Tree, other: Tree) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    return all(one is two or np.array_equal(one, two) for one, two in pairs)


def _rows(layout: Layout, indices: Sequence[Mapping]) -> dict[str, np.ndarray]:
    """int32 `[devices, members, steps, b]` of each set."""
    return {
        name: np.stack([[indices[member][name] for member in row] for row in layout.rows])
        for name in indices[0]
    }


def too_many(count: int, why: str = "") -> str:
    """What is said of so many members that do not fit."""
    return (
        f"{count} members do not fit into memory at once{why}: set train.program=turns (one "
        "at a time on each device), train.program=alone, or a smaller data.batch_size"
    )
