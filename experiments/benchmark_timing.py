"""How the benchmarks measure: rounds in turns, planned memory, counted arithmetic, the table.

It prepares the process, so it is imported before jax is.
"""

import argparse
import dataclasses
import datetime
import os
import pathlib
import platform
import statistics
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from medtl_jax.process import keep_freed_memory, prepare_xla

# Before jax is imported, which the modules below do.
keep_freed_memory()
prepare_xla()

import jax  # noqa: E402

from medtl_jax.commands import printable  # noqa: E402
from medtl_jax.errors import UserError  # noqa: E402
from medtl_jax.files import user_path  # noqa: E402
from medtl_jax.models.registry import model_spec  # noqa: E402
from medtl_jax.runs import describe_environment  # noqa: E402
from medtl_jax.training.runner import planned_bytes  # noqa: E402

MEGABYTE = 1e6
NOTE, DEVICE_PEAK = "note", "device peak MB"
_LONGEST_NOTE = 160

Timer = Callable[[int], float]
Row = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Timed:
    """A compiled step.

    Attributes:
      time: `time(n)` -> seconds of n steps.
      flops: of a step as the program is written, before XLA's passes: those turn convolutions
        into calls whose arithmetic it does not count. None where XLA does not say.
      planned: bytes that the program needs at once, with its arguments; None as above.
    """

    time: Timer
    flops: float | None
    planned: int | None


@dataclasses.dataclass(frozen=True)
class Section:
    """One table of a benchmark; `rows` measures as it is read, each row by column."""

    title: str
    columns: tuple[str, ...]
    rows: Iterable[Row]


def compile_step(step: Callable, carry, *given) -> Timed:
    """`step(carry, *given) -> (carry, result)`, compiled and warmed up; `carry` is donated."""
    lowered = jax.jit(step, donate_argnums=0).lower(carry, *given)
    program = lowered.compile()
    timer = repeated(lambda carry: program(carry, *given), carry)
    flops = (lowered.cost_analysis() or {}).get("flops")
    return Timed(timer, flops, planned_bytes(program, 0).get("step_bytes"))


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


def alternate(timers: Sequence[Timer], rounds: int, seconds: float) -> list[float]:
    """Seconds of an iteration of each timer, the median over rounds of about `seconds` each.

    The timers take turns, round by round: the load of the machine changes from round to round.
    """
    counts = [max(1, round(seconds / _once(timer, seconds))) for timer in timers]
    found: list[list[float]] = [[] for _ in timers]
    for _ in range(rounds):
        for values, timer, count in zip(found, timers, counts, strict=True):
            values.append(timer(count) / count)
    return [statistics.median(values) for values in found]


def _once(timer: Timer, seconds: float) -> float:
    """Seconds of one iteration; the least of three where these are short."""
    first = timer(1)
    return first if first > seconds / 4 else min(first, timer(1), timer(1))


def measured_row(label: Row, work: Callable[[], Row]) -> Row:
    """The cells of `label` and those that `work` measures, or a note why it could not.

    Where the devices count their memory, `DEVICE_PEAK` is the most bytes that one of them ever
    held; the counter is never set back, so a row that did not move it has "at most" there.
    """
    before = _device_peak()
    try:
        cells = work()
    except Exception as error:  # whatever it is, the other rows are wanted
        cells = {NOTE: trouble(error)}
    after = _device_peak()
    if after is not None:
        moved = "" if after > (before or 0) else "at most "
        cells = {**cells, DEVICE_PEAK: f"{moved}{after / MEGABYTE:.0f}"}
    return {**label, **cells}


def guarded(rows: Iterable[Row], first: str) -> Iterator[Row]:
    """The rows, and where they break off one with a note in place of the rest, under `first`."""
    try:
        yield from rows
    except Exception as error:  # as above
        yield {first: "the rest", NOTE: trouble(error)}


def trouble(error: Exception) -> str:
    """What a row says of an error; one that is neither the user's nor memory also on stderr."""
    text = printable((str(error).splitlines() or [""])[0]).replace("|", "/")
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return "out of memory"
    if not isinstance(error, UserError):
        traceback.print_exception(error)
        text = f"failed: {type(error).__name__}: {text}"
    return textwrap.shorten(text, _LONGEST_NOTE, placeholder=" ...")


def _device_peak() -> int | None:
    """Most bytes that a device of this process has held so far; None where none counts."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(
        (one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one), default=None
    )


def megabytes(count: float | None) -> str:
    """Bytes as a cell in megabytes, empty where they are not known."""
    return "" if count is None else f"{count / MEGABYTE:.1f}"


def milliseconds(seconds: float) -> str:
    """Seconds as a cell in milliseconds, with three digits that count."""
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def machine() -> str:
    """Date, devices, versions and commit, for the line above a table."""
    found = describe_environment()
    kinds, packages = found["devices"], found["packages"]
    devices = (f"{len(kinds)} x " if len(kinds) > 1 else "") + kinds[0]
    return (
        f"{datetime.date.today()}, {devices} ({platform.machine()}, {os.cpu_count()} cores), "
        f"Python {found['python']}, jax {packages['jax']}, flax {packages['flax']}, "
        f"commit {found['commit']}"
    )


def markdown(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    """A table of the rows; a column that is empty in all of them is left out."""
    shown = [name for name in columns if any(row.get(name) for row in rows)]
    lines = [shown, ["---"] * len(shown), *([row.get(name, "") for name in shown] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def check_positive(options: argparse.Namespace, *keys: str) -> None:
    """UserError unless these options are at least 1."""
    for key in keys:
        if getattr(options, key) < 1:
            raise UserError(f"--{key}={getattr(options, key)} must be at least 1")


def check_known(flag: str, names: Iterable[str], known: Iterable[str]) -> None:
    """UserError unless each of the names is known."""
    known = tuple(known)
    for name in names:
        if name not in known:
            raise UserError(f"{flag}: {name!r} is not known; choose from {', '.join(known)}")


def check_size(flag: str, size: int, model: str) -> None:
    """UserError if images of `size` pixels are too small for the network, or there is no such."""
    if size < model_spec(model).smallest_input:
        raise UserError(f"{flag}={size} is too small for {model}")


def output_path(text: str, flag: str) -> pathlib.Path | None:
    """The file for a table, None for none. UserError if it cannot be one."""
    path = user_path(text, flag) if text else None
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"{flag}={path}: name a file in a folder that exists")
    return path
