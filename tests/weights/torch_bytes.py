"""Writes torch's formats, well and badly, and reads what came out: helpers of the tests here."""

import dataclasses
import io
import os
import pickle
import struct
import zipfile
from typing import ClassVar

import numpy as np
import pytest

from medtl_jax.errors import UserError
from medtl_jax.weights.files import read_weights


@dataclasses.dataclass(frozen=True)
class Global:
    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    function: object
    args: tuple


@dataclasses.dataclass(frozen=True)
class Storage:
    reference: tuple


class Pickler(pickle._Pickler):
    """Writes globals and calls of modules that are not installed, and persistent ids."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_name(self, value):
        self.write(f"c{value.module}\n{value.name}\n".encode())

    def save_call(self, value):
        self.save(value.function)
        self.save(value.args)
        self.write(pickle.REDUCE)

    dispatch[Global] = save_name
    dispatch[Call] = save_call

    def persistent_id(self, value):
        return value.reference if isinstance(value, Storage) else None


def dumps(value):
    stream = io.BytesIO()
    Pickler(stream, 2).dump(value)
    return stream.getvalue()


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
SYSTEM = {"protocol_version": 1001, "little_endian": True}
MAGIC = 0x1950A86A20F9469CFC6C


def storage(key="0", kind="FloatStorage", count=6):
    return Storage(("storage", Global("torch", kind), key, "cpu", count, None))


def tensor(shape=(6,), strides=(1,), offset=0, **kwargs):
    hooks = Call(Global("collections", "OrderedDict"), ())
    return Call(REBUILD, (storage(**kwargs), offset, shape, strides, False, hooks))


SIX = {"0": np.arange(6, dtype="<f4")}


def legacy(
    state, buffers=SIX, *, keys=None, counts=None, magic=MAGIC, protocol=1001, system=SYSTEM
):
    """A legacy file; `state` is an object or its pickle, `buffers` key -> values."""
    head = dumps(magic) + dumps(protocol) + dumps(system)
    body = state if isinstance(state, bytes) else dumps(state)
    listed = sorted(buffers) if keys is None else keys
    blocks = [
        struct.pack("<q", (counts or {}).get(key, len(values))) + values.tobytes()
        for key, values in sorted(buffers.items())
    ]
    return head + body + dumps(listed) + b"".join(blocks)


def zipped(entries, method=zipfile.ZIP_STORED):
    """A zip archive of `entries`, name -> bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return stream.getvalue()


def torch_entries(state, buffers=SIX, root="archive"):
    """The entries of torch's zip format; `state` is an object or its pickle."""
    body = state if isinstance(state, bytes) else dumps(state)
    storages = {f"{root}/data/{key}": values.tobytes() for key, values in buffers.items()}
    side = {f"{root}/version": b"3\n", f"{root}/byteorder": b"little"}
    return {f"{root}/data.pkl": body, **storages, **side}


class Evil(dict):
    """Runs a shell command when unpickled by `pickle`."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"echo > {self.marker}",)


def system_calls(marker):
    command = (f"echo > {marker}",)
    return {
        "function and arguments": Call(os.system, command),
        "subclass": Evil(marker),
        "tensor": {"w": tensor(), "x": Evil(marker)},
        "shape": {"w": tensor(Evil(marker), (1,))},
        "hooks": {"w": Call(REBUILD, (storage(), 0, (6,), (1,), False, Evil(marker)))},
        "storage type": {
            "w": Storage(("storage", Evil(marker), "0", "cpu", 6, None)),
        },
    }


def read(folder, data):
    path = folder / "weights"
    path.write_bytes(data)
    return read_weights(path)


def refusal(folder, data):
    """The message of the refusal: one line that starts with the file's path."""
    with pytest.raises(UserError) as caught:
        read(folder, data)
    message = str(caught.value)
    assert message.startswith(f"weights file {folder / 'weights'}: ")
    assert message.isprintable()
    assert len(message) < 600
    return message
