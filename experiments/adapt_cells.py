"""The runs of a table of adaptations: which there are, and their configs."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from experiments.adapt_methods import SOURCE, SUPERVISED, find_method
from experiments.cells import Cell, check_different, listed, resolved_config
from experiments.domain_settings import target_data, unused_by_domain, wanted
from experiments.settings import default_section
from medtl_jax import runs
from medtl_jax.errors import UserError

_METHODS = "adapt.methods"


class AdaptCell(Cell):
    """One run of a table of adaptations, named by method and seed."""

    kind = "method"
    listed = _METHODS

    @property
    def group(self) -> str:
        """The method, as it can be in the name of a folder."""
        return self.strategy.replace(" ", "").replace("*", "x")

    @property
    def sets(self) -> Mapping[str, Any]:
        """The flat keys of the config that its method sets."""
        return {} if self.is_bound else find_method(self.strategy).settings

    @property
    def is_bound(self) -> bool:
        """Whether it is trained with the target's labels."""
        return self.strategy == SUPERVISED

    @property
    def made_of(self) -> dict[tuple, tuple[str, ...]]:
        """As `Cell.made_of`, with the target's images."""
        found = super().made_of
        return found if self.is_bound else {**found, ("images", "target"): ("target", "sha256")}

    @property
    def of_others(self) -> list[str]:
        """Settings of the section `domain` that this method has no use for."""
        return unused_by_domain(self.resolved)

    def words(self, text: str) -> str:
        """What it says, with the settings by which a table has it set them."""
        return text.replace("domain.method", _METHODS)


def make_cells(config: dict, given: Set[str] = frozenset()) -> list[AdaptCell]:
    """The runs of the table: by method in the order given, then seed; those of the bound last.

    Raises:
      UserError: there is no target; `config.adapt` is none; a run's config cannot be used.
    """
    if not wanted(config):
        raise UserError(
            "experiment=adapt needs a target to adapt to: set domain.target.name (and dir), such "
            "as npz or folder"
        )
    names = listed(config, _METHODS)
    methods = {name: find_method(name).settings for name in names}
    check_different(_METHODS, {name: _as_strong(config, sets) for name, sets in methods.items()})
    if SOURCE not in names:
        raise UserError(
            f"adapt.methods={','.join(names)}: source is not among them, with which the others are "
            "compared; add it"
        )
    names += [SUPERVISED] * config["adapt"]["supervised"]
    numbers = range(config["adapt"]["seeds"])
    return [_cell(config, name, number, given) for name in names for number in numbers]


def unused_by_all(cells: Sequence[AdaptCell]) -> list[str]:
    """A note on each setting of the section `domain` that was changed and no method uses."""
    notes = [cell.of_others for cell in cells if not cell.is_bound]
    return [cells[0].words(note) for note in notes[0] if all(note in others for others in notes)]


def _as_strong(config: dict, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a method sets, with the strength that it has anyway."""
    return {"domain.strength": config["domain"]["strength"], **settings}


def _cell(config: dict, name: str, number: int, given: Set[str]) -> AdaptCell:
    data, seed = config["data"], config["seed"] + number
    own = {
        **config,
        "experiment": "finetune",
        "seed": seed,
        "data": {**data, "seed_draw": data["seed_draw"] + number},
        # A run is the same in every table that has it.
        "adapt": default_section("adapt"),
    }
    if name == SUPERVISED:
        # All labels of the target: what is drawn is drawn from the source.
        whole = {"per_class": 0, "train_fraction": 1.0, "seed_draw": data["seed_draw"]}
        own |= {"data": {**target_data(config), **whole}, "domain": default_section("domain")}
    else:
        own = runs.nested_config(own, {**runs.flat_config(own), **find_method(name).settings})
    found = resolved_config(own, given, f"{name}, seed {seed}")
    return AdaptCell(name, own["data"]["train_fraction"], *found)
