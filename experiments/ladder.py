"""Trains strategies x fractions of the labels x seeds on the same splits, and says which to use.

    python launch.py --config=configs/ladder.py [--config.ladder.strategies=probe,lpft,full ...]

Each combination is a run of its own in `<workdir>/cells`, whose command repeats it alone; all but
those of k-NN, which have no network, can be used by `evaluate` and `predict`. All strategies of one
seed train on the same drawn images. A ladder that was interrupted goes on where it was; one in
whose folder strategies, fractions or seeds are added trains those alone. The result is that of one
without interruption; heads, whose seeds train together, are the same to float tolerance.
"""

from collections.abc import Sequence, Set

from experiments.augmentation import resolve_augmentation
from experiments.cells import Cell, check_untouched, overwritten_settings
from experiments.contact_sheet import study_sheet
from experiments.ladder_cells import make_cells
from experiments.ladder_checks import check_cells
from experiments.ladder_requests import Memos
from experiments.ladder_results import collect, data_name
from experiments.ladder_training import check_many, opened, say_table, train_cells
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.files import write_file
from medtl_jax.report.ladder import (
    Ladder,
    ladder_table,
    percent,
    write_ladder,
)
from medtl_jax.report.ladder_figures import ladder_figures
from medtl_jax.report.study_page import entry_of, to_json
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
    check_untouched(config, _OF_THE_LADDER, "a ladder")
    config = resolve_augmentation(config, given)
    config = {**config, "augment": {**config["augment"], "preset": ""}}
    # A strategy may be another experiment, and one without weights leaves those of the others.
    make_cells(config, given - {"experiment", "model.weights"})
    return config


def run(request: Request) -> None:
    """Trains what is missing of the ladder, then writes table, figures and report."""
    config, folder, console = request.config, request.folder, request.console
    if check_many(folder, config) and runs.is_finished(folder):
        console.note(f"{folder} is finished; for another ladder name another --workdir")
        say_table(folder, TABLE, console)
        return
    cells = make_cells(config)
    for line in overwritten_settings(cells, config):
        console.note(f"note: {line}")
    memos: Memos = {}
    check_cells(cells, request, memos)
    environment = {**runs.describe_environment(), "command": request.command}
    with opened(folder, config, environment):
        train_cells(cells, request, memos)
        _finish(request, cells, environment, memos)


def _finish(request: Request, cells: Sequence[Cell], environment: dict, memos: Memos) -> None:
    """Writes result, table, figures, report and, last of all, `metrics.json`; says the table."""
    folder, config = request.folder, request.config
    ladder = collect(folder, cells, config, request.console)
    runs.write_json(folder / RESULT, to_json(ladder), sort_keys=False)
    write_file(folder / TABLE, ladder_table(ladder))
    figures = ladder_figures(ladder) | study_sheet(cells, request, memos)
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
    say_table(folder, TABLE, request.console)


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
