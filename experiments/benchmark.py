"""What this device makes of the project: networks, input, augmentation, ensembles, kept features.

    python -m experiments.benchmark [--parts models,input,augment,ensemble,cache] [--torch PYTHON]
        [--models resnet18,vgg16] [--dtype bfloat16] [--output table.md]

PYTHON is an interpreter with torch and torchvision (timm for the EfficientNet-Lites). Both sides
take turns, round by round, in one run: on a shared machine only their ratio says anything.

models: the forward pass in evaluation, and the train step that `finetune` uses (images as uint8,
normalisation on the device, all stages in training, SGD with momentum, gradient norms); torch's is
the plain loop of forward, backward and optimizer. On a GPU ours uses XLA's deterministic kernels,
as every run does; theirs torch.compile, and cuDNN's fastest kernels. They run on one device.
input: files to batches, by themselves. augment: a batch that lies on the device, by itself.
ensemble: members of one program over all devices, in each of the ways of computing them, with the
one that `train.program=auto` takes. Each round is an epoch, with the states put together before it
and taken apart behind it.
cache: a head on a frozen network that is run every step, and on its kept features; over all
devices, torch's on one.

"of peak" is the FLOPs of a step, as the program is written, a second, over those of a product of
two large matrices on the same device in the same dtype and the same run: what this machine reaches
at all (the fastest round), not what its maker says of it. Winograd convolutions need fewer than
they are counted for, and may come out above 100%.
"planned MB" is what XLA reserves for the program: arguments, results, temporary values, without
the data set; of the train step they include the batch. "device peak MB" is the most that a device
has held in this run so far, where it counts; "at most", where the row did not raise it.
The compute dtype is that of networks and heads; augmentation is float32.
What fails, as for want of memory, has a note in its row. `--output` is written row by row.
"""

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence

# It prepares the process, before jax is imported.
from experiments.benchmark_timing import (
    DEVICE_PEAK,
    NOTE,
    Row,
    Section,
    Timed,
    alternate,
    check_known,
    check_positive,
    check_size,
    compile_step,
    guarded,
    machine,
    markdown,
    measured_row,
    megabytes,
    milliseconds,
    output_path,
)

# isort: split
import jax
import jax.numpy as jnp

from experiments.benchmark_augment import augment_section
from experiments.benchmark_cache import cache_section
from experiments.benchmark_ensemble import ensemble_section
from experiments.benchmark_input import input_section
from experiments.benchmark_peer import COLUMNS, Torch, beside
from experiments.benchmark_steps import FORWARD, TRAIN, forward_pass, training_step
from medtl_jax.augment.presets import PRESETS
from medtl_jax.commands import Parser, run_tool
from medtl_jax.ensemble.program import PROGRAMS
from medtl_jax.errors import UserError
from medtl_jax.files import write_file
from medtl_jax.training.devices import check_batch_size, data_mesh

MODELS = "resnet18,resnet50,vgg16,densenet121,mobilenet_v2,efficientnet_lite0,googlenet"
MODES: dict[str, Callable[..., Timed]] = {FORWARD: forward_pass, TRAIN: training_step}
_GIGA = 1e9


def main(arguments: Sequence[str]) -> None:
    """Prints the tables, and writes them with `--output`. UserError for a mistake."""
    options = _parse(arguments)
    sides = (options.torch, options.batch, options.size, options.dtype)
    torch = Torch(*sides) if options.torch else None
    with torch or contextlib.nullcontext():
        text = header = _header(options, torch)
        done = table = ""
        for name in options.parts:
            section = PARTS[name](options, torch)
            rows: list[Row] = []
            for row in guarded(section.rows, section.columns[0]):
                rows.append(row)
                shown = filter(None, (row.get(column) for column in section.columns))
                print(" ".join(shown), file=sys.stderr, flush=True)
                table = f"\n## {section.title}\n\n{markdown(section.columns, rows)}\n"
                text = header + done + table
                if options.output:
                    write_file(options.output, text)
            done += table
    print(text, end="")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m experiments.benchmark", description=__doc__.splitlines()[0])
    add, shown = parser.add_argument, "default: %(default)s"
    add("--parts", default=",".join(PARTS), help=shown)
    add("--models", default=MODELS, help=f"{shown}; the first is that of cache and of the heads")
    add("--modes", default=",".join(MODES), help=shown)
    add("--batch", type=int, default=32, help=shown)
    add("--size", type=int, default=112, help=f"pixels; {shown}")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=shown)
    add("--rounds", type=int, default=5, help=shown)
    add("--seconds", type=float, default=0.5, help=f"of a round, about; {shown}")
    add("--presets", default="xray,photographs", help=f"beside the usual augmentation; {shown}")
    add("--members", default="2,4,8", help=f"beside one alone; {shown}")
    add("--programs", default=",".join(PROGRAMS), help=shown)
    add("--member-models", default="lenet5", help=shown)
    add("--member-size", type=int, default=28, help=f"pixels; {shown}")
    add("--torch", default="", metavar="PYTHON", help="an interpreter that has torch")
    add("--output", default="", metavar="FILE.md", help="for the tables")
    options = parser.parse_args(arguments)
    for key in ("parts", "models", "modes", "presets", "programs", "member_models"):
        setattr(options, key, getattr(options, key).split(","))
    options.members = _counts("--members", options.members)
    _check(options)
    options.output = output_path(options.output, "--output")
    return options


def _counts(flag: str, text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise UserError(f"{flag}={text}: want numbers from 1 on, with commas between them")
    return counts


def _check(options: argparse.Namespace) -> None:
    """UserError for what cannot be measured, as far as the parts that are asked for go."""
    check_positive(options, "batch", "size", "rounds")
    if not 0 < options.seconds < float("inf"):
        raise UserError(f"--seconds={options.seconds} must be more than 0")
    check_known("--parts", options.parts, PARTS)
    check_known("--modes", options.modes, MODES)
    check_known("--presets", options.presets, PRESETS)
    check_known("--programs", options.programs, PROGRAMS)
    if {"models", "ensemble", "cache"} & set(options.parts):
        # The other parts take the first alone.
        for name in options.models if "models" in options.parts else options.models[:1]:
            check_size("--size", options.size, name)
    if "ensemble" in options.parts:
        for name in options.member_models:
            check_size("--member-size", options.member_size, name)
    if {"input", "cache"} & set(options.parts):
        check_batch_size("--batch", options.batch, data_mesh())


def _header(options: argparse.Namespace, torch: Torch | None) -> str:
    beside_it = f"; torch {torch.version}" if torch else ""
    return (
        f"{machine()}{beside_it}; batch {options.batch}, {options.size} px, {options.dtype}; "
        f"median of {options.rounds} rounds of about {options.seconds} s\n"
    )


def models_section(options: argparse.Namespace, torch: Torch | None) -> Section:
    """The forward pass and the train step of each network, after the product of two matrices."""
    columns = ("network", "mode", *COLUMNS, "GFLOP", "GFLOP/s", "of peak", "planned MB")
    return Section("Networks", (*columns, DEVICE_PEAK, NOTE), _model_rows(options, torch))


def _model_rows(options: argparse.Namespace, torch: Torch | None) -> Iterator[Row]:
    peak: list[float] = []
    side = 2048 if jax.default_backend() == "cpu" else 8192
    label = {"network": f"product of {side} x {side} matrices", "mode": ""}
    yield measured_row(label, functools.partial(_product, side, options, peak))
    for name in options.models:
        for mode in options.modes:
            work = functools.partial(_model, name, mode, options, torch, peak)
            yield measured_row({"network": name, "mode": mode}, work)


def _product(side: int, options: argparse.Namespace, peak: list[float]) -> Row:
    """The cells of a matrix product, whose FLOP/s is put into `peak`."""
    factor = jax.random.normal(jax.random.key(0), (side, side)) / side**0.5
    factor = factor.astype(options.dtype)
    step = compile_step(lambda value, factor: (value @ factor, None), jnp.copy(factor), factor)
    # The fastest round: a peak is not what other work on the machine leaves of it.
    seconds = min(alternate([step.time], 1, options.seconds)[0] for _ in range(options.rounds))
    peak.append(2 * side**3 / seconds)
    return {"ms a step": milliseconds(seconds), **_arithmetic(2.0 * side**3, seconds, peak)}


def _model(
    name: str, mode: str, options: argparse.Namespace, torch: Torch | None, peak: list[float]
) -> Row:
    step = MODES[mode](name, options.batch, options.size, options.dtype)
    seconds, cells = beside(step.time, torch, (name, mode), options)
    cells |= {"planned MB": megabytes(step.planned)}
    return {**cells, **_arithmetic(step.flops, seconds, peak)}


def _arithmetic(flops: float | None, seconds: float, peak: list[float]) -> Row:
    """The cells about the FLOPs of a step; none where they, or the peak, are not known."""
    if flops is None:
        return {}
    rate = flops / seconds
    share = {"of peak": f"{rate / peak[0]:.0%}"} if peak else {}
    return {"GFLOP": f"{flops / _GIGA:.3g}", "GFLOP/s": f"{rate / _GIGA:.1f}", **share}


PARTS: dict[str, Callable[[argparse.Namespace, Torch | None], Section]] = {
    "models": models_section,
    "input": lambda options, _: input_section(options),
    "augment": lambda options, _: augment_section(options),
    "ensemble": lambda options, _: ensemble_section(options),
    "cache": cache_section,
}
"""What there is to measure, in the order of the table."""


if __name__ == "__main__":
    sys.exit(run_tool(main, sys.argv[1:]))
