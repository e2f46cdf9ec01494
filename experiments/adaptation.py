"""Adaptation of a run to an unlabelled target: its set, its terms, its networks, its validators."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments import study
from experiments.study import Fitted
from medtl_jax.console import Console
from medtl_jax.data.catalog import Dataset
from medtl_jax.data.domains import Domains, check_domains, has_labels, unlabelled
from medtl_jax.data.streams import select
from medtl_jax.data.unlabelled import read_target
from medtl_jax.domain.adversary import (
    DISCRIMINATOR,
    Adversary,
    ramp,
    without_discriminator,
)
from medtl_jax.domain.methods import check_method, make_domain_terms, parse_method
from medtl_jax.domain.selection import (
    ORACLE,
    VALIDATORS,
    Evidence,
    Validator,
    find_validator,
    measure,
)
from medtl_jax.domain.statistics import norm_stages, of_domain, split_domains, with_domain
from medtl_jax.domain.validators import distributions, sampled_rows
from medtl_jax.errors import UserError
from medtl_jax.keys import named_key
from medtl_jax.metrics.scores import task_scores
from medtl_jax.models.backbone import FEATURES
from medtl_jax.models.registry import create_model, variable_shapes
from medtl_jax.objectives.task import Task
from medtl_jax.report.predict import Predictions, predict_scores, predict_splits
from medtl_jax.training.devices import DataMesh
from medtl_jax.training.inference import Predict, make_predict
from medtl_jax.training.loop import Training
from medtl_jax.training.reestimate import make_reestimate
from medtl_jax.training.selection import task_validator
from medtl_jax.training.step import Term

AUTO, SOURCE, OWN, ADABN = "auto", "source", "own", "adabn"
STATISTICS = (AUTO, SOURCE, OWN, ADABN)
"""Whose batch statistics the target's images meet, see `config.domain.bn`."""

# Target images that an epoch is judged by without their labels; of masks every pixel is one row.
_JUDGED = {"segment": 200}
_MOST_JUDGED = 2000
_TARGET, _SOURCE = 1, 0


def wanted(config: dict) -> bool:
    """Whether the run has an unlabelled target beside its data."""
    return bool(config["domain"]["target"]["name"])


def resolve_domain(config: dict) -> dict:
    """`config` with the `domain.bn` that `auto` stands for.

    Target images that train get statistics of their own where the network has batch norms.
    """
    domain = config["domain"]
    if not wanted(config) or domain["bn"] != AUTO:
        return config
    network, _ = create_model(config["model"]["name"], 1, decoder=study.decoder_widths(config))
    has_norms = bool(variable_shapes(network, config["model"]["image_size"])["batch_stats"])
    own = has_norms and domain["method"] != "none"
    return {**config, "domain": {**domain, "bn": OWN if own else SOURCE}}


def check_domain(config: dict) -> None:
    """UserError for a section `domain` that asks for nothing, or for what does not go together."""
    domain, transfer = config["domain"], config["transfer"]
    parse_method(domain["method"])
    if not wanted(config):
        idle = {"method": "none", "bn": AUTO}
        for key, usual in idle.items():
            if domain[key] != usual:
                raise UserError(
                    f"domain.{key}={domain[key]} needs a target: set domain.target.name (and dir)"
                )
        if domain["target"]["dir"]:
            raise UserError(
                f"domain.target.dir={domain['target']['dir']} needs domain.target.name, such as "
                "folder, csv or npz"
            )
        return
    if config["experiment"] != "finetune":
        raise UserError(
            f"domain.target.name={domain['target']['name']} is for a training: use "
            f"experiment=finetune or adapt, not {config['experiment']}"
        )
    if transfer["cache"] != "none":
        raise UserError(
            f"transfer.cache={transfer['cache']} keeps no maps of the target's images, which the "
            "adaptation needs; set transfer.cache=none"
        )
    if config["task"]:
        check_method(domain["method"], config["task"])


def find_domains(config: dict, dataset: Dataset, console: Console) -> Domains:
    """Source and target of the run, fit for one training. Notes are said.

    Raises:
      UserError: as `read_target` and `check_domains`, in the words of the section `domain`.
    """
    named = dict(config["domain"]["target"])
    data = {**config["data"], **named}
    if named["name"] == "phantom":
        # The same scanner would be no other domain.
        other = {"a": "b", "b": "a"}.get(config["data"]["phantom"]["domain"], "b")
        data["phantom"] = {**config["data"]["phantom"], "domain": other}
    try:
        with console.progress("target data") as advance:
            target = read_target(
                data,
                dataset.spec,
                config["model"]["image_size"],
                advance,
                grey=config["model"]["in_chans"] == 1,
            )
    except UserError as error:
        text = str(error).replace("data.dir", "domain.target.dir")
        raise UserError(f"domain.target: {text}") from error
    domains = check_domains(dataset, target)
    counts = ", ".join(f"{name} {len(split)}" for name, split in target.splits.items())
    console.note(f"target data: {target.spec.name}: {counts} images")
    for note in (*target.spec.notes, *domains.notes):
        console.note(f"note: {note}")
    return domains


def run_validator(config: dict, task: Task) -> Validator:
    """What names the best epoch of a run: with a target, `domain.select`."""
    source = task_validator(config["train"]["select"], task)
    if not wanted(config):
        return source
    found = find_validator(config["domain"]["select"], source, task.name)
    if found.name == "dev" and task.name != "classify":
        raise UserError(
            f"domain.select=dev weighs the log loss of single images: it is not for {task.name}; "
            "choose another validator"
        )
    return found


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


def trains_on_target(config: dict) -> bool:
    """Whether the step sees images of the target: for a term, or for statistics of their own."""
    domain = config["domain"]
    used = domain["method"] != "none" and domain["strength"] > 0
    return wanted(config) and (used or domain["bn"] == OWN)


def target_domain(config: dict) -> int:
    """The domain whose statistics the target's images meet in a step."""
    return _TARGET if has_own_statistics(config) else _SOURCE


def has_own_statistics(config: dict) -> bool:
    """Whether the network keeps batch statistics of the target beside those of the source."""
    return wanted(config) and config["domain"]["bn"] in (OWN, ADABN)


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
    size = min(config["data"]["batch_size"], len(images))
    order = np.random.default_rng(config["seed"]).permutation(len(images))
    count = len(order) // size
    batches = order[: count * size].reshape(count, size).astype(np.int32)
    stages = set(norm_stages(fitted.variables, "domain.bn=adabn"))
    own = make_reestimate(fitted.network, fitted.spec, stages, mesh)

    def adapt(variables):
        plain = own(of_domain(variables, _SOURCE), images, batches)
        return with_domain(variables, _TARGET, plain)

    return adapt


def judged_training(config: dict, fitted: Fitted, training: Training, domains: Domains) -> Training:
    """`training` whose epochs are also evaluated on the target, and chosen without its labels."""
    before, adapt = training.evaluated, _make_adabn(config, fitted, domains, training.mesh)
    return dataclasses.replace(
        training,
        evaluated=lambda state: adapt(before(state)),
        validated=for_source,
        judged=_make_judged(config, fitted, domains, training.mesh),
        validator=run_validator(config, fitted.task),
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
    found = {"val": predictions["val"], "source_test": predictions["test"]}
    if "test" in domains.scored:
        found |= predict_splits(score, domains.target, ("test",))
    return found


def _make_judged(
    config: dict, fitted: Fitted, domains: Domains, mesh: DataMesh
) -> Callable[[Predict, dict], dict]:
    """`fn(predict, variables)`: what the validators, and the target's labels, say of an epoch.

    What takes labels has a name that begins with `oracle`: nothing is chosen by it.
    """
    task, chosen = fitted.task, run_validator(config, fitted.task)
    train = domains.target.splits["train"]
    most = _JUDGED.get(task.name, _MOST_JUDGED)
    rows = sampled_rows(len(train), most, config["seed"])
    images = select(unlabelled(train).images, rows)
    labels = train.target[rows] if has_labels(train) else None
    known = [found for found in VALIDATORS.values() if found.needs == ("target_probabilities",)]
    validators = [] if task.name == "regress" else known
    if chosen.name == "dev":
        validators = [*validators, chosen]
    predict_features = make_predict(
        fitted.network, fitted.spec, mesh, config["eval"]["batch_size"], output=FEATURES
    )

    def judged(predict, variables):
        adapted = for_target(config, variables)
        score = predict_scores(predict, adapted, images, task)
        evidence = Evidence()
        if task.name != "regress":
            evidence = Evidence(target_probabilities=distributions(task.name, score))
        if chosen.name == "dev":
            source = for_source(variables)
            evidence = dataclasses.replace(
                evidence,
                target_features=predict_features(adapted, images),
                **_source_evidence(domains, predict, predict_features, source, task, rows),
            )
        values = measure(evidence, validators)
        return values | ({} if labels is None else _oracle(task, labels, score))

    return judged


def _source_evidence(domains, predict, predict_features, variables, task: Task, rows) -> dict:
    """What `dev` reads of the source."""
    train, val = domains.source.splits["train"], domains.source.splits["val"]
    chosen = sampled_rows(len(train), len(rows), 0)
    score = predict_scores(predict, variables, val.images, task)
    right = score[np.arange(len(val)), np.asarray(val.target[:])]
    return {
        "source_train_features": predict_features(variables, select(train.images, chosen)),
        "source_features": predict_features(variables, val.images),
        "source_losses": -np.log(np.maximum(right, 1e-12)),
    }


def _oracle(task: Task, labels: np.ndarray, score: np.ndarray) -> dict[str, float | None]:
    scores = task_scores(task.name, labels, score, task.classes, surfaces=False)
    values = {name: scores[name].value for name in task.selection if name != "loss"}
    return {
        f"{ORACLE}_{name}": None if np.isnan(value) else float(value)
        for name, value in values.items()
    }
