"""Names and layouts of pretrained weights: one table for each model and each way of writing it.

A table is made by a function of `tables.py`; to add a family, write its table there.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from medtl_jax.errors import UserError
from medtl_jax.models.inputs import InputSpec

_FIRST_UNKNOWN = 6


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array of the source becomes one of Linen: its axes by name, and the change."""

    axes: str
    change: Callable[[np.ndarray], np.ndarray]


VECTOR = Layout("C", lambda x: x)
# torch and Caffe. A depthwise kernel [c, 1, k, k] becomes [k, k, 1, c] by the same transpose.
CONV_OIHW = Layout("OIHW", lambda x: x.transpose(2, 3, 1, 0))
DENSE_OI = Layout("OI", lambda x: x.transpose(1, 0))
# Keras and Linen agree.
CONV_HWIO = Layout("HWIO", lambda x: x)
DENSE_IO = Layout("IO", lambda x: x)


def bgr(layout: Layout) -> Layout:
    """`layout` of a first convolution over blue, green, red, turned to red, green, blue."""
    return Layout(layout.axes, lambda x: layout.change(x)[:, :, ::-1])


def flattened(channels: int, side: int) -> Layout:
    """`[o, c * h * w]` of a layer over a flattened `[c, h, w]` map -> `[h * w * c, o]`."""

    def change(x):
        if x.shape[1] != channels * side * side:
            return x.transpose(1, 0)  # its shape is then refused by the merge
        maps = x.reshape(-1, channels, side, side)
        return maps.transpose(2, 3, 1, 0).reshape(-1, len(x))

    return Layout("OI", change)


@dataclasses.dataclass(frozen=True)
class Naming:
    """One way of writing the weights of one model.

    Attributes:
      scheme: who writes them so: `"torchvision"`, `"timm"`, `"keras"`, ...
      input: what such weights expect of an image.
      targets: source key -> (flat Linen name, layout).
      ignored: source keys that have no place in Linen.
      rename: applied to the keys of a file first.
    """

    scheme: str
    input: InputSpec
    targets: Mapping[str, tuple[str, Layout]]
    ignored: frozenset[str] = frozenset()
    rename: Callable[[str], str] = str

    def known(self, key: str) -> bool:
        """Whether the table has a place for a key of a file, or ignores it."""
        key = self.rename(key)
        return key in self.targets or key in self.ignored


def choose_naming(model_name: str, namings: tuple[Naming, ...], keys: list[str]) -> Naming:
    """The naming that knows the most of `keys`.

    Raises:
      UserError: there is none, or a key that the best one does not know.
    """
    if not namings:
        raise UserError(
            f"no names of others' weights are known for the model {model_name!r}: it loads the "
            "weights.safetensors of a run of its own"
        )
    best = max(namings, key=lambda naming: sum(map(naming.known, keys)))
    unknown = sorted(key for key in keys if not best.known(key))
    if unknown:
        listed = ", ".join(unknown[:_FIRST_UNKNOWN])
        more = f" and {len(unknown) - _FIRST_UNKNOWN} more" if len(unknown) > _FIRST_UNKNOWN else ""
        schemes = ", ".join(naming.scheme for naming in namings)
        raise UserError(
            f"{len(unknown)} of {len(keys)} keys are unknown for {model_name} (as written by "
            f"{schemes}): {listed}{more}; use a file made for {model_name}"
        )
    return best


def to_linen(naming: Naming, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return `tensors` under Linen's names and in Linen's layout, flat.

    Keys start with `params/` or `batch_stats/`. Convolution kernels are `[h, w, in, out]`
    (depthwise `[h, w, 1, c]`), dense kernels `[in, out]`; dtypes stay. Which of the model's
    names are absent is for `merge_weights` to say.

    Raises:
      UserError: a tensor with another number of axes than its layer needs, or two keys for one
        place.
    """
    flat: dict[str, np.ndarray] = {}
    for source, array in tensors.items():
        key = naming.rename(source)
        if key in naming.ignored:
            continue
        target, layout = naming.targets[key]
        if array.ndim != len(layout.axes):
            raise UserError(
                f"{source} has shape {list(array.shape)}, expected {len(layout.axes)} axes "
                f"({layout.axes})"
            )
        if target in flat:
            raise UserError(f"two tensors for {target}, the second is {source}")
        flat[target] = np.ascontiguousarray(layout.change(array))
    return flat
