"""The runs of a study made by one process or by several at once, each run by one of them.

What is at work on a run holds a lock on a file in `<workdir>/locks`, which the system takes back
when the process ends, however it ends. Where the system has no such locks there can be one process.
"""

import contextlib
import os
import pathlib
import time
from collections.abc import Iterator, Sequence

try:
    import fcntl
except ImportError:  # not there on Windows
    fcntl = None

from experiments.cells import Cell
from experiments.ladder_requests import Memos
from experiments.ladder_training import run_seeds
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.errors import UserError

LOCKS = "locks"
# Seconds between two looks at runs that others are at work on.
_PAUSE = 2.0


def begin(folder: pathlib.Path, config: dict, environment: dict, complete: bool) -> None:
    """Makes the folder of a study of shared runs, or takes over that of an earlier one.

    Its runs know what they are made of by their names, so that the study in it may change.

    Args:
      folder: of the study.
      config: of the study.
      environment: versions, devices, command.
      complete: whether all of its runs are finished.

    Raises:
      UserError: the folder is of something else, or cannot be made.
    """
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={folder} cannot be made ({error.strerror})") from None
    with _locked(parent):
        if not (folder / runs.CONFIG).is_file():
            runs.open_folder(folder, config, environment)
        elif runs.read_json(folder / runs.CONFIG) != config or not complete:
            # First what says that the folder is finished.
            (folder / runs.METRICS).unlink(missing_ok=True)
            runs.write_json(folder / runs.ENVIRONMENT, environment)
            runs.write_json(folder / runs.CONFIG, config)
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

    A run whose process has ended before it is taken over.
    """
    told = False
    while missing := [c for c in cells if not runs.is_finished(c.folder(request.folder))]:
        worked = False
        for cell in missing:
            with _tried(request.folder / LOCKS / cell.name) as ours:
                if ours and not runs.is_finished(cell.folder(request.folder)):
                    number = f"{cells.index(cell) + 1} of {len(cells)}"
                    run_seeds([cell], request, memos, number)
                    worked = True
        if worked:
            continue
        if not told:
            words = "run is" if len(missing) == 1 else "runs are"
            request.console.note(f"{len(missing)} {words} made by other processes: waiting")
            told = True
        time.sleep(_PAUSE)


@contextlib.contextmanager
def finishing(folder: pathlib.Path) -> Iterator[bool]:
    """Whether the result is still to be written, while no other process writes it."""
    with _locked(folder):
        yield not runs.is_finished(folder)


@contextlib.contextmanager
def _tried(path: pathlib.Path) -> Iterator[bool]:
    """Whether the lock on the file `path`, made if need be, is ours; held for the block."""
    with open(path, "ab") as file:
        ours = True
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                ours = False
        yield ours


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Holds the lock on a folder, once nobody else does."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
