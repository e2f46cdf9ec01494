"""What is wrong with a set before anything is learned from it: copies across splits, and more.

That every file can be read, and that no patient is in two splits where patients are known, the
readers have seen to before.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from medtl_jax.data.catalog import MISSING, SPLITS, Dataset, Split
from medtl_jax.data.duplicates import (
    MOST_REGISTERED,
    Copy,
    equal_pixels,
    near_copies,
    searches_crops,
)
from medtl_jax.data.fingerprints import Prints, Whitening, describe, take_prints
from medtl_jax.data.images import Progress

VERSION = 1
"""Of what an audit looks for; a kept audit of another version is made anew."""

DEFAULT_LIMIT = 0.5
"""Share of the images of val or test with a copy in an earlier split from which training is
refused. Public sets have some: see experiments/results/audit.md."""

MOST_PAIRS_SHOWN = 100
# A border of one shade is worth a line from this part of the side on, in this part of the images.
_WIDE, _OFTEN = 0.05, 0.01
# Classes of so many images that differ by so much in it can be told apart by their borders.
_COUNTED, _DIFFERENCE = 20, 0.1
# Of 256 grey values: what the middle of the images should span at least, and its mean reach.
_LEAST_SPAN, _LEAST_MEAN = 96, 10
_DESCRIBED = 20_000
_CROPPED = 0.01  # of a side; less is how well it can be told


@dataclasses.dataclass(frozen=True)
class _Pair:
    first: str
    second: str
    copy: Copy
    conflict: bool


def audit_dataset(
    dataset: Dataset, progress: Progress | None = None, most_pairs: int = MOST_PAIRS_SHOWN
) -> dict[str, Any]:
    """Returns what was found, JSON-ready; the images are read a few at a time.

    Keys:
      version: `VERSION`.
      images: `{split: n}`.
      patients: whether they are known (then none is in two splits).
      copied: `{split: {"exact", "near", "share"}}` of val and test: images with the same pixels in
        an earlier split, others with a copy there that is mirrored, cropped, brightened or saved
        anew, and their share of the split together.
      repeated: `{split: n}`: images whose pixels were in the same split before.
      conflicts: copies whose labels differ.
      pairs: the first `most_pairs` copies, across splits first: `{"first": [split, id],
        "second": [split, id], "fit", "exact", "mirrored", "crop", "conflict"}`.
      pairs_found: how many there are.
      constant: ids of images of one shade, `MOST_PAIRS_SHOWN` at most.
      findings: a line of text for each thing that is wrong.
      notes: lines on what was not looked for, or need not be wrong.
    """
    names = [name for name in SPLITS if name in dataset.splits]
    prints = {name: take_prints(dataset.splits[name].images) for name in names}
    pairs, left = _pairs(dataset, names, prints, progress)
    copied = {name: _copied(name, pairs, len(prints[name].keys)) for name in names[1:]}
    within = [pair for pair in pairs if pair.first == pair.second]
    repeated = {name: sum(pair.first == name for pair in within) for name in names}
    constant = [
        str(dataset.splits[name].ids[row])
        for name in names
        for row in np.flatnonzero(prints[name].constant)
    ]
    conflicts = [pair for pair in pairs if pair.conflict]
    borders, bordered = _border_lines(dataset, prints)
    shown = sorted(pairs, key=lambda pair: (pair.first == pair.second, not pair.conflict))
    return {
        "version": VERSION,
        "images": {name: len(prints[name].keys) for name in names},
        "patients": all(split.patients is not None for split in dataset.splits.values()),
        "copied": copied,
        "repeated": repeated,
        "conflicts": len(conflicts),
        "pairs": [_pair_card(dataset, pair) for pair in shown[:most_pairs]],
        "pairs_found": len(pairs),
        "constant": constant[:MOST_PAIRS_SHOWN],
        "findings": [
            *_copy_lines(copied, repeated, len(conflicts)),
            *_constant_lines(constant),
            *_range_lines(prints),
            *borders,
        ],
        "notes": [*_notes(dataset, prints, left), *bordered],
    }


def highest_share(audit: Mapping[str, Any]) -> tuple[str, float]:
    """Returns the split with the greatest share of copies, and that share; ("", 0) without one."""
    shares = {name: found["share"] for name, found in audit["copied"].items()}
    worst = max(shares, key=shares.get, default="")
    return worst, shares.get(worst, 0.0)


def pair_cells(pair: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Returns of one of the `pairs` both images, how they are copies, and whether labels differ."""
    how = ["same pixels"] if pair["exact"] else [f"fit {pair['fit']:.3f}"]
    how += ["mirrored"] if pair["mirrored"] else []
    how += ["cropped"] if max(pair["crop"]) > _CROPPED else []
    one, two = (f"{split}: {name}" for split, name in (pair["first"], pair["second"]))
    return one, two, ", ".join(how), "labels differ" if pair["conflict"] else ""


def _pairs(
    dataset: Dataset,
    names: list[str],
    prints: Mapping[str, Prints],
    progress: Progress | None,
) -> tuple[list[_Pair], int]:
    """Returns the copies of each split in itself (equal pixels alone) and in each later one.

    With them comes the number of pairs that look alike and were not looked at closely.
    """
    whitening = _whitening(prints)
    pairs, unread = [], 0
    for first, second in itertools.combinations_with_replacement(names, 2):
        one, two = prints[first], prints[second]
        found = equal_pixels(one, two)
        if first != second:
            images = dataset.splits[first].images, dataset.splits[second].images
            near, left = near_copies((images[0], one), (images[1], two), whitening, progress)
            found, unread = found + near, unread + left
        for copy in found:
            differ = _labels_differ(
                dataset.spec.task, dataset.splits[first], dataset.splits[second], copy
            )
            pairs.append(_Pair(first, second, copy, differ))
    return pairs, unread


def _whitening(prints: Mapping[str, Prints]) -> Whitening:
    """Returns that of the whole set, of a large one by images spread over it."""
    thumbnails = np.concatenate([part.thumbnails for part in prints.values()])
    return Whitening.of(describe(thumbnails[:: 1 + len(thumbnails) // _DESCRIBED])[0])


def _labels_differ(task: str, first: Split, second: Split, copy: Copy) -> bool:
    """Returns whether known labels of two copies differ; masks only where the pixels are equal."""
    if task == "segment" and not copy.exact:
        return False
    one, two = np.asarray(first.target[copy.first]), np.asarray(second.target[copy.second])
    if task == "multilabel":
        known = (one != MISSING) & (two != MISSING)
        return bool((one != two)[known].any())
    if task == "regress":
        known = np.isfinite(one) & np.isfinite(two)
        return not np.allclose(one[known], two[known])
    return bool((one != two).any())


def _copied(name: str, pairs: list[_Pair], count: int) -> dict[str, float]:
    across = [pair.copy for pair in pairs if pair.second == name and pair.first != name]
    exact = {copy.second for copy in across if copy.exact}
    near = {copy.second for copy in across} - exact
    share = (len(exact) + len(near)) / count
    return {"exact": len(exact), "near": len(near), "share": round(share, 6)}


def _pair_card(dataset: Dataset, pair: _Pair) -> dict[str, Any]:
    copy = pair.copy
    return {
        "first": [pair.first, str(dataset.splits[pair.first].ids[copy.first])],
        "second": [pair.second, str(dataset.splits[pair.second].ids[copy.second])],
        "fit": copy.fit,
        "exact": copy.exact,
        "mirrored": copy.mirrored,
        "crop": list(copy.crop),
        "conflict": pair.conflict,
    }


def _copy_lines(copied: dict, repeated: dict, conflicts: int) -> Iterator[str]:
    for name, found in copied.items():
        if found["share"]:
            yield (
                f"{found['exact'] + found['near']} images of {name} ({found['share']:.2%}) have a "
                f"copy in an earlier split: {found['exact']} of the same pixels, {found['near']} "
                "mirrored, cropped, brightened or saved anew"
            )
    for name, count in repeated.items():
        if count:
            yield f"{count} images of {name} repeat the pixels of another one there"
    if conflicts:
        yield f"{conflicts} pairs of copies have different labels"


def _constant_lines(constant: list[str]) -> Iterator[str]:
    if constant:
        yield f"{len(constant)} images have one shade alone, first: {constant[0]}"


def _range_lines(prints: Mapping[str, Prints]) -> Iterator[str]:
    """Yields what keeps the set from the values 0..255 that the weights' mean and std are for."""
    lowest, highest, means = (
        np.concatenate([getattr(part, name)[~part.constant] for part in prints.values()])
        for name in ("lowest", "highest", "means")
    )
    if not len(means):
        return
    low, high = int(np.percentile(lowest, 1)), int(np.percentile(highest, 99))
    advice = "the weights expect all of it: see data.bit_depth and data.window"
    if high - low < _LEAST_SPAN:
        yield f"the pixels span {low}..{high} of 0..255, and {advice}"
    elif (middle := float(np.median(means))) < _LEAST_MEAN:
        yield f"half of the images are nearly black (mean below {middle:.1f} of 0..255): {advice}"


def _border_lines(dataset: Dataset, prints: Mapping[str, Prints]) -> tuple[list[str], list[str]]:
    """Returns findings, where a network could tell classes by their borders, and notes, where it
    could not, as of slices with air around the body.
    """
    wide = [(part.borders > _WIDE) & ~part.constant for part in prints.values()]
    every = np.concatenate(wide)
    if every.mean() < _OFTEN:
        return [], []
    line = (
        f"{every.mean():.0%} of the images have a border of one shade wider than {_WIDE:.0%} of "
        "their side"
    )
    if dataset.spec.task not in ("classify", "ordinal"):
        return [], [line]
    target = np.concatenate([np.asarray(dataset.splits[name].target) for name in prints])
    shares = {
        label: every[target == k].mean()
        for k, label in enumerate(dataset.spec.classes)
        if (target == k).sum() >= _COUNTED
    }
    if len(shares) < 2 or max(shares.values()) - min(shares.values()) < _DIFFERENCE:
        return [], [line]
    listed = ", ".join(f"{label} {share:.0%}" for label, share in shares.items())
    return [f"{line}, by class {listed}: a network can learn that instead"], []


def _notes(dataset: Dataset, prints: Mapping[str, Prints], left: int) -> list[str]:
    notes = []
    if any(split.patients is None for split in dataset.splits.values()):
        notes.append("patients are not known: two images of one patient may be in different splits")
    pairs = itertools.combinations(prints.values(), 2)
    if not all(searches_crops(len(one.keys), len(two.keys)) for one, two in pairs):
        notes.append("cropped copies were not searched for: there are too many pairs of images")
    if left:
        notes.append(
            f"{left} pairs of images that look alike were not compared closely, only the "
            f"{MOST_REGISTERED} most alike of two splits"
        )
    return notes
