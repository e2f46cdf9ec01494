"""The part of the benchmark on cached features: a head on them, beside the whole network."""

import argparse
import functools
from collections.abc import Iterator

# It prepares the process, before jax is imported.
from experiments.benchmark_timing import (
    DEVICE_PEAK,
    NOTE,
    Row,
    Section,
    measured_row,
    megabytes,
)

# isort: split
from experiments.benchmark_peer import COLUMNS, HEAD, Torch, beside
from experiments.benchmark_prefix import Steps
from experiments.benchmark_steps import finetune_network

_FASTER = "faster"


def cache_section(options: argparse.Namespace, torch: Torch | None) -> Section:
    """A step of the head of the first of `options.models`, all before it frozen, as `finetune`
    makes it: with the network run every step, and on its kept features.

    Torch's runs its network, too, without gradients, and learns the last linear layer alone.
    """
    name = options.models[0]
    columns = ("the features", *COLUMNS, _FASTER)
    rows = _rows(name, options, torch)
    title = f"A head on the frozen {name}: features computed every step, or kept"
    return Section(title, (*columns, "planned MB", DEVICE_PEAK, NOTE), rows)


def _rows(name: str, options: argparse.Namespace, torch: Torch | None) -> Iterator[Row]:
    seconds: dict[str, float] = {}
    for variant, label in (("frozen", "computed every step"), ("head", "kept")):
        peer = torch if variant == "frozen" else None
        work = functools.partial(_measure, variant, name, options, peer, seconds)
        yield measured_row({"the features": label}, work)


def _measure(
    variant: str,
    name: str,
    options: argparse.Namespace,
    torch: Torch | None,
    seconds: dict[str, float],
) -> Row:
    """The cells of a row; its seconds a step are put into `seconds`."""
    model, spec = finetune_network(name, options.dtype)
    sizes = {"image_size": options.size, "batch": options.batch}
    steps = Steps(variant, model, spec, **sizes, frozen_until=spec.head)
    steps.time(2)
    found, cells = beside(steps.time, torch, (name, HEAD), options)
    seconds[variant] = found
    faster = f"{seconds['frozen'] / found:.1f}x" if "frozen" in seconds else ""
    planned = steps.measured(found).planned
    return {**cells, _FASTER: faster, "planned MB": megabytes(planned)}
