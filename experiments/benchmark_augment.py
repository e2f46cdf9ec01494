"""What the augmentation of each preset adds to a train step.

    python -m experiments.benchmark_augment [--model efficientnet_lite0 --size 128 --batch 32]

The step of `finetune` with all stages in training, without augmentation and with that of each
preset, which take turns, round by round, in one run. X-rays, CT, MRI and ultrasound are grey, the
others in colour.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence

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
    machine,
    measured_row,
    megabytes,
    milliseconds,
)

# isort: split
import jax
import jax.numpy as jnp

from experiments.benchmark_steps import random_images, training_step
from experiments.settings import default_section
from medtl_jax.augment.policy import check_channels, make_augment
from medtl_jax.augment.presets import PRESETS, fill_preset
from medtl_jax.commands import Parser, run_tool

USUAL = "usual"
"""The augmentation of configs/default.py."""

_GREY = ("xray", "ct", "mri", "ultrasound")


def main(arguments: Sequence[str]) -> None:
    """Prints the table. UserError for a mistake on the command line."""
    options = _parse(arguments)
    print(
        f"{machine()}; {options.model}, batch {options.batch}, {options.size} px, "
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
    options.presets = options.presets.split(",")
    check_positive(options, "batch", "rounds", "steps")
    check_known("--presets", options.presets, PRESETS)
    check_size("--size", options.size, options.model)
    return options


def settings_of(preset: str) -> tuple[Mapping, int]:
    """`(config.augment, channels)` of a preset, or of `USUAL`."""
    if preset == USUAL:
        return default_section("augment"), 3
    settings, channels = fill_preset({"preset": preset}), 1 if preset in _GREY else 3
    check_channels(settings, channels)
    return settings, channels


def augmentation(settings: Mapping, channels: int, batch: int, size: int) -> Timed:
    """The augmentation of a batch of images that lie on the device, by itself."""
    augment = make_augment(settings)

    def draw(key, images):
        return jax.random.fold_in(key, 1), augment(key, images)[0]

    images = jnp.asarray(random_images(batch, size, channels))
    return compile_step(draw, jax.random.key(0), images)


def augment_section(options: argparse.Namespace) -> Section:
    """The augmentations of `options.presets` and the usual one, alone on the device."""
    columns = ("augmentation", "channels", "images/s", "ms a batch", "planned MB")
    rows = _alone_rows(options)
    return Section("Augmentation alone", (*columns, DEVICE_PEAK, NOTE), rows)


def _alone_rows(options: argparse.Namespace) -> Iterator[Row]:
    for preset in (USUAL, *options.presets):
        settings, channels = settings_of(preset)
        work = functools.partial(_alone, settings, channels, options)
        yield measured_row({"augmentation": preset, "channels": str(channels)}, work)


def _alone(settings: Mapping, channels: int, options: argparse.Namespace) -> Row:
    step = augmentation(settings, channels, options.batch, options.size)
    (seconds,) = alternate([step.time], options.rounds, options.seconds)
    return {
        "images/s": f"{options.batch / seconds:.0f}",
        "ms a batch": milliseconds(seconds),
        "planned MB": megabytes(step.planned),
    }


def _row(preset: str, options: argparse.Namespace) -> str:
    settings, channels = settings_of(preset)
    train = functools.partial(
        training_step,
        options.model,
        options.batch,
        options.size,
        "float32",
        channels=channels,
    )
    steps = (
        train(),
        train(augment=make_augment(settings)),
        augmentation(settings, channels, options.batch, options.size),
    )
    rounds = [
        [step.time(options.steps) / options.steps for step in steps] for _ in range(options.rounds)
    ]
    medians = [1000 * statistics.median(column) for column in zip(*rounds, strict=True)]
    # Of the two steps of one round: the load of the machine changes from round to round.
    added = [100 * (seconds[1] / seconds[0] - 1) for seconds in rounds]
    median, least, most = (f"{f(added):+.0f} %" for f in (statistics.median, min, max))
    without, within, single = (f"{value:.1f}" for value in medians)
    cells = (preset, channels, without, within, median, f"{least} to {most}", single)
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    sys.exit(run_tool(main, sys.argv[1:]))
