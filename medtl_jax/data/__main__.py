"""Writes data sets in another form.

python -m medtl_jax.data export KIND OUT --size=PIXELS [--task=TASK] KEY=VALUE ...

KIND is folder, npz, csv or tfds; OUT the new folder or file. KEY=VALUE are keys of config.data
that say which set is read:

python -m medtl_jax.data export tfds sets/breast --size=64 name=medmnist/breastmnist dir=downloads
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from medtl_jax.commands import Parser, printable, run_tool
from medtl_jax.console import Console
from medtl_jax.data.catalog import SPLITS, TASKS
from medtl_jax.data.export import KINDS, export_dataset
from medtl_jax.data.readers import load_dataset
from medtl_jax.errors import UserError
from medtl_jax.files import user_path

_COLUMNS = ("path", "split", "label", "mask", "patient")
_FORMATS = ("path", "mask", "mask2")
_TYPES: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("name", "dir", "classes", "phantom.domain"), str),
    **dict.fromkeys(("csv_where", "window", "plane", "dicom_patient"), str),
    **{f"csv_{name}_column": str for name in _COLUMNS},
    **{f"csv_{name}_format": str for name in _FORMATS},
    **dict.fromkeys(("per_class", "seed_draw", "folds", "fold", "seed_split"), int),
    **dict.fromkeys(("bit_depth", "slices"), int),
    **dict.fromkeys((f"phantom.{split}" for split in SPLITS), int),
    **dict.fromkeys(("train_fraction", "val_fraction", "test_fraction", "cache_gb"), float),
}


def main(arguments: Sequence[str]) -> None:
    """Runs the command line `arguments` (without the program's name)."""
    options = _parser().parse_args(arguments)
    options.run(options)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m medtl_jax.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="export")
    exporting = commands.add_parser("export", help="write a set as folders, npz, csv or TFDS")
    exporting.add_argument("kind", metavar="KIND", choices=KINDS, help=", ".join(KINDS))
    exporting.add_argument("out", metavar="OUT", help="what is written; may not exist yet")
    exporting.add_argument(
        "settings", metavar="KEY=VALUE", nargs="+", help="of config.data: name=..., dir=..., ..."
    )
    exporting.add_argument(
        "--size", type=int, required=True, metavar="PIXELS", help="side of the images"
    )
    exporting.add_argument(
        "--task", default="", choices=("", *TASKS), help="as config.task; else as the data say"
    )
    exporting.set_defaults(run=_export)
    return parser


def _export(options: argparse.Namespace) -> None:
    config, console = _read_settings(options.settings), Console()
    out = user_path(options.out, "OUT")
    with console.progress("reading") as advance:
        dataset = load_dataset(config, options.size, advance, task=options.task)
    with console.progress("writing") as advance:
        written = export_dataset(dataset, options.kind, out, advance)
    for note in (*dataset.spec.notes, *written.notes):
        console.note(f"note      {note}")
    counts = ", ".join(f"{name} {len(split)}" for name, split in dataset.splits.items())
    console.note(f"written   {printable(str(written.path))}: {counts}")
    flags = (f"--config.{key}={shlex.quote(value)}" for key, value in written.config.items())
    console.note(f"read it   {' '.join(flags)}")


def _read_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Returns the section `data` of a configuration from texts like "name=csv"."""
    config: dict[str, Any] = {}
    for text in settings:
        key, found, value = text.partition("=")
        if not found or key not in _TYPES:
            raise UserError(f"'{text}' is no KEY=VALUE of config.data; keys: {', '.join(_TYPES)}")
        try:
            read = _TYPES[key](value)
        except ValueError:
            kind = "an integer" if _TYPES[key] is int else "a number"
            raise UserError(f"{key}={value} must be {kind}") from None
        if key.startswith("phantom."):
            config.setdefault("phantom", {})[key.removeprefix("phantom.")] = read
        else:
            config[key] = read
    return config


if __name__ == "__main__":
    sys.exit(run_tool(main, sys.argv[1:]))
