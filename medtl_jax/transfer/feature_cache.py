"""Activations on disk: computed once for all that decides them, checked whenever they are opened.

An entry is two files named after its key: `<digest>.npy`, float32, to be mapped into memory, and
`<digest>.json`, which says what it is. Both are written aside and renamed, so that several
processes may make the same entry at once, and what a killed one leaves behind is never used.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import pooch

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

import medtl_jax
from medtl_jax.errors import UserError
from medtl_jax.files import user_path

Note = Callable[[str], None]
Fill = Callable[[], Iterable[np.ndarray]]
Took = Callable[[float, float], None]

# Entries that were neither made nor opened for so long are removed when another one is made.
UNUSED_DAYS = 60

_SETTING = "transfer.cache_dir"
_DTYPE = np.dtype("<f4")
_MAX_RECORD_BYTES = 2**20
_ENTRY = re.compile(r"[0-9a-f]{64}\.npy")
_DRAFT = re.compile(r"\.[0-9a-f]{64}\.(npy|json)\.[0-9a-f]{32}\.part")
# A draft is locked by its writer right after it is made; younger ones are left alone.
_GRACE_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class FeatureKey:
    """All that decides activations; another value of any field is another entry.

    The size of the batches and the number of devices are not among it: they change the last bits
    alone. Every field is JSON-ready.

    Attributes:
      variables: SHA-256 over the parameters and statistics of the stages before `start`.
      network: name of the backbone.
      attributes: fields of its module that matter in evaluation mode.
      start: the part of the network that reads the activations.
      input: mean, std, offset and contrast of the `InputSpec`.
      image: `(h, w, c)` of the images.
      data: SHA-256 over their ids and pixels.
      views: augmented draws of each image, 0 = the images as they are.
      augment, seed: what they are drawn with; empty and 0 without views.
      compute, precision, platform: how the backend calculates.
      versions: of the packages that do so, and SHA-256 over our own source of it.
    """

    variables: str
    network: str
    attributes: Mapping[str, Any]
    start: str
    input: Mapping[str, Any]
    image: tuple[int, ...]
    data: str
    views: int
    augment: Mapping[str, float]
    seed: int
    compute: str
    precision: str
    platform: str
    versions: Mapping[str, str]

    def record(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))

    def digest(self) -> str:
        """SHA-256 (hex) of the fields."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()


class _DamagedError(Exception):
    """Why an entry is not used."""


def default_cache_folder(text: str) -> pathlib.Path:
    """The folder that `config.transfer.cache_dir` names; for "" one of the user's caches.

    UserError if it is not a path.
    """
    return (
        user_path(text, _SETTING) if text else pathlib.Path(pooch.os_cache("medtl_jax"), "features")
    )


def cached(
    folder: pathlib.Path,
    key: FeatureKey,
    shape: tuple[int, ...],
    fill: Fill,
    note: Note,
    took: Took = lambda seconds, cpu_seconds: None,
) -> np.memmap:
    """The entry of `key`, float32 `shape`, mapped read-only; made with `fill` where there is none.

    The values of an entry that is there are compared with their SHA-256 first. A damaged entry is
    made anew, and `note` says so. Entries that nobody has used for `UNUSED_DAYS` are removed when
    one is made.

    Args:
      folder: made if missing.
      key: of the entry.
      shape: `(n, ...)`, all positive.
      fill: called to make the entry; yields float32 blocks `[b, ...]`, n rows in all. They are
        written as they come.
      note: called with a line of text.
      took: called with the seconds, of the clock and of the processor, that the entry took to make,
        now or when it was made.

    Raises:
      UserError: the folder cannot be used, or its disk is too small; nothing half-written stays.
      ValueError: the blocks are not of `shape`.
    """
    array = folder / f"{key.digest()}.npy"
    record = {"key": key.record(), "shape": list(shape), "dtype": _DTYPE.str}
    needed = _byte_count(shape)
    with _explained(folder, needed):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_stale_drafts(folder)
        try:
            if array.is_file():
                mapped, seconds = _opened(array, record, shape)
                took(*seconds)
                return mapped
        except _DamagedError as damage:
            note(f"features: {array} is damaged ({damage}); it is made anew")
            array.unlink(missing_ok=True)
        _remove_unused(folder)
        _check_space(folder, needed)
    seconds = _make(array, record, shape, fill)
    with _explained(folder, needed), array.open("rb") as file:
        mapped = _mapped(file, shape)
    took(*seconds)
    note(f"features: {needed / 2**20:,.1f} MiB of activations before {key.start} kept in {folder}")
    return mapped


def _opened(
    array: pathlib.Path, record: Mapping[str, Any], shape: tuple[int, ...]
) -> tuple[np.memmap, tuple[float, float]]:
    """The entry at `array`, mapped, and what it took to make.

    _DamagedError unless it is what `record` and its digest say.
    """
    said = _read_record(array.with_suffix(".json"))
    for field, value in record.items():
        if said.get(field) != value:
            raise _DamagedError(f"its .json has another {field}")
    header = _header(shape)
    with array.open("rb") as file:
        size, wanted = os.fstat(file.fileno()).st_size, len(header) + _byte_count(shape)
        if size != wanted:
            raise _DamagedError(f"it has {size:,} bytes, not {wanted:,}")
        if file.read(len(header)) != header:
            raise _DamagedError("its header has another shape or dtype")
        if hashlib.file_digest(file, "sha256").hexdigest() != said.get("sha256"):
            raise _DamagedError("its sha256 is another")
        os.utime(array)
        return _mapped(file, shape), _read_seconds(said)


def _read_record(path: pathlib.Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_RECORD_BYTES + 1)
        said = json.loads(content) if len(content) <= _MAX_RECORD_BYTES else None
    except FileNotFoundError:
        raise _DamagedError("its .json is missing") from None
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise _DamagedError("its .json cannot be read")
    return said


def _read_seconds(said: Mapping[str, Any]) -> tuple[float, float]:
    """What the entry took to make. _DamagedError where it does not say."""
    values = said.get("seconds"), said.get("cpu_seconds")
    if not all(type(value) is float and 0 <= value < math.inf for value in values):
        raise _DamagedError("its .json does not say what it took")
    return values


def _make(
    array: pathlib.Path, record: Mapping[str, Any], shape: tuple[int, ...], fill: Fill
) -> tuple[float, float]:
    """Writes the entry and returns what it took."""
    folder, needed = array.parent, _byte_count(shape)
    started, worked = time.perf_counter(), time.process_time()
    with _replacing(array, needed) as file:
        sha256 = _write(file, shape, fill(), lambda: _explained(folder, needed))
        seconds = time.perf_counter() - started, time.process_time() - worked
        about = {
            **record,
            "sha256": sha256,
            "made_by": f"medtl_jax {medtl_jax.__version__}",
            "seconds": seconds[0],
            "cpu_seconds": seconds[1],
        }
        # The array is renamed last: without it there is no entry.
        with _replacing(array.with_suffix(".json"), needed) as text, _explained(folder, needed):
            text.write(json.dumps(about, indent=2, sort_keys=True).encode())
    return seconds


def _write(
    file: BinaryIO,
    shape: tuple[int, ...],
    blocks: Iterable[np.ndarray],
    explained: Callable[[], contextlib.AbstractContextManager],
) -> str:
    """Writes header and blocks, and returns the SHA-256 of the blocks. ValueError: see `cached`."""
    # Written, not stored into a mapping: on a full disk that would end the process with a signal.
    digest, rows = hashlib.sha256(), 0
    with explained():
        file.write(_header(shape))
    for block in blocks:
        rows += len(block)
        if block.dtype != _DTYPE or block.shape[1:] != shape[1:] or rows > shape[0]:
            raise ValueError(f"a block {block.dtype}{block.shape} up to row {rows} of {shape}")
        values = np.ascontiguousarray(block)
        digest.update(values)
        with explained():
            file.write(values)
    if rows != shape[0]:
        raise ValueError(f"{rows} rows for activations {shape}")
    return digest.hexdigest()


def _header(shape: tuple[int, ...]) -> bytes:
    """What a .npy file of the shape begins with."""
    stream = io.BytesIO()
    header = {"descr": _DTYPE.str, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def _byte_count(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _DTYPE.itemsize


def _mapped(file: BinaryIO, shape: tuple[int, ...]) -> np.memmap:
    return np.memmap(file, _DTYPE, "r", offset=len(_header(shape)), shape=tuple(shape))


@contextlib.contextmanager
def _replacing(path: pathlib.Path, needed: int) -> Iterator[BinaryIO]:
    """A file, locked and written aside, that takes the place of `path` if all goes well."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with contextlib.ExitStack() as stack:
            with _explained(path.parent, needed):
                file = stack.enter_context(draft.open("xb"))
            # Where the file system has no locks, nobody can take the draft for a dead one either.
            with contextlib.suppress(OSError):
                _lock(file)
            yield file
            with _explained(path.parent, needed):
                file.flush()
                os.fsync(file.fileno())
        # Closed first: Windows renames no open file.
        with _explained(path.parent, needed):
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _lock(file: BinaryIO) -> None:
    """Takes the file for this process until it is closed. OSError if another has it."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_stale_drafts(folder: pathlib.Path) -> None:
    """Deletes the drafts whose writers have ended: nobody holds their locks any more."""
    for path in folder.glob(".*.part"):
        if not _DRAFT.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime < _GRACE_SECONDS:
                continue
            with path.open("rb") as file:
                _lock(file)
                path.unlink()


def _remove_unused(folder: pathlib.Path) -> None:
    """Deletes the entries that were neither made nor opened for `UNUSED_DAYS`."""
    for path in folder.glob("*.npy"):
        if not _ENTRY.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > UNUSED_DAYS * 86_400:
                path.unlink()
                path.with_suffix(".json").unlink(missing_ok=True)


def _check_space(folder: pathlib.Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{_SETTING}: the activations need {needed:,} bytes in {folder}, where {free:,} are "
            "free; free some space or name a folder on another disk"
        )


@contextlib.contextmanager
def _explained(folder: pathlib.Path, needed: int) -> Iterator[None]:
    """Turns what the file system refuses into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{_SETTING}: cannot keep {needed:,} bytes of activations in {folder}: "
            f"{error.strerror or error}; free some space or name another folder"
        ) from error
