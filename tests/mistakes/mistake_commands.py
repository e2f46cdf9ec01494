"""Commands that must be refused, and what they must leave as it was."""

import pathlib

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUDY = f"--config={ROOT / 'configs' / 'finetune.py'}"
# The smallest run that would train: whatever is refused is refused for the mistake alone.
TINY = (
    "--config.model.image_size=32",
    "--config.data.phantom.train=16",
    "--config.data.phantom.val=8",
    "--config.data.phantom.test=8",
    "--config.data.batch_size=8",
    "--config.eval.batch_size=8",
)


class TrainingBegan(Exception):
    """Raised where the first step would be built."""


def the_one_line(error: str) -> str:
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1, error
    return error.removeprefix("error: ").rstrip()


def snapshot(folder: pathlib.Path) -> dict[str, bytes | None]:
    """Every path below `folder`, hidden ones too, with the content of the files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def set_keys(**values) -> list[str]:
    """`--config.a.b=value` for each `a__b=value`."""
    return [f"--config.{key.replace('__', '.')}={value}" for key, value in values.items()]


def class_folders(root: pathlib.Path, classes=("cyst", "normal")) -> pathlib.Path:
    for split in ("train", "val", "test"):
        for label in classes:
            (root / split / label).mkdir(parents=True)
            for number in range(2):
                grey = np.random.default_rng(number).integers(0, 256, (40, 40), np.uint8)
                Image.fromarray(grey).save(root / split / label / f"{number}.jpg", quality=95)
    return root


def folder_keys(root: pathlib.Path) -> list[str]:
    return set_keys(data__name="folder", data__dir=root)
