"""A strict merge of pretrained weights into a model's variables, with a report."""

import dataclasses
import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from medtl_jax.errors import UserError
from medtl_jax.models.inputs import InputSpec

_SHOWN_PER_KIND = 4
_SHOWN_IN_REPORT = 8

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What a merge did; `str()` of it is up to six lines for the user.

    Attributes:
      loaded: flat name -> shape of what came from the file.
      kept: flat name -> shape of what `dont_load` left at the model's own init.
      skipped: flat name -> shape of what `dont_load` left in the file.
      source: name of the weights file, `""` where there was none.
      sha256: of the weights file, hex, `""` where there was none.
      scheme: whose names the file uses, `""` where there was none.
      input: what the weights, adapted if they were, expect of an image; None where unknown.
      input_origin: who says so, `""` where nobody does.
      adapted: what was changed to fit the model, in words.
    """

    loaded: Shapes
    kept: Shapes
    skipped: Shapes
    source: str = ""
    sha256: str = ""
    scheme: str = ""
    input: InputSpec | None = None
    input_origin: str = ""
    adapted: tuple[str, ...] = ()

    @property
    def loaded_values(self) -> int:
        """Number of scalars that came from the file, batch statistics included."""
        return sum(map(math.prod, self.loaded.values()))

    @property
    def kept_values(self) -> int:
        """Number of scalars left at the model's own init."""
        return sum(map(math.prod, self.kept.values()))

    def __str__(self) -> str:
        origin = f" from {self.source}" if self.source else ""
        names = f", names of {self.scheme}" if self.scheme else ""
        digest = f" (sha256 {self.sha256[:8]}...{names})" if self.sha256 else ""
        lines = [f"loaded {self.loaded_values:,} values in {len(self.loaded)} tensors"]
        lines[0] += origin + digest
        if self.input:
            mean, std = _numbers(self.input.mean), _numbers(self.input.std)
            line = f"input: (x - mean) / std, x in 0..255, mean {mean}, std {std}"
            lines.append(line + (f", {self.input_origin}" if self.input_origin else ""))
        lines += [f"adapted: {words}" for words in self.adapted]
        if self.kept:
            lines.append(f"kept own init ({self.kept_values:,} values): {_sizes(self.kept)}")
        if self.skipped:
            lines.append(f"not taken from the file: {_sizes(self.skipped)}")
        return "\n".join(lines)


def merge_weights(
    variables,
    loaded: dict[str, np.ndarray],
    *,
    dont_load: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> tuple[dict, MergeReport]:
    """Return `variables` with the weights of `loaded` in them, and a report.

    The tree structure stays. A loaded leaf is a jax array of the model's dtype; a leaf under
    `dont_load` is the one of `variables`, untouched.

    Args:
      variables: `{"params": ..., "batch_stats": ...}` of Linen's `init`; leaves are numpy or
        jax arrays or `jax.ShapeDtypeStruct`.
      loaded: flat, as from `to_linen`: `"params/stem/conv/kernel"` -> array.
      dont_load: regular expressions, each matched against whole flat names
        (`"params/head/.*"`). They excuse a name from everything that is checked.
      optional: parts of the network (`"aux1"`) that may be absent altogether, from the file or
        from the model; they are then treated as `dont_load`.

    Raises:
      UserError: names of the model that the file lacks, names of the file that the model
        lacks, shapes or kinds of dtype that differ, values that are not finite or do not
        survive the model's dtype (all listed in one line); a pattern that is no regular
        expression or matches nothing; patterns that leave nothing to load.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(variables)
    model = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    excused = _excused(dont_load, [*model, *(name for name in loaded if name not in model)])
    excused |= _absent_parts(optional, model, loaded)
    wanted = [name for name in model if name not in excused]
    if not wanted:
        raise UserError("dont_load leaves nothing to load: set model.weights to none instead")
    problems = {
        "missing from the file": [n + _size(model[n].shape) for n in wanted if n not in loaded],
        "not in the model": [
            n + _size(loaded[n].shape) for n in loaded if n not in model and n not in excused
        ],
    }
    merged = dict(model)
    for name in wanted:
        if name in loaded:
            kind, text, value = _convert(name, loaded[name], model[name])
            if kind:
                problems.setdefault(kind, []).append(text)
            else:
                merged[name] = value
    _raise_problems(problems)
    report = MergeReport(
        loaded={n: tuple(model[n].shape) for n in wanted},
        kept={n: tuple(model[n].shape) for n in model if n in excused},
        skipped={n: tuple(loaded[n].shape) for n in loaded if n in excused},
    )
    return jax.tree_util.tree_unflatten(structure, merged.values()), report


def _excused(dont_load: Sequence[str], names: list[str]) -> set[str]:
    """The names that some pattern matches in full."""
    if isinstance(dont_load, str):
        raise UserError(f"dont_load must be a list of patterns, got the text {dont_load!r}")
    excused: set[str] = set()
    for pattern in dont_load:
        try:
            matched = {name for name in names if re.fullmatch(pattern, name)}
        except re.error as error:
            raise UserError(f"dont_load {pattern!r} is no regular expression: {error}") from error
        if not matched:
            raise UserError(
                f"dont_load {pattern!r} matches no name of the model or the file; "
                f"names look like {min(names, default='params/head/kernel')}"
            )
        excused |= matched
    return excused


def _absent_parts(optional: Sequence[str], model, loaded) -> set[str]:
    """The names of the optional parts that the model or the file does not have at all."""
    absent: set[str] = set()
    for part in optional:
        ours, theirs = (
            {name for name in names if name.split("/")[1:2] == [part]} for names in (model, loaded)
        )
        if not ours or not theirs:
            absent |= ours | theirs
    return absent


def _convert(name: str, array: np.ndarray, leaf) -> tuple[str, str, jax.Array | None]:
    """`(kind of problem, its text, None)`, or `("", "", the array in the leaf's dtype)`."""
    # Without x64, jax itself would narrow a 64-bit leaf: check against what it will hold.
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if tuple(array.shape) != tuple(leaf.shape):
        text = f"{name}: file{_size(array.shape)}, model{_size(leaf.shape)}"
        return "of another shape", text, None
    if _kind(array.dtype) != _kind(dtype):
        return "of another dtype", f"{name}: file {array.dtype}, model {dtype}", None
    if not np.isfinite(array).all():
        return "with NaN or infinite values", name, None
    with np.errstate(over="ignore"):
        value = array.astype(dtype)
    exact_or_float = _kind(dtype) == "float" or bool((value == array).all())
    if not (np.isfinite(value).all() and exact_or_float):
        text = f"{name}: file {array.dtype}, model {dtype}"
        return "with values outside the model's dtype", text, None
    return "", "", jnp.asarray(value)


def _kind(dtype) -> str:
    for kind, abstract in (("float", jnp.floating), ("int", jnp.integer), ("bool", jnp.bool_)):
        if jnp.issubdtype(dtype, abstract):
            return kind
    return str(dtype)


def _raise_problems(problems: dict[str, list[str]]) -> None:
    parts = []
    for kind, texts in problems.items():
        if texts:
            more = ", ..." if len(texts) > _SHOWN_PER_KIND else ""
            parts.append(f"{len(texts)} {kind} ({'; '.join(texts[:_SHOWN_PER_KIND])}{more})")
    if parts:
        raise UserError(
            f"the weights do not fit the model: {', '.join(parts)}; choose weights of the same "
            "model, or name what shall keep the model's own init in dont_load"
        )


def _numbers(values: tuple[float, ...]) -> str:
    """One number for equal values, else the first few."""
    distinct = values[:1] if len(set(values)) == 1 else values
    more = " ..." if len(distinct) > _SHOWN_PER_KIND else ""
    return " ".join(f"{value:.6g}" for value in distinct[:_SHOWN_PER_KIND]) + more


def _sizes(shapes: Shapes) -> str:
    shown = [name + _size(shape) for name, shape in list(shapes.items())[:_SHOWN_IN_REPORT]]
    rest = len(shapes) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def _size(shape) -> str:
    return f" {list(shape)}"
