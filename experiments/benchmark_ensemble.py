"""The part of the benchmark on ensembles: members of one program, beside one member alone."""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

# It prepares the process, before jax is imported.
from experiments.benchmark_timing import (
    DEVICE_PEAK,
    NOTE,
    Row,
    Section,
    measured_row,
    megabytes,
    milliseconds,
)

# isort: split
import jax
import numpy as np

from experiments.benchmark_steps import (
    CLASSES,
    examples,
    finetune_network,
    finetune_parts,
    groups_until,
)
from medtl_jax.data.catalog import Split
from medtl_jax.ensemble.members import usual_program
from medtl_jax.ensemble.program import TURNS, Program
from medtl_jax.models.registry import initialize
from medtl_jax.objectives.task import Task
from medtl_jax.training.devices import data_mesh
from medtl_jax.training.loop import LoopSettings, Training, TrainingPhase
from medtl_jax.training.runner import Feed
from medtl_jax.training.step import TrainState, create_state

_COLUMNS = (
    "of",
    "members",
    "program",
    "auto",
    "ms a step of all",
    "ms a step of one member",
    "to one alone",
    "planned MB a member",
)
# Steps of a trial that says how many make a round, and the bounds of these.
_TRIAL, _FEWEST, _MOST = 4, 2, 1000


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What the members are: a training, and its state before the first step."""

    training: Training
    state: TrainState


class _Members:
    """Members of one program, whose epochs are timed."""

    def __init__(self, kind: _Kind, count: int, mode: str, steps: int) -> None:
        settings = kind.training.settings
        trainings = [
            dataclasses.replace(kind.training, settings=dataclasses.replace(settings, seed=seed))
            for seed in range(count)
        ]
        self.steps = steps
        self._states: Sequence[TrainState] = [kind.state] * count
        self._indices = [
            one.feed.indices(one.settings.seed, 0, steps, settings.batch_size) for one in trainings
        ]
        self.program = Program(trainings, 0, mode)
        self.program.compile(self._states, self._indices)
        self.seconds()

    def seconds(self) -> float:
        """Seconds of a step of all members, from an epoch: what begins and ends it is in it."""
        begun = time.perf_counter()
        self._states, _ = self.program(self._states, self._indices, lambda done, total: None)
        jax.block_until_ready(self._states)
        return (time.perf_counter() - begun) / self.steps


def ensemble_section(options: argparse.Namespace) -> Section:
    """Steps of `options.members` members by each of `options.programs`, with one alone in turns.

    The members are networks `options.member_models` on images of `options.member_size` pixels,
    and heads on kept features of the first of `options.models`.
    """
    return Section("Ensembles", (*_COLUMNS, DEVICE_PEAK, NOTE), _rows(options))


def _rows(options: argparse.Namespace) -> Iterator[Row]:
    for name in options.member_models:
        make = functools.partial(_kind, name, False, options.member_size, options)
        yield from _rows_of(f"{name}, {options.member_size} px", make, options)
    name = options.models[0]
    make = functools.partial(_kind, name, True, options.size, options)
    yield from _rows_of(f"head on features of {name}", make, options)


def _kind(name: str, head: bool, size: int, options: argparse.Namespace) -> _Kind:
    """A network that trains as a whole, or its head alone on features."""
    model, spec = finetune_network(name, options.dtype)
    start = spec.head if head else ""
    only = (lambda part: part == spec.head) if head else None
    variables = initialize(model, size, jax.random.key(0), only)
    table = groups_until(spec, start or spec.stages[0])
    parts = finetune_parts(model, spec, variables["params"], table, start)
    data = examples(model, spec, size, options.batch, start)
    names = tuple(map(str, range(CLASSES)))
    training = Training(
        phases=[TrainingPhase(0, parts)],
        feed=Feed({"train": data}),
        val=Split(data["image"][:1], data["target"][:1], np.array(["0"])),
        task=Task("classify", names),
        settings=LoopSettings(1, 0, options.batch, 0, "loss", 0),
        schedules={},
        mesh=data_mesh(),
    )
    return _Kind(training, create_state(variables, parts))


def _rows_of(label: str, make: Callable[[], _Kind], options: argparse.Namespace) -> Iterator[Row]:
    found: list[tuple[_Kind, _Members]] = []

    def alone() -> Row:
        kind = make()
        once = _Members(kind, 1, TURNS, _TRIAL).seconds()
        # As many for every number of members: what an epoch begins and ends with is the same
        # share of it. The largest ensemble's takes about twice as long as it was asked for.
        steps = round(2 * options.seconds / once / max(options.members))
        one = _Members(kind, 1, TURNS, min(max(_FEWEST, steps), _MOST))
        found.append((kind, one))
        return _cells(statistics.median(one.seconds() for _ in range(options.rounds)), 1, one)

    yield measured_row({"of": label, "members": "1", "program": "alone"}, alone)
    for kind, one in found:
        usual = usual_program(kind.training.phases[0].parts.start)
        for count in options.members:
            for mode in options.programs:
                auto = "yes" if mode == usual else ""
                work = functools.partial(_together, kind, one, count, mode, options.rounds)
                head = {"of": label, "members": str(count), "program": mode, "auto": auto}
                yield measured_row(head, work)


def _together(kind: _Kind, one: _Members, count: int, mode: str, rounds: int) -> Row:
    members = _Members(kind, count, mode, one.steps)
    pairs = [(members.seconds(), one.seconds()) for _ in range(rounds)]
    ratio = statistics.median(together / alone for together, alone in pairs) / count
    seconds = statistics.median(together for together, _ in pairs)
    return {**_cells(seconds, count, members), "to one alone": f"{ratio:.2f}"}


def _cells(seconds: float, count: int, members: _Members) -> Row:
    return {
        "ms a step of all": milliseconds(seconds),
        "ms a step of one member": milliseconds(seconds / count),
        "planned MB a member": megabytes(members.program.cost().get("step_bytes")),
    }
