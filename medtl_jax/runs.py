"""The run folder: what is written where, when it may be reused, and what made it."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

import medtl_jax
from medtl_jax.distributed import meet
from medtl_jax.errors import UserError
from medtl_jax.files import user_path, write_file
from medtl_jax.process import is_writer

CONFIG, ENVIRONMENT, METRICS = "config.json", "environment.json", "metrics.json"
WEIGHTS, CALIBRATION = "weights.safetensors", "calibration.json"
EVENTS = "tensorboard"
DRIFT, COST = "drift.json", "cost.json"

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "scipy",
    "scikit-learn",
    "scikit-image",
    "pillow",
)
# What a run was begun with and may not change under it: key of environment.json -> its name.
_FIXED = {
    "data_sha256": "data",
    "weights_sha256": "weights",
    "source_sha256": "source data",
    "target_sha256": "target data",
    "checkpoint_sha256": "checkpoint",
}
# What changes how a run is computed and, but for rounding, nothing of what comes out.
_OF_ONE_SITTING = ("train.program",)


def write_json(path: pathlib.Path, value: Any, *, sort_keys: bool = True) -> None:
    """Writes `value` to `path`, whole or not at all."""
    write_file(path, json.dumps(value, indent=1, sort_keys=sort_keys, allow_nan=False) + "\n")


def read_json(path: pathlib.Path, most_bytes: int = 10_000_000) -> dict[str, Any]:
    """The mapping in a JSON file of a run folder. UserError where there is none to be had."""
    try:
        if path.stat().st_size > most_bytes:
            raise UserError(f"{path} is larger than {most_bytes} bytes: not written by medtl_jax")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no run folder: it has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no mapping: not written by medtl_jax")
    return value


def flat_config(config: dict, prefix: str = "") -> dict[str, Any]:
    """`{"model.name": ...}` from a nested config."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(flat_config(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def nested_config(sections: dict, flat: dict[str, Any], prefix: str = "") -> dict:
    """The values of a `flat_config` in the order and the depth of the config `sections`."""
    return {
        key: nested_config(value, flat, f"{prefix}{key}.")
        if isinstance(value, dict)
        else flat[prefix + key]
        for key, value in sections.items()
    }


def default_folder(config: dict) -> pathlib.Path:
    """`runs/<experiment>-<hash of the config>`: the same command finds its run again."""
    decisive = _decisive(config)
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    return pathlib.Path("runs") / f"{config['experiment']}-{digest[:8]}"


def _decisive(config: dict, prefix: str = "") -> dict:
    """The config without what may differ from one sitting to the next."""
    return {
        key: _decisive(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in config.items()
        if prefix + key not in _OF_ONE_SITTING
    }


def is_finished(folder: pathlib.Path) -> bool:
    """Whether the run ended: `metrics.json` is the last file that a run writes."""
    return (folder / METRICS).is_file()


def check_folder(folder: pathlib.Path, config: dict) -> None:
    """UserError if `folder` exists and holds anything but an earlier part of this very run.

    A folder inside a folder of images is refused too: its pictures would be read as data.
    """
    data = config["data"]["dir"]
    searched = data and (config["data"]["name"] == "folder" or config["experiment"] == "predict")
    if searched and folder.resolve().is_relative_to(user_path(data, "data.dir").resolve()):
        raise UserError(f"--workdir={folder} lies inside data.dir={data}; name a folder elsewhere")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--workdir={folder} is a file; name a new folder")
    if not any(folder.iterdir()):
        return
    if not (folder / CONFIG).is_file():
        raise UserError(f"--workdir={folder} is not empty and no run folder; name a new folder")
    found, wanted = flat_config(read_json(folder / CONFIG)), flat_config(config)
    differing = sorted(
        key
        for key in found.keys() | wanted.keys()
        if key not in _OF_ONE_SITTING and found.get(key) != wanted.get(key)
    )
    if differing:
        shown = ", ".join(
            f"{key} ({found.get(key)!r} there, {wanted.get(key)!r} now)" for key in differing[:3]
        )
        raise UserError(
            f"--workdir={folder} holds a run of another config: {shown}"
            f"{' and more' if len(differing) > 3 else ''}; name another folder"
        )


def what_is_run(folder: pathlib.Path, config: dict) -> dict[str, str]:
    """What several processes of one run have in common before anything is read, for `meet`."""
    facts = {f"config.{key}": repr(value) for key, value in flat_config(config).items()}
    return {**facts, "--workdir": os.path.realpath(folder)}


def open_folder(folder: pathlib.Path, config: dict, environment: dict) -> None:
    """Makes the run folder with its config and environment, or checks that it is this run's.

    Of several processes that run one program the first makes it, and the others wait for it: all
    of them have the same config, folder, data and weights.
    Called once everything that can be refused has been: a mistake leaves no folder behind. The
    folder is made aside and renamed, so a run killed here leaves none either.

    Raises:
      UserError: the folder belongs to another config, its data or weights have changed, or the
        processes are not of one run.
    """
    facts = what_is_run(folder, config)
    facts |= {what: str(environment.get(key)) for key, what in _FIXED.items()}
    # Nobody makes a folder that another one has not looked for yet.
    meet(facts)
    if is_writer():
        _open_folder(folder, config, environment)
    meet()


def _open_folder(folder: pathlib.Path, config: dict, environment: dict) -> None:
    check_folder(folder, config)
    if (folder / CONFIG).is_file():
        earlier = read_json(folder / ENVIRONMENT)
        for key, what in _FIXED.items():
            if earlier.get(key) != environment.get(key):
                raise UserError(
                    f"--workdir={folder} was begun with other {what} ({key} differs); "
                    "name another folder"
                )
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Cleaned up whatever happens; once it is renamed there is nothing left to clean.
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True
        ) as name:
            aside = pathlib.Path(name)
            aside.chmod(0o755)
            write_json(aside / CONFIG, config)
            write_json(aside / ENVIRONMENT, environment)
            aside.replace(folder)
    except OSError as error:
        raise UserError(
            f"--workdir={folder} cannot be made ({error.strerror}); name another folder"
        ) from None


@contextlib.contextmanager
def hold(folder: pathlib.Path) -> Iterator[None]:
    """Keeps a second process out of the run folder. UserError if there is one in it.

    Those that run one program with the process that holds it are in there with it.
    """
    if fcntl is None or not is_writer():
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--workdir={folder}: another process is at work on this run; wait for it or name "
                "another folder"
            ) from None
        yield
    finally:
        os.close(handle)


def describe_environment() -> dict[str, Any]:
    """Versions, devices and the commit, for `environment.json` and the report."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "backend": jax.default_backend(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "processes": jax.process_count(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of the source tree, `+changes` if it is edited, or the package's version."""

    folder = pathlib.Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout.strip()

    version = f"medtl_jax {medtl_jax.__version__}"
    try:
        # An installed copy may lie inside a repository of somebody else's.
        if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() != folder:
            return version
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return version
