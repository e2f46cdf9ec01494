"""The runs of an ablation: which there are, their configs, and what makes each the run it is."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import study
from experiments.ablation_axes import KEY, parse_axes, row_name, rows_of, settings_of
from experiments.augmentation import with_preset
from experiments.cells import Cell, resolved_config
from experiments.ladder_requests import Memos, Quiet, cell_request, named
from experiments.prepared import read_training_data
from experiments.settings import check_ranges, default_section
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.errors import UserError

_LONGEST_SLUG = 60


@dataclasses.dataclass(frozen=True)
class AblationCell(Cell):
    """One run of an ablation, named by its row, its seed and a hash of all that it is made of.

    Attributes:
      of_row: the flat keys of the config that its row sets, as they are written.
      digest: of its config, images and weights; a run of others is another run.
    """

    of_row: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    digest: str = ""

    kind = "row"
    listed = KEY

    @property
    def group(self) -> str:
        """The row, as it can be in the name of a folder."""
        return re.sub(r"[^\w.=-]+", "_", self.strategy)[:_LONGEST_SLUG]

    @property
    def sets(self) -> Mapping[str, Any]:
        """The flat keys of the config that its row sets."""
        return self.of_row

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{super().name}-{self.digest}"

    @property
    def title(self) -> str:
        """Row and seed."""
        return f"{self.strategy}, seed {self.config['seed']}"

    @property
    def place(self) -> str:
        """The runs of one place differ in their draws alone."""
        data = {**self.resolved["data"], "seed_draw": 0, "train_fraction": 1.0, "per_class": 0}
        model = {key: self.resolved["model"][key] for key in ("image_size", "in_chans")}
        return json.dumps([data, model, self.resolved["task"]], sort_keys=True)

    @property
    def made_of(self) -> dict[tuple, tuple[str, ...]]:
        """Nothing: its name says what it is made of."""
        return {}

    @property
    def settings(self) -> dict[str, Any]:
        """What its row sets, as it is written: a preset is strengths in the config."""
        return dict(self.of_row)


def make_cells(config: dict) -> list[AblationCell]:
    """The runs of an ablation, by row and then seed, without their digests.

    What a row sets wins over what the study has.

    Raises:
      UserError: `config.ablation` is none; a run's config cannot be used.
    """
    axes = parse_axes(config["ablation"]["axes"])
    cells = []
    for row in rows_of(axes, config["ablation"]["design"]):
        settings = settings_of(axes, row)
        for number in range(config["ablation"]["seeds"]):
            cells.append(_cell(config, row_name(row), settings, number))
    return cells


def _cell(config: dict, name: str, settings: Mapping[str, Any], number: int) -> AblationCell:
    own = runs.nested_config(config, {**runs.flat_config(config), **settings})
    seed = config["seed"] + number
    where = f"{name}, seed {seed}"
    own = {
        **own,
        "experiment": "finetune",
        "seed": seed,
        "data": {**own["data"], "seed_draw": own["data"]["seed_draw"] + number},
        # A run is the same in every ablation that has it.
        "ablation": default_section("ablation"),
    }
    try:
        check_ranges(own)
        own = with_preset(own, frozenset(settings))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    own = {**own, "augment": {**own["augment"], "preset": ""}}
    found = resolved_config(own, frozenset(), where)
    return AblationCell(name, own["data"]["train_fraction"], *found, of_row=settings)


def with_digests(
    cells: Sequence[AblationCell], request: Request, memos: Memos
) -> list[AblationCell]:
    """The runs with the digests of what they are made of, for which images and weights are read.

    UserError for images or weights that cannot be.
    """
    weights: dict[str, str] = {}
    found = []
    for cell in cells:
        with named(cell):
            images = read_training_data(cell_request(cell, request, memos)).checksum()
            source = cell.resolved["model"]["weights"]
            key = json.dumps([cell.resolved["model"]["name"], source])
            if key not in weights:
                quiet = Quiet(request.console, cell, cell.folder(request.folder))
                opened = study.open_weights(cell.resolved, quiet)
                weights[key] = opened.file.sha256 if opened else ""
            parts = [_content(cell.resolved), images, weights[key]]
            digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]
        found.append(dataclasses.replace(cell, digest=digest))
    return found


def _content(config: dict) -> dict:
    """What of a config makes a run what it is: not where its images lie, as these are hashed."""
    return {**config, "data": {**config["data"], "dir": ""}}
