"""Small runs on drawn digits, in this process: a LeNet at 28 pixels, without pictures."""

import contextlib
import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from medtl_jax import runs
from medtl_jax.augment.presets import TRANSFORMS
from medtl_jax.console import Console
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.weights.files import read_weights

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = {
    "model.name": "lenet5",
    "model.image_size": 28,
    "data.name": "npz",
    "data.batch_size": 16,
    "train.epochs": 2,
    "train.min_steps": 0,
    "eval.batch_size": 16,
    "eval.resamples": 20,
}
TIMINGS = ("seconds", "cpu_seconds", "images_per_second", "compile_seconds", "program")
# A display of seven segments: (first row, last row, first column, last column) of each, and which
# of them each digit lights.
SEGMENTS = (
    (4, 6, 8, 20),
    (4, 14, 18, 20),
    (14, 24, 18, 20),
    (22, 24, 8, 20),
    (14, 24, 8, 10),
    (4, 14, 8, 10),
    (13, 15, 8, 20),
)
LIT = (
    (0, 1, 2, 3, 4, 5),
    (1, 2),
    (0, 1, 6, 4, 3),
    (0, 1, 6, 2, 3),
    (5, 6, 1, 2),
    (0, 5, 6, 2, 3),
    (0, 5, 4, 3, 2, 6),
    (0, 1, 2),
    (0, 1, 2, 3, 4, 5, 6),
    (0, 1, 2, 3, 5, 6),
)


def digits(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey images `[count, 28, 28]` of shifted, noisy digits, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 60, (count, 28, 28))
    for image, label in zip(images, labels, strict=True):
        for segment in LIT[label]:
            top, bottom, left, right = SEGMENTS[segment]
            image[top:bottom, left:right] += 180
    shifts = rng.integers(-3, 4, (count, 2))
    moved = [np.roll(image, shift, (0, 1)) for image, shift in zip(images, shifts, strict=True)]
    return np.stack(moved).astype(np.uint8), labels.astype(np.uint8)


def write_digits(path: pathlib.Path, classes: int, seed: int) -> pathlib.Path:
    arrays = {}
    for i, (split, count) in enumerate((("train", 96), ("val", 30), ("test", 30))):
        images, labels = digits(count, classes, 10 * seed + i)
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    np.savez(path, **arrays)
    return path


class Notes(Console):
    """A console that remembers."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def note(self, text):
        self.lines.append(text)


def make_request(folder: pathlib.Path, data: pathlib.Path, weights, **settings):
    """What launch.py would make of the settings; `a__b` sets `a.b`.

    Runs on one device, augments nothing unless it is told to, and draws no pictures; what it
    caches lies beside `data`.
    """
    from configs import default
    from experiments import extract, finetune, strategies, traditional
    from experiments.settings import check_ranges
    from experiments.study import Request

    given = {key.replace("__", "."): value for key, value in settings.items()}
    given |= {"model.weights": str(weights)} if weights else {}
    usual = default.get_config().to_dict()
    flat = runs.flat_config(usual)
    still = {f"augment.{name}": 0.0 for name in TRANSFORMS}
    keys = {**SETTINGS, **still, "data.dir": str(data), "train.devices": 1, **given}
    keys = {"transfer.cache_dir": str(data.parent / "cache"), **keys}
    assert keys.keys() <= flat.keys(), keys.keys() - flat.keys()
    config = strategies.expand(runs.nested_config(usual, {**flat, **keys}), given.keys())
    check_ranges(config)
    modules = {"finetune": finetune, "extract": extract, "traditional": traditional}
    experiment = modules[config["experiment"]]
    config = experiment.resolve(config, given.keys())
    return Request(config, folder, "python launch.py", Notes(), brief=True)


def run(folder: pathlib.Path, data: pathlib.Path, weights, **settings) -> pathlib.Path:
    """The folder of a finished run of these settings."""
    from experiments import extract, finetune, traditional

    request = make_request(folder, data, weights, **settings)
    modules = {"finetune": finetune, "extract": extract, "traditional": traditional}
    modules[request.config["experiment"]].run(request)
    return folder


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return read_weights(folder / runs.WEIGHTS).tensors


def initial(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a run before its training, by the names of `tensors`."""
    return checkpoint(folder, "initial", 0)


def best(folder: pathlib.Path, epoch: int) -> dict[str, np.ndarray]:
    """The tensors that were kept of an epoch."""
    return checkpoint(folder, "best", epoch)


def checkpoint(folder: pathlib.Path, kind: str, step: int) -> dict[str, np.ndarray]:
    restored = ocp.StandardCheckpointer().restore(
        (folder / "checkpoints" / kind / str(step) / "tree").absolute()
    )
    return {name: np.asarray(leaf) for name, leaf in restored.items()}


def history(folder: pathlib.Path) -> list[dict]:
    """The epochs of a run without what it took."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in TIMINGS}
        for line in lines
    ]


def scores(folder: pathlib.Path) -> np.ndarray:
    with np.load(folder / "predictions.npz") as found:
        return found["test_score"]


@contextlib.contextmanager
def small_process():
    """This process as launch.py has it."""
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.syspath_prepend(ROOT)
        yield


@contextlib.contextmanager
def stopped_at(epoch: int):
    """Training is interrupted where it would save the epoch, from 1."""
    save = Checkpoints.save

    def interrupted(self, number, *content):
        if number == epoch:
            raise KeyboardInterrupt
        save(self, number, *content)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", interrupted)
        yield
