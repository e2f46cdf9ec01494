"""Trains methods of adaptation x seeds on one source and one target, and says which to use.

    python launch.py --config=configs/adversarial.py [--config.adapt.methods=source,dann,mmd ...]

Each combination is a run of its own in `<workdir>/cells`, whose command repeats it alone. The epoch
of each run and then the method are chosen by `domain.select`, without a label of the target; these
labels, where there are some, only score. Beside the methods stand two bounds: training on the
source alone and, with `adapt.supervised`, on the target with its labels. A table that was
interrupted goes on where it was, and one in whose folder methods or seeds are added trains those
alone.
"""

from collections.abc import Sequence, Set

from matplotlib.figure import Figure

from experiments.adapt_cells import AdaptCell, make_cells, unused_by_all
from experiments.adapt_checks import check_adaptations
from experiments.adapt_features import features_of
from experiments.adapt_methods import SOURCE
from experiments.adapt_results import collect, discriminators
from experiments.augmentation import resolve_augmentation
from experiments.cells import check_untouched, overwritten_settings
from experiments.contact_sheet import study_sheet
from experiments.ladder_requests import Memos
from experiments.ladder_training import check_many, opened, say_table, train_cells
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.files import write_file
from medtl_jax.report.adaptation import Adaptation, adaptation_table, to_json, write_adaptation
from medtl_jax.report.adaptation_figures import (
    LEAST_POINTS,
    discriminator_figure,
    features_figure,
    methods_figure,
)
from medtl_jax.report.study_page import entry_of
from medtl_jax.report.style import save_figures

RESULT, TABLE = "adaptation.json", "adaptation.md"
# What a table sets in each of its runs, and where to say it.
_OF_THE_TABLE = {"domain.method": "adapt.methods"}


def resolve(config: dict, given: Set[str] = frozenset()) -> dict:
    """The config as it is, once all runs of the table are known to have one that can be used.

    In the place of an `augment.preset` it has the strengths, which are then those of every run.
    """
    check_untouched(config, _OF_THE_TABLE, "a table of adaptations")
    config = resolve_augmentation(config, given)
    config = {**config, "augment": {**config["augment"], "preset": ""}}
    make_cells(config, given - {"experiment"})
    return config


def run(request: Request) -> None:
    """Trains what is missing of the table, then writes result, table, figures and report."""
    config, folder, console = request.config, request.folder, request.console
    if check_many(folder, config) and runs.is_finished(folder):
        console.note(f"{folder} is finished; for another table name another --workdir")
        say_table(folder, TABLE, console)
        return
    cells = make_cells(config)
    for line in overwritten_settings(cells, config) + unused_by_all(cells):
        console.note(f"note: {line}")
    memos: Memos = {}
    check_adaptations(cells, request, memos)
    environment = {**runs.describe_environment(), "command": request.command}
    with opened(folder, config, environment):
        train_cells(cells, request, memos)
        _finish(request, cells, environment, memos)


def _finish(request: Request, cells: Sequence[AdaptCell], environment: dict, memos: Memos) -> None:
    """Writes result, table, figures, report and, last of all, `metrics.json`; says the table."""
    folder, config = request.folder, request.config
    found = collect(folder, cells, config, request.console)
    runs.write_json(folder / RESULT, to_json(found), sort_keys=False)
    write_file(folder / TABLE, adaptation_table(found))
    figures = _figures(request, cells, found, memos)
    save_figures(figures, folder / "figures")
    write_adaptation(
        folder / "report.html",
        found=found,
        title=f"Adaptation: {found.source} to {found.target}",
        command=request.command,
        config=config,
        environment=environment,
        commands={cell.name: cell.command for cell in cells},
        figures=figures,
    )
    runs.write_json(folder / runs.METRICS, {"test": _metrics(found)}, sort_keys=False)
    say_table(folder, TABLE, request.console)


def _figures(
    request: Request, cells: Sequence[AdaptCell], found: Adaptation, memos: Memos
) -> dict[str, Figure]:
    """The methods' scores, features of some, the discriminators, the augmentation of the source."""
    drawn = {metric: methods_figure(found, metric) for metric in found.metrics}
    # One seed of each: features of several networks have no plane in common.
    first = {cell.strategy: cell for cell in reversed(cells)}
    shown = dict.fromkeys(name for name in (SOURCE, found.picked) if name)
    panels, classes = features_of([first[name] for name in shown], request, memos)
    if all(len(panel.source) + len(panel.target) >= LEAST_POINTS for panel in panels.values()):
        drawn["features"] = features_figure(panels, classes, "tsne", request.config["seed"])
    accuracies = discriminators(request.folder, cells)
    if accuracies:
        drawn["discriminators"] = discriminator_figure(accuracies)
    return drawn | study_sheet(cells, request, memos)


def _metrics(found: Adaptation) -> dict[str, dict]:
    """Every mean on the target's test as an entry of `metrics.json`, named `metric/method`."""
    return {
        f"{metric}/{method.name}": {**entry_of(value), "n": found.images}
        for method in found.methods
        for metric, value in method.test.items()
    }
