"""Several trainings as the members of one program: seeds, and values of some settings, differ.

A leading member axis lies over state, indices, seeds and settings. `jax.pmap` divides the members
over the devices; the members of one device are computed one after the other by the same program,
or as one by `vmap`, a scan or copies of the step, see `PROGRAMS`. No member sees another, so
nothing travels between devices.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence

import jax

from medtl_jax.console import Advance, Console
from medtl_jax.ensemble.program import (
    PROGRAMS,
    TURNS,
    VMAP,
    Program,
    too_many,
)
from medtl_jax.errors import UserError
from medtl_jax.models.backbone import HEAD
from medtl_jax.process import Preempted, termination
from medtl_jax.training.inference import Predict
from medtl_jax.training.loop import Epoch, Keeping, Trained, Training, epochs
from medtl_jax.training.step import TrainState

AUTO, FASTEST = "auto", "fastest"

# Steps that are timed for each program that may be chosen, after one to warm up.
_TIMED = 3


def fit_members(
    trainings: Sequence[Training],
    states: Sequence[TrainState],
    predict: Predict,
    keepings: Sequence[Keeping],
    program: str = AUTO,
) -> list[list[dict]]:
    """The epoch records of each training, as `loop.fit` gives them, from steps that they share.

    Each member resumes, validates, stops and is saved by itself; the result is that of `fit` to
    float tolerance. The seconds of an epoch are divided evenly over the members that took part.

    Args:
      trainings: with the same parts, but for the settings in `Training.values`, and the same shapes
        of data.
      states: before the first step.
      predict: serves all of them.
      keepings: of each, in its own folder.
      program: one of `PROGRAMS`; `auto`, that of `usual_program`; `fastest`, the one that is so in
        a trial of a few steps before the first epoch, which may turn out otherwise the next time. A
        training that continues keeps the one it began with, unless another one is named.

    Raises:
      Preempted: after SIGTERM, once the last epoch is saved; the one under way is dropped, and
        repeated by who continues.
      UserError: the members of a device do not fit into its memory; as `fit`.
    """
    with termination.deferred():
        return _fit_members(trainings, states, predict, keepings, program)


def _fit_members(
    trainings: Sequence[Training],
    states: Sequence[TrainState],
    predict: Predict,
    keepings: Sequence[Keeping],
    program: str,
) -> list[list[dict]]:
    works = [
        epochs(training, state, predict, keeping)
        for training, state, keeping in zip(trainings, states, keepings, strict=True)
    ]
    chosen = program if program in PROGRAMS else _begun_with(keepings) or program
    step = _Epochs(trainings, keepings[0].console, chosen)
    histories: dict[int, list[dict]] = {}
    waiting: dict[int, Trained | None] = dict.fromkeys(range(len(works)))
    while waiting:
        asked: dict[int, Epoch] = {}
        for member, done in waiting.items():
            try:
                asked[member] = works[member].send(done)
            except StopIteration as stopped:
                histories[member] = stopped.value
        if termination.asked:
            raise Preempted
        waiting = step(asked)
    return [histories[member] for member in range(len(works))]


def _begun_with(keepings: Sequence[Keeping]) -> str:
    """The program of trainings that continue, empty where all begin."""
    for keeping in keepings:
        if keeping.checkpoints.last_epoch() is not None:
            program = keeping.checkpoints.history()[-1].get("program")
            if program in PROGRAMS:
                return program
    return ""


class _Epochs:
    """Runs an epoch of those members that ask for one, of each phase by itself."""

    def __init__(self, trainings: Sequence[Training], console: Console, program: str):
        self._trainings, self._console, self._program = trainings, console, program
        # Of the members and phases that took part last; they change when a member stops.
        self._programs: dict[tuple, Program] = {}

    def __call__(self, asked: dict[int, Epoch]) -> dict[int, Trained]:
        together: dict[int, list[int]] = {}
        for member, epoch in asked.items():
            together.setdefault(epoch.phase, []).append(member)
        done: dict[int, Trained] = {}
        wanted = {(phase, *members) for phase, members in together.items()}
        # First gives back the memory of what is not wanted again.
        self._programs = {key: kept for key, kept in self._programs.items() if key in wanted}
        for phase, members in together.items():
            done |= self._run(phase, members, {member: asked[member] for member in members})
        return done

    def _run(self, phase: int, members: list[int], asked: dict[int, Epoch]) -> dict[int, Trained]:
        started, worked = time.perf_counter(), time.process_time()
        trainings = [self._trainings[member] for member in members]
        states = [asked[member].state for member in members]
        indices = [asked[member].indices for member in members]
        key = (phase, *members)
        compiling = working = 0.0
        with _fitting(len(members)):
            if key not in self._programs:
                self._programs[key] = None
                program = Program(trainings, phase, self._chosen(trainings, phase, states))
                program.compile(states, indices)
                self._programs[key] = program
                compiling, working = time.perf_counter() - started, time.process_time() - worked
            program = self._programs[key]
            numbers = {asked[member].number for member in members}
            title = f"epoch {min(numbers)}/{trainings[0].settings.epochs}, {len(members)} members"
            with self._console.progress(title) as advance:
                states, means = program(states, indices, _ending(advance))
        count = len(members)
        seconds = (time.perf_counter() - started - compiling) / count
        cpu_seconds = (time.process_time() - worked - working) / count
        return {
            member: Trained(
                state, mean, seconds, cpu_seconds, program.cost(), compiling / count, program.mode
            )
            for member, state, mean in zip(members, states, means, strict=True)
        }

    def _chosen(self, trainings, phase: int, states) -> str:
        """The program that is asked for, or is faster; the same one from then on."""
        if self._program == AUTO:
            self._program = usual_program(trainings[0].phases[phase].parts.start)
        if self._program == FASTEST:
            self._program = _fastest(trainings, phase, states, self._console)
        return self._program


def _ending(advance: Advance) -> Advance:
    """`advance`, which ends an epoch that SIGTERM comes in."""

    def stepped(done: int, total: int) -> None:
        advance(done, total)
        if termination.asked and done < total:
            raise Preempted

    return stepped


@contextlib.contextmanager
def _fitting(count: int) -> Iterator[None]:
    """Turns an allocator's complaint into what to do about it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(too_many(count)) from None


def usual_program(start: str) -> str:
    """The program of networks that begin at `start`, where none is asked for.

    A head is two matrix products: as one they take the time of one. On a CPU a larger convolution
    with weights of each member takes several times as long as one after the other; on a GPU or TPU
    neither was measured.
    """
    return VMAP if start == HEAD or jax.default_backend() != "cpu" else TURNS


def _fastest(
    trainings: Sequence[Training], phase: int, states: Sequence[TrainState], console: Console
) -> str:
    """The program whose steps take the least time in a trial."""
    size = trainings[0].settings.batch_size
    indices = [t.feed.indices(t.settings.seed, 0, _TIMED + 1, size) for t in trainings]
    warm = [{key: rows[:1] for key, rows in each.items()} for each in indices]
    timed = [{key: rows[1:] for key, rows in each.items()} for each in indices]
    seconds = {}
    for name in PROGRAMS:
        try:
            with _fitting(len(trainings)):
                program = Program(trainings, phase, name, scan=False)
                program.compile(states, warm)
                for rows in (warm, timed):
                    began = time.perf_counter()
                    jax.block_until_ready(program(states, rows, lambda *_: None)[0])
        except UserError as error:
            console.note(f"{name}: {error}")
            continue
        seconds[name] = (time.perf_counter() - began) / _TIMED
    if not seconds:
        raise UserError(too_many(len(trainings)))
    best = min(seconds, key=seconds.__getitem__)
    said = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds.items())
    console.note(f"{len(trainings)} members, a step of all: {said}; chosen: {best}")
    return best
