"""What a repository of the model hub says of its weights: its config.json in timm's layout."""

import json
import pathlib

from medtl_jax.errors import UserError
from medtl_jax.models.inputs import InputSpec
from medtl_jax.weights.checks import shown

MAX_CONFIG_BYTES = 2**20
CONFIG, NO_CONFIG = "config.json", b"{}"

# Arguments of a timm model that leave what it computes from an image as it is.
_HARMLESS = frozenset({"num_classes", "in_chans", "drop_rate", "drop_path_rate"})
_BY_HAND = "download the file by hand and set model.weights to its path"


def config_path(weights: pathlib.Path) -> pathlib.Path:
    """Return where the repository's config.json is kept for the file `weights` from the hub.

    `NO_CONFIG` stands there for a repository without one. Files from elsewhere have none.
    """
    return weights.with_name(f"{weights.name}.hub.json")


def read_input(config: pathlib.Path, model_name: str, architecture: str | None) -> InputSpec:
    """Return what weights from the hub expect of an image, from the repository's config.json.

    timm's architectures share names and shapes of tensors but differ in padding, in epsilons and
    in normalisation, so a file may fit a model that computes something else with it.

    Args:
      config: a file at `config_path`.
      model_name: our name of the model, for the messages.
      architecture: timm's name of it; None where timm has none that is the same.

    Raises:
      UserError: not in timm's layout, another architecture, or arguments that change it.
    """
    content = _read(config)
    found, cfg = content.get("architecture"), content.get("pretrained_cfg")
    if not isinstance(found, str) or not isinstance(cfg, dict):
        raise UserError(
            "its repository has no config.json that names timm's architecture and pretrained_cfg, "
            f"so its normalisation is not known; {_BY_HAND}"
        )
    if found != architecture:
        ours = f"timm's {architecture}" if architecture else "no architecture of timm's"
        raise UserError(
            f"its repository's config.json says architecture {shown(found)}, but {model_name} is "
            f"{ours}; choose weights of the same network"
        )
    arguments = content.get("model_args", {})
    if not isinstance(arguments, dict):
        raise UserError(f"its repository's config.json has no valid model_args; {_BY_HAND}")
    pools = {section.get("global_pool", "avg") == "avg" for section in (content, arguments)}
    changing = sorted(arguments.keys() - _HARMLESS - {"global_pool"})
    if changing or pools != {True}:
        what = shown(", ".join(changing) or "global_pool")
        raise UserError(
            f"its repository's config.json changes the network by {what}, which {model_name} does "
            "not follow; choose weights of the plain network"
        )
    return _input(cfg)


def _read(config: pathlib.Path) -> dict:
    try:
        if config.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"more than {MAX_CONFIG_BYTES:,} bytes")
        content = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"its repository's config.json, kept as {config}, cannot be read "
            f"({type(error).__name__}); {_BY_HAND}"
        ) from None
    return content if isinstance(content, dict) else {}


def _input(cfg: dict) -> InputSpec:
    """timm counts an image's values from 0 to 1, we from 0 to 255."""
    mean, std = cfg.get("mean"), cfg.get("std")
    if not (_are_fractions(mean) and _are_fractions(std) and len(mean) == len(std) and min(std)):
        raise UserError(
            "its repository's config.json has no valid pretrained_cfg.mean and .std (lists of as "
            f"many numbers of 0..1, std above 0); {_BY_HAND}"
        )
    return InputSpec(*(tuple(255.0 * value for value in values) for values in (mean, std)))


def _are_fractions(values) -> bool:
    return (
        isinstance(values, list)
        and 1 <= len(values) <= 1024
        and all(type(value) in (int, float) and 0 <= value <= 1 for value in values)
    )
