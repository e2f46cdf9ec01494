"""Fills the tables of a paper: CNNs from scratch, pretrained ones, and what came before CNNs.

    python launch.py --config=configs/paper_tables.py --workdir=TABLES

Accuracy, precision, recall, specificity and F1 (Table 2), Dice, IoU, MAE and MSE (Table 3), with
intervals over several seeds, bar charts of both and confusion matrices (figures 6 to 9). Each run
is one of an ablation whose axis is the model: interrupted tables go on with the same command, and
several processes may share them. The finished cells are checked against each other.
"""

import json
from collections.abc import Sequence, Set

import numpy as np

from experiments import ablation
from experiments.ablation_axes import parse_axes
from experiments.ablation_cells import AblationCell, distinct, entries_of
from experiments.ablation_fusion import read_entry
from experiments.cells import check_untouched, listed
from experiments.ladder_requests import Memos
from experiments.ladder_results import check_same, data_name, notes_of, sampled_runs
from experiments.ladder_training import say_table
from experiments.rank import parse_candidates
from experiments.settings import default_section
from experiments.strategies import find_strategy
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.errors import UserError
from medtl_jax.files import write_file
from medtl_jax.metrics.pairing import Predicted
from medtl_jax.metrics.published import published_scores
from medtl_jax.metrics.scores import confusion
from medtl_jax.metrics.seeds import over_seeds
from medtl_jax.metrics.table_check import check_table
from medtl_jax.report.comparison_figures import MOST_RUNS
from medtl_jax.report.paper_tables import (
    PaperTables,
    paper_csv,
    paper_figures,
    paper_markdown,
    write_paper_tables,
)
from medtl_jax.report.study_page import entry_of
from medtl_jax.report.style import save_figures

TABLE, CSV = "paper_tables.md", "paper_tables.csv"
_AXIS, _NETWORKS, _BASELINES = "model", "paper.networks", "paper.baselines"
# Networks without batch norms want lower rates than those of configs/default.py: of all stages
# from scratch, or of pretrained ones (experiments/results/families.md).
_WITHOUT_NORMS = ("alexnet", "vgg11", "vgg13", "vgg16", "vgg16_gap", "vgg19")
_SCRATCH_RATE, _TUNED_RATE = {"optim.high.lr": 2e-4}, {"optim.low.lr": 1e-4}


def resolve(config: dict, given: Set[str] = frozenset()) -> dict:
    """The config with the ablation that the tables are made of.

    Raises:
      UserError: models that there are not, twice, or more than a figure tells apart; another task
        than one label an image; as `ablation.resolve`.
    """
    usual = default_section("ablation")
    check_untouched(
        config,
        {f"ablation.{key}": "paper.networks, paper.baselines and paper.seeds" for key in usual},
        "a paper's tables",
    )
    if config["task"] not in ("", "classify"):
        raise UserError(
            f"task={config['task']}: a paper's tables are of one label an image; leave it out"
        )
    models = _models(config)
    if not 2 <= len(models) <= MOST_RUNS:
        raise UserError(
            f"{_NETWORKS} and {_BASELINES} name {len(models)} models; from 2 to {MOST_RUNS} make "
            "tables and their figures"
        )
    rows = {
        "axes": json.dumps({_AXIS: models}),
        "design": "grid",
        "seeds": config["paper"]["seeds"],
    }
    return ablation.resolve({**config, "task": "classify", "ablation": {**usual, **rows}}, given)


def _models(config: dict) -> dict[str, dict]:
    """The settings of each model by its name."""
    models: dict[str, dict] = {}
    text = config["paper"]["networks"]
    for candidate in parse_candidates(text, _NETWORKS) if text else ():
        scratch = candidate.weights == "none"
        name = f"{candidate.model} ({'from scratch' if scratch else 'pretrained'})"
        if name in models:
            raise UserError(f"{_NETWORKS}: {name} is there twice; leave one out")
        own = {"model.name": candidate.model, "model.weights": candidate.weights}
        if candidate.model in _WITHOUT_NORMS:
            own |= _SCRATCH_RATE if scratch else _TUNED_RATE
        models[name] = own
    for name in listed(config, _BASELINES) if config["paper"]["baselines"] else ():
        if find_strategy(name, _BASELINES).settings.get("experiment") != "traditional":
            raise UserError(f"{_BASELINES}: {name} has a network; name it in {_NETWORKS}")
        models[name] = {"transfer.strategy": name}
    return models


def run(request: Request) -> None:
    """Trains what is missing of the models, then writes tables, figures and report."""
    ablation.make_rows(request, _finish)
    say_table(request.folder, TABLE, request.console)


def _finish(
    request: Request, cells: Sequence[AblationCell], environment: dict, memos: Memos
) -> None:
    """Writes tables, figures, report and, last of all, `metrics.json`."""
    folder, config = request.folder, request.config
    found = _collect(request, cells)
    write_file(folder / TABLE, paper_markdown(found))
    figures = paper_figures(found)
    save_figures(figures, folder / "figures")
    write_paper_tables(
        folder / "report.html",
        found=found,
        title=f"A paper's tables: {data_name(cells[0].folder(folder))}",
        command=request.command,
        config=config,
        environment=environment,
        commands={f"{cell.title}: {cell.name}": cell.command for cell in distinct(cells)},
        figures=figures,
    )
    metrics = {
        f"{metric}/{model}": {**entry_of(value), "n": found.images}
        for model, test in found.rows.items()
        for metric, value in test.items()
    }
    runs.write_json(folder / runs.METRICS, {"test": metrics}, sort_keys=False)


def _collect(request: Request, cells: Sequence[AblationCell]) -> PaperTables:
    """The tables of the finished runs. UserError where one is damaged or has other test images."""
    folder, config = request.folder, request.config
    check_same(folder, cells)
    models = list(parse_axes(config["ablation"]["axes"])[_AXIS].items())
    entries, seeds = entries_of(cells), config["paper"]["seeds"]
    predicted = [read_entry(entry, folder, "test") for entry in entries]
    first = predicted[0]
    sampled = list(
        sampled_runs(predicted, len(entries), config, request.console, scored=published_scores)
    )
    rows, counts, settings = {}, {}, {}
    for number, (model, own) in enumerate(models):
        seeds_of = slice(number * seeds, (number + 1) * seeds)
        samples = sampled[seeds_of]
        rows[model] = {metric: over_seeds(samples, metric) for metric in samples[0].values}
        counts[model] = sum(_confusion(one) for one in predicted[seeds_of])
        settings[model] = "; ".join(f"{key}={value!r}" for key, value in own.items())
    path, classes = folder / CSV, first.classes
    write_file(path, paper_csv(rows, seeds, len(classes)))
    report = check_table(path, binary=len(classes) == 2)
    return PaperTables(
        rows=rows,
        confusion=counts,
        settings=settings,
        classes=tuple(classes),
        seeds=seeds,
        images=len(first.ids),
        patients=None if first.patients is None else len(np.unique(first.patients)),
        flagged=tuple(
            f"{cell.row}, {cell.column} = {cell.text}: {'; '.join(cell.reasons)}"
            for cell in report.findings
        ),
        doubts=report.notes,
        notes=notes_of(folder, cells),
    )


def _confusion(one: Predicted) -> np.ndarray:
    return confusion(one.target, one.score)
