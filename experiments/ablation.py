"""Trains every combination of settings x seeds on the same splits, and says what each changes.

    python launch.py --config=configs/ablation.py [--config.ablation.axes='{...}' ...]

Each combination is a run of its own in `<workdir>/cells`, whose command repeats it alone and whose
name ends with a hash of its config, images and weights: one that is finished is never run again,
one of which anything has changed always is. Several processes, or machines that share a file
system with locks, may be given the same command: each run is made by one of them, and the table is
written once all are finished.
"""

from collections.abc import Sequence, Set

import numpy as np

from experiments import trained
from experiments.ablation_axes import DESIGNS, parse_axes, row_name, rows_of
from experiments.ablation_cells import AblationCell, make_cells, with_digests
from experiments.augmentation import resolve_augmentation
from experiments.compare import read_run
from experiments.contact_sheet import study_sheet
from experiments.ladder_checks import check_cells
from experiments.ladder_requests import Memos
from experiments.ladder_results import data_name, device_of, make_rungs, notes_of, sampled_runs
from experiments.ladder_training import say_table
from experiments.shared_grid import begin, check_place, finishing, train_shared
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.errors import UserError
from medtl_jax.files import write_file
from medtl_jax.report.ablation import Ablation, ablation_table, rows_figure, write_ablation
from medtl_jax.report.ladder import entry_of, to_json
from medtl_jax.report.style import save_figures

RESULT, TABLE = "ablation.json", "ablation.md"


def resolve(config: dict, given: Set[str] = frozenset()) -> dict:
    """The config as it is, once all runs of the ablation are known to have one that can be used.

    In the place of an `augment.preset` it has the strengths, which rows may change.
    """
    if config["ablation"]["design"] not in DESIGNS:
        raise UserError(
            f"ablation.design={config['ablation']['design']!r} is not known; choose from "
            f"{', '.join(DESIGNS)}"
        )
    config = resolve_augmentation(config, given)
    config = {**config, "augment": {**config["augment"], "preset": ""}}
    make_cells(config)
    return config


def run(request: Request) -> None:
    """Trains what is missing of the ablation, then writes table, figures and report."""
    config, folder, console = request.config, request.folder, request.console
    check_place(folder, config)
    memos: Memos = {}
    cells = with_digests(make_cells(config), request, memos)
    check_cells(cells, request, memos)
    environment = {**runs.describe_environment(), "command": request.command}
    complete = all(runs.is_finished(cell.folder(folder)) for cell in cells)
    begin(folder, config, environment, complete)
    train_shared(cells, request, memos)
    with finishing(folder) as unwritten:
        if unwritten:
            _finish(request, cells, environment, memos)
    say_table(folder, TABLE, console)


def _finish(
    request: Request, cells: Sequence[AblationCell], environment: dict, memos: Memos
) -> None:
    """Writes result, table, figures, report and, last of all, `metrics.json`."""
    folder, config = request.folder, request.config
    found = _collect(request, cells)
    runs.write_json(folder / RESULT, to_json(found), sort_keys=False)
    write_file(folder / TABLE, ablation_table(found))
    figures = {metric: rows_figure(found, metric) for metric in found.metrics}
    figures |= study_sheet(cells, request, memos)
    save_figures(figures, folder / "figures")
    write_ablation(
        folder / "report.html",
        found=found,
        title=f"Ablation: {data_name(cells[0].folder(folder))}",
        command=request.command,
        config=config,
        environment=environment,
        commands={cell.name: cell.command for cell in cells},
        figures=figures,
    )
    runs.write_json(folder / runs.METRICS, {"test": _metrics(found)}, sort_keys=False)


def _collect(request: Request, cells: Sequence[AblationCell]) -> Ablation:
    """The result of the finished runs. UserError where one is damaged or has other test images."""
    folder, config = request.folder, request.config
    axes = parse_axes(config["ablation"]["axes"])
    rows = rows_of(axes, config["ablation"]["design"])
    first = cells[0].folder(folder)
    tested = read_run(first, cells[0].name, "test").predicted
    predicted = (read_run(cell.folder(folder), cell.name, "test").predicted for cell in cells)
    sampled = sampled_runs(predicted, len(cells), config, request.console)
    reference = row_name(rows[0])
    task = trained.read_card(first).task
    rungs, picked = make_rungs(folder, cells, sampled, reference, config["train"], task)
    return Ablation(
        rows=rungs,
        labels={row_name(row): row for row in rows},
        sets=tuple(
            (name, label, "; ".join(f"{key}={value!r}" for key, value in settings.items()))
            for name, labels in axes.items()
            for label, settings in labels.items()
        ),
        reference=reference,
        picked=picked,
        select=config["train"]["select"],
        seeds=config["ablation"]["seeds"],
        images=len(tested.ids),
        patients=None if tested.patients is None else len(np.unique(tested.patients)),
        device=device_of(first),
        notes=notes_of(folder, cells),
    )


def _metrics(found: Ablation) -> dict[str, dict]:
    """Every mean as an entry of `metrics.json`, named `metric/row`."""
    return {
        f"{metric}/{row.strategy}": {**entry_of(value), "n": found.images}
        for row in found.rows
        for metric, value in row.test.items()
    }
