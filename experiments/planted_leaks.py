"""Leaks planted into a copy of a folder of X-rays, and how many of them the audit finds.

    python -m experiments.planted_leaks DIR [--count=100] [--seed=0] [--size=128] \\
        [--patients=REGEX]

DIR holds train, val and test with class folders; it is not changed. Of each kind `count` images of
val and test get a copy in train: the same file, saved anew as JPEG, mirrored, brightened, cropped,
or all of these at once. With `--patients` as many images more are moved from val and test to train
whose patient stays behind. A false alarm is an image of val or test that has no planted copy and is
said to have one; those that DIR itself holds count as such. Beside the audit stands what a
perceptual hash of 64 signs finds at a Hamming distance of 10.
"""

import argparse
import io
import re
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.fft import dctn
from scipy.stats import binomtest

from medtl_jax.commands import Parser, run_tool
from medtl_jax.data import audit
from medtl_jax.data.catalog import Dataset
from medtl_jax.data.csvlist import SharedPatientsError
from medtl_jax.data.fingerprints import to_luma
from medtl_jax.data.readers import load_dataset
from medtl_jax.errors import UserError

PREFIX = "planted-"
_SUFFIXES = (".jpeg", ".jpg", ".png")
_HAMMING = 10

Edit = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _brighten(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    gain, offset = rng.uniform(0.7, 1.3), rng.uniform(-30, 30)
    return np.clip(pixels * gain + offset, 0, 255).astype(np.uint8)


def _crop(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = pixels.shape[:2]
    top, bottom, left, right = rng.uniform(0, 0.1, 4)
    rows = slice(round(top * height), height - round(bottom * height))
    return pixels[rows, round(left * width) : width - round(right * width)]


def _all_of_it(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _brighten(_crop(pixels, rng), rng)[:, ::-1]


EDITS: dict[str, Edit] = {
    "saved anew": lambda pixels, rng: pixels,
    "mirrored": lambda pixels, rng: pixels[:, ::-1],
    "brightened": _brighten,
    "cropped": _crop,
    "all of these": _all_of_it,
}
KINDS = ("same file", *EDITS)


def plant(folder: Path, count: int, seed: int) -> dict[str, str]:
    """Writes copies of images of val and test into train; returns their ids by those of the copies.

    The name of a copy says its number; `count` are made of each of `KINDS`, in this order. JPEG
    qualities are 30 to 95, crops up to a tenth of each side, gains 0.7 to 1.3 with offsets to 30.
    """
    rng = np.random.default_rng(seed)
    images = _later_images(folder)
    if len(images) < count * len(KINDS):
        raise UserError(f"{folder}: val and test have {len(images)} images; lower --count")
    chosen = rng.permutation(len(images))[: count * len(KINDS)]
    planted = {}
    for number, row in enumerate(chosen):
        path, kind = images[row], KINDS[number // count]
        copy = folder / "train" / path.parent.name / f"{PREFIX}{number:05d}{path.suffix}"
        if kind == "same file":
            shutil.copyfile(path, copy)
        else:
            pixels = EDITS[kind](np.asarray(Image.open(path).convert("L")), rng)
            encoded = io.BytesIO()
            quality = int(rng.integers(30, 96))
            Image.fromarray(np.ascontiguousarray(pixels)).save(encoded, "JPEG", quality=quality)
            copy.write_bytes(encoded.getvalue())
        planted[copy.relative_to(folder).as_posix()] = path.relative_to(folder).as_posix()
    return planted


def move_patients(folder: Path, pattern: str, count: int, seed: int) -> set[str]:
    """Moves an image of each of `count` patients of val and test to train; returns the patients."""
    by_patient = defaultdict(list)
    for path in _later_images(folder):
        found = re.search(pattern, path.name)
        if found is None:
            raise UserError(f"--patients={pattern!r} finds nothing in {path.name}")
        by_patient[found[1]].append(path)
    several = sorted(name for name, paths in by_patient.items() if len(paths) > 1)
    if len(several) < count:
        raise UserError(f"{folder}: {len(several)} patients have several images; lower --count")
    chosen = np.random.default_rng(seed).choice(several, count, replace=False).tolist()
    for name in chosen:
        path = by_patient[name][0]
        path.rename(folder / "train" / path.parent.name / path.name)
    return set(chosen)


def _later_images(folder: Path) -> list[Path]:
    return sorted(
        path
        for split in ("val", "test")
        for path in (folder / split).glob("*/*")
        if path.suffix.lower() in _SUFFIXES
    )


def hashed_pairs(dataset: Dataset) -> Iterator[tuple[str, str]]:
    """Yields the ids of an image of train and one of val or test whose hashes are near."""
    train = dataset.splits["train"]
    signs = _signs(train.images)
    for name in ("val", "test"):
        later = dataset.splits[name]
        # Of 64 signs of -1 and 1, the product is 64 less twice the number of those that differ.
        alike = _signs(later.images) @ signs.T >= 64 - 2 * _HAMMING
        for row, column in np.argwhere(alike):
            yield str(train.ids[column]), str(later.ids[row])


def _signs(images: np.ndarray) -> np.ndarray:
    """Returns float32 `[n, 64]` of -1 and 1: pHash, the lowest frequencies against their median."""
    small = [
        np.asarray(Image.fromarray(np.rint(image).astype(np.uint8)).resize((32, 32)))
        for image in to_luma(images)
    ]
    low = dctn(np.stack(small).astype(np.float32), axes=(1, 2))[:, :8, :8].reshape(-1, 64)
    return np.where(low > np.median(low[:, 1:], axis=1, keepdims=True), 1, -1).astype(np.float32)


def main(arguments: Sequence[str]) -> None:
    """Runs the command line `arguments` (without the program's name)."""
    options = _parser().parse_args(arguments)
    source = Path(options.dir)
    if not source.is_dir():
        raise UserError(f"{source} is not a folder")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "set")
        shutil.copytree(source, folder, copy_function=shutil.copyfile)
        _writable(folder)
        planted = plant(folder, options.count, options.seed)
        started, worked = time.perf_counter(), time.process_time()
        dataset = load_dataset({"name": "folder", "dir": str(folder)}, options.size)
        read = time.perf_counter() - started
        found = audit.audit_dataset(dataset, most_pairs=sys.maxsize)
        spent = time.perf_counter() - started, time.process_time() - worked
        print(
            f"{sum(found['images'].values())} images: {spent[0]:.1f} s in all (reading {read:.1f}"
            f"), {spent[1]:.1f} s of the processor"
        )
        pairs = [(pair["first"], pair["second"]) for pair in found["pairs"]]
        across = {(one[1], two[1]) for one, two in pairs if one[0] == "train" != two[0]}
        _say("audit", planted, across, dataset, options.count)
        _say("pHash", planted, set(hashed_pairs(dataset)), dataset, options.count)
        for path in planted:
            (folder / path).unlink()
        if options.patients:
            _say_patients(folder, options)


def _writable(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _say(
    name: str,
    planted: dict[str, str],
    across: set[tuple[str, str]],
    dataset: Dataset,
    count: int,
) -> None:
    hits = [(copy, image) in across for copy, image in planted.items()]
    for number, kind in enumerate(KINDS):
        part = hits[number * count : (number + 1) * count]
        print(f"{name:8}{kind:14}{_share(sum(part), len(part))}")
    print(f"{name:8}{'all planted':14}{_share(sum(hits), len(hits))}")
    clean = {
        str(image)
        for split in ("val", "test")
        for image in dataset.splits[split].ids
        if str(image) not in set(planted.values())
    }
    false = {image for copy, image in across if image in clean}
    print(f"{name:8}{'false alarms':14}{_share(len(false), len(clean))}")
    for copy, image in sorted(across):
        if image in clean and name == "audit":
            print(f"        {copy}  {image}")


def _say_patients(folder: Path, options: argparse.Namespace) -> None:
    moved = move_patients(folder, options.patients, options.count, options.seed)
    config = {"name": "folder", "dir": str(folder), "patient_pattern": options.patients}
    named: set[str] = set()
    try:
        load_dataset(config, options.size)
    except SharedPatientsError as error:
        named = set(error.patients)
    print(f"{'audit':8}{'same patient':14}{_share(len(moved & named), len(moved))}")
    print(f"{'audit':8}{'other patients named':22}{len(named - moved)}")


def _share(hits: int, total: int) -> str:
    interval = binomtest(hits, total).proportion_ci(method="wilson")
    return f"{hits}/{total} = {hits / total:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def _parser() -> Parser:
    parser = Parser(
        prog="python -m experiments.planted_leaks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dir", metavar="DIR", help="folder of splits and classes")
    parser.add_argument("--count", type=int, default=100, help="planted of each kind; 100")
    parser.add_argument("--seed", type=int, default=0, help="0")
    parser.add_argument("--size", type=int, default=128, help="side of the images; 128")
    parser.add_argument("--patients", default="", help="finds the patient in a file's name")
    return parser


if __name__ == "__main__":
    sys.exit(run_tool(main, sys.argv[1:]))
