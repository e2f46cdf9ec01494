"""What a process that computes does before its first import of jax, and when it is to end."""

import contextlib
import ctypes
import os
import pathlib
import signal
import threading
from collections.abc import Iterator


def keep_freed_memory() -> None:
    """Lets glibc hold on to freed memory instead of returning it to the kernel.

    A training step on CPU frees and takes the same hundreds of megabytes again and again; mapped
    afresh each time, the page faults cost up to a third of the step.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, top_pad, mmap_threshold, mmap_max, arena_max = -1, -2, -3, -4, -8
        # One arena for all threads: the others would go on returning memory. It works on threads
        # that do not exist yet, so this comes before the first import of jax.
        libc.mallopt(arena_max, 1)
        libc.mallopt(mmap_threshold, 2**31 - 1)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 << 20)
        libc.mallopt(mmap_max, 0)
    except (OSError, AttributeError):
        return  # another C library: its own ways of allocation stay


def prepare_xla() -> None:
    """Sets up XLA before its first use: repeatable GPU kernels, programs cached on disk."""
    flags_set = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags_set:
        os.environ["XLA_FLAGS"] = f"{flags_set} --xla_gpu_deterministic_ops=true".strip()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import jax
    import pooch

    if not jax.config.jax_compilation_cache_dir:
        folder = pathlib.Path(pooch.os_cache("medtl_jax")) / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class Preempted(BaseException):
    """SIGTERM asked this process to end, and the state that a training had reached is saved.

    Like KeyboardInterrupt it is no `Exception`, so that nobody handles it by accident.
    """


PREEMPTED = 143
"""The exit code after SIGTERM."""
CONTINUES = "stopped by SIGTERM; the same command continues or repeats the run"


class Termination:
    """What SIGTERM does: it ends the process at once or, while that is `deferred`, where it can be.

    At once it ends as by SIGKILL, for which every file is written whole or not at all: an exception
    in the midst of a library's event loop might be lost there, or leave it waiting for ever.

    Attributes:
      asked: whether the signal has come.
    """

    def __init__(self):
        self.asked = False
        self._deferring = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM does that; in a thread that gets no signals, nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.asked = False
        before = signal.signal(signal.SIGTERM, self._handle)
        try:
            yield
        finally:
            # None stands for a handler that Python does not know.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, SIGTERM sets `asked` alone: whoever works here looks at it, and stops.

        Raises:
          Preempted: at the end, where it has come and nobody else is deferring it.
        """
        self._deferring += 1
        try:
            yield
        finally:
            self._deferring -= 1
        if self.asked and not self._deferring:
            raise Preempted

    def _handle(self, number, frame) -> None:
        del number, frame
        self.asked = True
        if not self._deferring:
            os.write(2, f"{CONTINUES}\n".encode())
            os._exit(PREEMPTED)


termination = Termination()


class _Role:
    follows = False
    sharers = 1


def follow() -> None:
    """Makes this process one that computes with others and writes no files."""
    _Role.follows = True


def lead() -> None:
    """Makes this process one that writes files, as it is from the start."""
    _Role.follows = False


def is_writer() -> bool:
    """Whether this process writes the run's files: of several that run one program, one does."""
    return not _Role.follows


@contextlib.contextmanager
def sharing(count: int) -> Iterator[None]:
    """Inside, this process is one of `count` that take runs of the same study."""
    _Role.sharers = count
    try:
        yield
    finally:
        _Role.sharers = 1


def sharers() -> int:
    """How many processes take runs of the same study, as far as this one was told: 1 or more."""
    return _Role.sharers
