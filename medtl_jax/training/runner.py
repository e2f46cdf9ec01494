"""The steps of an epoch: what they read, and how they are run on this kind of device."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from medtl_jax.data.catalog import Array
from medtl_jax.data.domains import target_indices
from medtl_jax.data.loader import training_indices
from medtl_jax.data.streams import is_streamed, stream_batches
from medtl_jax.domain.alignment import TARGET_DOMAIN
from medtl_jax.training.devices import DataMesh
from medtl_jax.training.step import StepParts, TrainState, take, train_epoch, train_step

Advance = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Feed:
    """What the steps of a training read.

    Attributes:
      sets: `{"train": {"image", "target"}}`, arrays of equal length; other sets of the same form,
        `source` and `target_domain`, give every batch parts of their own.
      groups: those of `loader.training_indices`, of `train`.
      views: how often each image of `train` is there: row `v * n + i` is view v of image i. The
        passes over the images take the views in turn.
    """

    sets: Mapping[str, Mapping[str, Array]]
    groups: np.ndarray | None = None
    views: int = 1

    @property
    def examples(self) -> int:
        """Number of training images, each counted once."""
        return len(self.sets["train"]["target"]) // self.views

    @property
    def streams(self) -> bool:
        """Whether the batches travel to the device one by one."""
        return any(is_streamed(array) for arrays in self.sets.values() for array in arrays.values())

    def indices(
        self, seed: int, first_step: int, steps: int, batch_size: int
    ) -> dict[str, np.ndarray]:
        """int32 `[steps, batch_size]` for each set: the rows that each step sees."""
        found = {}
        for name, arrays in self.sets.items():
            rows = self.examples if name == "train" else len(arrays["target"])
            groups = self.groups if name == "train" else None
            given = (seed, first_step, steps, rows, batch_size)
            if name == TARGET_DOMAIN:
                found[name] = target_indices(*given)
            else:
                found[name] = training_indices(*given, groups)
        if self.views > 1:
            places = np.arange(first_step * batch_size, (first_step + steps) * batch_size)
            passes = places.reshape(steps, batch_size) // self.examples
            found["train"] += (passes % self.views * self.examples).astype(np.int32)
        return found


class Runner:
    """Runs the steps of an epoch.

    Arrays in memory are put on the device once; with `scan` an epoch over them is one program,
    without, one program a step, called in a loop. Streamed arrays travel batch by batch.

    Attributes:
      scans: whether an epoch is one program.
      compiled: the program, None before the first step.
      compiling: what it took to compile, `(seconds, cpu_seconds)`; 0 before the first step, and
        again once `taken` has given it away.
    """

    def __init__(self, parts: StepParts, mesh: DataMesh, key: jax.Array, feed: Feed, scan: bool):
        self._mesh, self._key, self._feed = mesh, key, feed
        self.scans = scan and not feed.streams
        self.compiled, self.compiling = None, (0.0, 0.0)
        if feed.streams:
            program = functools.partial(train_step, parts=parts)
        else:
            self._data = mesh.place(_plain(feed.sets), mesh.replicated)
            program = functools.partial(train_epoch if self.scans else _step_of, parts=parts)
        self._program = jax.jit(
            program, donate_argnums=0, out_shardings=(mesh.replicated, mesh.replicated)
        )

    def __call__(
        self, state: TrainState, indices: Mapping[str, np.ndarray], advance: Advance
    ) -> tuple[TrainState, dict[str, float | None]]:
        """The state after the steps at `indices`, and the mean of each log."""
        state, logged = self.steps(state, indices, advance)
        return state, mean_logs(logged)

    def steps(
        self,
        state: TrainState,
        indices: Mapping[str, np.ndarray],
        advance: Advance,
        stop: Callable[[], bool] = lambda: False,
    ) -> tuple[TrainState, list[dict[str, np.ndarray]]]:
        """The state after the steps at `indices`, and what each of them has logged.

        They end early where `stop()`, asked after each, says so. A scan is one program, which is
        not asked and logs once.
        """
        if self.scans:
            rows = self._mesh.place(dict(indices), self._mesh.batched_epoch)
            state, logged = self._run(state, self._data, rows, self._key)
            return state, jax.device_get([logged])
        step = lambda state, batch: self._run(state, *batch, self._key)  # noqa: E731
        with contextlib.closing(self._batches(indices)) as batches:
            return _each_step(step, state, batches, len(indices["train"]), advance, stop)

    def _batches(self, indices: Mapping[str, np.ndarray]) -> Iterator[tuple]:
        """What each step takes between the state and the key."""
        mesh, size = self._mesh, indices["train"].shape[1]
        if self._feed.streams:
            own = mesh.own_rows(size)
            mine = {name: rows[:, own] for name, rows in indices.items()}
            with contextlib.closing(_streamed(self._feed.sets, mine)) as batches:
                for batch in batches:
                    yield (mesh.place_rows(batch, size),)
            return
        for number in range(len(indices["train"])):
            row = {name: rows[number] for name, rows in indices.items()}
            yield self._data, mesh.place(row, mesh.batched)

    def _run(self, *arguments):
        # Compiled ahead of time, so that what it costs can be read off it.
        if self.compiled is None:
            started, worked = time.perf_counter(), time.process_time()
            self.compiled = self._program.lower(*arguments).compile()
            self.compiling = time.perf_counter() - started, time.process_time() - worked
        return self.compiled(*arguments)

    def taken(self) -> tuple[float, float]:
        """`compiling`, once: it belongs to the epoch that the program was compiled in."""
        taken, self.compiling = self.compiling, (0.0, 0.0)
        return taken

    def cost(self) -> dict[str, float]:
        """`step_bytes` and `data_bytes`, see `planned_bytes`; nothing where XLA does not say."""
        held = 0 if self._feed.streams else data_bytes(self._feed)
        return planned_bytes(self.compiled, held)


def data_bytes(feed: Feed) -> int:
    """Bytes of the sets that a training puts on the device."""
    return sum(array.nbytes for arrays in feed.sets.values() for array in arrays.values())


def planned_bytes(compiled, held: int) -> dict[str, int]:
    """Bytes that a program needs at once, as XLA plans it, without and of the data it reads.

    `step_bytes` counts state and temporary values; the loop on CPU lets two steps overlap, each
    with temporary values of its own. `data_bytes` are the `held` ones, which lie on the device.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return {}
    read = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {"step_bytes": int(read + new - held), "data_bytes": held}


def _step_of(state: TrainState, data, indices, key: jax.Array, *, parts: StepParts):
    return train_step(state, take(data, indices), key, parts=parts)


def _plain(sets: Mapping[str, Mapping[str, Array]]) -> dict[str, dict[str, Array]]:
    return {name: dict(arrays) for name, arrays in sets.items()}


def _streamed(sets: Mapping[str, Mapping[str, Array]], indices: Mapping[str, np.ndarray]):
    """The batches of host arrays at `indices`, in the form of `step.take`."""
    names = list(sets)
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(contextlib.closing(stream_batches(sets[name], indices[name])))
            for name in names
        ]
        for batches in zip(*streams, strict=True):
            batch = dict(zip(names, batches, strict=True))
            yield {**batch.pop("train"), **batch}


def _each_step(step, state, inputs, count: int, advance, stop):
    """The state after `step(state, input)` for each of `count` inputs, and the logs of each."""
    logged = []
    for number, one in enumerate(inputs, 1):
        state, sums = step(state, one)
        logged.append(sums)
        # Waiting for the step before this one keeps the queue short and the bar honest.
        if number > 1:
            jax.block_until_ready(logged[-2])
        advance(number, count)
        if stop():
            break
    return state, jax.device_get(logged)


def mean_logs(logged: list[dict]) -> dict[str, float | None]:
    """The mean over all examples of each value that the steps have summed, without the `count`."""
    sums = {name: float(np.sum([step[name] for step in logged])) for name in logged[0]}
    count = sums.pop("count")
    means = {name: value / count for name, value in sums.items()}
    # JSON knows no infinity; a gradient's norm may overflow and the training still recover.
    return {name: value if np.isfinite(value) else None for name, value in means.items()}
