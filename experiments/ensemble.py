"""Trains several networks, fuses what they predict, and says whether that is a gain.

    python launch.py --config=configs/ensemble.py --workdir=ENSEMBLE [--config.key=value ...]

Each member is a run of its own in `<workdir>/cells`, whose command repeats it alone and whose
folder is named by its network, its seed and a hash of config, images and weights: one that is
finished is never trained again, so that five members grow to eight by three. The members of one
network are trained as one program where they can be. Several processes, or machines that share a
file system with locks, may be given the same command, as in an ablation.

Fusions are fitted, and the ensemble is picked, on the validation split alone.
"""

from collections.abc import Sequence, Set

from experiments import domain_settings, trained
from experiments.ablation_cells import with_digests
from experiments.augmentation import resolve_augmentation
from experiments.contact_sheet import study_sheet
from experiments.ensemble_candidates import check_members, fit_fusions, fuse, names_of, read_members
from experiments.ensemble_cells import MemberCell, make_cells
from experiments.ensemble_cost import network_costs
from experiments.ensemble_results import collect, metrics_of, picked_predictions
from experiments.ensemble_soups import make_soups
from experiments.ladder_checks import check_cells
from experiments.ladder_folder import FOLDER
from experiments.ladder_requests import Memos, cell_request, keep_one, remade
from experiments.ladder_results import check_same, data_name, notes_of
from experiments.ladder_training import say_table
from experiments.prepared import read_training_data
from experiments.shared_grid import begin, check_place, finishing, train_shared
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.data.catalog import DataSpec
from medtl_jax.errors import UserError
from medtl_jax.files import write_file
from medtl_jax.report.ensemble import ensemble_table, write_ensemble
from medtl_jax.report.ensemble_figures import ensemble_figures
from medtl_jax.report.predict import write_predictions
from medtl_jax.report.study_page import to_json
from medtl_jax.report.style import save_figures

RESULT, TABLE = "ensemble.json", "ensemble.md"


def resolve(config: dict, given: Set[str] = frozenset()) -> dict:
    """The config as it is, once all members are known to have one that can be used.

    In the place of an `augment.preset` it has the strengths, in which members may differ.
    """
    if domain_settings.wanted(config):
        raise UserError(
            f"domain.target.name={config['domain']['target']['name']} has no place in an ensemble, "
            "which is scored on the set it learned from: adapt one network with configs/finetune.py"
        )
    config = resolve_augmentation(config, given)
    config = {**config, "augment": {**config["augment"], "preset": ""}}
    make_cells(config, given)
    return config


def run(request: Request) -> None:
    """Trains what is missing of the ensemble, then writes table, figures and report."""
    config, folder, console = request.config, request.folder, request.console
    check_place(folder, config)
    memos: Memos = {}
    cells = with_digests(make_cells(config), request, memos)
    spec = _read_spec(cells[0], request, memos)
    names = names_of(config, spec.task, len(spec.classes))
    check_cells(cells, request, memos)
    environment = {**runs.describe_environment(), "command": request.command}
    begin(folder, config, environment)
    _say_members(cells, request)
    train_shared(cells, request, memos)
    with remade(cells[0].folder(folder)):
        first = runs.read_json(cells[0].folder(folder) / runs.ENVIRONMENT)
    environment |= {key: first.get(key) for key in ("data", "data_sha256", "task")}
    with finishing(folder, config, environment, [cell.name for cell in cells]) as unwritten:
        if unwritten:
            check_members(cells, folder, spec)
            _finish(request, cells, names, environment, memos)
    say_table(folder, TABLE, console)


def _read_spec(cell: MemberCell, request: Request, memos: Memos) -> DataSpec:
    """Task and classes, which the data say."""
    keep_one(memos, cell)
    return read_training_data(cell_request(cell, request, memos)).spec


def _say_members(cells: Sequence[MemberCell], request: Request) -> None:
    """Says which members there are from before, those of this ensemble and others."""
    names, place = {cell.name for cell in cells}, request.folder / FOLDER
    found = {path.name for path in place.glob("*") if runs.is_finished(path)}
    if names & found:
        request.console.note(f"{len(names & found)} of {len(names)} members are finished already")
    if found - names:
        request.console.note(
            f"{len(found - names)} in {place} are of an ensemble with more or other members, and "
            "have no part in this one"
        )


def _finish(
    request: Request,
    cells: Sequence[MemberCell],
    names: Sequence[str],
    environment: dict,
    memos: Memos,
) -> None:
    """Writes result, predictions, figures, report and, last of all, `metrics.json`."""
    folder, config, console = request.folder, request.config, request.console
    check_same(folder, cells)
    task = trained.read_card(cells[0].folder(folder)).task
    members = read_members(cells, folder)
    fitted = fit_fusions(names, [member.val for member in members], config["seed"])
    soups, without = [], []
    if config["ensemble"]["soups"]:
        soups, without = make_soups(cells, members, request, memos, task)
    candidates = [*members, *fuse(fitted, members), *soups]
    costs = network_costs(cells, request, memos)
    notes = (*notes_of(folder, cells), *without)
    device = environment["backend"].upper()
    found = collect(candidates, costs, task, config, device, notes, console)
    runs.write_json(folder / RESULT, to_json(found), sort_keys=False)
    write_file(folder / TABLE, ensemble_table(found))
    picked = next((one for one in candidates if one.name == found.picked), None)
    kept = folder / "predictions.npz"
    if picked:
        write_predictions(kept, picked_predictions(picked))
    else:
        # Of an earlier ensemble in this folder, which had one to pick.
        kept.unlink(missing_ok=True)
    figures = ensemble_figures(found) | study_sheet(cells, request, memos)
    save_figures(figures, folder / "figures")
    write_ensemble(
        folder / "report.html",
        found=found,
        figures=figures,
        title=f"Ensemble: {data_name(cells[0].folder(folder))}",
        command=request.command,
        config=config,
        environment={key: value for key, value in environment.items() if key != "data"},
        commands={f"{cell.title}: {cell.name}": cell.command for cell in cells},
    )
    metrics = metrics_of(found, picked, config)
    runs.write_json(folder / runs.METRICS, {"test": metrics}, sort_keys=False)
