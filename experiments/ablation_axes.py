"""The axes of an ablation: which settings are varied, read from `config.ablation.axes`.

    {"optim.high.lr": [0.001, 0.002],
      "augmentation": {"none": {"augment.shift": 0.0}, "xray": {"augment.preset": "xray"}},
     "ensemble": {"one": {}, "three": {"ensemble.members": 3}}}

An axis is a key of the config with a list of its values, or a name with its settings by their
labels, each of which sets any number of keys (none, `{}`: what the study has). `ensemble.members`
sets nothing in a run: it is how many of them a row fuses for each seed.
"""

import itertools
import json
import math
import reprlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from configs import default
from medtl_jax import runs
from medtl_jax.errors import UserError
from medtl_jax.files import is_text

KEY = "ablation.axes"
DESIGNS = ("grid", "one")
# What the ablation sets in each of its runs, or what all rows of one table are told by.
_OWN = ("experiment", "seed", "data.seed_draw", "train.select", "train.devices")
_OTHERS = ("ablation.", "paper.", "ladder.", "adapt.", "rank.", "find_lr.")
MEMBERS = "ensemble.members"
_ENSEMBLE, _MOST_MEMBERS = "ensemble.", 1000
_LONGEST_LABEL, _MOST_ROWS = 40, 1000
Settings = dict[str, Any]
Axes = dict[str, dict[str, Settings]]
Row = dict[str, str]
"""The label of every axis."""


def parse_axes(text: str) -> Axes:
    """The settings of each axis by their labels, of a text as in the module's docstring.

    Raises:
      UserError: no such text; a key that there is not or that may not be varied, a value of another
        type than the key's; two axes with the same key; a label or settings that are there twice.
    """
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{KEY} is no JSON ({error}); write it as in configs/ablation.py") from None
    if not isinstance(found, dict) or not found:
        raise UserError(f'{KEY}={text!r}: name one axis or more, as {{"optim.high.lr": [0.001]}}')
    for name in found:
        _check_label("an axis", name)
    axes = {name: _axis(name, values) for name, values in found.items()}
    whose: dict[str, str] = {}
    for name, labels in axes.items():
        for key in dict.fromkeys(key for settings in labels.values() for key in settings):
            if key in whose:
                raise UserError(f"{KEY}: the axes {whose[key]} and {name} both set {key}")
            whose[key] = name
    return axes


def rows_of(axes: Axes, design: str) -> list[Row]:
    """The rows of the table; the first is the reference, the first label of every axis.

    Args:
      axes: see `parse_axes`.
      design: `grid`, all combinations; `one`, those that differ from the reference on one axis.

    Raises:
      UserError: they are too many, or two have one name.
    """
    if design == "grid":
        if math.prod(map(len, axes.values())) > _MOST_ROWS:
            raise UserError(f"{KEY}: more than {_MOST_ROWS} rows; leave axes or values out")
        rows = [
            dict(zip(axes, labels, strict=True)) for labels in itertools.product(*axes.values())
        ]
    else:
        reference = {name: next(iter(labels)) for name, labels in axes.items()}
        rows = [reference]
        for name, labels in axes.items():
            rows += [{**reference, name: label} for label in list(labels)[1:]]
    names = set()
    for row in rows:
        name = row_name(row)
        if name in names:
            raise UserError(f"{KEY}: two rows would be called {name!r}: choose other labels")
        names.add(name)
    return rows


def settings_of(axes: Axes, row: Row) -> Settings:
    """The flat keys of the config that a row sets."""
    return {key: value for name, label in row.items() for key, value in axes[name][label].items()}


def row_name(row: Row) -> str:
    """A name for a row: `lr=0.001, augmentation=none`, keys by as much of them as tells them."""
    short = _short_names(list(row))
    return ", ".join(f"{short[name]}={label}" for name, label in row.items())


def _short_names(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        parts = name.split(".")
        tails = (".".join(parts[-size:]) for size in range(1, len(parts) + 1))
        found[name] = next(
            (t for t in tails if sum(f".{other}".endswith(f".{t}") for other in names) == 1), name
        )
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, _ in pairs if [name for name, _ in pairs].count(key) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no finite number")


def _check_label(what: str, label: str) -> None:
    if not is_text(label) or not 0 < len(label) <= _LONGEST_LABEL or not label.isprintable():
        raise UserError(
            f"{KEY}: {what}: {label!r} is no label of 1 to {_LONGEST_LABEL} printable letters"
        )


def _axis(name: str, values: Any) -> dict[str, Settings]:
    """The settings of one axis by their labels."""
    if isinstance(values, list):
        labelled = [(_label(value), {name: value}) for value in values]
    elif isinstance(values, dict):
        labelled = list(values.items())
    else:
        raise UserError(f"{KEY}: {name} wants a list of values, or settings by their labels")
    if len(labelled) < 2:
        raise UserError(f"{KEY}: {name} has {len(labelled)} settings; an axis wants two or more")
    found: dict[str, Settings] = {}
    for label, settings in labelled:
        _check_label(name, label)
        if label in found:
            raise UserError(f"{KEY}: {name}: {label} is there twice; leave one out")
        checked = _checked(f"{name}: {label}" if isinstance(values, dict) else name, settings)
        if checked in found.values():
            raise UserError(f"{KEY}: {name}: {label} sets the same as another; leave one out")
        found[label] = checked
    return found


def _label(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _checked(where: str, settings: Any) -> Settings:
    """Settings of known keys, with values of their types."""
    if not isinstance(settings, Mapping):
        raise UserError(f'{KEY}: {where} wants settings, as in {{"augment.preset": "xray"}}')
    usual = runs.flat_config(default.get_config().to_dict())
    found = {}
    for key, value in settings.items():
        if key in _OWN or key.startswith(_OTHERS):
            raise UserError(f"{KEY}: {where}: {key} cannot be varied; the study sets it for all")
        if key not in usual:
            raise UserError(f"{KEY}: {where}: there is no key {key}; configs/default.py has all")
        if key.startswith(_ENSEMBLE) and key != MEMBERS:
            raise UserError(
                f"{KEY}: {where}: {key} has no effect in an ablation, whose rows fuse members by "
                f"their mean; of the section only {MEMBERS} may be set"
            )
        kind = type(usual[key])
        # JSON writes 1 for the float 1.0.
        if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
            value = float(value)
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise UserError(
                f"{KEY}: {where}: {key}={reprlib.repr(value)} must be of the type of "
                f"{usual[key]!r}, and finite"
            )
        if key == MEMBERS and not 2 <= value <= _MOST_MEMBERS:
            raise UserError(
                f"{KEY}: {where}: {key}={value} must be at least 2 and at most {_MOST_MEMBERS}; a "
                "row that does not set it has one network for each seed"
            )
        found[key] = value
    return found
