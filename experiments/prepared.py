"""From a config to all the parts of a training: data, network with weights, losses, phases."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import numpy as np

from experiments import adaptation, domain_settings, source, study, trained
from experiments.augmentation import check_for_data, mixing, say_augmentation
from experiments.features import kept_activations, linear_probe, with_head
from experiments.options import (
    average,
    caches,
    check_options_without_data,
    check_retention,
    group_table,
    loop_settings,
)
from experiments.retention import pretrain_terms
from experiments.settings import unused_settings
from experiments.study import Fitted, Request
from medtl_jax.augment.policy import make_augment
from medtl_jax.data.catalog import Array, Dataset, Split
from medtl_jax.data.domains import Domains, unlabelled
from medtl_jax.domain.adversary import without_discriminator
from medtl_jax.domain.alignment import TARGET_DOMAIN
from medtl_jax.domain.statistics import of_domain, with_domain
from medtl_jax.errors import UserError
from medtl_jax.models.backbone import SOURCE_HEAD
from medtl_jax.models.registry import variable_shapes
from medtl_jax.objectives.pretrain import needs, weight_schedule
from medtl_jax.objectives.task import (
    Task,
    make_task,
    make_terms,
    sampling_groups,
)
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.devices import DataMesh, check_batch_size, data_mesh
from medtl_jax.training.loop import Training, TrainingPhase, check_splits
from medtl_jax.training.reestimate import make_reestimate
from medtl_jax.training.runner import Feed
from medtl_jax.training.step import (
    StepParts,
    Term,
    TrainState,
    create_state,
    evaluation_variables,
)
from medtl_jax.transfer.features import cache_start
from medtl_jax.transfer.groups import (
    DISCRIMINATOR,
    FROZEN,
    HIGH,
    LOW,
    check_loaded,
    label_tree,
)
from medtl_jax.transfer.norm_policy import (
    frozen_norms,
    moving_statistics,
    norm_modes,
    reestimated,
)
from medtl_jax.transfer.optim import Schedule, layer_scales, make_optimizer, make_schedules
from medtl_jax.transfer.phases import first_epochs, parse_phases
from medtl_jax.weights.pretrained import Pretrained

_GIB = 2**30


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
    table = group_table(config)
    plan = parse_phases(config["transfer"]["phases"], table)
    begun = trained.begun_card(request.folder)
    weights = None if begun else study.open_weights(config, console)
    classifier = begun.classifier if begun else source.source_task(config, weights)
    check_retention(config, classifier)
    dataset = read_training_data(request)
    domains = None
    if domain_settings.wanted(config):
        domains = adaptation.find_domains(config, dataset, console)
        dataset = domains.source
    train = dataset.splits["train"]
    task = make_task(dataset.spec, train.target, config["train"]["ordinal"])
    groups = sampling_groups(task, train.target, config["train"]["sampling"])
    check_splits(dataset, task, settings)
    steps = settings.steps(len(train))
    settings = settings.for_set(steps)
    domain_settings.run_validator(config, task)
    total, firsts = settings.epochs * steps, first_epochs(plan, settings.epochs)
    learning = {*table.values(), *domain_settings.own_groups(config)}
    schedules = make_schedules(config["optim"], learning, total, steps)
    new = _new_terms(config, task, train.target, total)
    console.note(f"training: {settings.epochs} epochs of {steps} steps")
    table = with_source_head(table, config)
    channels = train.images.shape[-1]
    fitted, card = make_network(request, task, table, weights, begun, classifier, channels)
    divided = trained.division_of_source(config)
    read_channels = fitted.network.in_chans
    source_set = source.read_source(config, classifier, read_channels, console, divided)
    console.note("groups: " + ", ".join(f"{stage} {group}" for stage, group in table.items()))
    if config["transfer"]["probe_first"] and not begun:
        fitted = with_head(fitted, linear_probe(request, fitted, dataset, mesh))
    start = cache_start(fitted.network, fitted.spec, table) if caches(config) else ""
    pre = pretrain_terms(request, fitted, table, classifier, dataset, source_set, mesh, total)
    across = adaptation.domain_terms(config, fitted)
    widened = adaptation.widened(config, fitted, across)
    make_parts = functools.partial(
        _step_parts, config, widened, (*new, *pre, *across), schedules, start, total, table
    )
    phases = tuple(
        TrainingPhase(first, make_parts(with_source_head(phase.table, config), first * steps))
        for phase, first in zip(plan, firsts, strict=True)
    )
    say_augmentation(config, console)
    feed, val = _feed(request, fitted, dataset, source_set, domains, groups, start, mesh)
    environment = study.describe(request, dataset, task, card)
    if source_set:
        environment["source_sha256"] = source_set.checksum()
    environment["training"] = {"epochs": settings.epochs, "steps_per_epoch": steps}
    training = Training(phases, feed, val, task, settings, schedules, mesh)
    evaluated = _evaluated(config, fitted, training)
    training = dataclasses.replace(training, evaluated=evaluated)
    if domains:
        environment["target"] = adaptation.target_card(domains)
        environment["target_sha256"] = environment["target"]["sha256"]
        training = adaptation.judged_training(config, fitted, training, domains)
    return Prepared(
        training=training,
        dataset=dataset,
        domains=domains,
        network=fitted.network,
        classifier=classifier,
        source=source_set,
        state=create_state(widened.variables, phases[0].parts, anchored=bool(pre)),
        table=table,
        environment=environment,
        pretrained=config["model"]["weights"] != "none",
    )


def with_source_head(table: dict[str, str], config: dict) -> dict[str, str]:
    """`table`, of a phase, with the classifier of the weights where it stays in the network.

    It learns with the pretrained stages where a term of L_pre reads it; else it is only there to
    measure by, and stays as it is.
    """
    if not source.wanted(config):
        return table
    stages = study.architecture(config).stages
    used = {table[stage] for stage in stages} - {FROZEN}
    reads = "source_head" in needs(config["transfer"]["pretrain_loss"])
    group = (LOW if LOW in used else HIGH) if used and reads else FROZEN
    return {**table, SOURCE_HEAD: group}


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
    check_batch_size("data.batch_size", config["data"]["batch_size"], mesh)
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
    unused = unused_settings(config, dataset.spec.task)
    for line in (*unused, *domain_settings.unused_by_domain(config)):
        console.note(f"note: {line}")
    return dataset


def _new_terms(config: dict, task: Task, target: Array, total: int) -> tuple[Term, ...]:
    """beta L_new: the head's loss and that of each auxiliary head in use.

    `target` is that of the training images, `total` the updates of the training.
    """
    outputs = ("logits", *study.auxiliary_heads(config))
    terms = make_terms(task, target, config["train"], outputs)
    factors = {"logits": 1.0}
    kind, beta = config["transfer"]["beta_schedule"], config["transfer"]["beta"]
    return tuple(
        Term(
            "new",
            weight_schedule(kind, beta, total),
            term,
            factors.get(name, config["model"]["auxiliary"]),
        )
        for name, term in terms.items()
    )


def _step_parts(
    config: dict,
    fitted: Fitted,
    terms: tuple[Term, ...],
    schedules: dict[str, Schedule],
    start: str,
    total: int,
    run_table: dict[str, str],
    table: dict[str, str],
    first_step: int,
) -> StepParts:
    """The parts of the step in a phase that begins with `first_step` and has the groups `table`.

    `run_table` has those of the whole training.
    """
    transfer, params = config["transfer"], fitted.variables["params"]
    beside = {DISCRIMINATOR: DISCRIMINATOR} if DISCRIMINATOR in params else {}

    def labelled(table):
        return label_tree(params, {**table, **beside}, frozen_norms(table, transfer["bn"]))

    labels, learning = labelled(table), {*table.values(), *beside}
    used = {group: rate for group, rate in schedules.items() if group in learning}
    scales = layer_scales(fitted.spec.stages, table, transfer["layer_decay"])
    new = study.new_parts(config)
    return StepParts(
        model=fitted.network,
        spec=fitted.spec,
        optimizer=make_optimizer(config["optim"], labels, used, scales, new, first_step),
        table=table,
        labels=labels,
        terms=terms,
        augment=make_augment(config["augment"]),
        mix=mixing(config),
        average=average(config, total),
        norms=lambda step: norm_modes(table, transfer["bn"], step, total),
        start=start,
        teacher="teacher" in needs(transfer["pretrain_loss"]),
        adaptation=adaptation.strength(config, total),
        target_domain=adaptation.target_domain(config),
        run_table=run_table,
        run_labels=labelled(run_table),
    )


def _feed(
    request: Request,
    fitted: Fitted,
    dataset: Dataset,
    source_set: Dataset | None,
    domains: Domains | None,
    groups: np.ndarray | None,
    start: str,
    mesh: DataMesh,
) -> tuple[Feed, Split]:
    """What the steps read, and what an epoch is validated on."""
    config, splits = request.config, dataset.splits
    train, val, views = splits["train"], splits["val"], config["transfer"]["views"]
    if not start:
        sets = {"train": {"image": train.images, "target": train.target}}
        if "source_data" in needs(config["transfer"]["pretrain_loss"]):
            old = source_set.splits["train"]
            sets["source"] = {"image": old.images, "target": old.target}
        if domain_settings.trains_on_target(config):
            other = unlabelled(domains.target.splits["train"])
            sets[TARGET_DOMAIN] = {"image": other.images, "target": other.target}
        return Feed(sets, groups), val
    limit = config["data"]["cache_gb"] * _GIB
    kept = _held(kept_activations(request, fitted, train, start, mesh, views), limit)
    target = np.concatenate([train.target] * max(views, 1))
    held = _held(kept_activations(request, fitted, val, start, mesh), limit)
    feed = Feed({"train": {"image": kept, "target": target}}, groups, max(views, 1))
    return feed, dataclasses.replace(val, images=held)


def _held(array: np.memmap, limit_bytes: float) -> np.ndarray:
    """The array in memory up to a limit; above it, it is read from disk batch by batch."""
    return np.array(array) if array.nbytes <= limit_bytes else array


def _evaluated(config: dict, fitted: Fitted, training: Training) -> Callable[[TrainState], dict]:
    """What an epoch is validated with: the average of the states, with exact statistics if asked.

    A mean of weights has statistics of its own (stochastic weight averaging, Izmailov et al. 2018,
    section 3.2), and so it always gets exact ones.
    """
    settings, feed = training.settings, training.feed
    # Whole batches of a fixed random order, so that none of them is of one class.
    order = np.random.default_rng(settings.seed).permutation(feed.examples)
    count, size = len(order) // settings.batch_size, settings.batch_size
    batches = order[: count * size].reshape(count, size).astype(np.int32)

    def exact(parts):
        affected = moving_statistics if config["train"]["swa"] else reestimated
        stages = set(affected(parts.table, config["transfer"]["bn"]))
        if not stages:
            return lambda variables: variables
        own = make_reestimate(fitted.network, parts.spec, stages, training.mesh, parts.start)

        def of_source(variables):
            plain = own(of_domain(variables, 0), feed.sets["train"]["image"], batches)
            return with_domain(variables, 0, plain)

        return of_source

    by_phase = [exact(phase.parts) for phase in training.phases]
    return lambda state: by_phase[int(state.phase)](
        without_discriminator(evaluation_variables(state))
    )
