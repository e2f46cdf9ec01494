"""Several processes that run one program: how they meet, agree to stop, and end together.

The processes share one run folder, which all of them reach under the same path. Process 0 alone
writes into it, but for the checkpoints, which they write together.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping

import jax
from jax.experimental import multihost_utils

from medtl_jax import process
from medtl_jax.errors import UserError

_ENDED, _SEEN = "medtl_jax/ended", "medtl_jax/seen"
_SECONDS_BETWEEN_LOOKS = 0.5
# How often process 0 looks whether the others have heard of an end, before its own.
_LOOKS_AT_THE_END = 20
# As good as none: the others may be at work on a report, or on a large set.
_LONGEST_WAIT = 30 * 24 * 3600
_LOST = re.compile("gloo|unavailable|connection|coordination|heartbeat|barrier", re.IGNORECASE)

# Of the meetings of this process, which the others number alike.
_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Where and with how many others this process runs the program.

    Attributes:
      coordinator: `host:port` of process 0; empty where jax finds out by itself, as on a TPU pod or
        under SLURM, Open MPI or Kubernetes.
      processes: how many there are.
      process: which of them this one is, from 0.
      wait: seconds until all must have arrived.
    """

    coordinator: str = ""
    processes: int | None = None
    process: int | None = None
    wait: float = 300.0


def spans() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def check_joined() -> None:
    """UserError where the devices are those of several processes that have not met.

    The hosts of one TPU slice see the devices of all of them, whether they have met or not.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"the devices of this host belong to those of {jax.process_count()} hosts, as in a "
            "slice of a TPU, which compute as one program: give each the same command with "
            "--distributed, or, for runs of its own, a slice of its own"
        )


@contextlib.contextmanager
def joined(meeting: Meeting, report: Callable[[BaseException], int]) -> Iterator[None]:
    """Inside, this process and the others are one program; they leave together.

    Where one of them fails, all end at once with the exit code of its failure: a process that has
    failed is waited for by the others, in a computation that would never come to its end.

    Args:
      meeting: where they meet.
      report: says what went wrong and returns the exit code.

    Raises:
      UserError: there is nobody to meet, or the port of the coordinator is taken. That others have
        not arrived in time is one line on stderr and the end of the process, with exit code 2: jax
        waits where no exception reaches it.
    """
    _connect(meeting)
    if jax.process_index():
        process.follow()
    watch = _Watch()
    watch.start()
    stopped = None
    try:
        try:
            yield
        except process.Preempted as error:
            stopped = error
        _leave(watch)
    except BaseException as error:
        _fail(error, report)
    finally:
        process.lead()
    if stopped is not None:
        raise stopped


def _connect(meeting: Meeting) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    late = threading.Timer(meeting.wait, _say_late, [meeting])
    late.daemon = True
    late.start()
    try:
        _initialize(meeting)
        jax.devices()
    finally:
        late.cancel()


def _initialize(meeting: Meeting) -> None:
    try:
        if meeting.coordinator and meeting.process == 0:
            _bind_once(int(meeting.coordinator.rpartition(":")[2]))
        jax.distributed.initialize(
            meeting.coordinator or None,
            meeting.processes,
            meeting.process,
            # jax ends the process with a stack trace when it gives up: the timer comes first.
            initialization_timeout=int(meeting.wait) + 60,
        )
    except (OSError, RuntimeError, ValueError) as error:
        if not meeting.coordinator:
            raise UserError(
                "--distributed: jax finds no cluster here (TPU pod, SLURM, Open MPI, Kubernetes): "
                f"{error}; name it with --coordinator, --processes and --process"
            ) from None
        raise UserError(
            f"--coordinator={meeting.coordinator} cannot be used by process {meeting.process}: "
            f"{error}; name another port, the same for all"
        ) from None


def _bind_once(port: int) -> None:
    """OSError if `port` of this host cannot be had, of which jax would die by a signal."""
    dual = socket.has_dualstack_ipv6()
    with socket.socket(socket.AF_INET6 if dual else socket.AF_INET) as probe:
        if dual:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # As gRPC does: the connections of a run that has just ended do not keep the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", port))


def _say_late(meeting: Meeting) -> None:
    where = f" at {meeting.coordinator}" if meeting.coordinator else ""
    who = "" if meeting.processes is None else f"of the {meeting.processes} "
    _quit(
        2,
        f"error: not all {who}processes have met{where} after {meeting.wait:g} s; start every "
        "one of them with the same --coordinator and --processes and its own --process, or give "
        "them more time with --wait",
    )


def _quit(code: int, line: str = "") -> None:
    """Ends the process at once: what jax does at its end would wait for the others."""
    if line:
        print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _client():
    # The key-value store that jax itself, and orbax, have the processes agree by.
    from jax._src import distributed

    return distributed.global_state.client


class _Watch(threading.Thread):
    """Ends this process when another one says that it has failed."""

    def __init__(self):
        super().__init__(daemon=True)
        self._over = threading.Event()

    def run(self) -> None:
        client = _client()
        while not self._over.wait(_SECONDS_BETWEEN_LOOKS):
            # Reading the folder of the key, unlike the key, is no error where there is none.
            try:
                found = client.key_value_dir_get(_ENDED)
            except jax.errors.JaxRuntimeError:
                return  # process 0 is gone: jax ends this one
            if found:
                _follow(found[0][1])

    def stop(self) -> None:
        self._over.set()
        self.join()


def _follow(ended: str) -> None:
    """Ends this process as the one that has failed, where that is another one."""
    who, code, line = ended.split(" ", 2)
    if int(who) != jax.process_index():
        _end(int(code), f"error: process {who} has ended: {line}")


def _fail(error: BaseException, report: Callable[[BaseException], int]) -> None:
    """Says why this process ends, here and to the others, and ends it."""
    if isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error)):
        error = UserError(
            "another process is gone; the same command on all of them continues the run"
        )
    client = _client()
    if client is None:
        _quit(report(error))  # the connection has been ended
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        # Perhaps it is another one's end that this one fails of.
        for _, ended in client.key_value_dir_get(_ENDED):
            _follow(ended)
    code = report(error)
    line = " ".join(str(error).split()) or type(error).__name__
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(f"{_ENDED}/first", f"{jax.process_index()} {code} {line}")
    _end(code)


def _end(code: int, line: str = "") -> None:
    """Ends this process; process 0, with which the store ends, after the others."""
    client, pause = _client(), threading.Event()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(f"{_SEEN}/{jax.process_index()}", "", allow_overwrite=True)
        for _ in range(0 if jax.process_index() else _LOOKS_AT_THE_END):
            if len(client.key_value_dir_get(_SEEN)) == jax.process_count():
                break
            pause.wait(_SECONDS_BETWEEN_LOOKS)
    _quit(code, line)


def _leave(watch: _Watch) -> None:
    """Waits for the others and ends the connection."""
    # Another one may be somewhere else, as in a run that this one has found finished.
    meet({"the end": ""})
    watch.stop()
    jax.distributed.shutdown()


def meet(facts: Mapping[str, str] | None = None) -> None:
    """Waits until all processes are here; at once where there is one.

    Args:
      facts: what has to be the same in all of them, by its name.

    Raises:
      UserError: it is not, or they have met from different parts of the program.
    """
    if not spans():
        return
    client, place = _client(), f"medtl_jax/{next(_numbers)}"
    client.key_value_set(f"{place}/{jax.process_index()}", json.dumps(dict(facts or {})))
    client.wait_at_barrier(place, 1000 * _LONGEST_WAIT)
    told = {
        int(key.rpartition("/")[2]): json.loads(value)
        for key, value in client.key_value_dir_get(place)
    }
    for number in sorted(told):
        _check_alike(number, told[number], told[0])


def _check_alike(number: int, facts: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    if facts.keys() != wanted.keys():
        raise UserError(
            f"process {number} is at another part of the program than process 0; start all "
            "processes with the same command and the same run folder"
        )
    differing = [name for name in wanted if facts[name] != wanted[name]]
    if differing:
        raise UserError(
            f"process {number} has another {', '.join(differing[:3])}"
            f"{' and more' if len(differing) > 3 else ''} than process 0; start all processes "
            "with the same command, data and weights"
        )


class Stop:
    """Whether to stop at this step: asked once a step by all processes, and answered alike.

    Several processes stop at the first step that none of them has gone past when one of them is
    sent SIGTERM.
    """

    def __init__(self):
        self._calls, self._reached = 0, False

    def __call__(self) -> bool:
        self._calls += 1
        if not spans():
            return process.termination.asked
        # Of one step alone jax says that it is the one.
        self._reached |= multihost_utils.reached_preemption_sync_point(self._calls)
        return self._reached
