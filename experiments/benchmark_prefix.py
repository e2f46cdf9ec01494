"""What a frozen prefix of a network saves: seconds, memory and FLOPs of a training step.

    python -m experiments.benchmark_prefix [--model efficientnet_lite0] [--frozen-until stage5]

Four steps take turns, round by round, in one run, as `finetune` compiles and calls them with the
defaults of its config: all stages train; the prefix is frozen; the prefix is frozen and its
activations are cached; everything but the head is, and its features are cached. Only the ratios
say something on a shared machine. The prefix ends before a named stage, or before the first one
that has at least `--fraction` of the FLOPs of a forward pass before it. No image is augmented, the
weights are drawn at random and so are the cached activations: the values change no time.

Planned memory is what XLA reserves for the program of a step: temporary values, arguments and
outputs that are not arguments' own buffers, without the data set's images or activations, on each
device. With `--rss` each step also runs in a process of its own, whose peak resident memory,
once it has compiled, is compared with that before its state was made.
"""

import argparse
import ctypes
import dataclasses
import functools
import itertools
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

# It prepares the process, before jax is imported.
from experiments.benchmark_timing import (
    MEGABYTE,
    check_positive,
    machine,
    megabytes,
    output_path,
)

# isort: split
import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.benchmark_steps import (
    drawn,
    examples,
    finetune_network,
    finetune_parts,
    groups_until,
)
from medtl_jax.commands import Parser, run_tool
from medtl_jax.errors import UserError
from medtl_jax.files import write_file
from medtl_jax.models.backbone import FEATURES
from medtl_jax.models.registry import ModelSpec, model_spec, variable_shapes
from medtl_jax.training.devices import check_batch_size, data_mesh
from medtl_jax.training.runner import Feed, Runner
from medtl_jax.training.step import TrainState, create_state

VARIANTS = {
    "full": "all stages train",
    "frozen": "prefix frozen",
    "cached": "prefix cached",
    "head": "head on cached features",
}
_STATUS, _CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one step takes.

    Attributes:
      seconds: median over the rounds.
      planned: bytes that the program needs at once, without the data set; None where XLA does
        not say.
      temporary: those of them that hold temporary values.
      flops: of the step, as XLA counts them.
      peak: bytes of resident memory in a process of its own; None where it was not measured.
    """

    seconds: float
    planned: int | None
    temporary: int
    flops: float
    peak: int | None = None


def main(arguments: Sequence[str]) -> None:
    """Prints the table, and writes it with `--out`. UserError for a mistake."""
    options = _parse(arguments)
    model, spec = finetune_network(options.model)
    if options.frozen_until:
        _check_part(options.frozen_until, spec)
    if options.peak_of:
        print(_own_peak(model, spec, options))
        return
    before = forward_flops(model, spec, options.image_size)
    options.frozen_until = options.frozen_until or boundary(before, options.fraction)
    measured = measure(model, spec, options)
    if options.rss:
        measured = {
            name: dataclasses.replace(found, peak=_peak_of(name, options))
            for name, found in measured.items()
        }
    text = table(measured, before[options.frozen_until], options)
    print(text)
    if options.out:
        write_file(options.out, text + "\n")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python -m experiments.benchmark_prefix", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="efficientnet_lite0", help="default: %(default)s")
    parser.add_argument("--image-size", type=int, default=128, help="pixels; default: %(default)s")
    parser.add_argument("--batch", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="of a round; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--fraction", type=float, default=0.667, help="of the forward FLOPs; default: %(default)s"
    )
    parser.add_argument("--frozen-until", default="", metavar="STAGE", help="the first to train")
    parser.add_argument("--rss", action="store_true", help="also measure resident memory")
    parser.add_argument("--out", default="", metavar="FILE.md", help="for the table")
    # For the processes that this one starts.
    parser.add_argument("--peak-of", choices=tuple(VARIANTS), default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    check_positive(options, "steps", "rounds")
    check_batch_size("--batch", options.batch, data_mesh())
    if not 0 < options.fraction < 1:
        raise UserError(f"--fraction={options.fraction} must lie between 0 and 1")
    least = model_spec(options.model).smallest_input
    if not least <= options.image_size <= 1024:
        raise UserError(
            f"--image-size={options.image_size}: {options.model} takes {least} to 1024 pixels"
        )
    if options.rss and jax.default_backend() != "cpu":
        raise UserError("--rss: the steps run on an accelerator, whose memory it does not see")
    if (options.rss or options.peak_of) and not _CLEAR.exists():
        raise UserError(f"--rss: this system has no {_CLEAR}, it is none of Linux")
    options.out = output_path(options.out, "--out")
    return options


def _check_part(part: str, spec: ModelSpec) -> None:
    parts = (*spec.stages[1:], spec.head)
    if part not in parts:
        raise UserError(
            f"--frozen-until={part!r} is no part of {spec.name}; choose from {', '.join(parts)}"
        )


def forward_flops(model: nn.Module, spec: ModelSpec, image_size: int) -> dict[str, float]:
    """part -> share of a forward pass's FLOPs before that part, in evaluation mode.

    The parts are the stages after the first one, and the head. Nothing is compiled: XLA's cost
    analysis counts the program as it is written.
    """
    variables = variable_shapes(model, image_size)
    image = jax.ShapeDtypeStruct((1, image_size, image_size, model.in_chans), jnp.float32)
    _, out = jax.eval_shape(model.apply, variables, image)

    def flops(start: str, value) -> float:
        run = jax.jit(functools.partial(model.apply, start=start))
        return run.lower(variables, value).cost_analysis()["flops"]

    total = flops("", image)
    inputs = {part: out[before] for before, part in itertools.pairwise(spec.stages)}
    inputs[spec.head] = out[FEATURES]
    return {part: 1 - flops(part, value) / total for part, value in inputs.items()}


def boundary(before: Mapping[str, float], fraction: float) -> str:
    """The first part with at least `fraction` of the FLOPs before it; the last where none has.

    >>> boundary({"stage1": 0.2, "stage2": 0.7, "head": 0.999}, 0.667)
    'stage2'
    """
    return next((part for part, share in before.items() if share >= fraction), list(before)[-1])


def measure(model: nn.Module, spec: ModelSpec, options: argparse.Namespace) -> dict[str, Measured]:
    """What each of `VARIANTS` takes; they take turns for `rounds` rounds."""
    runs = {name: _made(name, model, spec, options) for name in VARIANTS}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for steps in runs.values():
        steps.time(2)
    for _ in range(options.rounds):
        for name, steps in runs.items():
            seconds[name].append(steps.time(options.steps) / options.steps)
    return {name: steps.measured(statistics.median(seconds[name])) for name, steps in runs.items()}


class Steps:
    """The training steps of one of `VARIANTS`, with a state and a data set on the device."""

    def __init__(
        self,
        variant: str,
        model: nn.Module,
        spec: ModelSpec,
        *,
        image_size: int,
        batch: int,
        frozen_until: str,
    ) -> None:
        self._batch = batch
        start = {"cached": frozen_until, "head": spec.head}.get(variant, "")
        self._shapes = variable_shapes(model, image_size)
        self._feed = Feed({"train": examples(model, spec, image_size, batch, start)})
        self._mesh = data_mesh()
        table = _groups(spec, variant, frozen_until)
        self._parts = finetune_parts(model, spec, self._shapes["params"], table, start)
        key = jax.random.key(0)
        self._run = Runner(self._parts, self._mesh, key, self._feed, scan=False)
        self._state: TrainState | None = None

    def time(self, count: int) -> float:
        """Seconds of `count` steps; the first call makes the state and compiles."""
        if self._state is None:
            state = create_state(drawn(self._shapes), self._parts)
            self._state = jax.device_put(state, self._mesh.replicated)
        rows = self._feed.indices(0, 0, count, self._batch)
        begun = time.perf_counter()
        self._state, _ = self._run(self._state, rows, lambda done, total: None)
        jax.block_until_ready(self._state)
        return time.perf_counter() - begun

    def measured(self, seconds: float) -> Measured:
        """What the compiled step takes, with the seconds that were measured."""
        program = self._run.compiled
        return Measured(
            seconds=seconds,
            planned=self._run.cost().get("step_bytes"),
            temporary=int(program.memory_analysis().temp_size_in_bytes),
            flops=float(program.cost_analysis()["flops"]),
        )


def _groups(spec: ModelSpec, variant: str, frozen_until: str) -> dict[str, str]:
    """stage -> group of one of `VARIANTS`."""
    first = {"full": spec.stages[0], "head": spec.head}.get(variant, frozen_until)
    return groups_until(spec, first)


def _made(variant: str, model: nn.Module, spec: ModelSpec, options: argparse.Namespace) -> Steps:
    return Steps(
        variant,
        model,
        spec,
        image_size=options.image_size,
        batch=options.batch,
        frozen_until=options.frozen_until,
    )


def _memory(field: str) -> int:
    """Bytes of `VmRSS`, resident now, or `VmHWM`, the most so far, of this process."""
    # Not getrusage: a child inherits its parent's peak there.
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def _own_peak(model: nn.Module, spec: ModelSpec, options: argparse.Namespace) -> int:
    """Bytes by which the state of `--peak-of` and its steps make this process grow at most."""
    steps = _made(options.peak_of, model, spec, options)
    # What imports and compiler took and gave back is no part of a step.
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    before = _memory("VmRSS")
    steps.time(1)
    libc.malloc_trim(0)
    _CLEAR.write_text("5")
    steps.time(options.steps)
    return _memory("VmHWM") - before


def _peak_of(variant: str, options: argparse.Namespace) -> int:
    """`_own_peak` of a process of its own."""
    command = [sys.executable, "-m", "experiments.benchmark_prefix", "--peak-of", variant]
    for key in ("model", "image_size", "batch", "steps", "frozen_until"):
        command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    root = pathlib.Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"--rss: the process of {variant} ended; its own message stands above")
    return int(done.stdout.split()[-1])


def table(
    measured: Mapping[str, Measured], frozen_share: float, options: argparse.Namespace
) -> str:
    """The Markdown table, with what was measured on what above it."""
    head = ["step", "s/step", "faster", "memory MB", "ratio", "temporary MB", "GFLOP", "ratio"]
    head += ["peak RSS MB", "ratio"] if options.rss else []
    lines = [
        f"{options.model}, {options.image_size} px, batch {options.batch}, float32: frozen until "
        f"{options.frozen_until}, {frozen_share:.1%} of the forward FLOPs.",
        "",
        f"{machine()}; median of {options.rounds} rounds of {options.steps} steps.",
        "",
        f"| {' | '.join(head)} |",
        f"|---|{'---:|' * (len(head) - 1)}",
    ]
    full = measured["full"]
    lines += [f"| {' | '.join(_cells(VARIANTS[n], m, full))} |" for n, m in measured.items()]
    return "\n".join(lines)


def _cells(name: str, found: Measured, full: Measured) -> list[str]:
    cells = [
        name,
        f"{found.seconds:.4f}",
        f"{full.seconds / found.seconds:.2f}x",
        megabytes(found.planned),
        "" if None in (found.planned, full.planned) else f"{found.planned / full.planned:.2f}",
        f"{found.temporary / MEGABYTE:.1f}",
        f"{found.flops / 1e9:.3g}",
        f"{found.flops / full.flops:.3f}",
    ]
    if found.peak is not None:
        cells += [f"{found.peak / MEGABYTE:.0f}", f"{found.peak / full.peak:.2f}"]
    return cells


if __name__ == "__main__":
    sys.exit(run_tool(main, sys.argv[1:]))
