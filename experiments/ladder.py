"""Trains strategies x fractions of the labels x seeds on the same splits, and says which to use.

    python launch.py --config=configs/ladder.py [--config.ladder.strategies=probe,lpft,full ...]

Each combination is a run of its own in `<workdir>/cells`, whose command repeats it alone; all but
those of k-NN, which have no network, can be used by `evaluate` and `predict`. All strategies of one
seed train on the same drawn images. A ladder that was interrupted goes on where it was; one in
whose folder strategies, fractions or seeds are added trains those alone. The result is that of one
without interruption; heads, whose seeds train together, are the same to float tolerance.
"""

import itertools
import pathlib
import time
from collections.abc import Sequence, Set

from configs import default
from experiments import finetune
from experiments.augmentation import resolve_augmentation
from experiments.ladder_cells import Cell, make_cells, overwritten_settings
from experiments.ladder_checks import check_cells
from experiments.ladder_requests import cell_request, named
from experiments.ladder_results import collect, data_name
from experiments.reporting import say_report
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.console import Console
from medtl_jax.data.catalog import Dataset
from medtl_jax.errors import UserError
from medtl_jax.files import write_file
from medtl_jax.report.ladder import (
    Ladder,
    entry_of,
    ladder_table,
    percent,
    to_json,
    write_ladder,
)
from medtl_jax.report.ladder_figures import ladder_figures
from medtl_jax.report.style import save_figures

RESULT, TABLE = "ladder.json", "ladder.md"
# What a ladder sets in each of its runs, and where to say it.
_OF_THE_LADDER = {
    "transfer.strategy": "ladder.strategies",
    "data.train_fraction": "ladder.fractions",
}


def resolve(config: dict, given: Set[str] = frozenset()) -> dict:
    """The config as it is, once all runs of the ladder are known to have one that can be used.

    In the place of an `augment.preset` it has the strengths, which are then those of every run.
    """
    flat, usual = (runs.flat_config(c) for c in (config, default.get_config().to_dict()))
    for key, instead in _OF_THE_LADDER.items():
        if flat[key] != usual[key]:
            raise UserError(f"{key}={flat[key]} has no effect in a ladder: set {instead}")
    config = resolve_augmentation(config, given)
    config = {**config, "augment": {**config["augment"], "preset": ""}}
    # A strategy may be another experiment, and one without weights leaves those of the others.
    make_cells(config, given - {"experiment", "model.weights"})
    return config


def run(request: Request) -> None:
    """Trains what is missing of the ladder, then writes table, figures and report."""
    config, folder, console = request.config, request.folder, request.console
    same = _check_folder(folder, config)
    if same and runs.is_finished(folder):
        console.note(f"{folder} is finished; for another ladder name another --workdir")
        _say(folder, console)
        return
    cells = make_cells(config)
    for line in overwritten_settings(cells, config):
        console.note(f"note: {line}")
    memo: dict[str, Dataset] = {}
    check_cells(cells, request, memo)
    environment = {**runs.describe_environment(), "command": request.command}
    if not (folder / runs.CONFIG).is_file():
        runs.open_folder(folder, config, environment)
    with runs.hold(folder):
        if not same:
            # First what says that the folder is finished.
            (folder / runs.METRICS).unlink(missing_ok=True)
            runs.write_json(folder / runs.ENVIRONMENT, environment)
            runs.write_json(folder / runs.CONFIG, config)
        _train(cells, request, memo)
        _finish(request, cells, environment)


def _check_folder(folder: pathlib.Path, config: dict) -> bool:
    """Whether `folder` is new or of this very ladder, and not of one with other rungs.

    UserError where it is of something else, as `runs.check_folder`.
    """
    if not (folder / runs.CONFIG).is_file():
        runs.check_folder(folder, config)
        return True
    earlier = runs.read_json(folder / runs.CONFIG).get("ladder")
    runs.check_folder(folder, {**config, "ladder": earlier})
    return earlier == config["ladder"]


def _train(cells: Sequence[Cell], request: Request, memo: dict[str, Dataset]) -> None:
    """Runs the cells that are not finished, the seeds of one strategy after each other."""
    done = 0
    for _, group in itertools.groupby(cells, lambda cell: (cell.fraction, cell.strategy)):
        members = list(group)
        _run_seeds(members, request, memo, f"{done + len(members)} of {len(cells)}")
        done += len(members)


def _run_seeds(
    members: Sequence[Cell], request: Request, memo: dict[str, Dataset], progress: str
) -> None:
    """Runs one strategy at one fraction with each of its seeds; what is finished stays."""
    started, missing = time.perf_counter(), []
    for cell in members:
        with named(cell.name):
            folder = cell.folder(request.folder)
            runs.check_folder(folder, cell.resolved)
            if not runs.is_finished(folder):
                missing.append(cell)
    if not missing:
        return
    requests = [cell_request(cell, request, memo) for cell in missing]
    with named(f"{missing[0].strategy}-{percent(missing[0].fraction)}"):
        if missing[0].experiment is finetune:
            finetune.run_all(requests)
        else:
            for one in requests:
                missing[0].experiment.run(one)
    seconds = time.perf_counter() - started
    names = ", ".join(cell.name for cell in missing)
    request.console.note(f"run {progress}: {names}, {seconds:.0f} s")


def _finish(request: Request, cells: Sequence[Cell], environment: dict) -> None:
    """Writes result, table, figures, report and, last of all, `metrics.json`; says the table."""
    folder, config = request.folder, request.config
    ladder = collect(folder, cells, config, request.console)
    runs.write_json(folder / RESULT, to_json(ladder), sort_keys=False)
    write_file(folder / TABLE, ladder_table(ladder))
    figures = ladder_figures(ladder)
    save_figures(figures, folder / "figures")
    write_ladder(
        folder / "report.html",
        ladder=ladder,
        title=f"Ladder of strategies: {data_name(cells[0].folder(folder))}",
        command=request.command,
        config=config,
        environment=environment,
        commands={cell.name: cell.command for cell in cells},
        figures=figures,
    )
    runs.write_json(folder / runs.METRICS, {"test": _metrics(ladder)}, sort_keys=False)
    _say(folder, request.console)


def _metrics(ladder: Ladder) -> dict[str, dict]:
    """Every mean as an entry of `metrics.json`, named `metric@percent/strategy`."""
    return {
        f"{metric}@{percent(level.fraction)}/{rung.strategy}": {
            **entry_of(found),
            "n": ladder.images,
        }
        for level in ladder.levels
        for rung in level.rungs
        for metric, found in rung.test.items()
    }


def _say(folder: pathlib.Path, console: Console) -> None:
    """Prints the table. UserError where it is gone."""
    path = folder / TABLE
    try:
        words = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise UserError(
            f"{path} cannot be read; delete {folder / runs.METRICS} to have it written again"
        ) from None
    console.note(f"\n{words}")
    say_report(folder, console)
