"""Torch's side of the benchmark: a process of another interpreter, asked in turns."""

import argparse
import contextlib
import os
import pathlib
import subprocess

import jax

from experiments.benchmark_timing import NOTE, Row, Timer, alternate, milliseconds
from medtl_jax.errors import UserError

HEAD = "head"
"""The mode in which a frozen network is run every step, and its classifier alone learns."""

COLUMNS = ("images/s", "torch images/s", "ratio", "ms a step")
"""Those that `beside` fills."""

_ENDED = "torch's side of the benchmark ended; its own message stands above"


class PeerError(Exception):
    """Torch could not do what was asked; the message is one line."""


class Torch:
    """The process that times torch's side, see benchmark_torch.py.

    Attributes:
      version: of torch.

    Raises:
      UserError: at the start, there is no such interpreter or it has no torch.
    """

    def __init__(self, python: str, batch: int, size: int, dtype: str) -> None:
        gpu = jax.default_backend() == "gpu"
        command = [python, str(pathlib.Path(__file__).with_name("benchmark_torch.py"))]
        command += ["--batch", str(batch), "--size", str(size)]
        command += ["--device", "cuda", "--compile"] if gpu else ["--threads", str(os.cpu_count())]
        self._command = command + (["--amp"] if dtype == "bfloat16" else [])
        try:
            self._start()
        except PeerError as error:
            raise UserError(str(error)) from None
        except OSError as error:
            raise UserError(f"--torch={python}: {error.strerror}") from error

    def __enter__(self) -> "Torch":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def timer(self, name: str, mode: str) -> Timer:
        """`timer(n)` -> seconds of n iterations, built and warmed up. PeerError if it fails."""

        def timer(count: int) -> float:
            return self._ask(f"{name} {mode} {count}\n")

        timer(1)
        return timer

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = self._answer()

    def _ask(self, question: str) -> float:
        if self._process.poll() is not None:
            # It has ended in an earlier row, as for want of memory; this one may do.
            self.close()
            self._start()
        try:
            self._process.stdin.write(question)
            self._process.stdin.flush()
        except BrokenPipeError:
            self._process.wait()
            raise PeerError(_ENDED) from None
        answer = self._answer()
        try:
            return float(answer)
        except ValueError:
            raise PeerError(f"torch: {answer}") from None

    def _answer(self) -> str:
        line = self._process.stdout.readline().strip()
        if not line:
            self.close()
            raise PeerError(_ENDED)
        return line


def beside(
    ours: Timer, torch: Torch | None, asked: tuple[str, str], options: argparse.Namespace
) -> tuple[float, Row]:
    """Seconds of our step, and the cells of it and of torch's, which take turns.

    Args:
      ours: of a step on `options.batch` images.
      torch: None where there is none to compare with.
      asked: `(name, mode)` of torch's. Where it fails, ours is measured by itself.
      options: `rounds`, `seconds` of a round, `batch`.
    """
    seconds, note = [], ""
    if torch is not None:
        try:
            seconds = alternate([ours, torch.timer(*asked)], options.rounds, options.seconds)
        except PeerError as error:
            note = str(error)
    seconds = seconds or alternate([ours], options.rounds, options.seconds)
    cells = {"images/s": f"{options.batch / seconds[0]:.1f}", "ms a step": milliseconds(seconds[0])}
    if len(seconds) > 1:
        cells["torch images/s"] = f"{options.batch / seconds[1]:.1f}"
        cells["ratio"] = f"{seconds[1] / seconds[0]:.2f}"
    return seconds[0], {**cells, NOTE: note}
