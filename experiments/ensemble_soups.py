"""The soups of an ensemble: the mean of the weights of one network's members, as one network."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence

from experiments.ensemble_candidates import Candidate, open_member, validation_value
from experiments.ensemble_cells import MemberCell, by_network
from experiments.ladder_requests import Memos, cell_request, keep_one, named
from experiments.options import group_table
from experiments.prepared import make_mesh, read_training_data
from experiments.study import Fitted, Request
from medtl_jax.data.catalog import Dataset
from medtl_jax.ensemble.soup import Soup, Tree, greedy_soup, uniform_soup
from medtl_jax.metrics.pairing import Predicted
from medtl_jax.objectives.task import Task
from medtl_jax.report.ensemble import SOUP
from medtl_jax.report.predict import Predictions, predict_scores, predict_splits
from medtl_jax.training.devices import DataMesh
from medtl_jax.training.inference import make_predict
from medtl_jax.training.reestimate import batches_of_all, make_reestimate
from medtl_jax.transfer.norm_policy import moving_statistics


def make_soups(
    cells: Sequence[MemberCell],
    members: Sequence[Candidate],
    request: Request,
    memos: Memos,
    task: Task,
) -> tuple[list[Candidate], list[str]]:
    """A uniform and a greedy soup of each network whose members began alike; and why not others.

    Args:
      cells: all finished.
      members: of each cell, in their order.
      request: of the study.
      memos: where the data that are read are kept.
      task: of all members.
    """
    whose = dict(zip((cell.name for cell in cells), members, strict=True))
    groups, found, notes = by_network(cells), [], []
    for label, group in groups.items():
        why = _without(group)
        if why:
            notes.append(f"no soup of {label}: {why}")
            continue
        keep_one(memos, group[0])
        with named(group[0], label):
            of = f" of {label}" if len(groups) > 1 else ""
            candidates = [whose[cell.name] for cell in group]
            found += _soups(group, candidates, of, request, memos, task)
    return found, notes


def _without(group: Sequence[MemberCell]) -> str:
    """Why the members of one network have no soup, `""` where they have one."""
    if len(group) < 2:
        return "it has one member"
    if group[0].resolved["model"]["weights"] == "none":
        return "its members began with different random weights"
    return ""


def _soups(
    group: Sequence[MemberCell],
    members: Sequence[Candidate],
    of: str,
    request: Request,
    memos: Memos,
    task: Task,
) -> list[Candidate]:
    config = group[0].resolved
    select = config["train"]["select"]
    more_is_better = task.selection[select]
    dataset = read_training_data(cell_request(group[0], request, memos))
    network = _SoupNetwork.of(group, request.folder, dataset, task)
    values = [validation_value(task, select, member.val) for member in members]
    order = _best_first(values, more_is_better)

    def value(variables: Tree) -> float:
        found = validation_value(task, select, network.validate(variables))
        return float("nan") if found is None else found

    folders = [cell.folder(request.folder) for cell in group]
    uniform = network.finish(uniform_soup(_variables(folders)))
    greedy = greedy_soup(
        _variables([folders[place] for place in order]), network.finish, value, more_is_better
    )
    greedy = dataclasses.replace(greedy, members=tuple(order[place] for place in greedy.members))
    soups = {
        f"uniform soup{of}": Soup(uniform, tuple(range(len(group)))),
        f"greedy soup{of}": greedy,
    }
    return [
        Candidate(
            name,
            SOUP,
            *network.predicted(name, soup.variables),
            uses={group[0].group: 1},
            made_of={"members": [members[place].name for place in soup.members]},
        )
        for name, soup in soups.items()
    ]


def _best_first(values: Sequence[float | None], more_is_better: bool) -> list[int]:
    """The places of the members, those without a value last; equals as they are."""
    sign = -1 if more_is_better else 1
    return sorted(
        range(len(values)),
        key=lambda place: (values[place] is None, sign * (values[place] or 0.0)),
    )


def _variables(folders: Sequence[pathlib.Path]) -> Iterator[Tree]:
    """The best variables of each run, read when they are asked for."""
    for folder in folders:
        yield open_member(folder).fitted.variables


@dataclasses.dataclass(frozen=True)
class _SoupNetwork:
    """What makes a network of a mean of weights, and has it predict."""

    configs: Sequence[dict]
    fitted: Fitted
    dataset: Dataset
    task: Task
    mesh: DataMesh

    @classmethod
    def of(
        cls, cells: Sequence[MemberCell], study: pathlib.Path, dataset: Dataset, task: Task
    ) -> "_SoupNetwork":
        """That of the network of `cells`, members of the `study`."""
        fitted = open_member(cells[0].folder(study)).fitted
        configs = [cell.resolved for cell in cells]
        return cls(configs, fitted, dataset, task, make_mesh(configs[0]))

    @functools.cached_property
    def _predict(self):
        size = self.configs[0]["eval"]["batch_size"]
        return make_predict(self.fitted.network, self.fitted.spec, self.mesh, size)

    @functools.cached_property
    def _reestimate(self):
        # Statistics that any of the members has moved.
        stages = {
            stage
            for config in self.configs
            for stage in moving_statistics(group_table(config), config["transfer"]["bn"])
        }
        return make_reestimate(self.fitted.network, self.fitted.spec, stages, self.mesh)

    def finish(self, variables: Tree) -> Tree:
        """The variables with exact batch statistics of the training images, not augmented."""
        images, size = self.dataset.splits["train"].images, self.configs[0]["data"]["batch_size"]
        # The same batches, whichever members are in it.
        batches = batches_of_all(len(images), size, 0)
        return self._reestimate(variables, images, *batches)

    def validate(self, variables: Tree) -> Predicted:
        """What a network predicts of the validation split."""
        return self._predictions("", variables, ("val",))[0]

    def predicted(self, name: str, variables: Tree) -> list[Predicted]:
        """What a network predicts of validation and test."""
        return self._predictions(name, variables, ("val", "test"))

    def _predictions(self, name: str, variables: Tree, splits: Sequence[str]) -> list[Predicted]:
        score = functools.partial(predict_scores, self._predict, variables, task=self.task)
        found = predict_splits(score, self.dataset, splits)
        return [_as_predicted(name, self.task, found[split]) for split in splits]


def _as_predicted(name: str, task: Task, found: Predictions) -> Predicted:
    return Predicted(
        name, task.name, task.classes, found.ids, found.target, found.score, found.patients
    )
