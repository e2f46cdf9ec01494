"""What would stop a table of adaptations, found before the first of its runs trains."""

from collections.abc import Sequence

from experiments import adaptation, domain_settings, study
from experiments.adapt_cells import AdaptCell
from experiments.adapt_results import order_of
from experiments.ladder_checks import check_cells
from experiments.ladder_requests import Memos, cell_request, named
from experiments.ladder_results import check_same
from experiments.prepared import read_training_data
from experiments.study import Fitted, Request
from medtl_jax import runs
from medtl_jax.data.domains import Domains
from medtl_jax.domain.statistics import norm_stages
from medtl_jax.errors import UserError
from medtl_jax.models.registry import create_model, variable_shapes
from medtl_jax.objectives.task import make_task


def check_adaptations(cells: Sequence[AdaptCell], request: Request, memos: Memos) -> None:
    """UserError for a run that could not be begun, or that would not fit those that are finished.

    Args:
      cells: of the table.
      request: of the table.
      memos: where the data that are read are kept.
    """
    missing = [cell for cell in cells if not runs.is_finished(cell.folder(request.folder))]
    if not missing:
        return
    _check_norms(missing)
    adapted = [cell for cell in cells if not cell.is_bound]
    check_cells(adapted, request, memos)
    domains = _check_domains(adapted, request, memos)
    check_same(request.folder, adapted, {("target",): domains.target.checksum()})
    for cell in {cell.strategy: cell for cell in reversed(missing)}.values():
        if not cell.is_bound:
            with named(cell):
                _check_method(cell, domains)
    bound = [cell for cell in cells if cell.is_bound]
    if any(cell in missing for cell in bound):
        _check_labels(domains)
        check_cells(bound, request, memos)
        own = read_training_data(cell_request(bound[0], request, memos))
        order_of(own.spec.classes, domains.source.spec.classes)


def _check_norms(cells: Sequence[AdaptCell]) -> None:
    """UserError for a method that needs batch norms where the network has none."""
    for cell in {cell.strategy: cell for cell in reversed(cells)}.values():
        config, method = cell.resolved, f"adapt.methods: {cell.strategy}"
        if not domain_settings.has_own_statistics(config):
            continue
        decoder = study.decoder_widths(config)
        network, _ = create_model(config["model"]["name"], 1, decoder=decoder)
        norm_stages(variable_shapes(network, config["model"]["image_size"]), method)


def _check_domains(cells: Sequence[AdaptCell], request: Request, memos: Memos) -> Domains:
    """Both domains as the first seed has them, once they fit each other in every seed."""
    of_seed = {cell.draw: cell for cell in reversed(cells)}
    first = None
    for cell in sorted(of_seed.values(), key=lambda cell: cell.draw):
        own = cell_request(cell, request, memos)
        with named(cell):
            source = read_training_data(own)
            domains = adaptation.find_domains(cell.resolved, source, own.console, own.memo)
            first = first or domains
    return first


def _check_method(cell: AdaptCell, domains: Domains) -> None:
    """UserError for losses that the network, or the task, does not allow."""
    config, train = cell.resolved, domains.source.splits["train"]
    task = make_task(domains.source.spec, train.target, config["train"]["ordinal"])
    adaptation.domain_validator(config, task, domains)
    # Shapes do not depend on the weights.
    read = study.input_spec(config, train.images.shape[-1], None)
    network, spec = study.make_model(config, task, read)
    shapes = variable_shapes(network, config["model"]["image_size"])
    adaptation.domain_terms(config, Fitted(network, spec, shapes, task))


def _check_labels(domains: Domains) -> None:
    """UserError for a target without the labels that the bound trains and is scored with."""
    without = [name for name in ("train", "test") if name not in domains.scored]
    if without:
        raise UserError(
            f"adapt.supervised=True trains and scores with the target's labels, and the target has "
            f"none in {' and '.join(without)}: set adapt.supervised=False"
        )
