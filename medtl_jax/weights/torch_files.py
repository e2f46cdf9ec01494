"""Torch's two .pth formats -> flat arrays, without torch and without executing anything.

The legacy format (`torch.save` before 1.6) is five pickles (magic number, protocol 1001, system
information, the object, the list of storage keys) and then, for each storage key, an int64 count
and the raw little-endian values. The zip format has the object in `<root>/data.pkl` and the raw
values of each storage in `<root>/data/<key>`.
"""

import zipfile

import numpy as np

from medtl_jax.archives import ArchiveError, read_entry
from medtl_jax.weights.checks import (
    MAX_EXPANSION,
    RefusedError,
    check_name,
    check_total,
    finished,
    shown,
    unpacked_limit,
)
from medtl_jax.weights.pickles import MAX_PICKLE_BYTES, Storage, Tensor, load_pickle

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_WRAPPERS = ("state_dict", "model")
_PARALLEL = "module."
# Small entries beside data.pkl and data/; what they say is checked or says nothing on values.
_SIDE_ENTRIES = {
    "version",
    "byteorder",
    ".data/serialization_id",
    ".format_version",
    ".storage_alignment",
}
_SIDE_BYTES = 1024

_Values = dict[str, bytes | memoryview]


def read_legacy(data: bytes) -> dict[str, np.ndarray]:
    """Returns name -> array of the state dict in a file of torch's legacy format.

    Raises:
      RefusedError: damaged, hostile, or something other than a state dict; every byte of the
        file is accounted for.
    """
    storages: dict[str, Storage] = {}
    magic, position = load_pickle(data, 0, "first pickle", storages)
    if magic != _MAGIC:
        raise RefusedError("a pickle without torch's magic number, no weight format known here")
    protocol, position = load_pickle(data, position, "protocol number", storages)
    if protocol != _PROTOCOL:
        raise RefusedError(f"torch's legacy protocol must be {_PROTOCOL}")
    system, position = load_pickle(data, position, "system information", storages)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise RefusedError("written on a big-endian machine, or without saying so")
    state, position = load_pickle(data, position, "object pickle", storages)
    keys, position = load_pickle(data, position, "list of storage keys", storages)
    records = _state_dict(state)
    _check_total(records, len(data))
    return _arrays(records, _legacy_values(data, position, keys, storages))


def read_zip(archive: zipfile.ZipFile, size: int) -> dict[str, np.ndarray]:
    """Returns name -> array of the state dict in `archive`, a zip of torch's of `size` bytes.

    `archive` comes from `archives.open_archive`, which has checked its names and sizes.

    Raises:
      RefusedError: several roots, an entry that torch does not write, storages that differ
        from what the pickle claims, big-endian values, or anything but a state dict.
    """
    root, entries = _entries(archive)
    _check_side_entries(archive, entries)
    storages: dict[str, Storage] = {}
    if entries["data.pkl"].file_size > MAX_PICKLE_BYTES:
        raise RefusedError(f"{root}/data.pkl is longer than {MAX_PICKLE_BYTES:,} bytes")
    pickled = _read(archive, entries["data.pkl"])
    state, end = load_pickle(pickled, 0, f"{root}/data.pkl", storages)
    if end != len(pickled):
        raise RefusedError(f"{root}/data.pkl has {len(pickled) - end:,} bytes too many")
    records = _state_dict(state)
    _check_total(records, size)
    _check_storages(entries, storages)
    # Only what the tensors need: a checkpoint's optimizer may be twice as large.
    keys = {record.storage.key for record in records.values() if type(record) is Tensor}
    needed = {key: entries[f"data/{key}"] for key in keys}
    check_total(sum(info.file_size for info in needed.values()), unpacked_limit(size), size)
    return _arrays(records, {key: _read(archive, info) for key, info in needed.items()})


def _entries(archive: zipfile.ZipFile) -> tuple[str, dict[str, zipfile.ZipInfo]]:
    """The name of the one root folder, and the entries by their path inside it."""
    roots = {info.filename.partition("/")[0] for info in archive.infolist()}
    if len(roots) != 1:
        raise RefusedError(f"{len(roots)} folders at its root, torch writes one")
    root = roots.pop()
    entries = {info.filename[len(root) + 1 :]: info for info in archive.infolist()}
    if any(name == "constants.pkl" or name.startswith("code/") for name in entries):
        raise RefusedError(
            "a TorchScript program, not a state dict: save model.state_dict() with torch.save"
        )
    if "data.pkl" not in entries:
        raise RefusedError(f"has no {shown(root + '/data.pkl')}")
    for name in entries:
        if name not in _SIDE_ENTRIES and name != "data.pkl" and not name.startswith("data/"):
            raise RefusedError(f"holds {shown(name)}, an entry that torch.save does not write")
    return root, entries


def _check_side_entries(archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> None:
    texts = {}
    for name in _SIDE_ENTRIES & entries.keys():
        if entries[name].file_size > _SIDE_BYTES:
            raise RefusedError(f"its entry {shown(name)} is longer than {_SIDE_BYTES:,} bytes")
        texts[name] = _read(archive, entries[name]).decode("ascii", "replace").strip()
    if texts.get("byteorder", "little") != "little":
        raise RefusedError(f"its byte order is {shown(texts['byteorder'])}, only little is read")
    if not texts.get("version", "3").isdigit():
        raise RefusedError(f"its version is {shown(texts['version'])}, not a number")


def _check_storages(entries: dict[str, zipfile.ZipInfo], storages: dict[str, Storage]) -> None:
    """Refuses storages that are absent, unused or of another size than the pickle claims."""
    found = {name.removeprefix("data/") for name in entries if name.startswith("data/")}
    if found != storages.keys():
        culprit = min(found ^ storages.keys())
        where = "file" if culprit in found else "pickle"
        raise RefusedError(f"storage {shown(culprit)} is in the {where} alone")
    for key, storage in storages.items():
        size, claim = entries[f"data/{key}"].file_size, storage.count * storage.dtype.itemsize
        if size != claim:
            where = f"storage {shown(key)} has {size:,} bytes"
            raise RefusedError(f"{where}, the pickle claims {claim:,}")


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        return read_entry(archive, info)
    except ArchiveError as error:
        raise RefusedError(str(error)) from error


def _legacy_values(data: bytes, position: int, keys, storages: dict[str, Storage]) -> _Values:
    """Storage key -> its bytes; every byte of the file is accounted for."""
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise RefusedError("the list of storage keys is not a list of strings")
    if sorted(keys) != sorted(storages):
        raise RefusedError("the storage keys differ from the storages of its tensors, or repeat")
    values = {}
    for key in keys:
        storage, where = storages[key], f"storage {shown(key)}"
        count = int.from_bytes(data[position : position + 8], "little", signed=True)
        start = position + 8
        claim = storage.count * storage.dtype.itemsize
        if start > len(data) or claim > len(data) - start:
            text = f"which claims {storage.count:,} values"
            raise RefusedError(f"truncated inside {where}, {text}: copy or download it again")
        if count != storage.count:
            raise RefusedError(f"{where} has {count:,} values, the pickle says {storage.count:,}")
        position = start + claim
        values[key] = memoryview(data)[start:position]
    if position != len(data):
        raise RefusedError(f"{len(data) - position:,} bytes too many at its end")
    return values


def _state_dict(state) -> dict[str, Tensor | int | float]:
    """The flat state dict, out of its checkpoint if it has one, without DataParallel's prefix."""
    if type(state) is dict:
        wrapped = [key for key in _WRAPPERS if type(state.get(key)) is dict]
        if len(wrapped) > 1:
            raise RefusedError("holds both a state_dict and a model: save the one that is meant")
        state = state[wrapped[0]] if wrapped else state
    if type(state) is not dict:
        raise RefusedError(f"holds a {type(state).__name__}, not a state dict")
    for name, value in state.items():
        if type(name) is not str:
            raise RefusedError(f"a dict key of type {type(name).__name__} among the tensors")
        check_name(name)
        if type(value) not in (Tensor, int, float):
            found = f"{shown(name)} is a {type(value).__name__}"
            raise RefusedError(f"{found}, not a tensor: save the state dict alone, flat")
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise RefusedError(f"{shown(name)} is an integer of more than 64 bits")
    if not any(type(value) is Tensor for value in state.values()):
        raise RefusedError("holds a dict without tensors, not a state dict")
    if all(name.startswith(_PARALLEL) and name != _PARALLEL for name in state):
        return {name.removeprefix(_PARALLEL): value for name, value in state.items()}
    return state


def _check_total(records: dict[str, Tensor | int | float], size: int) -> None:
    tensors = [record for record in records.values() if type(record) is Tensor]
    asked = sum(tensor.size * tensor.storage.dtype.itemsize for tensor in tensors)
    check_total(asked, MAX_EXPANSION * size, size)


def _arrays(records: dict[str, Tensor | int | float], values: _Values) -> dict[str, np.ndarray]:
    return {name: finished(name, _view(record, values)) for name, record in records.items()}


def _view(record: Tensor | int | float, values: _Values) -> np.ndarray:
    if type(record) is not Tensor:
        return np.array(record, np.int64 if type(record) is int else np.float64)
    dtype = record.storage.dtype
    # numpy checks once more that the view stays inside the buffer.
    return np.ndarray(
        record.shape,
        dtype,
        values[record.storage.key],
        record.offset * dtype.itemsize,
        [step * dtype.itemsize for step in record.strides],
    )
