"""Images a second of each network, forward and in training, beside torch's where it is given.

    python -m experiments.benchmark --models resnet18,vgg16 [--torch PYTHON]

PYTHON is an interpreter with torch and torchvision (timm for the EfficientNet-Lites). Both sides
take turns, round by round, in one run: on a shared machine only their ratio says anything. Ours is
the forward pass in evaluation, and the train step that `finetune` uses (images as uint8,
normalisation on the device, all stages in training, SGD with momentum, gradient norms); theirs is
the plain loop of forward, backward and optimizer. On a GPU ours uses XLA's deterministic kernels,
as every run does; theirs torch.compile, and cuDNN's fastest kernels.
"""

import argparse
import contextlib
import dataclasses
import datetime
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from medtl_jax.commands import Parser, run_tool
from medtl_jax.process import keep_freed_memory, prepare_xla

# Before jax is imported, which the modules below do.
keep_freed_memory()
prepare_xla()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from medtl_jax.augment.policy import Augment, make_augment  # noqa: E402
from medtl_jax.errors import UserError  # noqa: E402
from medtl_jax.models.registry import create_model, initialize, model_spec  # noqa: E402
from medtl_jax.objectives.task import cross_entropy  # noqa: E402
from medtl_jax.runs import describe_environment  # noqa: E402
from medtl_jax.training.step import StepParts, Term, create_state, train_step  # noqa: E402
from medtl_jax.transfer.groups import label_tree  # noqa: E402
from medtl_jax.weights.adapt import adapted_input  # noqa: E402

MODELS = "resnet18,resnet50,vgg16,densenet121,mobilenet_v2,efficientnet_lite0,googlenet"
MODES = ("forward", "train")
_CLASSES = 1000

Timer = Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: seconds an iteration, ours and torch's (None without torch)."""

    model: str
    mode: str
    ours: float
    theirs: float | None


def main(arguments: Sequence[str]) -> None:
    """Prints the table. UserError for a mistake on the command line."""
    options = _parse(arguments)
    print(table(measure(options), options))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m experiments.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=MODELS, help="comma-separated; default: %(default)s")
    parser.add_argument("--modes", default=",".join(MODES), help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=112, help="pixels; default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round, about")
    parser.add_argument("--torch", default="", help="an interpreter that has torch")
    options = parser.parse_args(arguments)
    options.models, options.modes = options.models.split(","), options.modes.split(",")
    for key in ("batch", "rounds"):
        if getattr(options, key) < 1:
            raise UserError(f"--{key}={getattr(options, key)} must be at least 1")
    for name in options.models:
        if options.size < model_spec(name).smallest_input:
            raise UserError(f"--size={options.size} is too small for {name}")
    for mode in options.modes:
        if mode not in MODES:
            raise UserError(f"--modes: {mode!r} is not known; choose from {', '.join(MODES)}")
    return options


def measure(options: argparse.Namespace) -> list[Row]:
    """The rows of all models and modes; each pair of sides takes turns for `rounds` rounds."""
    rows: list[Row] = []
    torch = Torch(options) if options.torch else None
    with torch or contextlib.nullcontext():
        for name in options.models:
            for mode in options.modes:
                ours = make_timer(name, mode, options)
                once = min(ours(1) for _ in range(3))
                count = max(1, round(options.seconds / once))
                seconds, theirs = [], []
                for _ in range(options.rounds):
                    seconds.append(ours(count) / count)
                    if torch:
                        theirs.append(torch.time(name, mode, count) / count)
                peer = statistics.median(theirs) if theirs else None
                rows.append(Row(name, mode, statistics.median(seconds), peer))
                print(table(rows[-1:], options).splitlines()[-1], file=sys.stderr, flush=True)
    return rows


def make_timer(name: str, mode: str, options: argparse.Namespace) -> Timer:
    """`timer(n)` -> seconds of n iterations of a network, compiled and warmed up."""
    if mode == "train":
        return train_timer(name, options, make_augment({}))
    model, _ = create_model(name, _CLASSES, dtype=jnp.dtype(options.dtype))
    variables = initialize(model, options.size, jax.random.key(0))
    image = jnp.asarray(random_images(options), jnp.float32) / 128 - 1
    forward = jax.jit(lambda variables, image: model.apply(variables, image)[0])

    def step(carry):
        return carry, forward(variables, image)

    return repeated(step, None)


def random_images(options: argparse.Namespace, channels: int = 3) -> np.ndarray:
    """uint8 `[batch, size, size, channels]`."""
    shape = (options.batch, options.size, options.size, channels)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def train_timer(
    name: str, options: argparse.Namespace, augment: Augment, channels: int = 3
) -> Timer:
    """The timer of the train step of a network, compiled and warmed up."""
    model, spec = create_model(name, _CLASSES, channels, dtype=jnp.dtype(options.dtype))
    spec = dataclasses.replace(spec, input=adapted_input(spec.input, channels))
    variables = initialize(model, options.size, jax.random.key(0))
    label = jnp.arange(options.batch, dtype=jnp.int32)
    batch = {"image": jnp.asarray(random_images(options, channels)), "target": label}
    table = dict.fromkeys((*spec.stages, spec.head), "high")
    parts = StepParts(
        model=model,
        spec=spec,
        optimizer=optax.sgd(1e-3, momentum=0.9),
        table=table,
        labels=label_tree(variables["params"], table),
        terms=(Term("new", 1.0, cross_entropy(np.ones(_CLASSES, np.float32), 0.0)),),
        augment=augment,
    )
    update = jax.jit(
        lambda state: train_step(state, batch, jax.random.key(0), parts=parts), donate_argnums=0
    )
    return repeated(update, create_state(variables, parts))


def repeated(step: Callable, carry) -> Timer:
    """The timer of `step(carry) -> (carry, result)`, warmed up."""

    def timer(count: int) -> float:
        nonlocal carry
        start = time.perf_counter()
        for _ in range(count):
            carry, result = step(carry)
        jax.block_until_ready((carry, result))
        return time.perf_counter() - start

    timer(2)
    return timer


class Torch:
    """The process that times torch's side, see benchmark_torch.py."""

    def __init__(self, options: argparse.Namespace) -> None:
        gpu = jax.default_backend() == "gpu"
        command = [options.torch, str(pathlib.Path(__file__).with_name("benchmark_torch.py"))]
        command += ["--batch", str(options.batch), "--size", str(options.size)]
        command += ["--device", "cuda", "--compile"] if gpu else ["--threads", str(os.cpu_count())]
        command += ["--amp"] if options.dtype == "bfloat16" else []
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise UserError(f"--torch={options.torch}: {error.strerror}") from error
        options.torch_version = self._answer()

    def __enter__(self) -> "Torch":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> str:
        line = self.process.stdout.readline().strip()
        if not line:
            self.close()
            raise UserError("torch's side of the benchmark ended; its own message stands above")
        return line

    def time(self, name: str, mode: str, count: int) -> float:
        """Seconds of `count` iterations."""
        try:
            self.process.stdin.write(f"{name} {mode} {count}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.close()
            raise UserError("torch's side of the benchmark ended") from None
        return float(self._answer())


def table(rows: list[Row], options: argparse.Namespace) -> str:
    """The rows as Markdown, with what was measured on what above them."""
    versions = describe_environment()["packages"]
    device = jax.devices()[0].device_kind
    device = f"{device} ({platform.machine()}, {os.cpu_count()} cores)"
    version = getattr(options, "torch_version", "")
    lines = [
        f"{datetime.date.today()}, {device}, jax {versions['jax']}"
        f"{', torch ' + version if version else ''}; batch {options.batch}, {options.size} px, "
        f"{options.dtype}; median of {options.rounds} rounds",
        "",
        "| network | mode | images/s | torch images/s | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ours = options.batch / row.ours
        theirs = f"{options.batch / row.theirs:.1f}" if row.theirs else ""
        ratio = f"{row.theirs / row.ours:.2f}" if row.theirs else ""
        lines.append(f"| {row.model} | {row.mode} | {ours:.1f} | {theirs} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_tool(main, sys.argv[1:]))
