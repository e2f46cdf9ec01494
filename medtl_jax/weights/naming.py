"""Names and layouts of pretrained weights: a table for each family, source key -> Linen path.

To add a family, write its table as a function that returns `Naming` and put it in `FAMILIES`.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from medtl_jax.errors import UserError

_FIRST_UNKNOWN = 6


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array of the source becomes one of Linen: its axes by name, and the change."""

    axes: str
    change: Callable[[np.ndarray], np.ndarray]


VECTOR = Layout("C", lambda x: x)
# A depthwise kernel [c, 1, k, k] becomes [k, k, 1, c] by the same transpose.
CONV = Layout("OIHW", lambda x: x.transpose(2, 3, 1, 0))
DENSE = Layout("OI", lambda x: x.transpose(1, 0))


@dataclasses.dataclass(frozen=True)
class Naming:
    """The table of one model.

    Attributes:
      targets: source key -> (flat Linen name, layout).
      ignored: source keys that have no place in Linen.
    """

    targets: dict[str, tuple[str, Layout]]
    ignored: frozenset[str]


def to_linen(model_name: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return `tensors` under Linen's names and in Linen's layout, flat.

    Keys start with `params/` or `batch_stats/`. Convolution kernels are `[h, w, in, out]`
    (depthwise `[h, w, 1, c]`), dense kernels `[in, out]`; dtypes stay. Which of the model's
    names are absent is for `merge_weights` to say.

    Raises:
      UserError: no table for `model_name`, a key that the table does not know, or a tensor
        with another number of axes than its layer needs.
    """
    if model_name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"no weight names are known for the model {model_name!r}; known: {known}")
    naming = FAMILIES[model_name]()
    unknown = sorted(tensors.keys() - naming.targets.keys() - naming.ignored)
    if unknown:
        listed = ", ".join(unknown[:_FIRST_UNKNOWN])
        more = f" and {len(unknown) - _FIRST_UNKNOWN} more" if len(unknown) > _FIRST_UNKNOWN else ""
        raise UserError(
            f"weights for {model_name} have {len(unknown)} unknown keys: {listed}{more}; "
            f"use a file made for {model_name}"
        )
    flat = {}
    for source, array in tensors.items():
        if source in naming.ignored:
            continue
        target, layout = naming.targets[source]
        if array.ndim != len(layout.axes):
            raise UserError(
                f"weights for {model_name}: {source} has shape {list(array.shape)}, "
                f"expected {len(layout.axes)} axes ({layout.axes})"
            )
        flat[target] = np.ascontiguousarray(layout.change(array))
    return flat


class _Table:
    """Collects the rows of a torch model's table, layer by layer."""

    def __init__(self) -> None:
        self.targets: dict[str, tuple[str, Layout]] = {}
        self.ignored: set[str] = set()

    def conv(self, source: str, target: str) -> None:
        self.targets[f"{source}.weight"] = (f"params/{target}/kernel", CONV)

    def norm(self, source: str, target: str) -> None:
        self.targets[f"{source}.weight"] = (f"params/{target}/scale", VECTOR)
        self.targets[f"{source}.bias"] = (f"params/{target}/bias", VECTOR)
        self.targets[f"{source}.running_mean"] = (f"batch_stats/{target}/mean", VECTOR)
        self.targets[f"{source}.running_var"] = (f"batch_stats/{target}/var", VECTOR)
        # Torch counts its updates for a momentum of None, which no model here uses.
        self.ignored.add(f"{source}.num_batches_tracked")

    def conv_norm(self, conv: str, norm: str, target: str) -> None:
        self.conv(conv, f"{target}/conv")
        self.norm(norm, f"{target}/norm")

    def dense(self, source: str, target: str) -> None:
        self.targets[f"{source}.weight"] = (f"params/{target}/kernel", DENSE)
        self.targets[f"{source}.bias"] = (f"params/{target}/bias", VECTOR)

    def done(self) -> Naming:
        return Naming(self.targets, frozenset(self.ignored))


def _efficientnet_lite(repeats: tuple[int, ...]) -> Naming:
    """EfficientNet-Lite as in the package efficientnet-lite-pytorch; blocks counted through."""
    table = _Table()
    table.conv_norm("_conv_stem", "_bn0", "stem")
    index = 0
    for stage, blocks in enumerate(repeats, start=1):
        for block in range(1, blocks + 1):
            source, target = f"_blocks.{index}", f"stage{stage}/block{block}"
            # The first stage has expansion ratio 1: no expanding convolution.
            if stage > 1:
                table.conv_norm(f"{source}._expand_conv", f"{source}._bn0", f"{target}/expand")
            table.conv_norm(f"{source}._depthwise_conv", f"{source}._bn1", f"{target}/depthwise")
            table.conv_norm(f"{source}._project_conv", f"{source}._bn2", f"{target}/project")
            index += 1
    table.conv_norm("_conv_head", "_bn1", "features")
    table.dense("_fc", "head")
    return table.done()


FAMILIES: dict[str, Callable[[], Naming]] = {
    "efficientnet_lite0": lambda: _efficientnet_lite((1, 2, 2, 3, 3, 4, 1)),
}
