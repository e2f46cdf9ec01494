"""Writes data sets in another form, and looks for what is wrong with them.

python -m medtl_jax.data export KIND OUT --size=PIXELS [--task=TASK] KEY=VALUE ...
python -m medtl_jax.data audit [DIR] [--size=PIXELS] [--limit=SHARE] [--task=TASK] [KEY=VALUE ...]

KIND is folder, npz, csv or tfds; OUT the new folder or file. KEY=VALUE are keys of config.data
that say which set is read; DIR is a folder of splits and classes, a csv or an .npz file:

python -m medtl_jax.data export tfds sets/breast --size=64 name=medmnist/breastmnist dir=downloads
python -m medtl_jax.data audit images patient_pattern='(person[0-9]+)_'

The audit lists copies across splits and the other things that `data.audit` looks for. Its exit code
is 1 where more than --limit of the images of val or test have a copy in an earlier split, or
patients are in two splits; else 0, also where there is less to tell, and 2 after a mistake.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from medtl_jax.commands import Parser, printable, run_tool
from medtl_jax.console import Console
from medtl_jax.data.audit import DEFAULT_LIMIT, audit_dataset, highest_share, pair_cells
from medtl_jax.data.catalog import SPLITS, TASKS
from medtl_jax.data.csvlist import SharedPatientsError
from medtl_jax.data.export import KINDS, export_dataset
from medtl_jax.data.readers import load_dataset
from medtl_jax.errors import UserError
from medtl_jax.files import user_path

_COLUMNS = ("path", "split", "label", "mask", "patient")
_FORMATS = ("path", "mask", "mask2")
_TYPES: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("name", "dir", "classes", "phantom.domain"), str),
    **dict.fromkeys(("csv_where", "window", "plane"), str),
    **dict.fromkeys(("dicom_patient", "patient_pattern"), str),
    **{f"csv_{name}_column": str for name in _COLUMNS},
    **{f"csv_{name}_format": str for name in _FORMATS},
    **dict.fromkeys(("per_class", "seed_draw", "folds", "fold", "seed_split"), int),
    **dict.fromkeys(("bit_depth", "slices"), int),
    **dict.fromkeys((f"phantom.{split}" for split in SPLITS), int),
    **dict.fromkeys(("train_fraction", "val_fraction", "test_fraction", "cache_gb"), float),
}


def main(arguments: Sequence[str]) -> None:
    """Runs the command line `arguments` (without the program's name).

    Raises:
      UserError: a mistake in the arguments or in the set.
      SystemExit: with code 1, where an audit finds too many copies, or patients in two splits.
    """
    options = _parser().parse_args(arguments)
    options.run(options)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m medtl_jax.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="export | audit")
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
    auditing = commands.add_parser("audit", help="copies across splits, label conflicts, ranges")
    auditing.add_argument(
        "settings", metavar="DIR | KEY=VALUE", nargs="+", help="of config.data, or where the set is"
    )
    auditing.add_argument(
        "--size", type=int, default=128, metavar="PIXELS", help="side of the images; 128"
    )
    auditing.add_argument(
        "--limit",
        type=float,
        default=DEFAULT_LIMIT,
        metavar="SHARE",
        help=f"of val or test with copies in an earlier split; {DEFAULT_LIMIT:g}",
    )
    auditing.add_argument(
        "--task", default="", choices=("", *TASKS), help="as config.task; else as the data say"
    )
    auditing.set_defaults(run=_audit)
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


def _audit(options: argparse.Namespace) -> None:
    if not 0 <= options.limit <= 1:
        raise UserError(f"--limit={options.limit:g} must be from 0 to 1")
    config, console = _read_settings(_with_kind(options.settings)), Console()
    try:
        with console.progress("reading") as advance:
            dataset = load_dataset(config, options.size, advance, task=options.task)
    except SharedPatientsError as error:
        console.note("\n".join(["patients in more than one split:", *error.patients]))
        console.note(f"{len(error.patients)} patients are in more than one split")
        _fail()
    with console.progress("auditing") as advance:
        audit = audit_dataset(dataset, advance, most_pairs=sys.maxsize)
    for line in _audit_lines(audit):
        console.note(line)
    worst, share = highest_share(audit)
    if share > options.limit:
        console.note(f"above the limit: {share:.2%} of {worst}, --limit={options.limit:g}")
        _fail()


def _fail() -> NoReturn:
    sys.stdout.flush()  # Here, where a closed pipe is still `run_tool`'s to answer.
    raise SystemExit(1)


def _with_kind(settings: Sequence[str]) -> list[str]:
    """Returns the settings with those that a bare DIR stands for."""
    first, rest = settings[0], list(settings[1:])
    if "=" in first and not Path(first).exists():
        return [first, *rest]
    kind = {".csv": "csv", ".npz": "npz"}.get(Path(first).suffix.lower(), "folder")
    return [f"name={kind}", f"dir={first}", *rest]


def _audit_lines(audit: Mapping[str, Any]) -> Iterator[str]:
    counts = ", ".join(f"{name} {count}" for name, count in audit["images"].items())
    yield f"{'images':10}{counts}: all could be read"
    if audit["patients"]:
        yield f"{'patients':10}known, none in two splits"
    for pair in audit["pairs"]:
        yield "  ".join((f"{'copy':8}", *pair_cells(pair)))
    yield from (f"{'note':10}{line}" for line in audit["notes"])
    yield from (f"{'finding':10}{line}" for line in audit["findings"])
    if not audit["findings"]:
        yield "nothing found"


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
