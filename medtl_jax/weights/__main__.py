"""Looks into weights files, without training.

python -m medtl_jax.weights inspect FILE        format, SHA-256, metadata, every tensor
python -m medtl_jax.weights check MODEL FILE    what the model takes from it, and what it leaves
"""

import argparse
import sys
from collections.abc import Sequence

from medtl_jax.commands import Parser, printable, run_tool
from medtl_jax.console import Console
from medtl_jax.errors import UserError
from medtl_jax.files import user_path
from medtl_jax.models.registry import create_model, model_spec, variable_shapes
from medtl_jax.weights.files import read_weights
from medtl_jax.weights.pretrained import Pretrained, fill, for_channels, open_pretrained
from medtl_jax.weights.sources import find_weights

_METADATA_SHOWN = 200


def main(arguments: Sequence[str]) -> None:
    """Runs the command line `arguments` (without the program's name)."""
    options = _parser().parse_args(arguments)
    options.run(options)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m medtl_jax.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="inspect | check")
    inspecting = commands.add_parser("inspect", help="what a file holds")
    inspecting.add_argument("file", metavar="FILE", help=".pth, .safetensors, .h5 or .npz")
    inspecting.set_defaults(run=_inspect)
    checking = commands.add_parser("check", help="whether weights fit a model, and what is taken")
    checking.add_argument("model", metavar="MODEL", help="one of python -m medtl_jax.models")
    checking.add_argument("weights", metavar="FILE", help="as model.weights takes it")
    checking.add_argument(
        "--classes",
        type=int,
        metavar="N",
        help="with a new head for N classes, as in a training; else the file's own is checked too",
    )
    checking.add_argument(
        "--channels", type=int, metavar="C", help="of the images; else as many as in the file"
    )
    checking.add_argument(
        "--dont_load", default="", metavar="PATTERNS", help="as model.dont_load takes them"
    )
    checking.set_defaults(run=_check)
    return parser


def _inspect(options: argparse.Namespace) -> None:
    file = read_weights(user_path(options.file, "FILE"))
    print(f"file      {printable(str(file.path))}")
    print(f"format    {file.format}")
    print(f"sha256    {file.sha256}")
    for key, value in file.metadata.items():
        cut = f"... ({len(value):,} characters)" if len(value) > _METADATA_SHOWN else ""
        print(f"metadata  {printable(key)}: {printable(value[:_METADATA_SHOWN])}{cut}")
    values = sum(array.size for array in file.tensors.values())
    print(f"tensors   {len(file.tensors):,} with {values:,} values\n")
    rows = [("key", "shape", "dtype")]
    for key, array in file.tensors.items():
        rows.append((printable(key), str(list(array.shape)), str(array.dtype)))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for key, shape, dtype in rows:
        print(f"{key:{widths[0]}}  {shape:{widths[1]}}  {dtype}")


def _check(options: argparse.Namespace) -> None:
    spec, console = model_spec(options.model), Console()
    for name, least, most in (("classes", 1, 100_000), ("channels", 1, 1024)):
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name}={value} must be at least {least} and at most {most}")
    with console.progress("weights") as advance:
        path = find_weights(spec.name, options.weights, advance)
    weights = open_pretrained(spec, path)
    dont_load = [part.strip() for part in options.dont_load.split(",") if part.strip()]
    classes = options.classes
    if classes is None:
        bias = weights.flat.get(f"params/{spec.head}/bias")
        if bias is None or bias.ndim != 1:
            raise UserError(f"weights file {path}: no classifier; add --classes=N for a new one")
        classes = len(bias)
    else:
        dont_load.append(f"params/{spec.head}/.*")
    weights = for_channels(weights, options.channels or weights.input.channels)
    read = weights.input
    network, _ = create_model(spec.name, classes, in_chans=read.channels, offset=read.offset)
    shapes = variable_shapes(network, spec.smallest_input)
    if options.classes is None:
        _check_head(shapes, weights)
    _, report = fill(shapes, weights, dont_load=dont_load)
    console.note(str(report))


def _check_head(shapes: dict, weights: Pretrained) -> None:
    """UserError where the file's own classifier reads other features than the model has."""
    head = weights.spec.head
    kernel, wanted = weights.flat.get(f"params/{head}/kernel"), shapes["params"][head]["kernel"]
    # A kernel of another number of axes is for the merge to refuse.
    if kernel is not None and kernel.ndim == 2 and kernel.shape[0] != wanted.shape[0]:
        raise UserError(
            f"weights file {weights.file.path}: its classifier reads {kernel.shape[0]} features, "
            f"{weights.spec.name} has {wanted.shape[0]}; add --classes=N for a new one"
        )


if __name__ == "__main__":
    sys.exit(run_tool(main, sys.argv[1:]))
