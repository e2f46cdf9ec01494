"""Runs one experiment: python launch.py --config=configs/finetune.py [--config.key=value ...]

Prepares the process (flags, compilation cache, run folder's name) and hands over to
`experiments.<config.experiment>.run`. A mistake of the user's is one line and exit code 2.

A study may take an argument, behind a colon: --config=configs/recipes/bone_age.py:SETS calls its
get_config("SETS"). Keys are set after that, as for any study.

One run over several hosts, or several processes of one: the same command for each, with
--coordinator=HOST:PORT --processes=N --process=I, or with --distributed where jax knows of the
others. They share the run folder. No single run of an ablation or of an ensemble is divided: each
process trains some of the runs, also where it is given none of these flags.

SIGTERM ends a training at its next step, which is saved, and anything else at once, with exit code
143; the same command continues. Several processes are ended by it in a training alone. Where an
epoch is one program (on a GPU or TPU, and of a head) the last epoch is what is saved, and so it is
of members of one program.
"""

import contextlib
import difflib
import importlib
import inspect
import math
import pathlib
import re
import runpy
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from medtl_jax.commands import report_mistake
from medtl_jax.console import Console
from medtl_jax.errors import UserError
from medtl_jax.process import (
    CONTINUES,
    PREEMPTED,
    Preempted,
    is_writer,
    keep_freed_memory,
    prepare_xla,
    sharers,
    sharing,
    termination,
)

EXPERIMENTS = (
    "finetune",
    "extract",
    "traditional",
    "ladder",
    "adapt",
    "ablation",
    "paper_tables",
    "ensemble",
    "rank",
    "find_lr",
    "evaluate",
    "predict",
    "export",
)

# Several processes train different runs of these, each of which is the work of one.
_OF_SHARED_RUNS = ("ablation", "paper_tables", "ensemble")

WAIT = 300.0
LONGEST_WAIT = 24 * 3600

# What Python's converters say of a value, in plainer words.
_PLAINER = {
    "invalid literal for int() with base 10": "not a whole number",
    "could not convert string to float": "not a number",
}


def run_command(argv: Sequence[str]) -> int:
    """The exit code of the command line `argv` (program name first): 0, 2, 130 or 143.

    A `UserError` becomes one line on stderr and 2, Ctrl-C 130, SIGTERM 143. May be called again and
    again in one process: its flags are not absl's global ones. Where the process is one of several,
    a failure of any ends it.
    """
    # The libraries' own progress messages would bury ours.
    logging.set_verbosity(logging.WARNING)
    try:
        options, settings = _parse_options(list(argv))
        if options.help:
            print(f"{__doc__}{options.get_help()}\n\nThe keys of the config: configs/default.py")
            return 0
        with _process(options, settings):
            config, given = _apply_settings(_load_study(options.config), settings)
            _run_experiment(config, given, options.workdir, argv)
    except (UserError, OSError, KeyboardInterrupt, Preempted) as error:
        return _report(error)
    return 0


def _report(error: BaseException) -> int:
    """The exit code after `error`, of which stderr tells."""
    if isinstance(error, UserError | OSError):
        return report_mistake(error)
    if isinstance(error, Preempted):
        print(CONTINUES, file=sys.stderr)
        return PREEMPTED
    if isinstance(error, KeyboardInterrupt):
        print("interrupted; the same command continues or repeats the run", file=sys.stderr)
        return 130
    traceback.print_exception(error)
    return 1


@contextlib.contextmanager
def _process(options: flags.FlagValues, settings: list[str]) -> Iterator[None]:
    """The process made ready to compute, alone or with others."""
    where = _meeting(options)
    keep_freed_memory()
    prepare_xla()
    apart = where is not None and _has_shared_runs(options, settings)
    if where is None or apart:
        with sharing(where[1] if apart else 1), termination.listening():
            yield
        return
    # After the first import of jax has been prepared.
    from medtl_jax.distributed import Meeting, joined, spans

    with joined(Meeting(*where), _report), contextlib.ExitStack() as stack:
        # Of several processes SIGTERM is jax's: they agree on the step to stop at.
        if not spans():
            stack.enter_context(termination.listening())
        yield


def _has_shared_runs(options: flags.FlagValues, settings: list[str]) -> bool:
    """Whether the command is for a study whose runs several processes share without meeting.

    UserError for `--distributed`, which says neither how many they are nor which devices are whose
    before they have met.
    """
    try:
        config, _ = _apply_settings(_load_study(options.config), settings)
    except UserError:
        return False  # told once they have met, to all of them
    name = config["experiment"]
    if name in _OF_SHARED_RUNS and options.distributed:
        raise UserError(
            f"--distributed makes one program of the processes, and experiment={name} is shared by "
            "processes of their own: give each the same command with the same --workdir, without "
            "--distributed, and devices that no other one has"
        )
    if name in _OF_SHARED_RUNS and options.wait is not None:
        raise UserError(
            f"--wait is for processes that meet, and those of experiment={name} do not; leave it "
            "out"
        )
    return name in _OF_SHARED_RUNS


def _meeting(options: flags.FlagValues) -> tuple | None:
    """The values of a `distributed.Meeting`; None for a process of its own."""
    named = {name: options[name].value for name in ("coordinator", "processes", "process")}
    missing = [f"--{name}" for name, value in named.items() if value is None]
    wait = options.wait
    if wait is not None and not 0 < wait <= LONGEST_WAIT:
        raise UserError(f"--wait={wait:g} must be more than 0 and at most {LONGEST_WAIT} seconds")
    if options.distributed:
        if len(missing) < len(named):
            raise UserError(
                "--distributed finds by itself what --coordinator, --processes and "
                "--process say: leave out one or the other"
            )
        return "", None, None, wait or WAIT
    if len(missing) == len(named):
        if wait is not None:
            raise UserError("--wait is for --coordinator or --distributed; leave it out")
        return None
    if missing:
        raise UserError(
            f"{', '.join(missing)} missing: --coordinator=HOST:PORT, --processes=N and "
            "--process=I (from 0) belong together"
        )
    found = re.fullmatch(r".+:([0-9]{1,5})", options.coordinator)
    if not found or not 1 <= int(found[1]) <= 65535:
        raise UserError(
            f"--coordinator={options.coordinator} is not HOST:PORT, as in host0:8476, with a port "
            "from 1 to 65535"
        )
    if not 0 <= options.process < options.processes:
        raise UserError(
            f"--process={options.process} of --processes={options.processes}: they are numbered "
            "from 0"
        )
    return options.coordinator, options.processes, options.process, wait or WAIT


def _parse_options(argv: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """The flags `config`, `workdir`, `help`, and the rest of `argv` (the settings)."""
    options = flags.FlagValues()
    options.set_gnu_getopt()  # flags may follow `--config.key value`
    flags.DEFINE_string(
        "config",
        None,
        "The study, a file of configs/; FILE.py:ARGUMENT for one that takes an argument.",
        flag_values=options,
    )
    flags.DEFINE_string(
        "workdir",
        "",
        "Run folder; by default runs/<experiment>-<hash of the config>.",
        flag_values=options,
    )
    for define, name, what in (
        (flags.DEFINE_string, "coordinator", "host:port of process 0 of several."),
        (flags.DEFINE_integer, "processes", "How many processes run this command as one."),
        (flags.DEFINE_integer, "process", "Which of them this one is, from 0."),
        (flags.DEFINE_float, "wait", f"Seconds until all must have arrived; {WAIT:g} by default."),
    ):
        define(name, None, what, flag_values=options)
    flags.DEFINE_boolean(
        "distributed",
        False,
        "One of several processes, found by jax: TPU pod, SLURM, Open MPI, Kubernetes.",
        flag_values=options,
    )
    flags.DEFINE_boolean("help", False, "Prints this text.", flag_values=options)
    try:
        rest = options(argv, known_only=True)
    except flags.Error as error:
        raise UserError(str(error).removeprefix("ERROR:: ")) from error
    if not options.config and not options.help:
        raise UserError("--config is missing; try --config=configs/finetune.py")
    return options, rest


def _load_study(given: str) -> ConfigDict:
    """What `get_config` of a Python file returns; UserError where that fails.

    `given` is the file's path, or `FILE.py:ARGUMENT` for `get_config(ARGUMENT)`.
    """
    path, argument = _split_argument(given)
    if not pathlib.Path(path).is_file():
        raise UserError(f"--config={given}: no such file; try --config=configs/finetune.py")
    try:
        names = runpy.run_path(path)
        config = _call_study(names["get_config"], argument) if "get_config" in names else None
    except UserError as error:
        raise UserError(f"--config={given}: {error}") from error
    # A study is a program: it can fail in any way, and the line is what its author needs.
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        where = f", line {lines[-1]}" if lines else ""
        raise UserError(f"--config={given}{where}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={given} must define get_config(), which returns a ConfigDict")
    from experiments.settings import check_config

    check_config(config.to_dict(), f"--config={given}")
    return config


def _split_argument(given: str) -> tuple[str, str | None]:
    """The path and the argument of `FILE.py:ARGUMENT`; None where there is no argument."""
    found = re.fullmatch(r"(.*?\.py):(.*)", given, re.DOTALL)
    if not found or pathlib.Path(given).is_file():
        return given, None
    return found[1], found[2]


def _call_study(get_config: Callable[..., Any], argument: str | None) -> Any:
    """`get_config()`, or `get_config(argument)`; UserError where it takes no argument, or needs it.

    Only the call itself is judged here: what fails inside is the study's own.
    """
    wanted = () if argument is None else (argument,)
    try:
        inspect.signature(get_config).bind(*wanted)
    except TypeError as error:
        if argument is None:
            raise UserError("the study needs an argument: write FILE.py:ARGUMENT") from error
        raise UserError(
            "the study takes no argument: leave out the colon and what follows it"
        ) from error
    if argument == "":
        raise UserError("nothing follows the colon: name the argument, or leave the colon out")
    return get_config(*wanted)


def _items(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`("section.key", value)` of every value."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _items(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _apply_settings(config: ConfigDict, settings: list[str]) -> tuple[dict[str, Any], Set[str]]:
    """`config` as a dict, changed by `settings`, and the keys that these name.

    `settings` are the program's name, then `--config.key=value` ...
    """
    keys = [key for key, _ in _items(config)]
    for argument in settings[1:]:
        found = re.match(r"--?config\.([^=]*)", argument)
        if found and found[1] not in keys:
            members = [key for key in keys if key.startswith(f"{found[1]}.")]
            near = members or difflib.get_close_matches(found[1], keys, 3)
            hint = f"did you mean {', '.join(near)}? " if near else ""
            raise UserError(f"no key config.{found[1]}: {hint}configs/default.py has them all")
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=settings)
        rest = values(settings)
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"{error}; python launch.py --help lists the flags") from error
    except flags.Error as error:
        message = str(error)
        for theirs, ours in _PLAINER.items():
            message = message.replace(theirs, ours)
        raise UserError(message) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; settings are written --config.key=value")
    for key, value in _items(values.config):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{key}={value} must be a finite number")
    return values.config.to_dict(), config_flags.get_override_values(values["config"]).keys()


def _run_experiment(config: dict, given: Set[str], workdir: str, argv: Sequence[str]) -> None:
    """Prepares the process, resolves the config and runs its experiment."""
    from experiments.strategies import expand

    config = expand(config, given)
    name = config["experiment"]
    if name not in EXPERIMENTS:
        raise UserError(f"experiment={name!r} is not known; choose from {', '.join(EXPERIMENTS)}")
    experiment = importlib.import_module(f"experiments.{name}")
    from experiments.settings import check_processes, check_ranges
    from experiments.study import Request
    from medtl_jax.distributed import check_joined, meet, spans
    from medtl_jax.files import user_path
    from medtl_jax.runs import default_folder, what_is_run

    check_ranges(config)
    config = experiment.resolve(config, given)
    if spans():
        check_processes(config)
    check_joined()
    folder = user_path(workdir, "--workdir") if workdir else default_folder(config)
    # Before they compute anything together, as an evaluation does that has no folder yet.
    meet(what_is_run(folder, config))
    command = f"python launch.py {shlex.join(argv[1:])}"
    # Pictures and words are for one of several processes to make.
    console, brief = Console(quiet=not is_writer()), not is_writer()
    if sharers() > 1:
        console.note(
            f"one of {sharers()} processes that do not meet, so that none of them is at the "
            f"coordinator's address: each trains runs of its own, and all of them share {folder}"
        )
    experiment.run(Request(config, folder, command, console, brief))


if __name__ == "__main__":
    # absl parses nothing here: its global flags take one command line a process.
    app.run(lambda _: run_command(sys.argv), argv=sys.argv[:1])
