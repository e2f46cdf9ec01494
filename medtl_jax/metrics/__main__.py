"""Looks for mistakes in tables of results.

python -m medtl_jax.metrics check TABLE.csv     cells that no experiment can have given, and why
"""

import argparse
import sys
from collections.abc import Sequence

from medtl_jax.commands import Parser, printable, run_tool
from medtl_jax.errors import UserError
from medtl_jax.files import user_path
from medtl_jax.metrics.table_cells import NAMES
from medtl_jax.metrics.table_check import Finding, check_table

_HELP = """\
The first line of TABLE names the columns, every further line is a row. A printed number stands for
all that round to it; a flagged cell is impossible for every one of them. Cells may be 0.91, 91%,
0.91 ± 0.02 or 0.91 (0.88-0.93). Columns without % are read as fractions of 1 where most of their
numbers are at most 1, else as percent. A cell that is impossible only if the number is of one run,
or of one class, is flagged where that is known (--runs, --binary) and makes a note elsewhere.
Numbers of a row are taken to be averaged alike: over the same cases, classes, folds or runs, and as
means, not medians. Empty cells, - and n/a hold nothing.

Exit code: 0 nothing is flagged, 1 a cell is flagged, 2 the table could not be read.

Columns (macro, weighted, train, val, lower, upper may stand beside the name):
"""


def main(arguments: Sequence[str]) -> None:
    """Runs the command line `arguments` (without the program's name).

    Raises:
      SystemExit: with code 1, where a cell is flagged.
    """
    options = _parser().parse_args(arguments)
    options.run(options)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m medtl_jax.metrics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="check")
    columns = (f"  {metric:18} {', '.join(names)}" for metric, names in NAMES.items())
    checking = commands.add_parser(
        "check",
        help="impossible cells of a result table",
        description="Flags the cells of a result table that no experiment can have given.",
        epilog=_HELP + "\n".join(columns),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    checking.add_argument("table", metavar="TABLE.csv", help="commas, semicolons or tabs")
    checking.add_argument(
        "--binary",
        action="store_true",
        help="each row is about one positive class on one test set; known without it where a row "
        "has positives or the prevalence",
    )
    checking.add_argument(
        "--runs",
        type=int,
        metavar="N",
        help="each number is the mean of N runs on the whole test set, 1 for a single run; a "
        "column `runs` goes before it",
    )
    checking.set_defaults(run=_check)
    return parser


def _check(options: argparse.Namespace) -> None:
    if options.runs is not None and not 1 <= options.runs <= 10**6:
        raise UserError(f"--runs={options.runs} must be from 1 to 1000000")
    report = check_table(
        user_path(options.table, "TABLE.csv"), binary=options.binary, runs=options.runs
    )
    for line in (*map(_line, report.findings), *report.notes):
        print(printable(line))
    print(f"{len(report.findings)} of {report.cells} numbers flagged")
    if report.findings:
        sys.stdout.flush()  # Here, where a closed pipe is still `run_tool`'s to answer.
        raise SystemExit(1)


def _line(finding: Finding) -> str:
    reasons = "; ".join(finding.reasons)
    return f"{finding.row}, {finding.column} = {finding.text}: {reasons}"


if __name__ == "__main__":
    sys.exit(run_tool(main, sys.argv[1:]))
