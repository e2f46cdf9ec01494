"""Small sets in the forms that the readers take, and what a reader says of a wrong one."""

import numpy as np
import pytest
from PIL import Image

from medtl_jax.data.readers import load_dataset
from medtl_jax.errors import UserError

SPLITS = ("train", "val", "test")


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8), value, np.uint8)).save(path)


def folder_set(root, counts=(4, 2, 2), classes=("cyst", "normal"), splits=SPLITS):
    value = 0
    for split, count in zip(splits, counts, strict=True):
        for label in classes:
            for number in range(count):
                value += 1
                picture(root / split / label / f"{number}.png", value)
    return root


def refusal(config, image_size=4, **options):
    with pytest.raises(UserError) as caught:
        load_dataset(config, image_size, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


ROWS = [
    (f"{split}/{label}/{number}.png", split, label)
    for split, count in zip(SPLITS, (4, 2, 2), strict=True)
    for label in ("cyst", "normal")
    for number in range(count)
]


def csv_set(root, rows=ROWS, header=("path", "split", "label"), delimiter=",", encoding="utf-8"):
    folder_set(root)
    lines = [delimiter.join(map(str, row)) for row in (header, *rows)]
    (root / "list.csv").write_bytes(("\r\n".join(lines) + "\r\n\r\n").encode(encoding))
    return {"name": "csv", "dir": str(root / "list.csv")}


def arrays(shape=(5, 7), classes=2, count=6):
    rng = np.random.default_rng(1)
    made = {}
    for split in SPLITS:
        made[f"{split}_images"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        made[f"{split}_labels"] = (np.arange(count) % classes).astype(np.uint8)[:, None]
    return made


def npz_set(root, made, name="x.npz"):
    np.savez_compressed(root / name, **made)
    return {"name": "npz", "dir": str(root / name)}


def table(root, columns, count=6):
    """A csv of `count` images, half of them train; `columns`: {name: cells}."""
    splits = ["train"] * (count - count // 2) + ["val"] + ["test"] * (count // 2 - 1)
    lines = [",".join(("path", "split", *columns))]
    for number in range(count):
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(root / f"{number}.png")
        cells = [str(values[number]) for values in columns.values()]
        lines.append(",".join((f"{number}.png", splits[number], *cells)))
    (root / "list.csv").write_text("\n".join(lines))
    return {"name": "csv", "dir": str(root / "list.csv"), "csv_label_column": ",".join(columns)}
