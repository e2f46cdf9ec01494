"""The members of an ensemble: which there are, their configs, and what makes each what it is.

    ensemble.networks="efficientnet_lite0@128, googlenet@160, resnet18@112=WEIGHTS"
    ensemble.arrays='{"optim.high.lr": [0.001, 0.002, 0.004]}'

A network is its name, the image size behind @ and the weights behind =; what is not there is that
of the section `model`. Each has `ensemble.members` members, and an array one value for each.
"""

import dataclasses
import json
import reprlib
import sys
from collections.abc import Sequence, Set
from typing import Any

from configs import default
from experiments.ablation_cells import AblationCell
from experiments.cells import check_once, resolved_config
from experiments.settings import check_config, default_section
from medtl_jax import runs
from medtl_jax.errors import UserError

KEY, ARRAYS = "ensemble.networks", "ensemble.arrays"
# What members may differ in; all else is common to the table, or a part of the network.
_VARIED = ("optim.", "transfer.", "augment.", "train.", "model.dropout", "model.drop_path")
_COMMON = (
    "transfer.strategy",
    "transfer.source.",
    "transfer.cache",
    "augment.preset",
    "train.select",
    "train.devices",
    "train.program",
    "train.accumulate",
    "train.remat",
)


@dataclasses.dataclass(frozen=True)
class Network:
    """The architecture, the size of the images that it reads, and the weights it begins with."""

    name: str
    image_size: int
    weights: str

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.name}@{self.image_size}"


@dataclasses.dataclass(frozen=True)
class MemberCell(AblationCell):
    """One member; its `strategy` is its network, its `of_row` the values of its arrays."""

    kind = "network"
    listed = KEY

    @property
    def name(self) -> str:
        """Of its folder: of the same member in ensembles of whatever size."""
        return f"{self.resolved['model']['name']}-{super().name}"

    @property
    def draw(self) -> tuple[float, int, str]:
        """All members learn from one draw of the images."""
        return self.fraction, self.config["data"]["seed_draw"], self.place


def make_cells(config: dict, given: Set[str] = frozenset()) -> list[MemberCell]:
    """The members of an ensemble, by network and then seed, without their digests.

    A strategy may not set otherwise what an array sets, or what was `given` on the command line.

    Raises:
      UserError: `config.ensemble` is none; the config of a member cannot be used.
    """
    members = config["ensemble"]["members"]
    networks = parse_networks(config)
    if members * len(networks) < 2:
        raise UserError(
            f"ensemble.members={members}: an ensemble has two members or more; one network alone "
            "is trained with configs/finetune.py"
        )
    arrays = parse_arrays(config["ensemble"]["arrays"], members)
    cells = [
        _cell(config, network, settings, number, given)
        for network in networks
        for number, settings in enumerate(arrays)
    ]
    sizes = {network.image_size for network in networks}
    if len(sizes) > 1 and any(cell.resolved["task"] == "segment" for cell in cells):
        shown = ", ".join(map(str, sorted(sizes)))
        raise UserError(
            f"{KEY}: masks of different sizes ({shown} pixels) cannot be fused: give all networks "
            "of a segmentation one image size"
        )
    return cells


def parse_networks(config: dict) -> list[Network]:
    """The networks of `config.ensemble.networks`, that of `config.model` where it is empty.

    Raises:
      UserError: text that names none; two networks that tables could not tell apart.
    """
    model, text = config["model"], config["ensemble"]["networks"]
    usual = Network(model["name"], model["image_size"], model["weights"])
    if not text.strip():
        return [usual]
    found: list[Network] = []
    for part in text.split(","):
        network = _network(part.strip(), usual)
        if network.label in [other.label for other in found]:
            raise UserError(
                f"{KEY}: {network.label} is there twice: leave one out, or give it another image "
                "size"
            )
        found.append(network)
    return found


def _network(text: str, usual: Network) -> Network:
    head, named, weights = text.partition("=")
    name, sized, size = head.strip().partition("@")
    whole = size.isascii() and size.isdigit() and len(size) <= 6
    if not name.strip() or (sized and not whole) or (named and not weights.strip()):
        raise UserError(
            f"{KEY}: {text!r} is no network; write name, name@size, name=weights or "
            "name@size=weights, comma-separated"
        )
    return Network(
        name.strip(),
        int(size) if sized else usual.image_size,
        weights.strip() if named else usual.weights,
    )


def parse_arrays(text: str, members: int) -> list[dict[str, Any]]:
    """The flat keys of the config that each of so many members sets, in their order.

    Raises:
      UserError: no JSON of lists; a key that there is not or that members cannot differ in; a list
        of another length than there are members.
    """
    if not text.strip():
        return [{} for _ in range(members)]
    try:
        arrays = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f'{ARRAYS} is no JSON ({error}); write it as {{"optim.high.lr": [0.001, 0.002]}}'
        ) from None
    if not isinstance(arrays, dict) or not all(isinstance(v, list) for v in arrays.values()):
        raise UserError(f'{ARRAYS}: name keys with lists: {{"optim.high.lr": [0.001, 0.002]}}')
    usual = runs.flat_config(default.get_config().to_dict())
    for key, values in arrays.items():
        if key not in usual:
            raise UserError(f"{ARRAYS}: there is no key {key}; configs/default.py has them all")
        if not key.startswith(_VARIED) or key.startswith(_COMMON):
            raise UserError(
                f"{ARRAYS}: members cannot differ in {key}; rates, losses and augmentation they may"
            )
        if len(values) != members:
            raise UserError(
                f"{ARRAYS}: {key} has {len(values)} values, and ensemble.members={members}: give "
                "one for each member"
            )
    return [
        {key: _value(values[place], usual[key]) for key, values in arrays.items()}
        for place in range(members)
    ]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    check_once(ARRAYS, [key for key, _ in pairs])
    return dict(pairs)


def _value(value: Any, usual: Any) -> Any:
    """JSON writes 1 for the float 1.0."""
    if type(usual) is float and type(value) is int:
        if abs(value) > sys.float_info.max:
            raise UserError(f"{ARRAYS}: {reprlib.repr(value)} is larger than any float")
        return float(value)
    return value


def _cell(
    config: dict, network: Network, settings: dict[str, Any], number: int, given: Set[str]
) -> MemberCell:
    flat = {
        **runs.flat_config(config),
        **settings,
        "experiment": "finetune",
        "seed": config["seed"] + number,
        "model.name": network.name,
        "model.image_size": network.image_size,
        "model.weights": network.weights,
    }
    own = runs.nested_config(config, flat)
    # A member is the same in every ensemble that has it.
    own = {**own, "ensemble": default_section("ensemble")}
    title = f"{network.label}, seed {own['seed']}"
    check_config(own, f"{ARRAYS}: {title}")
    set_here = {*given, *settings} - {"experiment"}
    if network.weights != config["model"]["weights"]:
        set_here.add("model.weights")
    found = resolved_config(own, set_here, title)
    if found[1]["experiment"] != "finetune":
        raise UserError(
            f"transfer.strategy={config['transfer']['strategy']} has nothing that a seed changes: "
            "its members would all be the same; choose a strategy that trains by steps"
        )
    return MemberCell(network.label, own["data"]["train_fraction"], *found, of_row=settings)


def by_network(cells: Sequence[MemberCell]) -> dict[str, list[MemberCell]]:
    """The members of each network, by its label."""
    groups: dict[str, list[MemberCell]] = {}
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell)
    return groups
