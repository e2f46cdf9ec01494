"""The runs of a ladder: which there are, and their configs."""

from collections.abc import Mapping, Set
from typing import Any

from experiments.cells import (
    Cell,
    check_different,
    check_once,
    listed,
    resolved_config,
)
from experiments.settings import default_section, unused_by_probe
from experiments.strategies import find_strategy
from medtl_jax.errors import UserError
from medtl_jax.report.ladder import percent

_STRATEGIES, _FRACTIONS = "ladder.strategies", "ladder.fractions"


class LadderCell(Cell):
    """One run of a ladder, named by strategy, per cent of the labels, seed."""

    listed = _STRATEGIES

    @property
    def group(self) -> str:
        """Strategy and per cent of the labels."""
        return f"{self.strategy}-{percent(self.fraction)}"

    @property
    def sets(self) -> Mapping[str, Any]:
        """The flat keys of the config that its strategy sets."""
        return find_strategy(self.strategy).settings

    @property
    def of_others(self) -> list[str]:
        """The settings of a training by steps are for the other strategies."""
        by_steps = self.resolved["experiment"] not in ("extract", "traditional")
        return [] if by_steps else unused_by_probe(self.resolved)

    def words(self, text: str) -> str:
        """What it says, with the settings by which a ladder has it set them."""
        return text.replace("data.train_fraction", _FRACTIONS)


def make_cells(config: dict, given: Set[str] = frozenset()) -> list[LadderCell]:
    """The runs of a ladder: by fraction, the smallest first, then strategy, then seed.

    Raises:
      UserError: `config.ladder` is none; a run's config cannot be used.
    """
    strategies, fractions = _plan(config)
    if config["data"]["per_class"] and fractions[0] < 1:
        raise UserError(
            f"ladder.fractions={config['ladder']['fractions']} and data.per_class="
            f"{config['data']['per_class']} both draw training images: set ladder.fractions=1 or "
            "data.per_class=0"
        )
    cells = []
    for fraction in fractions:
        for strategy in strategies:
            for number in range(config["ladder"]["seeds"]):
                cells.append(_cell(config, strategy, fraction, number, given))
    return cells


def _plan(config: dict) -> tuple[list[str], list[float]]:
    """Strategies and growing fractions of `config.ladder`."""
    strategies, words = (listed(config, key) for key in (_STRATEGIES, _FRACTIONS))
    settings = {name: find_strategy(name, _STRATEGIES).settings for name in strategies}
    check_different(_STRATEGIES, settings)
    reference = config["ladder"]["reference"]
    if reference not in strategies:
        raise UserError(
            f"ladder.reference={reference!r} is not among ladder.strategies="
            f"{','.join(strategies)}: name one of them"
        )
    fractions = []
    for word in words:
        try:
            fraction = float(word)
        except ValueError:
            raise UserError(f"ladder.fractions: {word!r} is not a number") from None
        if not 0 < fraction <= 1:
            raise UserError(f"ladder.fractions: {word} must be more than 0 and at most 1")
        fractions.append(fraction)
    # Folders are named by it.
    check_once(_FRACTIONS, [f"{percent(fraction)}%" for fraction in fractions])
    return strategies, sorted(fractions)


def _cell(config: dict, strategy: str, fraction: float, number: int, given: Set[str]) -> LadderCell:
    data, seed = config["data"], config["seed"] + number
    draw = {"train_fraction": fraction, "seed_draw": data["seed_draw"] + number}
    own = {
        **config,
        "experiment": "finetune",
        "seed": seed,
        "data": {**data, **draw},
        "transfer": {**config["transfer"], "strategy": strategy},
        # A run is the same in every ladder that has it.
        "ladder": default_section("ladder"),
    }
    name = f"{strategy} at {percent(fraction)}%, seed {seed}"
    return LadderCell(strategy, fraction, *resolved_config(own, given, name))
