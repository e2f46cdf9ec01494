"""The last and the best checkpoint of a run, written by orbax in the background.

Several processes that run one program write and read them together, in a folder that all of them
reach. What they have written one process reads as well, and the reverse.
"""

import contextlib
import dataclasses
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from medtl_jax.errors import UserError
from medtl_jax.process import is_writer
from medtl_jax.training.devices import data_mesh

Tree = Any

SECONDS_APART = 10.0
"""Between two checkpoints, of epochs that take less: what a run that is killed may lose."""


def _flatten(tree: Tree) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _saved(tree: Tree) -> ocp.args.StandardSave:
    """What orbax is to write: arrays of all processes, as no other can be shared by them."""
    if jax.process_count() > 1:
        mesh = data_mesh()
        tree = mesh.place(tree, mesh.replicated)
    return ocp.args.StandardSave(_flatten(tree))


def _copied(tree: Tree) -> Tree:
    """The tree apart from the buffers that the next step will have donated to it."""
    if jax.process_count() > 1:
        return jax.tree.map(jnp.copy, tree)
    # On the host: those of the device may be held for long.
    return jax.tree.map(np.array, jax.device_get(tree))


class _Manager(ocp.CheckpointManager):
    """One that leaves it to the training to find the step to stop at, which is asked for once."""

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


def _manager(folder: pathlib.Path, keep: int, read_only: bool) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        enable_async_checkpointing=True,
        cleanup_tmp_directories=not read_only,
        create=not read_only,
    )
    handlers = {"tree": ocp.StandardCheckpointHandler(), "history": ocp.JsonCheckpointHandler()}
    return _Manager(folder.absolute(), options=options, item_handlers=handlers)


@contextlib.contextmanager
def _reading(manager: ocp.CheckpointManager, epoch: int) -> Iterator[None]:
    """Turns what orbax raises on missing, cut or altered files into one line."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"checkpoint {manager.directory / str(epoch)} is damaged ({type(error).__name__}); "
            f"delete {manager.directory.parent} to train anew"
        ) from None


def _restore_tree(manager: ocp.CheckpointManager, epoch: int, template: Tree) -> Tree:
    """The saved tree in the shape of `template`; every name, shape and dtype must agree.

    orbax itself fills what it finds and leaves the rest, so the comparison is made here.
    """
    wanted = _flatten(template)
    with _reading(manager, epoch):
        metadata = manager.item_metadata(epoch).tree
        metadata = dict(getattr(metadata, "tree", metadata))
    problems = [f"{name} is missing" for name in wanted.keys() - metadata.keys()]
    problems += [f"{name} is not of this model" for name in metadata.keys() - wanted.keys()]
    problems += [
        f"{name} is {metadata[name].dtype}{tuple(metadata[name].shape)}, "
        f"not {leaf.dtype}{tuple(leaf.shape)}"
        for name, leaf in wanted.items()
        if name in metadata
        and (tuple(metadata[name].shape), metadata[name].dtype) != (tuple(leaf.shape), leaf.dtype)
    ]
    if problems:
        raise UserError(
            f"checkpoint {manager.directory} does not fit this model and config: "
            f"{sorted(problems)[0]} ({len(problems)} differences)"
        )
    # Onto one device, whichever and how many there were when it was saved.
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    here = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        for name, leaf in wanted.items()
    }
    arguments = ocp.args.Composite(tree=ocp.args.StandardRestore(here))
    with _reading(manager, epoch):
        saved = manager.restore(epoch, args=arguments)
    leaves = [saved.tree[name] for name in wanted]
    if jax.process_count() > 1:
        # Bound to no device, they may be placed on those of all processes.
        leaves = [jnp.asarray(np.asarray(leaf)) for leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


@dataclasses.dataclass(frozen=True)
class Begun:
    """An epoch as far as it has come.

    Attributes:
      state: after its last step.
      logged: what each of its steps has logged.
      seconds, cpu_seconds, compile_seconds: what they took, as in `loop.Trained`.
    """

    state: Tree
    logged: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    compile_seconds: float = 0.0

    @property
    def steps(self) -> int:
        """How many steps have been made."""
        return len(self.logged)


_SECONDS = ("seconds", "cpu_seconds", "compile_seconds")


def _begun_from_json(found: Any, state: Tree) -> Begun:
    """ValueError for what `Checkpoints.save_begun` has not written."""
    logged, seconds = found["logged"], [found[name] for name in _SECONDS]
    if not isinstance(logged, list) or not all(isinstance(step, dict) for step in logged):
        raise ValueError("no logs of steps")
    values = [*seconds, *(value for step in logged for value in step.values())]
    if not logged or not all(isinstance(value, float) for value in values):
        raise ValueError("logs that are no numbers")
    if any(step.keys() != logged[0].keys() for step in logged):
        raise ValueError("steps with other logs")
    steps = [{name: np.float32(value) for name, value in step.items()} for step in logged]
    return Begun(state, steps, *seconds)


@dataclasses.dataclass
class _Held:
    """What is to be written of the epochs so far: the last, and the best if it is not on disk."""

    epoch: int
    state: Tree
    history: list[dict]
    best_epoch: int
    best: Tree | None


class Checkpoints:
    """`last/` (the state and the epoch log), `best/` (what to evaluate with), `initial/`, `begun/`.

    `initial/` holds the variables before training, where they are wanted again: they never change,
    and every `last/` is spared them. `begun/` holds the state in the midst of an epoch, where the
    training was asked to stop there.

    The best of an epoch is on disk before the last of that epoch is begun, and one older best is
    kept: whatever moment a run is killed at, the last checkpoint's best epoch is there too.

    An epoch is written `every` so many seconds after the one before it (`SECONDS_APART`), and the
    last one at the end, also that by an exception: a run that is killed repeats what it did since
    then. What is not written yet is held in the host's memory. Longer epochs are all written, and
    so are those of several processes, which write together.
    """

    def __init__(
        self, folder: pathlib.Path, *, read_only: bool = False, every: float | None = None
    ):
        if read_only and not folder.is_dir():
            raise UserError(f"{folder} does not exist: that run saved no checkpoint")
        self._last = _manager(folder / "last", 1, read_only)
        self._best = _manager(folder / "best", 2, read_only)
        self._initial, self._begun = folder / "initial", folder / "begun"
        # The clocks of several processes do not agree.
        self._every = 0.0 if jax.process_count() > 1 else SECONDS_APART if every is None else every
        self._held: _Held | None = None
        self._written = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def save(self, epoch: int, state: Tree, history: list[dict], best: Tree | None) -> None:
        """Takes the epoch, and starts writing where it is time to.

        `best` is given when this epoch is the best so far.
        """
        best_epoch = epoch
        if best is not None:
            best = _copied(best)
        elif self._held is not None:
            best_epoch, best = self._held.best_epoch, self._held.best
        self._held = _Held(epoch, _copied(state), list(history), best_epoch, best)
        if time.monotonic() - self._written >= self._every:
            self._write()

    def _write(self) -> None:
        """Starts writing what is held."""
        held, self._held = self._held, None
        if held is None:
            return
        if held.best is not None:
            # Left by a run that was killed, or begun anew: orbax would skip an older epoch.
            for later in self._best.all_steps():
                if later >= held.best_epoch:
                    self._best.delete(later)
            self._best.save(held.best_epoch, args=ocp.args.Composite(tree=_saved(held.best)))
            self._best.wait_until_finished()
        log = ocp.args.JsonSave({"epochs": held.history})
        self._last.save(held.epoch, args=ocp.args.Composite(tree=_saved(held.state), history=log))
        if is_writer():
            shutil.rmtree(self._begun, ignore_errors=True)
        self._written = time.monotonic()

    def save_begun(self, finished: int, begun: Begun) -> None:
        """Writes how far the epoch after `finished` ones has come."""
        # It is of no use without them.
        self._write()
        # The logs are float32: as Python's floats, and as text, they are the same numbers.
        logged = [{name: float(value) for name, value in step.items()} for step in begun.logged]
        record = {"logged": logged, **{name: getattr(begun, name) for name in _SECONDS}}
        tree = _saved(begun.state.replace(anchor=None))
        with _manager(self._begun, 1, False) as manager:
            for earlier in manager.all_steps():
                manager.delete(earlier)
            manager.save(
                finished, args=ocp.args.Composite(tree=tree, history=ocp.args.JsonSave(record))
            )
            manager.wait_until_finished()

    def restore_begun(self, finished: int, template: Tree) -> Begun | None:
        """How far the epoch after `finished` ones had come; None where it had not begun."""
        if not self._begun.is_dir():
            return None
        with _manager(self._begun, 1, True) as manager:
            if finished not in manager.all_steps():
                return None
            state = _restore_tree(manager, finished, template)
            arguments = ocp.args.Composite(history=ocp.args.JsonRestore())
            with _reading(manager, finished):
                found = manager.restore(finished, args=arguments).history
                return _begun_from_json(found, state)

    def save_initial(self, variables: Tree) -> None:
        """Writes the variables that training begins with, before its first step."""
        with _manager(self._initial, 1, False) as manager:
            for epoch in manager.all_steps():
                manager.delete(epoch)
            manager.save(0, args=ocp.args.Composite(tree=_saved(variables)))
            manager.wait_until_finished()

    def restore_initial(self, template: Tree) -> Tree:
        """The variables of `save_initial`. UserError if they are not there."""
        if not self._initial.is_dir():
            raise UserError(f"{self._initial} is missing: delete its run folder to train anew")
        with _manager(self._initial, 1, True) as manager:
            if 0 not in manager.all_steps():
                raise UserError(f"{self._initial} is empty: delete its run folder to train anew")
            return _restore_tree(manager, 0, template)

    def last_epoch(self) -> int | None:
        """The epoch of the last checkpoint, None for a run that has none yet."""
        self._write()
        self._last.wait_until_finished()
        return self._last.latest_step()

    def history(self) -> list[dict]:
        """The epoch records of the last checkpoint. UserError if there is none."""
        epoch = self.last_epoch()
        if epoch is None:
            raise UserError(f"{self._last.directory} has no checkpoint: train that run first")
        return self._history(epoch)

    def _history(self, epoch: int) -> list[dict]:
        arguments = ocp.args.Composite(history=ocp.args.JsonRestore())
        with _reading(self._last, epoch):
            return self._last.restore(epoch, args=arguments).history["epochs"]

    def restore_last(self, template: Tree) -> tuple[Tree, list[dict]] | None:
        """`(state, history)` of the last epoch, or None for a run that has none yet."""
        epoch = self.last_epoch()
        if epoch is None:
            return None
        return _restore_tree(self._last, epoch, template), self._history(epoch)

    def restore_best(self, epoch: int, template: Tree) -> Tree:
        """The variables `{"params", "batch_stats"}` saved for `epoch`. UserError if absent."""
        self._write()
        if epoch not in self._best.all_steps():
            raise UserError(f"{self._best.directory} has no checkpoint of epoch {epoch}")
        return _restore_tree(self._best, epoch, template)

    def close(self) -> None:
        """Writes what is held, and waits until everything is written."""
        try:
            self._write()
        finally:
            self._best.close()
            self._last.close()
