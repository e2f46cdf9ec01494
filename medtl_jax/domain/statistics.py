"""Variables of a network with batch statistics of each domain's own, made and taken apart.

Domain-specific batch norm (Chang et al. 2019) is a network with `domains=2`: domain 0 has its
statistics where a plain network has them, domain 1 beside them, see `models.norms.BatchNorm`.
What reads, saves or evaluates a plain network is given `of_domain(variables, index)`.

AdaBN (Li et al. 2016) needs no second set: it is `training.reestimate.make_reestimate` over
`norm_stages(variables)`, with images of the target in place of those of the training. Each norm
then has the mean and the variance of these images, without their labels, and all else stays as
it is. The same gives a domain exact statistics: `of_domain`, re-estimated, and `with_domain`.
"""

from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from medtl_jax.errors import UserError
from medtl_jax.models.norms import domain_key

Variables = Mapping[str, Any]
# Path of a leaf, from the collection on.
Path = tuple[str, ...]

_PARTS = {"params": ("scale", "bias"), "batch_stats": ("mean", "var")}


def norm_stages(variables: Variables, method: str) -> tuple[str, ...]:
    """The stages that have batch norms. UserError, with `method` named, where none has."""
    if not variables["batch_stats"]:
        raise UserError(
            f"{method} adapts the statistics of batch norms, and this network has none: choose a "
            "model with batch norms, or another method"
        )
    return tuple(variables["batch_stats"])


def split_domains(variables: Variables, domains: int = 2, affine: bool = False) -> dict[str, Any]:
    """`variables` of a plain network as those of the same network with `domains`.

    Each further domain begins with the statistics that are there, pretrained or not. Its leaves
    are the same arrays: copy them before a step that takes over the buffers of its state.

    Args:
      variables: `{"params", "batch_stats"}`.
      domains: at least 2.
      affine: for a network with `domain_affine`: so it does with the norms' scale and bias.

    Raises:
      UserError: the network has no batch norms.
      ValueError: fewer domains than 2, or `variables` have domains already.
    """
    norm_stages(variables, "domain-specific batch norm")
    flat = _flat(variables)
    norms = _norms(flat)
    if domains < 2 or any(_is_own(path, norms) for path in flat):
        raise ValueError(f"domains={domains}: want 2 or more, of the variables of a plain network")
    kinds = ("params", "batch_stats") if affine else ("batch_stats",)
    for index in range(1, domains):
        for kind in kinds:
            for norm in norms:
                for name in _PARTS[kind]:
                    flat[kind, *norm, domain_key(index), name] = flat[kind, *norm, name]
    return _nested(variables, flat)


def of_domain(variables: Variables, index: int) -> dict[str, Any]:
    """What domain `index` of a network uses, as the variables of a plain one.

    Of a plain network domain 0 is all there is. ValueError for a domain that is not there.
    """
    flat = _flat(variables)
    return _nested(variables, {path: flat[own] for path, own in _paths(flat, index).items()})


def with_domain(variables: Variables, index: int, plain: Variables) -> dict[str, Any]:
    """`variables` with what `of_domain(variables, index)` gives replaced by `plain`.

    What the domains share is replaced for all of them. ValueError for a domain that is not there.
    """
    flat, values = _flat(variables), _flat(plain)
    own = {own: values[path] for path, own in _paths(flat, index).items()}
    return _nested(variables, flat | own)


def _flat(variables: Variables) -> dict[Path, Any]:
    return flatten_dict({kind: variables[kind] for kind in _PARTS})


def _nested(variables: Variables, flat: Mapping[Path, Any]) -> dict[str, Any]:
    """`variables` with its two collections from the leaves `flat`."""
    return {**variables, **{kind: {} for kind in _PARTS}, **unflatten_dict(flat)}


def _norms(flat: Mapping[Path, Any]) -> list[Path]:
    """The paths of the batch norms, without the collection."""
    found = {path[1:-1] for path in flat if path[0] == "batch_stats" and path[-1] == "var"}
    return sorted(path for path in found if path[:-1] not in found)


def _is_own(path: Path, norms: list[Path]) -> bool:
    """Whether the leaf belongs to one of the domains from 1 on."""
    return path[1:-2] in norms


def _paths(flat: Mapping[Path, Any], index: int) -> dict[Path, Path]:
    """The path of each leaf of a plain network -> that of what domain `index` has for it."""
    norms, key = _norms(flat), domain_key(index)
    if index and not all(("batch_stats", *norm, key, "var") in flat for norm in norms or [()]):
        raise ValueError(f"domain {index}: the variables have no statistics of it")
    paths = {}
    for path in flat:
        own = (*path[:-1], key, path[-1])
        if not _is_own(path, norms):
            paths[path] = own if index and own in flat else path
    return paths
