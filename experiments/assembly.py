"""The training of a config put together: its course, its phases, what its steps read.

All that is here needs no more than a config, a network and data that are there already.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from experiments import adaptation, domain_settings, source, study
from experiments.augmentation import mixing
from experiments.features import kept_activations
from experiments.options import average
from experiments.study import Fitted, Request
from medtl_jax import runs
from medtl_jax.augment.policy import make_augment
from medtl_jax.augment.presets import TRANSFORMS
from medtl_jax.data.catalog import Array, Dataset, Split
from medtl_jax.data.domains import Domains, unlabelled
from medtl_jax.domain.adversary import without_discriminator
from medtl_jax.domain.alignment import TARGET_DOMAIN
from medtl_jax.domain.statistics import of_domain, with_domain
from medtl_jax.models.backbone import SOURCE_HEAD
from medtl_jax.objectives.pretrain import needs, weight_schedule
from medtl_jax.objectives.task import Task, make_terms
from medtl_jax.training.devices import DataMesh
from medtl_jax.training.loop import LoopSettings, Training, TrainingPhase
from medtl_jax.training.reestimate import batches_of_all, make_reestimate
from medtl_jax.training.runner import Feed
from medtl_jax.training.step import StepParts, Term, TrainState, evaluation_variables
from medtl_jax.transfer.groups import DISCRIMINATOR, FROZEN, HIGH, LOW, label_tree
from medtl_jax.transfer.norm_policy import (
    frozen_norms,
    moving_statistics,
    norm_modes,
    reestimated,
)
from medtl_jax.transfer.optim import Schedule, layer_scales, make_optimizer, make_schedules
from medtl_jax.transfer.phases import Phase, first_epochs

_GIB = 2**30

VARYING = (
    *(f"optim.{group}.{key}" for group in (LOW, HIGH) for key in ("lr", "weight_decay")),
    "transfer.alpha",
    "transfer.beta",
    "train.label_smoothing",
    *(f"augment.{name}" for name in TRANSFORMS),
)
"""Settings that a step may take as an array, as long as none of them is turned on or off by it."""


@dataclasses.dataclass(frozen=True)
class Course:
    """How long a training is, what learns when, and at which rates.

    Attributes:
      settings: with the epochs that the set needs.
      steps: updates in an epoch.
      phases: in their order; `firsts` are their first epochs, from 0.
      schedules: group -> learning rate.
    """

    settings: LoopSettings
    steps: int
    phases: Sequence[Phase]
    firsts: Sequence[int]
    schedules: Mapping[str, Schedule]

    @property
    def total(self) -> int:
        """Updates of the whole training."""
        return self.settings.epochs * self.steps


@dataclasses.dataclass(frozen=True)
class Sets:
    """The images of a training.

    Attributes:
      dataset: what is learned.
      domains: that and the target it is adapted to; None where there is none.
      source: what the pretrained weights were made on, where it is read.
      groups: of the training images, that are drawn equally often; None = all images are.
    """

    dataset: Dataset
    domains: Domains | None
    source: Dataset | None
    groups: np.ndarray | None


def make_course(
    config: dict, settings: LoopSettings, phases: Sequence[Phase], groups: Set[str], examples: int
) -> Course:
    """The course of a training on so many `examples`, in which stages of `groups` learn."""
    steps = settings.steps(examples)
    settings = settings.for_set(steps)
    learning = {*groups, *domain_settings.own_groups(config)}
    schedules = make_schedules(config["optim"], learning, settings.epochs * steps, steps)
    return Course(settings, steps, phases, first_epochs(phases, settings.epochs), schedules)


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


def new_terms(config: dict, task: Task, target: Array, total: int) -> tuple[Term, ...]:
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


def make_phases(
    config: dict,
    fitted: Fitted,
    make_terms: Callable[[dict], tuple[Term, ...]],
    course: Course,
    start: str,
    table: dict[str, str],
) -> tuple[TrainingPhase, ...]:
    """The phases of the course, over the network as it trains; `table` is of the whole training.

    `make_terms` gives the terms of the loss of a config.
    """

    def phase(number: int) -> TrainingPhase:
        first = course.firsts[number]
        own = with_source_head(course.phases[number].table, config)
        begins = first * course.steps

        def varied(values):
            other = with_values(config, values)
            rates = make_schedules(
                other["optim"], course.schedules.keys(), course.total, course.steps
            )
            changed = dataclasses.replace(course, schedules=rates)
            terms = make_terms(other)
            return _step_parts(other, fitted, terms, changed, start, table, own, begins)

        parts = _step_parts(config, fitted, make_terms(config), course, start, table, own, begins)
        return TrainingPhase(first, parts, varied)

    return tuple(map(phase, range(len(course.phases))))


def varying_values(config: dict) -> dict[str, float]:
    """The settings, by their flat keys, in which members of one program may differ: `VARYING`."""
    flat = runs.flat_config(config)
    return {key: flat[key] for key in VARYING}


def with_values(config: dict, values: Mapping[str, Any]) -> dict:
    """`config` with the values of some of its flat keys."""
    return runs.nested_config(config, {**runs.flat_config(config), **values})


def _step_parts(
    config: dict,
    fitted: Fitted,
    terms: tuple[Term, ...],
    course: Course,
    start: str,
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
    used = {group: rate for group, rate in course.schedules.items() if group in learning}
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
        average=average(config, course.total),
        norms=lambda step: norm_modes(table, transfer["bn"], step, course.total),
        start=start,
        teacher="teacher" in needs(transfer["pretrain_loss"]),
        adaptation=adaptation.strength(config, course.total),
        target_domain=adaptation.target_domain(config),
        run_table=run_table,
        run_labels=labelled(run_table),
        accumulate=config["train"]["accumulate"],
        remat=config["train"]["remat"],
    )


def make_feed(
    request: Request,
    fitted: Fitted,
    read: Sets,
    start: str,
    mesh: DataMesh,
) -> tuple[Feed, Split]:
    """What the steps read, and what an epoch is validated on."""
    config, splits, groups = request.config, read.dataset.splits, read.groups
    train, val, views = splits["train"], splits["val"], config["transfer"]["views"]
    if not start:
        sets = {"train": {"image": train.images, "target": train.target}}
        if "source_data" in needs(config["transfer"]["pretrain_loss"]):
            old = read.source.splits["train"]
            sets["source"] = {"image": old.images, "target": old.target}
        if domain_settings.trains_on_target(config):
            other = unlabelled(read.domains.target.splits["train"])
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


def make_evaluated(
    config: dict, fitted: Fitted, training: Training
) -> Callable[[TrainState], dict]:
    """What an epoch is validated with: the average of the states, with exact statistics if asked.

    A mean of weights has statistics of its own (stochastic weight averaging, Izmailov et al. 2018,
    section 3.2), and so it always gets exact ones, those of the target's images among them.
    """
    feed, size, seed = training.feed, training.settings.batch_size, training.settings.seed
    seen = {0: (feed.sets["train"]["image"], feed.examples)}
    if config["domain"]["bn"] == domain_settings.OWN:
        target = feed.sets[TARGET_DOMAIN]["image"]
        seen[adaptation.target_domain(config)] = target, len(target)
    read = {
        domain: (images, *batches_of_all(count, size, seed))
        for domain, (images, count) in seen.items()
    }

    def exact(parts):
        affected = moving_statistics if config["train"]["swa"] else reestimated
        stages = set(affected(parts.table, config["transfer"]["bn"]))
        if not stages:
            return lambda variables: variables
        own = make_reestimate(fitted.network, parts.spec, stages, training.mesh, parts.start)

        def of_domains(variables):
            for domain, what in read.items():
                plain = own(of_domain(variables, domain), *what)
                variables = with_domain(variables, domain, plain)
            return variables

        return of_domains

    by_phase = [exact(phase.parts) for phase in training.phases]
    return lambda state: by_phase[int(state.phase)](
        without_discriminator(evaluation_variables(state))
    )
