"""L_pre of a run: the terms that hold the network to its pretrained state, with what they need."""

import dataclasses

import numpy as np

from experiments.features import kept_activations, linear_probe, with_head
from experiments.settings import default_section
from experiments.study import Fitted, Request
from medtl_jax.data.catalog import Dataset
from medtl_jax.data.streams import select
from medtl_jax.models.backbone import HEAD, SOURCE_HEAD
from medtl_jax.objectives.cotuning import class_relation
from medtl_jax.objectives.delta import channel_importance
from medtl_jax.objectives.pretrain import make_pretrain_term, parse_pretrain_loss, weight_schedule
from medtl_jax.objectives.task import Task, make_terms
from medtl_jax.training.devices import DataMesh
from medtl_jax.training.step import Term
from medtl_jax.transfer.groups import FROZEN

# Training images behind the attention of DELTA: it is a mean over them.
_MOST_IMAGES = 500


def pretrain_terms(
    request: Request,
    fitted: Fitted,
    table: dict[str, str],
    classifier: Task | None,
    dataset: Dataset,
    source: Dataset | None,
    mesh: DataMesh,
    total_steps: int,
) -> tuple[Term, ...]:
    """alpha times L_pre as terms of the step; none where the config has no L_pre.

    Args:
      fitted: the network before training.
      table: stage -> group; what trains in any phase is anchored.
      classifier, source: task of the weights' own classifier, and the set they were made on.
      total_steps: of the training, for the schedule of alpha.
    """
    transfer = request.config["transfer"]
    names = [name for _, name in parse_pretrain_loss(transfer["pretrain_loss"])]
    if not names:
        return ()
    train = dataset.splits["train"]
    anchored = tuple(stage for stage in fitted.spec.stages if table[stage] != FROZEN)
    importance = relation = source_terms = None
    if "delta" in names and not fitted.spec.decoder:
        importance = _importance(request, fitted, dataset, anchored, mesh)
    if "cotuning" in names:
        features = kept_activations(request, fitted, train, HEAD, mesh)
        head = fitted.variables["params"][SOURCE_HEAD]
        logits = features @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
        relation = class_relation(fitted.task, classifier, logits, train.target)
    if "replay" in names:
        source_terms = make_terms(
            classifier, source.splits["train"].target, default_section("train"), ("logits",)
        )
    term = make_pretrain_term(
        transfer["pretrain_loss"],
        anchored=anchored,
        source=classifier,
        source_terms=source_terms,
        temperature=transfer["temperature"],
        importance=importance,
        relation=relation,
    )
    return with_alpha(request.config, (Term("pre", 0.0, term),), total_steps)


def with_alpha(config: dict, terms: tuple[Term, ...], total_steps: int) -> tuple[Term, ...]:
    """The terms of L_pre, each weighted by the config's alpha and its schedule."""
    transfer = config["transfer"]
    alpha = weight_schedule(transfer["alpha_schedule"], transfer["alpha"], total_steps)
    return tuple(dataclasses.replace(term, weight=alpha) for term in terms)


def _importance(
    request: Request,
    fitted: Fitted,
    dataset: Dataset,
    stages: tuple[str, ...],
    mesh: DataMesh,
) -> dict[str, np.ndarray]:
    """What the channels of the pretrained maps are worth to a linear classifier of the features."""
    train = dataset.splits["train"]
    rows = np.unique(np.linspace(0, len(train) - 1, _MOST_IMAGES).round().astype(int))
    probed = with_head(fitted, linear_probe(request, fitted, dataset, mesh))
    terms = make_terms(fitted.task, train.target, default_section("train"), ("logits",))
    return channel_importance(
        fitted.network,
        fitted.spec,
        probed.variables,
        select(train.images, rows),
        train.target[rows],
        terms["logits"],
        stages,
    )
