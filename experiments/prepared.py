"""From a config to all the parts of a training: data, network with weights, losses, phases."""

import dataclasses

import flax.linen as nn

from experiments import adaptation, auditing, domain_settings, source, study, trained
from experiments.assembly import (
    Course,
    Sets,
    make_course,
    make_evaluated,
    make_feed,
    make_phases,
    new_terms,
    varying_values,
    with_source_head,
)
from experiments.augmentation import check_for_data, say_augmentation
from experiments.features import linear_probe, with_head
from experiments.options import (
    caches,
    check_options_without_data,
    check_retention,
    group_table,
    loop_settings,
)
from experiments.retention import pretrain_terms, with_alpha
from experiments.settings import unused_settings
from experiments.study import Fitted, Request
from medtl_jax.data.catalog import Dataset
from medtl_jax.data.domains import Domains
from medtl_jax.errors import UserError
from medtl_jax.models.registry import variable_shapes
from medtl_jax.objectives.task import Task, make_task, sampling_groups
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.devices import DataMesh, check_batch_size, data_mesh
from medtl_jax.training.loop import Training, check_splits
from medtl_jax.training.step import StepParts, Term, TrainState, create_state
from medtl_jax.transfer.features import cache_start
from medtl_jax.transfer.groups import check_loaded
from medtl_jax.transfer.phases import parse_phases
from medtl_jax.weights.pretrained import Pretrained


@dataclasses.dataclass(frozen=True)
class Prepared:
    """All that a training needs, checked, before anything is written.

    Attributes:
      training: what is trained, on what, and for how long.
      dataset: what is learned.
      domains: that and the target it is adapted to; None where there is none.
      network: as it is evaluated, with the batch statistics of one domain.
      classifier, source: task of the classifier that came with the weights and stays in the
        network, and the set it was made on; None where there is none.
      state: before the first step.
      table: stage -> group, from `groups.assign_stages`.
      pretrained: whether the network began with pretrained weights.
    """

    training: Training
    dataset: Dataset
    domains: Domains | None
    network: nn.Module
    classifier: Task | None
    source: Dataset | None
    state: TrainState
    table: dict[str, str]
    environment: dict
    pretrained: bool

    @property
    def parts(self) -> StepParts:
        """Those of the first phase; model, specification and `start` are the same in all."""
        return self.training.phases[0].parts


def prepare(request: Request) -> Prepared:
    """Reads data and weights and builds every part; what needs no data is checked first."""
    config, console = request.config, request.console
    settings, mesh = loop_settings(config), make_mesh(config)
    check_options_without_data(config)
    if config["train"]["remat"] and not mesh.scans:
        console.note("note: train.remat=True saves no memory on a CPU: XLA undoes it there")
    table = group_table(config)
    plan = parse_phases(config["transfer"]["phases"], table)
    begun = trained.begun_card(request.folder)
    weights = None if begun else study.open_weights(config, console)
    classifier = begun.classifier if begun else source.source_task(config, weights)
    check_retention(config, classifier)
    dataset, domains = _read_domains(request)
    train = dataset.splits["train"]
    task = make_task(dataset.spec, train.target, config["train"]["ordinal"])
    groups = sampling_groups(task, train.target, config["train"]["sampling"])
    check_splits(dataset, task, settings)
    domain_settings.run_validator(config, task)
    course = make_course(config, settings, plan, {*table.values()}, len(train))
    console.note(f"training: {course.settings.epochs} epochs of {course.steps} steps")
    table = with_source_head(table, config)
    channels = train.images.shape[-1]
    fitted, card = make_network(request, task, table, weights, begun, classifier, channels)
    divided = trained.division_of_source(config)
    read_channels = fitted.network.in_chans
    source_set = source.read_source(config, classifier, read_channels, console, divided)
    console.note("groups: " + ", ".join(f"{stage} {group}" for stage, group in table.items()))
    if config["transfer"]["probe_first"] and not begun:
        fitted = with_head(fitted, linear_probe(request, fitted, dataset, mesh))
    sets = Sets(dataset, domains, source_set, groups)
    training, state = _make_training(request, fitted, sets, course, table, classifier, mesh)
    return Prepared(
        training=training,
        dataset=dataset,
        domains=domains,
        network=fitted.network,
        classifier=classifier,
        source=source_set,
        state=state,
        table=table,
        environment=_environment(request, sets, task, card, course),
        pretrained=config["model"]["weights"] != "none",
    )


def _read_domains(request: Request) -> tuple[Dataset, Domains | None]:
    """What is learned, and with it the target that it is adapted to, where there is one."""
    config, console = request.config, request.console
    dataset = read_training_data(request)
    if not domain_settings.wanted(config):
        return dataset, None
    domains = adaptation.find_domains(config, dataset, console, request.memo)
    kept = domain_settings.kept_statistics(config)
    if kept:
        console.note(
            f"note: domain.bn=own: in {', '.join(kept)} the target has no batch statistics of its "
            "own: transfer.groups freezes them, or transfer.bn has them use the stored ones"
        )
    return domains.source, domains


def _make_training(
    request: Request,
    fitted: Fitted,
    sets: Sets,
    course: Course,
    table: dict[str, str],
    classifier: Task | None,
    mesh: DataMesh,
) -> tuple[Training, TrainState]:
    """The training of the network `fitted`, and its first state.

    `table` is that of the whole training, `classifier` as in `Prepared`.
    """
    config = request.config
    start = cache_start(fitted.network, fitted.spec, table) if caches(config) else ""
    pre = pretrain_terms(
        request, fitted, table, classifier, sets.dataset, sets.source, mesh, course.total
    )
    across = adaptation.domain_terms(config, fitted)
    widened = adaptation.widened(config, fitted, across)

    def terms(own: dict) -> tuple[Term, ...]:
        new = new_terms(own, fitted.task, sets.dataset.splits["train"].target, course.total)
        return (*new, *with_alpha(own, pre, course.total), *across)

    phases = make_phases(config, widened, terms, course, start, table)
    say_augmentation(config, request.console)
    feed, val = make_feed(request, fitted, sets, start, mesh)
    training = Training(phases, feed, val, fitted.task, course.settings, course.schedules, mesh)
    evaluated = make_evaluated(config, fitted, training)
    training = dataclasses.replace(training, evaluated=evaluated, values=varying_values(config))
    if sets.domains:
        training = adaptation.judged_training(config, fitted, training, sets.domains)
    state = create_state(widened.variables, phases[0].parts, anchored=bool(pre))
    return training, state


def _environment(request: Request, sets: Sets, task: Task, card: dict, course: Course) -> dict:
    """The content of `environment.json`; `card` is that of the weights."""
    environment = study.describe(request, sets.dataset, task, card)
    environment["audit"] = auditing.audit_card(request.config, request.console, sets.dataset)
    if sets.source:
        environment["source_sha256"] = sets.source.checksum()
    epochs = course.settings.epochs
    environment["training"] = {"epochs": epochs, "steps_per_epoch": course.steps}
    if sets.domains:
        environment["target"] = adaptation.target_card(sets.domains)
        environment["target_sha256"] = environment["target"]["sha256"]
    return environment


def make_network(
    request: Request,
    task: Task,
    table: dict[str, str],
    weights: Pretrained | None,
    begun: trained.Card | None,
    classifier: Task | None,
    channels: int,
) -> tuple[Fitted, dict]:
    """The network before training, and the card of its weights.

    That of a run that has `begun` is what its checkpoints kept of the start; without pretrained
    weights they kept nothing, and zeros stand for it.
    """
    config, console = request.config, request.console
    read = begun.input if begun else study.input_spec(config, channels, weights)
    model, spec = study.make_model(config, task, read, classifier)
    if weights is not None and weights.input.contrast != read.contrast:
        console.note(
            f"note: the weights were trained on images of model.contrast={weights.input.contrast}"
            f", this run reads them with {read.contrast}"
        )
    if begun:
        console.note("weights: those of the last checkpoint; model.weights is not needed again")
        return Fitted(model, spec, _begun_variables(request, model), task), begun.weights
    variables, report = study.initial_variables(model, config, weights, task)
    check_loaded(table, report.kept if report else (), study.new_parts(config))
    console.note(f"weights: {report or 'none, every stage starts at random'}")
    card = study.weights_card(report, config["model"]["weights"], read, classifier)
    return Fitted(model, spec, variables, task), card


def _begun_variables(request: Request, model: nn.Module) -> dict:
    if request.config["model"]["weights"] == "none":
        return study.placeholder_variables(model, request.config)
    with Checkpoints(request.folder / "checkpoints", read_only=True) as checkpoints:
        shapes = variable_shapes(model, request.config["model"]["image_size"])
        return checkpoints.restore_initial(shapes)


def make_mesh(config: dict) -> DataMesh:
    """The mesh of `config.train.devices`, over which the batches divide evenly."""
    mesh = data_mesh(config["train"]["devices"])
    parts = config["train"]["accumulate"]
    check_batch_size("data.batch_size", config["data"]["batch_size"], mesh, parts)
    check_batch_size("eval.batch_size", config["eval"]["batch_size"], mesh)
    return mesh


def read_training_data(request: Request) -> Dataset:
    """The data set of `config.data`, with notes on settings that it has no use for.

    Images with masks are for a network whose config expects them.
    """
    config, console = request.config, request.console
    dataset = study.read_data(config, console, config["model"]["in_chans"], request.memo)
    if not study.fits_task(config, dataset.spec.task):
        raise UserError(
            f"{dataset.spec.name} has a mask for each image: set --config.task=segment, so that "
            "the network has a decoder"
        )
    check_for_data(config, dataset)
    auditing.check_audit(config, console, dataset)
    unused = unused_settings(config, dataset.spec.task)
    for line in (*unused, *domain_settings.unused_by_domain(config)):
        console.note(f"note: {line}")
    return dataset
