"""What the section `domain` of a config asks for, checked as far as it can be without data."""

import functools
import pathlib
from collections.abc import Set

from experiments import study
from experiments.settings import default_section
from medtl_jax.domain.methods import ADVERSARIAL, READERS, check_method, parse_method
from medtl_jax.domain.selection import Validator, find_validator, source_validator
from medtl_jax.domain.statistics import norm_stages
from medtl_jax.errors import UserError
from medtl_jax.models.registry import create_model, variable_shapes
from medtl_jax.objectives.task import Task
from medtl_jax.training.selection import task_validator
from medtl_jax.training.step import LOGITS
from medtl_jax.transfer.groups import DISCRIMINATOR, FROZEN, assign_stages
from medtl_jax.transfer.norm_policy import frozen_norms, moving_statistics

AUTO, SOURCE, OWN, ADABN = "auto", "source", "own", "adabn"
STATISTICS = (AUTO, SOURCE, OWN, ADABN)
"""Whose batch statistics the target's images meet, see `config.domain.bn`."""


def wanted(config: dict) -> bool:
    """Whether the run has an unlabelled target beside its data."""
    return bool(config["domain"]["target"]["name"])


def resolve_domain(config: dict) -> dict:
    """`config` with the `domain.bn` that `auto` stands for.

    Target images that train get statistics of their own where a batch norm moves its statistics.
    Needs the groups of the stages as they take effect.
    """
    domain = config["domain"]
    if not wanted(config) or domain["bn"] != AUTO:
        return config
    own = domain["method"] != "none" and _moves(config)
    return {**config, "domain": {**domain, "bn": OWN if own else SOURCE}}


def _table(config: dict) -> dict[str, str]:
    """stage -> group, as `options.group_table`."""
    stages = (*study.architecture(config).stages, *study.new_parts(config))
    return assign_stages(stages, config["transfer"]["groups"])


def _moves(config: dict) -> bool:
    """Whether any batch norm moves its statistics in training."""
    moving = moving_statistics(_table(config), config["transfer"]["bn"])
    return not _normed(config).isdisjoint(moving)


def kept_statistics(config: dict) -> tuple[str, ...]:
    """The stages in which statistics of each domain's own stay those that both began with.

    With `domain.bn=own` these are frozen, or their `transfer.bn` uses the stored statistics;
    `adabn` works out those of every stage.
    """
    if not wanted(config) or config["domain"]["bn"] != OWN:
        return ()
    table, normed = _table(config), _normed(config)
    moving = moving_statistics(table, config["transfer"]["bn"])
    return tuple(stage for stage in table if stage in normed and stage not in moving)


def _normed(config: dict) -> Set[str]:
    """The stages of the network of `config` that have batch norms."""
    study.check_image_size(config)
    model = config["model"]
    return _normed_stages(model["name"], study.decoder_widths(config), model["image_size"])


@functools.cache
def _normed_stages(name: str, decoder: tuple[int, ...], image_size: int) -> Set[str]:
    network, _ = create_model(name, 1, decoder=decoder)
    return frozenset(variable_shapes(network, image_size)["batch_stats"])


def check_domain(config: dict) -> None:
    """UserError for a section `domain` that asks for nothing, or for what does not go together."""
    domain, transfer = config["domain"], config["transfer"]
    parse_method(domain["method"])
    if not wanted(config):
        _check_no_target(domain)
        return
    if config["experiment"] != "finetune":
        raise UserError(
            f"domain.target.name={domain['target']['name']} is for a training: use "
            f"experiment=finetune or adapt, not {config['experiment']}"
        )
    if domain["target"]["name"] == "phantom" and domain["target"]["dir"]:
        raise UserError(
            f"domain.target.dir={domain['target']['dir']} has no effect: the phantom is in no "
            "folder; leave it out, or set domain.target.name to folder, csv or npz"
        )
    if transfer["cache"] != "none":
        raise UserError(
            f"transfer.cache={transfer['cache']} keeps no maps of the target's images, which the "
            "adaptation needs; set transfer.cache=none"
        )
    if config["task"]:
        check_method(domain["method"], config["task"], domain["reads"])
        find_validator(domain["select"], source_validator("loss", False), config["task"])
    if has_own_statistics(config):
        norm_stages({"batch_stats": _normed(config)}, f"domain.bn={domain['bn']}")
        _check_statistics(config)


def _check_statistics(config: dict) -> None:
    """UserError for values of the target's own that nothing would ever change."""
    domain, bn = config["domain"], config["transfer"]["bn"]
    if domain["bn"] == OWN and not _moves(config):
        raise UserError(
            f"domain.bn=own has no effect: with transfer.bn.low={bn['low']}, transfer.bn.high="
            f"{bn['high']} and these transfer.groups no batch norm moves its statistics; let "
            "stages that have some learn with the policy train, or set domain.bn to source or adabn"
        )
    if not domain["affine"]:
        return
    if domain["bn"] == ADABN:
        raise UserError(
            "domain.affine=True does not go with domain.bn=adabn, which works out statistics "
            "alone: set domain.bn=own and a domain.method, or leave domain.affine out"
        )
    unreached = _unreached(config)
    if unreached:
        raise UserError(
            "domain.affine=True: no loss on the target's images would train its scale and bias in "
            f"{', '.join(unreached)}: set a domain.method that reads what comes after, with "
            "domain.strength above 0, or leave domain.affine out"
        )


def _unreached(config: dict) -> tuple[str, ...]:
    """The stages whose norms' scale and bias train, but by no gradient of `domain.method`."""
    domain, stages = config["domain"], study.architecture(config).stages
    names = {name for _, name in parse_method(domain["method"])}
    if not names or not domain["strength"]:
        reached = ()
    elif names - set(READERS) or domain["reads"] == LOGITS:
        return ()
    elif domain["reads"] in stages:
        reached = stages[: stages.index(domain["reads"]) + 1]
    else:
        reached = stages
    table, normed = _table(config), _normed(config)
    fixed = (*reached, *frozen_norms(table, config["transfer"]["bn"]))
    return tuple(
        stage
        for stage, group in table.items()
        if group != FROZEN and stage in normed and stage not in fixed
    )


def _check_no_target(domain: dict) -> None:
    """UserError for an adaptation to nothing."""
    for key, usual in {"method": "none", "bn": AUTO}.items():
        if domain[key] != usual:
            raise UserError(
                f"domain.{key}={domain[key]} needs a target: set domain.target.name (and dir)"
            )
    if domain["target"]["dir"]:
        raise UserError(
            f"domain.target.dir={domain['target']['dir']} needs domain.target.name, such as "
            "folder, csv or npz"
        )


def unused_by_domain(config: dict) -> list[str]:
    """A note on each setting of an adaptation that was changed and does nothing in this run."""
    domain, names = config["domain"], {name for _, name in parse_method(config["domain"]["method"])}
    usual = default_section("domain")
    needed = {
        "strength": (names, "a domain.method"),
        "gamma": (names, "a domain.method"),
        "affine": (domain["bn"] == OWN, "domain.bn=own"),
        "reads": (names & set(READERS), f"one of {', '.join(READERS)} in domain.method"),
        "width": (names & set(ADVERSARIAL), f"one of {', '.join(ADVERSARIAL)} in domain.method"),
        "select": (wanted(config), "a target"),
    }
    return [
        f"domain.{key}={domain[key]} has no effect: it needs {what}"
        for key, (met, what) in needed.items()
        if domain[key] != usual[key] and not met
    ]


def target_data(config: dict) -> dict:
    """The section `data` that reads the target: the source's, with the target's name and dir.

    A phantom beside a phantom is its other scanner: the same one would be no other domain.
    """
    data = {**config["data"], **config["domain"]["target"]}
    if data["name"] != "phantom":
        return data
    scanner = {"a": "b", "b": "a"}.get(config["data"]["phantom"]["domain"], "b")
    return {**data, "phantom": {**config["data"]["phantom"], "domain": scanner}}


def names_apart(config: dict, source: str, target: str) -> tuple[str, str]:
    """`source` and `target`, the names of their sets, with more of each where they are the same.

    Phantoms differ by their scanners, others by the last parts of their paths, or by the rows of
    one table that are read.
    """
    if source != target:
        return source, target
    sections = config["data"], target_data(config)
    if sections[0]["name"] == "phantom":
        one, other = (data["phantom"]["domain"] for data in sections)
        return f"{source} (scanner {one})", f"{target} (scanner {other})"
    rows = [data["csv_where"] or "all rows" for data in sections]
    paths = [pathlib.Path(data["dir"]).absolute().parts for data in sections]
    if paths[0] == paths[1] and rows[0] != rows[1]:
        return f"{source} ({rows[0]})", f"{target} ({rows[1]})"
    for size in range(2, max(map(len, paths)) + 1):
        one, other = (pathlib.Path(*parts[-size:]).as_posix() for parts in paths)
        if one != other:
            return one, other
    return source, target


def trains_on_target(config: dict) -> bool:
    """Whether the step sees images of the target: for a term, or for statistics of their own."""
    domain = config["domain"]
    used = domain["method"] != "none" and domain["strength"] > 0
    return wanted(config) and (used or domain["bn"] == OWN)


def has_own_statistics(config: dict) -> bool:
    """Whether the network keeps batch statistics of the target beside those of the source."""
    return wanted(config) and config["domain"]["bn"] in (OWN, ADABN)


def run_validator(config: dict, task: Task) -> Validator:
    """What names the best epoch of a run: with a target, `domain.select`."""
    source = task_validator(config["train"]["select"], task)
    if not wanted(config):
        return source
    return find_validator(config["domain"]["select"], source, task.name)


def own_groups(config: dict) -> frozenset[str]:
    """The groups of parameters that learn beside those of the network's stages."""
    names = {name for _, name in parse_method(config["domain"]["method"])}
    judged = wanted(config) and config["domain"]["strength"] and names & set(ADVERSARIAL)
    return frozenset({DISCRIMINATOR} if judged else ())
