"""What the augmentation of each preset adds to a train step.

    python -m experiments.benchmark_augment [--model efficientnet_lite0 --size 128 --batch 32]

The step of `finetune` with all stages in training, without augmentation and with that of each
preset, which take turns, round by round, in one run. X-rays, CT, MRI and ultrasound are grey, the
others in colour.
"""

import argparse
import datetime
import os
import platform
import statistics
import sys
from collections.abc import Sequence

# It sets XLA's flags, before jax is imported.
from experiments.benchmark import random_images, repeated, train_timer

# isort: split
import jax
import jax.numpy as jnp

from medtl_jax.augment.policy import check_channels, make_augment
from medtl_jax.augment.presets import PRESETS, fill_preset
from medtl_jax.commands import Parser, run_tool
from medtl_jax.errors import UserError
from medtl_jax.models.registry import model_spec
from medtl_jax.runs import describe_environment

_GREY = ("xray", "ct", "mri", "ultrasound")


def main(arguments: Sequence[str]) -> None:
    """Prints the table. UserError for a mistake on the command line."""
    options = _parse(arguments)
    versions, device = describe_environment()["packages"], jax.devices()[0].device_kind
    print(
        f"{datetime.date.today()}, {device} ({platform.machine()}, {os.cpu_count()} cores), "
        f"jax {versions['jax']}; {options.model}, batch {options.batch}, {options.size} px, "
        f"float32; median of {options.rounds} rounds\n\n"
        "| preset | channels | ms a step without | ms a step with | added, median of the rounds' "
        "ratios | least to most | ms alone |\n"
        "|---|---|---|---|---|---|---|"
    )
    for preset in options.presets:
        print(_row(preset, options), flush=True)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m experiments.benchmark_augment", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--presets", default=",".join(PRESETS), help="default: %(default)s")
    parser.add_argument("--model", default="efficientnet_lite0", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=128, help="pixels; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="of a round; default: %(default)s")
    options = parser.parse_args(arguments)
    options.presets, options.dtype = options.presets.split(","), "float32"
    for key in ("batch", "rounds", "steps"):
        if getattr(options, key) < 1:
            raise UserError(f"--{key}={getattr(options, key)} must be at least 1")
    for name in options.presets:
        if name not in PRESETS:
            raise UserError(f"--presets: {name!r} is not known; choose from {', '.join(PRESETS)}")
    if options.size < model_spec(options.model).smallest_input:
        raise UserError(f"--size={options.size} is too small for {options.model}")
    return options


def _row(preset: str, options: argparse.Namespace) -> str:
    channels = 1 if preset in _GREY else 3
    settings = fill_preset({"preset": preset})
    check_channels(settings, channels)
    augment = make_augment(settings)
    images = jnp.asarray(random_images(options, channels))
    alone = jax.jit(lambda key: augment(key, images)[0])

    def draw(key):
        return jax.random.fold_in(key, 1), alone(key)

    timers = (
        train_timer(options.model, options, make_augment({}), channels),
        train_timer(options.model, options, augment, channels),
        repeated(draw, jax.random.key(0)),
    )
    rounds = [
        [timer(options.steps) / options.steps for timer in timers] for _ in range(options.rounds)
    ]
    medians = [1000 * statistics.median(column) for column in zip(*rounds, strict=True)]
    # Of the two steps of one round: the load of the machine changes from round to round.
    added = [100 * (seconds[1] / seconds[0] - 1) for seconds in rounds]
    median, least, most = (f"{f(added):+.0f} %" for f in (statistics.median, min, max))
    without, within, single = (f"{milliseconds:.1f}" for milliseconds in medians)
    cells = (preset, channels, without, within, median, f"{least} to {most}", single)
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    sys.exit(run_tool(main, sys.argv[1:]))
