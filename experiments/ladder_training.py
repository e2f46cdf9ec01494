"""Trains the runs of a study of many, and keeps its folder."""

import contextlib
import itertools
import pathlib
import time
from collections.abc import Iterator, Sequence

from experiments import finetune
from experiments.cells import Cell
from experiments.ladder_requests import Memos, cell_request, named
from experiments.reporting import say_report
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.console import Console
from medtl_jax.errors import UserError


def check_many(folder: pathlib.Path, config: dict) -> bool:
    """Whether `folder` is new or of this very study, and not of one with other runs.

    The section that is named as the experiment says which runs there are. UserError where the
    folder is of something else, as `runs.check_folder`.
    """
    section = config["experiment"]
    if not (folder / runs.CONFIG).is_file():
        runs.check_folder(folder, config)
        return True
    earlier = runs.read_json(folder / runs.CONFIG).get(section)
    runs.check_folder(folder, {**config, section: earlier})
    return earlier == config[section]


@contextlib.contextmanager
def opened(folder: pathlib.Path, config: dict, environment: dict) -> Iterator[None]:
    """Makes the folder of a study, or continues that of an earlier part of it, and holds it.

    Called once everything that can be refused has been.
    """
    same = check_many(folder, config)
    if not (folder / runs.CONFIG).is_file():
        runs.open_folder(folder, config, environment)
    with runs.hold(folder):
        if not same:
            # First what says that the folder is finished.
            (folder / runs.METRICS).unlink(missing_ok=True)
            runs.write_json(folder / runs.ENVIRONMENT, environment)
            runs.write_json(folder / runs.CONFIG, config)
        yield


def train_cells(cells: Sequence[Cell], request: Request, memos: Memos) -> None:
    """Runs the cells that are not finished, the seeds of one strategy after each other."""
    done = 0
    for _, group in itertools.groupby(cells, lambda cell: cell.group):
        members = list(group)
        run_seeds(members, request, memos, f"{done + len(members)} of {len(cells)}")
        done += len(members)


def run_seeds(members: Sequence[Cell], request: Request, memos: Memos, progress: str) -> None:
    """Runs one strategy at one fraction with each of its seeds; what is finished stays."""
    started, missing = time.perf_counter(), []
    for cell in members:
        with named(cell):
            folder = cell.folder(request.folder)
            runs.check_folder(folder, cell.resolved)
            if not runs.is_finished(folder):
                missing.append(cell)
    if not missing:
        return
    requests = [cell_request(cell, request, memos) for cell in missing]
    groups = dict.fromkeys(cell.group for cell in missing)
    with named(missing[0], ", ".join(groups)):
        if missing[0].experiment is finetune:
            finetune.run_all(requests)
        else:
            for one in requests:
                missing[0].experiment.run(one)
    seconds = time.perf_counter() - started
    names = ", ".join(cell.title for cell in missing)
    request.console.note(f"run {progress}: {names}, {seconds:.0f} s")


def say_table(folder: pathlib.Path, name: str, console: Console) -> None:
    """Prints the table, the file `name` of the study, and names its report. UserError if gone."""
    path = folder / name
    try:
        words = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise UserError(
            f"{path} cannot be read; delete {folder / runs.METRICS} to have it written again"
        ) from None
    console.note(f"\n{words}")
    say_report(folder, console)
