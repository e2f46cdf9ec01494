"""The runs of an ablation: which there are, their configs, and what makes each the run it is."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import adaptation, domain_settings, study
from experiments.ablation_axes import KEY, MEMBERS, parse_axes, row_name, rows_of, settings_of
from experiments.augmentation import with_preset
from experiments.cells import Cell, check_untouched, resolved_config
from experiments.ladder_requests import Memos, Quiet, cell_request, keep_one, named
from experiments.prepared import read_training_data
from experiments.settings import check_ranges, default_section
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.data.catalog import Dataset, DataSpec, Split
from medtl_jax.ensemble.members import AUTO
from medtl_jax.errors import UserError

# Keys of the section `data` that change nothing of what is read, or only draw from it.
_NOT_READ = ("seed_draw", "train_fraction", "per_class", "batch_size", "cache_gb")
_OF_ENSEMBLES = tuple(f"ensemble.{key}" for key in default_section("ensemble"))
# Between the seeds of two members: no two seeds of a row, at most so many, share a member.
_STRIDE = 1000


@dataclasses.dataclass(frozen=True)
class AblationCell(Cell):
    """One run of an ablation; its folder is named by its seed and a hash of what it is made of.

    Attributes:
      of_row: the flat keys of the config that its row sets, as they are written; how many members
        the row has is nothing that a run knows of.
      digest: of its config, images and weights; a run of others is another run.
    """

    of_row: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    digest: str = ""

    kind = "row"
    listed = KEY

    @property
    def group(self) -> str:
        """The row."""
        return self.strategy

    @property
    def sets(self) -> Mapping[str, Any]:
        """The flat keys of the config that its row sets."""
        return self.of_row

    @property
    def name(self) -> str:
        """Of its folder: of the same run in whatever ablation, whatever its row is called."""
        return f"{self.config['seed']}-{self.digest}"

    @property
    def title(self) -> str:
        """Row and seed."""
        return f"{self.strategy}, seed {self.config['seed']}"

    @property
    def place(self) -> str:
        """The runs of one place differ in their draws, or in nothing of what is read."""
        data = {key: value for key, value in self.resolved["data"].items() if key not in _NOT_READ}
        model = {key: self.resolved["model"][key] for key in ("image_size", "in_chans")}
        return json.dumps([data, model, self.resolved["task"]], sort_keys=True)

    @property
    def made_of(self) -> dict[tuple, tuple[str, ...]]:
        """Its name says what it is made of, but for the set of the weights that are held on to."""
        source = self.resolved["transfer"]["source"]
        return {("source", *source.values()): ("source_sha256",)} if source["name"] else {}

    @property
    def settings(self) -> dict[str, Any]:
        """What its row sets, as it is written: a preset is strengths in the config."""
        return dict(self.of_row)


def make_cells(config: dict) -> list[AblationCell]:
    """The runs of an ablation, by row, seed and member, without their digests.

    What a row sets wins over what the study has. Of a row with `ensemble.members` the first member
    of each seed is the run that the row would have without them; the seeds of the others are 1000
    apart, and all learn from the images of the first. A run of several rows is there for each.

    Raises:
      UserError: `config.ablation` is none; a run's config cannot be used; two rows come to the
        same runs; members whose seeds change nothing.
    """
    instead = f"{MEMBERS} in a row of {KEY}"
    check_untouched(config, dict.fromkeys(_OF_ENSEMBLES, instead), "an ablation")
    axes = parse_axes(config["ablation"]["axes"])
    cells: list[AblationCell] = []
    same: dict[str, str] = {}
    for row in rows_of(axes, config["ablation"]["design"]):
        name, settings = row_name(row), settings_of(axes, row)
        members = settings.pop(MEMBERS, 1)
        own = [
            _cell(config, name, settings, number, member)
            for number in range(config["ablation"]["seeds"])
            for member in range(members)
        ]
        _check_members(own[0], members)
        made_of = json.dumps([members, _made_of(own[0].resolved)], sort_keys=True)
        other = same.setdefault(made_of, name)
        if other != name:
            raise UserError(
                f"{KEY}: the rows {other!r} and {name!r} come to the same runs, as all settings "
                "take effect; leave one out"
            )
        cells += own
    return cells


def entries_of(cells: Sequence[AblationCell]) -> list[list[AblationCell]]:
    """The runs by what predicts together: for each seed of each row one, or all its members."""
    found: dict[tuple[str, int], list[AblationCell]] = {}
    for cell in cells:
        found.setdefault((cell.strategy, cell.config["data"]["seed_draw"]), []).append(cell)
    return list(found.values())


def distinct(cells: Sequence[AblationCell]) -> list[AblationCell]:
    """The runs, those that several rows have once, as of the first of these rows."""
    found: dict[str, AblationCell] = {}
    for cell in cells:
        found.setdefault(cell.name, cell)
    return list(found.values())


def _check_members(cell: AblationCell, members: int) -> None:
    """UserError for several members whose seeds change nothing."""
    if members > 1 and cell.resolved["experiment"] != "finetune":
        raise UserError(
            f"{cell.title}: {MEMBERS}={members}: a probe, k-NN or traditional classifier is not "
            f"trained by steps, of which members differ by their seeds; leave the row out of {KEY}"
        )


def _cell(
    config: dict, name: str, settings: Mapping[str, Any], number: int, member: int
) -> AblationCell:
    own = runs.nested_config(config, {**runs.flat_config(config), **settings})
    seed = config["seed"] + number + _STRIDE * member
    where = f"{name}, seed {seed}"
    own = {
        **own,
        "experiment": "finetune",
        "seed": seed,
        "data": {**own["data"], "seed_draw": own["data"]["seed_draw"] + number},
        # A run is the same in every ablation that has it.
        "ablation": default_section("ablation"),
        "paper": default_section("paper"),
    }
    try:
        check_ranges(own)
        own = with_preset(own, frozenset(settings))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    own = {**own, "augment": {**own["augment"], "preset": ""}}
    # What a strategy would set otherwise than the row is refused, not overwritten.
    found = resolved_config(own, frozenset(settings) - {"model.weights"}, where)
    return AblationCell(name, own["data"]["train_fraction"], *found, of_row=settings)


def with_digests(
    cells: Sequence[AblationCell], request: Request, memos: Memos
) -> list[AblationCell]:
    """The runs with the digests of what they are made of, for which images and weights are read.

    UserError for images or weights that cannot be, and for rows that have no test in common.
    """
    weights: dict[str, str] = {}
    images: dict[str, list[str]] = {}
    found, tested = [], None
    for cell in cells:
        keep_one(memos, cell)
        with named(cell):
            data = cell.resolved["data"]
            drawn = [cell.fraction, data["seed_draw"], data["per_class"]]
            draw = json.dumps([drawn, cell.place, _target(cell)])
            if draw not in images:
                own = cell_request(cell, request, memos)
                dataset = read_training_data(own)
                tested = tested or (dataset.splits["test"], dataset.spec)
                _check_comparable(dataset, *tested, cells[0])
                images[draw] = [dataset.checksum()]
                if _target(cell):
                    domains = adaptation.find_domains(cell.resolved, dataset, own.console, own.memo)
                    images[draw].append(domains.target.checksum())
            weight = _weights_digest(cell, request, weights)
            parts = [_made_of(cell.resolved), *images[draw], weight]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
        found.append(dataclasses.replace(cell, digest=digest))
    return found


def _made_of(config: dict) -> dict:
    """The config without what changes nothing of what comes out, see `train.program`."""
    return {**config, "train": {**config["train"], "program": AUTO}}


def _target(cell: AblationCell) -> list[str]:
    """Name and place of the target that the run is adapted to; nothing without one."""
    config = cell.resolved
    return list(config["domain"]["target"].values()) if domain_settings.wanted(config) else []


def _weights_digest(cell: AblationCell, request: Request, known: dict[str, str]) -> str:
    """SHA-256 of the weights of a run, `""` without; each file is read once."""
    key = json.dumps([cell.resolved["model"]["name"], cell.resolved["model"]["weights"]])
    if key not in known:
        quiet = Quiet(request.console, cell, cell.folder(request.folder))
        opened = study.open_weights(cell.resolved, quiet)
        known[key] = opened.file.sha256 if opened else ""
    return known[key]


def _check_comparable(
    dataset: Dataset, test: Split, spec: DataSpec, reference: AblationCell
) -> None:
    """UserError unless the set has the test of the `reference`: one table has one."""
    ours, own = dataset.splits["test"], dataset.spec
    same = (own.task, own.classes) == (spec.task, spec.classes)
    same = same and ours.target.shape == test.target.shape and np.array_equal(ours.ids, test.ids)
    if not same:
        raise UserError(
            f"its task, classes or test images are not those of {reference.title!r}, so that the "
            f"two cannot be compared: leave the setting out of {reference.listed}"
        )
