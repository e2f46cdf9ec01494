"""Adaptation of a run to an unlabelled target: its set, its terms, its networks, its validators."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.domain_settings import (
    ADABN,
    has_own_statistics,
    kept_statistics,
    names_apart,
    run_validator,
    target_data,
    trains_on_target,
    wanted,
)
from experiments.judging import make_judge
from experiments.memory import kept_target
from experiments.study import Fitted
from medtl_jax.console import Console
from medtl_jax.data.catalog import Dataset, DataSpec
from medtl_jax.data.domains import Domains, check_domains
from medtl_jax.data.unlabelled import read_target
from medtl_jax.domain.adversary import DISCRIMINATOR, Adversary, ramp, without_discriminator
from medtl_jax.domain.methods import (
    make_domain_terms,
)
from medtl_jax.domain.selection import Validator
from medtl_jax.domain.statistics import norm_stages, of_domain, split_domains, with_domain
from medtl_jax.domain.validators import check_dev
from medtl_jax.errors import UserError
from medtl_jax.keys import named_key
from medtl_jax.objectives.task import Task
from medtl_jax.report.predict import Predictions, predict_splits
from medtl_jax.report.tables import SOURCE_TEST
from medtl_jax.training.devices import DataMesh
from medtl_jax.training.loop import Training
from medtl_jax.training.reestimate import batches_of_all, make_reestimate
from medtl_jax.training.step import Term

_TARGET, _SOURCE = 1, 0


def find_domains(
    config: dict, dataset: Dataset, console: Console, memo: dict | None = None
) -> Domains:
    """Source and target of the run, fit for one training. Notes are said.

    `memo` is that of the request: one target is read once, and an image of either domain is
    compared with the others once.

    Raises:
      UserError: as `read_target` and `check_domains`, in the words of the section `domain`.
    """
    spec, model = dataset.spec, config["model"]
    made_of = {"like": [spec.task, spec.classes], "size": model["image_size"]}
    made_of |= {"channels": model["in_chans"], **target_data(config)}
    target, seen = kept_target(
        made_of, {} if memo is None else memo, lambda: _read_target(config, spec, console)
    )
    domains = check_domains(dataset, target, seen)
    counts = ", ".join(f"{name} {len(split)}" for name, split in target.splits.items())
    console.note(f"target data: {target.spec.name}: {counts} images")
    for note in (*target.spec.notes, *domains.notes):
        console.note(f"note: {note}")
    return domains


def _read_target(config: dict, like: DataSpec, console: Console) -> Dataset:
    """The target's set for a source that is `like`; errors name keys of `domain.target`."""
    try:
        with console.progress("target data") as advance:
            return read_target(
                target_data(config),
                like,
                config["model"]["image_size"],
                advance,
                grey=config["model"]["in_chans"] == 1,
            )
    except UserError as error:
        text = str(error)
        for key in config["domain"]["target"]:
            text = text.replace(f"data.{key}", f"domain.target.{key}")
        raise UserError(f"domain.target: {text}") from error


def domain_validator(config: dict, task: Task, domains: Domains) -> Validator:
    """As `run_validator`. UserError for domains that do not have the images it needs."""
    validator = run_validator(config, task)
    if "source_train_features" in validator.needs:
        check_dev(*(len(half.splits["train"]) for half in (domains.source, domains.target)))
    return validator


def domain_terms(config: dict, fitted: Fitted) -> tuple[Term, ...]:
    """The terms of `domain.method`, to be added to the others; none where the strength is 0."""
    domain = config["domain"]
    if not wanted(config) or not domain["strength"]:
        return ()
    parts = make_domain_terms(
        domain["method"], fitted.task, _shapes(config, fitted), domain["reads"], domain["width"]
    )
    return tuple(
        Term("domain", 1.0, term, factor, logs=_accuracy(term) if _judges(term) else None)
        for factor, term in parts
    )


def _judges(term) -> bool:
    return isinstance(term, Adversary)


def _accuracy(term: Adversary) -> Callable:
    return lambda out, batch, params: {
        "discriminator_accuracy": term.judge(out, batch, params).accuracy
    }


def _shapes(config: dict, fitted: Fitted) -> dict:
    """What the network makes of a batch in training, with its logits, as shapes."""
    size, network = config["model"]["image_size"], fitted.network
    image = jax.ShapeDtypeStruct((2, size, size, network.in_chans), jnp.float32)
    logits, out = jax.eval_shape(network.apply, fitted.variables, image)
    return {**out, "logits": logits}


def strength(config: dict, total_steps: int) -> Callable | None:
    """`fn(step)`, lambda of the adaptation; None where no target image is to be trained on."""
    domain = config["domain"]
    if not trains_on_target(config):
        return None
    return lambda step: ramp(step, total_steps, domain["strength"], domain["gamma"])


def target_domain(config: dict) -> int:
    """The domain whose statistics the target's images meet in a step."""
    return _TARGET if has_own_statistics(config) else _SOURCE


def widened(config: dict, fitted: Fitted, terms: tuple[Term, ...]) -> Fitted:
    """The network as it trains: with statistics of both domains, and with the discriminator."""
    network, variables = fitted.network, fitted.variables
    if has_own_statistics(config):
        affine = config["domain"]["affine"]
        network = with_domains(config, network)
        # A step takes over the buffers of its state, and the domains begin with the same ones.
        variables = jax.tree.map(jnp.copy, split_domains(variables, affine=affine))
    params = dict(variables["params"])
    for term in terms:
        if _judges(term.term):
            key = named_key(jax.random.key(config["seed"]), DISCRIMINATOR)
            params[DISCRIMINATOR] = term.term.initialize(_shapes(config, fitted), key)
    return dataclasses.replace(fitted, network=network, variables={**variables, "params": params})


def with_domains(config: dict, network: nn.Module) -> nn.Module:
    """The network of a run as its checkpoints have it, without the discriminator."""
    if not has_own_statistics(config):
        return network
    return network.clone(domains=2, domain_affine=config["domain"]["affine"])


def for_source(variables: dict) -> dict:
    """Of a run's variables those of the plain network, with the statistics of the source."""
    return of_domain(without_discriminator(variables), _SOURCE)


def for_target(config: dict, variables: dict) -> dict:
    """Of a run's variables those of the plain network, with the statistics of the target."""
    return of_domain(without_discriminator(variables), target_domain(config))


def _make_adabn(
    config: dict, fitted: Fitted, domains: Domains, mesh: DataMesh
) -> Callable[[dict], dict]:
    """`fn(variables)`: with exact statistics of the target's images for its domain (AdaBN)."""
    if config["domain"]["bn"] != ADABN:
        return lambda variables: variables
    images = domains.target.splits["train"].images
    batches = batches_of_all(len(images), config["data"]["batch_size"], config["seed"])
    stages = set(norm_stages(fitted.variables, "domain.bn=adabn"))
    own = make_reestimate(fitted.network, fitted.spec, stages, mesh)

    def adapt(variables):
        plain = own(of_domain(variables, _SOURCE), images, *batches)
        return with_domain(variables, _TARGET, plain)

    return adapt


def judged_training(config: dict, fitted: Fitted, training: Training, domains: Domains) -> Training:
    """`training` whose epochs are also evaluated on the target, and chosen without its labels."""
    mesh, validator = training.mesh, domain_validator(config, fitted.task, domains)
    before, adapt = training.evaluated, _make_adabn(config, fitted, domains, mesh)
    judge = make_judge(config, fitted, validator, domains, mesh)
    return dataclasses.replace(
        training,
        evaluated=lambda state: adapt(before(state)),
        validated=for_source,
        judged=lambda predict, variables: judge(
            predict, for_source(variables), for_target(config, variables)
        ),
        validator=validator,
    )


def target_card(domains: Domains) -> dict:
    """What `environment.json` says of the target, JSON-ready."""
    target = domains.target
    return {
        "name": target.spec.name,
        "source": target.spec.source,
        "images": {name: len(split) for name, split in target.splits.items()},
        "labelled": list(domains.scored),
        "notes": [*target.spec.notes, *domains.notes],
        "sha256": target.checksum(),
    }


def with_target(
    predictions: dict[str, Predictions], score: Callable, domains: Domains
) -> dict[str, Predictions]:
    """The source's `predictions` and those of the target's test, which then is the split `test`.

    The source's own test is `source_test`. A target whose test has no labels has no scores.
    """
    found = {"val": predictions["val"], SOURCE_TEST: predictions["test"]}
    if "test" in domains.scored:
        found |= predict_splits(score, domains.target, ("test",))
    return found


def reading(config: dict, domains: Domains) -> list[str]:
    """What a reader of the run's report has to know of its splits."""
    source, target = names_apart(config, domains.source.spec.name, domains.target.spec.name)
    lines = [
        f"The test split is that of the target, {target}; its labels only score."
        if "test" in domains.scored
        else f"The target, {target}, has no labelled test: the scores are those of the source."
    ]
    lines.append(
        f"The validation split and the source's own test ({SOURCE_TEST}) are of {source}; "
        "temperature and thresholds are fitted on the former."
    )
    values = "Values of the epochs named oracle come from labels of the target's training images"
    if "train" in domains.scored:
        lines.append(f"{values}: nothing was trained or chosen by them.")
    if has_own_statistics(config):
        lines.append(
            "Batch statistics: the source's images were predicted with those of the source; the "
            f"target's test and the saved weights have those of the target{_except(config)}."
        )
    return lines


def _except(config: dict) -> str:
    """What stands after `those of the target` where not every stage has some."""
    kept = kept_statistics(config)
    return f", except in {', '.join(kept)}, where those of before the training stay" if kept else ""


def reading_of_evaluation(config: dict) -> list[str]:
    """What a reader has to know where a run's network is used on other images."""
    if not has_own_statistics(config):
        return []
    return [f"Batch statistics: those of the target that the run was adapted to{_except(config)}."]
