"""Runs one experiment: python launch.py --config=configs/finetune.py [--config.key=value ...]

Prepares the process (flags, compilation cache, run folder's name) and hands over to
`experiments.<config.experiment>.run`. A mistake of the user's is one line and exit code 2.
"""

import ctypes
import importlib
import os
import pathlib
import shlex
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from medtl_jax.console import Console
from medtl_jax.errors import UserError

EXPERIMENTS = ("finetune", "evaluate", "predict")

_CONFIG = config_flags.DEFINE_config_file("config", None, "The study, a file of configs/.")
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Run folder; by default runs/<experiment>-<hash of the config>."
)


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags; whatever the parser dislikes becomes one line."""
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        _fail(str(error))
    except (AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        _fail(f"configuration: {error.args[0] if error.args else error}")
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}; settings are written --config.key=value")
    if _CONFIG.value is None:
        _fail("--config is missing; try --config=configs/finetune.py")
    return rest


def _prepare_xla() -> None:
    """Sets up XLA before its first use: repeatable GPU kernels, programs cached on disk."""
    flags_set = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags_set:
        os.environ["XLA_FLAGS"] = f"{flags_set} --xla_gpu_deterministic_ops=true".strip()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import jax
    import pooch

    if not jax.config.jax_compilation_cache_dir:
        folder = pathlib.Path(pooch.os_cache("medtl_jax")) / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _keep_freed_memory() -> None:
    """Lets glibc hold on to freed memory instead of returning it to the kernel.

    A training step on CPU frees and takes the same hundreds of megabytes again and again; mapped
    afresh each time, the page faults cost up to a third of the step.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, top_pad, mmap_threshold, mmap_max = -1, -2, -3, -4
        libc.mallopt(mmap_threshold, 2**31 - 1)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 << 20)
        libc.mallopt(mmap_max, 0)
    except (OSError, AttributeError):
        return  # another C library: its own ways of allocation stay


def main(argv: list[str]) -> None:
    """Resolves the config and runs its experiment."""
    del argv
    # The libraries' own progress messages would bury ours.
    logging.set_verbosity(logging.WARNING)
    config = _CONFIG.value.to_dict()
    if config["experiment"] not in EXPERIMENTS:
        _fail(f"experiment={config['experiment']!r}: choose from {', '.join(EXPERIMENTS)}")
    _prepare_xla()
    _keep_freed_memory()
    experiment = importlib.import_module(f"experiments.{config['experiment']}")
    from experiments.study import Request
    from medtl_jax.runs import default_folder

    try:
        config = experiment.resolve(config)
        folder = pathlib.Path(_WORKDIR.value) if _WORKDIR.value else default_folder(config)
        command = f"python launch.py {shlex.join(sys.argv[1:])}"
        experiment.run(Request(config, folder, command, Console()))
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command continues the run", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
