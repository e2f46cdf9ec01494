"""Trains every combination of settings x seeds on the same splits, and says what each changes.

    python launch.py --config=configs/ablation.py --workdir=ABLATION [--config.key=value ...]

Each combination is a run of its own in `<workdir>/cells`, whose command repeats it alone and whose
folder is named by its seed and a hash of config, images and weights: one that is finished is never
run again, one of which anything has changed always is. In a row that sets `ensemble.members` each
seed has several runs, and the mean of what they predict stands in the table. Several processes, or
machines that share a file system with locks, may be given the same command: each run is made by one
of them, those that several rows have once, and the table is written once all are finished.
"""

import pathlib
from collections.abc import Callable, Sequence, Set

import numpy as np

from experiments import trained
from experiments.ablation_axes import DESIGNS, parse_axes, row_name, rows_of
from experiments.ablation_cells import (
    AblationCell,
    distinct,
    entries_of,
    make_cells,
    with_digests,
)
from experiments.ablation_fusion import read_entry, validation_values
from experiments.augmentation import resolve_augmentation
from experiments.contact_sheet import study_sheet
from experiments.ladder_checks import check_cells
from experiments.ladder_requests import Memos
from experiments.ladder_results import (
    check_same,
    checked,
    data_name,
    device_of,
    make_rungs,
    notes_of,
    sampled_runs,
)
from experiments.ladder_training import say_table
from experiments.shared_grid import begin, check_place, finishing, train_shared
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.errors import UserError
from medtl_jax.files import write_file
from medtl_jax.report.ablation import Ablation, ablation_table, rows_figure, write_ablation
from medtl_jax.report.study_page import entry_of, to_json
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
    preset = config["augment"]["preset"]
    config = resolve_augmentation(config, given)
    config = {**config, "augment": {**config["augment"], "preset": ""}}
    cells = make_cells(config)
    if preset and any(cell.of_row.get("augment.preset") == "" for cell in cells):
        raise UserError(
            f"ablation.axes: a row has augment.preset='' and the study {preset!r}, which no row "
            "can take back: leave it out of the study and name it in a row"
        )
    return config


def run(request: Request) -> None:
    """Trains what is missing of the ablation, then writes table, figures and report."""
    make_rows(request, _finish)
    say_table(request.folder, TABLE, request.console)


def make_rows(
    request: Request,
    finish: Callable[[Request, Sequence[AblationCell], dict, Memos], None],
) -> None:
    """Trains what is missing of the rows of `config.ablation`, then has their result written.

    `finish(request, cells, environment, memos)` is called by one process, once all runs are
    finished, and writes `metrics.json` last of all; not where that is there of these very runs.
    """
    config, folder = request.config, request.folder
    check_place(folder, config)
    memos: Memos = {}
    cells = with_digests(make_cells(config), request, memos)
    alone = distinct(cells)
    check_cells(alone, request, memos)
    environment = {**runs.describe_environment(), "command": request.command}
    begin(folder, config, environment)
    train_shared(alone, request, memos)
    with finishing(folder, config, environment, [cell.name for cell in alone]) as unwritten:
        if unwritten:
            finish(request, cells, environment, memos)


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
        commands={f"{cell.title}: {cell.name}": cell.command for cell in distinct(cells)},
        figures=figures,
    )
    runs.write_json(folder / runs.METRICS, {"test": _metrics(found)}, sort_keys=False)


def _collect(request: Request, cells: Sequence[AblationCell]) -> Ablation:
    """The result of the finished runs. UserError where one is damaged or has other test images."""
    folder, config = request.folder, request.config
    check_same(folder, cells)
    axes = parse_axes(config["ablation"]["axes"])
    rows = rows_of(axes, config["ablation"]["design"])
    first = cells[0].folder(folder)
    entries = entries_of(cells)
    tested = read_entry(entries[0], folder, "test")
    predicted = (read_entry(entry, folder, "test") for entry in entries)
    sampled = sampled_runs(predicted, len(entries), config, request.console)
    reference = row_name(rows[0])
    task = trained.read_card(first).task
    values = validation_values(entries, folder, config["train"]["select"])
    rungs, picked = make_rungs(folder, entries, sampled, values, reference, config["train"], task)
    return Ablation(
        rows=rungs,
        labels={row_name(row): row for row in rows},
        members={entry[0].strategy: len(entry) for entry in entries},
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
        notes=(*notes_of(folder, cells), *_differences(folder, cells)),
    )


def _differences(folder: pathlib.Path, cells: Sequence[AblationCell]) -> list[str]:
    """A note where the runs were made by different versions, or on different devices."""
    notes = []
    for key, what in (("commit", "versions of medtl_jax"), ("backend", "devices")):
        found = [checked(cell.folder(folder) / runs.ENVIRONMENT, str, key) for cell in cells]
        if len(set(found)) > 1:
            notes.append(
                f"the runs were made with different {what}: {', '.join(sorted(set(found)))}"
            )
    return notes


def _metrics(found: Ablation) -> dict[str, dict]:
    """Every mean as an entry of `metrics.json`, named `metric/row`."""
    return {
        f"{metric}/{row.strategy}": {**entry_of(value), "n": found.images}
        for row in found.rows
        for metric, value in row.test.items()
    }
