"""From the finished runs of a table of adaptations to its result, picks and curves."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from experiments import trained
from experiments.adapt_cells import AdaptCell
from experiments.adapt_methods import SOURCE, SUPERVISED, SUPERVISED_SUMMARY, find_method
from experiments.compare import read_run
from experiments.domain_settings import OWN, names_apart, run_validator
from experiments.ladder_folder import FOLDER
from experiments.ladder_results import (
    check_same,
    checked,
    data_name,
    lines_of,
    notes_of,
    read_history,
    sampled_runs,
)
from medtl_jax import runs
from medtl_jax.console import Console
from medtl_jax.domain.selection import ORACLE, VALIDATORS, Validator, best_of
from medtl_jax.errors import UserError
from medtl_jax.metrics.pairing import Predicted
from medtl_jax.metrics.seeds import Judged, Sampled, over_seeds
from medtl_jax.objectives.task import Task
from medtl_jax.report.adaptation import (
    ADAPTED,
    SOURCE_ONLY,
    Adaptation,
    Criterion,
    Method,
    compare_methods,
)
from medtl_jax.report.adaptation import SUPERVISED as UPPER_BOUND
from medtl_jax.training.selection import task_validator

_BOUNDS = {SOURCE: SOURCE_ONLY, SUPERVISED: UPPER_BOUND}
_HISTORY, _ACCURACY = "metrics.jsonl", "discriminator_accuracy"


@dataclasses.dataclass(frozen=True)
class _Rules:
    """What a run is judged by: the validator that chose, all that are shown, the oracle."""

    chosen: Validator
    shown: tuple[Validator, ...]
    oracle: str
    more_is_better: bool


def collect(
    folder: pathlib.Path, cells: Sequence[AdaptCell], config: dict, console: Console
) -> Adaptation:
    """The result of the finished runs `cells` of the table in `folder`.

    Raises:
      UserError: a run is damaged, or they are not of the same weights, data and test images.
    """
    check_same(folder, cells)
    first = cells[0].folder(folder)
    rules = _rules(first, cells[0].resolved, trained.read_card(first).task)
    groups = {
        name: list(group) for name, group in itertools.groupby(cells, lambda cell: cell.strategy)
    }
    scored = "test" in lines_of(first / runs.ENVIRONMENT, "target", "labelled")
    tested = read_run(first, cells[0].name, "test").predicted if scored else None
    samples = _samples(folder, groups, tested, config, console)
    against = compare_methods(samples, SOURCE, [SUPERVISED]) if samples else {}
    alone, beyond = _beyond_statistics(groups, samples)
    patients = tested.patients if tested else None
    named = data_name(first), checked(first / runs.ENVIRONMENT, str, "target", "name")
    source, target = names_apart(cells[0].resolved, *named)
    return Adaptation(
        methods=tuple(
            _method(
                folder,
                group,
                samples.get(name, ()),
                rules,
                against.get(name, {}),
                beyond.get(name, {}),
            )
            for name, group in groups.items()
        ),
        summaries={name: _summary(group[0]) for name, group in groups.items()},
        source=source,
        target=target,
        validators={
            found.name: Criterion(found.summary, found.more_is_better) for found in rules.shown
        },
        validator=rules.chosen.name,
        oracle=rules.oracle,
        seeds=config["adapt"]["seeds"],
        images=len(tested.ids) if tested else 0,
        patients=None if patients is None else len(np.unique(patients)),
        notes=_notes(folder, cells),
        statistics_alone=alone,
    )


def _rules(folder: pathlib.Path, config: dict, task: Task) -> _Rules:
    """What the runs of the table are judged by, of which one with `config` lies in `folder`."""
    select = config["train"]["select"]
    recorded = read_history(folder / _HISTORY, [])[0]
    chosen = run_validator(config, task)
    known = (found for found in VALIDATORS.values() if found.key in recorded or found == chosen)
    shown = (task_validator(select, task), *known)
    metric = next(name for name in (select, *task.selection) if name != "loss")
    return _Rules(chosen, shown, metric, task.selection[metric])


def _summary(cell: AdaptCell) -> str:
    """What a method is, with its settings as they take effect."""
    if cell.is_bound:
        return SUPERVISED_SUMMARY
    flat, found = runs.flat_config(cell.resolved), find_method(cell.strategy)
    keys = ["domain.method", "domain.bn"]
    keys += ["domain.strength"] * (flat["domain.method"] != "none")
    return f"{found.summary}: {', '.join(f'{key}={flat[key]}' for key in keys)}"


def _samples(
    folder: pathlib.Path,
    groups: Mapping[str, Sequence[AdaptCell]],
    tested: Predicted | None,
    config: dict,
    console: Console,
) -> dict[str, list[Sampled]]:
    """The scores of each method's seeds on the target's test, all on the same draws.

    Nothing where the target's test, `tested` by the first run, has no labels.
    """
    if tested is None:
        return {}
    cells = [cell for group in groups.values() for cell in group]
    sampled = sampled_runs(_predicted(folder, cells, tested.classes), len(cells), config, console)
    return {name: list(itertools.islice(sampled, len(group))) for name, group in groups.items()}


def _beyond_statistics(
    groups: Mapping[str, Sequence[AdaptCell]], samples: Mapping[str, Sequence[Sampled]]
) -> tuple[str, dict[str, dict[str, Judged]]]:
    """The method that has statistics of its own and no loss, and the differences to it.

    They are those of the methods with a loss beside such statistics; `""` and nothing where either
    is missing, or where the target's test has no labels.
    """
    own = [name for name, cells in groups.items() if _statistics(cells[0]) == OWN]
    alone = [name for name in own if not _has_loss(groups[name][0])]
    if not samples or not alone or len(own) == 1:
        return "", {}
    return alone[0], compare_methods({name: samples[name] for name in own}, alone[0])


def _statistics(cell: AdaptCell) -> str:
    """The `domain.bn` of a method as it takes effect, `""` of the bound."""
    return "" if cell.is_bound else cell.resolved["domain"]["bn"]


def _has_loss(cell: AdaptCell) -> bool:
    return cell.resolved["domain"]["method"] != "none"


def _predicted(
    folder: pathlib.Path, cells: Sequence[AdaptCell], classes: tuple[str, ...]
) -> Iterator[Predicted]:
    for cell in cells:
        found = read_run(cell.folder(folder), cell.name, "test").predicted
        yield _in_order(found, classes) if cell.is_bound else found


def order_of(theirs: Sequence[str], ours: Sequence[str]) -> list[int]:
    """The place of each class of the source, `ours`, among those of the target read by itself.

    Numbers are taken as the source's classes, as they are where the target is read beside it.

    Raises:
      UserError: they are other classes.
    """
    if sorted(theirs) == sorted(ours):
        return [theirs.index(name) for name in ours]
    if tuple(theirs) == tuple(str(number) for number in range(len(ours))):
        return list(range(len(ours)))
    raise UserError(
        f"adapt.supervised=True: the target's own labels are of the classes {', '.join(theirs)}, "
        f"and the source's of {', '.join(ours)}: set adapt.supervised=False"
    )


def _in_order(run: Predicted, classes: tuple[str, ...]) -> Predicted:
    """What a run on the target alone predicted, with the classes in the source's order."""
    order = order_of(run.classes, classes)
    if run.task in ("multilabel", "regress"):
        target = run.target[..., order]
    else:
        target = np.argsort(order)[run.target].astype(run.target.dtype)
    return dataclasses.replace(run, classes=classes, target=target, score=run.score[..., order])


def _method(
    folder: pathlib.Path,
    cells: Sequence[AdaptCell],
    samples: Sequence[Sampled],
    rules: _Rules,
    against: Mapping[str, Judged],
    beyond: Mapping[str, Judged],
) -> Method:
    """One method with all of its seeds, `cells`."""
    name = cells[0].strategy
    metrics = samples[0].values if samples else ()
    values, oracle = ({}, ()) if cells[0].is_bound else _judged(folder, cells, rules)
    return Method(
        name=name,
        folders=tuple(f"{FOLDER}/{cell.name}" for cell in cells),
        values=values,
        test={metric: over_seeds(samples, metric) for metric in metrics},
        against=against,
        oracle=oracle,
        bound=_BOUNDS.get(name, ADAPTED),
        statistics=_statistics(cells[0]),
        beyond=beyond,
    )


def _judged(
    folder: pathlib.Path, cells: Sequence[AdaptCell], rules: _Rules
) -> tuple[dict[str, tuple], tuple]:
    """The validators' values of each seed at the epoch that was kept, and its best oracle."""
    values: dict[str, list] = {found.name: [] for found in rules.shown}
    key, oracle = f"{ORACLE}_{rules.oracle}", []
    for cell in cells:
        path = cell.folder(folder) / _HISTORY
        history = read_history(path, [found.key for found in rules.shown])
        best = best_of(history, rules.chosen)
        for found in rules.shown:
            values[found.name].append(None if best is None else history[best][found.key])
        if any(key in record for record in history):
            known = [r[key] for r in read_history(path, [key]) if r[key] is not None]
            oracle.append((max if rules.more_is_better else min)(known, default=None))
    return {name: tuple(found) for name, found in values.items()}, tuple(oracle)


def _notes(folder: pathlib.Path, cells: Sequence[AdaptCell]) -> tuple[str, ...]:
    """What the runs noted; the data of the bound are others than those of the methods."""
    adapted = [cell for cell in cells if not cell.is_bound]
    bound = [cell for cell in cells if cell.is_bound]
    found = notes_of(folder, adapted)
    if not bound:
        return found
    own = (note.removeprefix(f"{SUPERVISED}: ") for note in notes_of(folder, bound))
    return (*found, *(f"{SUPERVISED}: {note}" for note in own))


def discriminators(
    folder: pathlib.Path, cells: Sequence[AdaptCell]
) -> dict[str, list[list[float | None]]]:
    """The discriminator's accuracy in every epoch, of each seed of each method that has one.

    A training that stopped early is filled up with None.
    """
    found: dict[str, list[list[float | None]]] = {}
    for cell in cells:
        path = cell.folder(folder) / _HISTORY
        if any(_ACCURACY in record for record in read_history(path, [])):
            accuracies = [record[_ACCURACY] for record in read_history(path, [_ACCURACY])]
            found.setdefault(cell.strategy, []).append(accuracies)
    for seeds in found.values():
        longest = max(map(len, seeds))
        for seed in seeds:
            seed += [None] * (longest - len(seed))
    return found
