"""The runs of a study made by one process or by several at once, each run by one of them.

What is at work on a run holds a lock on a file in `<workdir>/locks`, which the system takes back
when the process ends, however it ends. Where the system has no such locks there can be one process.
"""

import contextlib
import errno
import pathlib
import time
from collections.abc import Collection, Iterator, Sequence

try:
    import fcntl
except ImportError:  # not there on Windows
    fcntl = None

from experiments.cells import Cell
from experiments.ladder_requests import Memos, keep_one
from experiments.ladder_training import run_seeds
from experiments.packing import packs
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.errors import UserError

LOCKS = "locks"
# Which runs the result is of, and the lock under which it is written.
_MADE_OF, _RESULT = "runs.json", ".result"
# What the system says of a lock that somebody else has.
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
# Seconds between two looks at runs that others are at work on.
_PAUSE = 2.0


def begin(folder: pathlib.Path, config: dict, environment: dict) -> None:
    """Makes the folder of a study of shared runs, unless there is one.

    Its runs know what they are made of by their names, so that the study in it may change.

    Raises:
      UserError: the folder is of something else, or cannot be made.
    """
    if not (folder / runs.CONFIG).is_file():
        try:
            runs.open_folder(folder, config, environment)
        except UserError:
            # Another process has made it in between.
            if not (folder / runs.CONFIG).is_file():
                raise
    check_place(folder, config)
    (folder / LOCKS).mkdir(exist_ok=True)


def check_place(folder: pathlib.Path, config: dict) -> None:
    """UserError unless `folder` is new or of a study of the same experiment as `config`."""
    if not (folder / runs.CONFIG).is_file():
        runs.check_folder(folder, config)
        return
    found = runs.read_json(folder / runs.CONFIG).get("experiment")
    if found != config["experiment"]:
        raise UserError(
            f"--workdir={folder} holds a run of experiment={found}; name another folder"
        )


def train_shared(cells: Sequence[Cell], request: Request, memos: Memos) -> None:
    """Runs the cells that neither are finished nor are made by another process, then waits.

    A run whose process has ended before it is taken over. One that cannot be finished, as a
    training that diverges, does not keep the others from it.

    Raises:
      UserError: some could not be finished; all others are.
    """
    told, failed = False, {}
    while missing := _missing(cells, request.folder, failed):
        worked = False
        for pack in packs([cell.resolved for cell in missing]):
            with contextlib.ExitStack() as stack:
                ours = _claimed(stack, [missing[place] for place in pack], request.folder)
                if ours:
                    worked = True
                    keep_one(memos, ours[0])
                    failed |= _run(ours, cells, request, memos)
        if worked:
            continue
        if not told:
            words = "run is" if len(missing) == 1 else "runs are"
            request.console.note(f"{len(missing)} {words} made by other processes: waiting")
            told = True
        time.sleep(_PAUSE)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(cells)} runs failed, the others are finished: "
            f"{next(iter(failed.values()))}; there is a table once all are: mend what it says, "
            "change their settings, or leave them out"
        )


def _claimed(
    stack: contextlib.ExitStack, cells: Sequence[Cell], folder: pathlib.Path
) -> list[Cell]:
    """Those of the cells that nobody else is at work on and nobody has finished, until `stack`.

    None where somebody else has begun to take them: two who start at once do not divide a program.
    """
    found = []
    for cell in cells:
        ours = stack.enter_context(_tried(folder / LOCKS / cell.name))
        if not ours and not found:
            return []
        if ours and not runs.is_finished(cell.folder(folder)):
            found.append(cell)
    return found


def _run(
    ours: Sequence[Cell], cells: Sequence[Cell], request: Request, memos: Memos
) -> dict[str, UserError]:
    """Runs some of the cells together; which have failed, and why."""
    number = ", ".join(str(cells.index(cell) + 1) for cell in ours) + f" of {len(cells)}"
    try:
        run_seeds(ours, request, memos, number)
    except UserError as error:
        if len(ours) == 1:
            request.console.note(f"run {number} failed: {error}")
            return {ours[0].name: error}
        # Which of them it was: the others go on by themselves.
        request.console.note(f"runs {number} failed together, now each by itself: {error}")
        failed: dict[str, UserError] = {}
        for cell in ours:
            failed |= _run([cell], cells, request, memos)
        return failed
    return {}


def _missing(cells: Sequence[Cell], folder: pathlib.Path, failed: Collection[str]) -> list[Cell]:
    return [c for c in cells if c.name not in failed and not runs.is_finished(c.folder(folder))]


@contextlib.contextmanager
def finishing(
    folder: pathlib.Path, config: dict, environment: dict, names: Sequence[str]
) -> Iterator[bool]:
    """Whether the result of the runs `names` is still to be written, while nobody else writes one.

    Where it is, the folder is no longer finished, and is that of `config`.
    """
    path = folder / LOCKS / _RESULT
    with _locked(path):
        ours = {"runs": list(names), "config": config}
        kept = runs.is_finished(folder) and (folder / _MADE_OF).is_file()
        if kept and runs.read_json(folder / _MADE_OF, most_bytes=100_000_000) == ours:
            yield False
            return
        # First what says that the folder is finished.
        (folder / runs.METRICS).unlink(missing_ok=True)
        runs.write_json(folder / runs.ENVIRONMENT, environment)
        runs.write_json(folder / runs.CONFIG, config)
        runs.write_json(folder / _MADE_OF, ours, sort_keys=False)
        yield True


@contextlib.contextmanager
def _tried(path: pathlib.Path) -> Iterator[bool]:
    """Whether the lock on the file `path`, made if need be, is ours; held for the block."""
    with open(path, "ab") as file:
        ours = True
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _HELD:
                    raise
                ours = False
        yield ours


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Holds the lock on the file `path`, made if need be, once nobody else does."""
    with open(path, "ab") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
