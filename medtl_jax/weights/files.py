"""Weight files from outside, read without executing anything in them.

A weight file is hostile: every size is checked against the bytes that are there before anything
is allocated, and what is not known is refused.

Torch's legacy `.pth` (the format of `torch.save` before 1.6) is five pickles (magic number,
protocol 1001, system information, the object, the list of storage keys) and then, for each
storage key, an int64 count and the raw little-endian values. The pickles are decoded by
`pickletools` and interpreted here, not by `pickle.Unpickler`: no callable is in reach, and a
dict key of a million nested tuples or a memo index of 2**31 cannot take the process down.
"""

import dataclasses
import hashlib
import io
import math
import pathlib
import pickletools

import numpy as np

from medtl_jax.errors import UserError

MAX_FILE_BYTES = 4 * 2**30
MAX_PICKLE_BYTES = 4 * 2**20
# Tensors may share a storage (tied weights); a file may not ask for much more than it holds.
MAX_EXPANSION = 4
MAX_NAME_LENGTH = 256
MAX_AXES = 8

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_ACCEPTED = "accepted: torch's legacy .pth (torch.save with _use_new_zipfile_serialization=False)"


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """The tensors of a weight file, under the names and in the layout of the file.

    Attributes:
      tensors: name -> array, finite, C-contiguous, owning its memory; dtype float32, float64,
        float16, int64, int32, uint8 or bool (bfloat16 is widened to float32, which is exact).
      sha256: of the whole file, hex.
      format: `"torch-legacy"`.
      path: where it was read from.
    """

    tensors: dict[str, np.ndarray]
    sha256: str
    format: str
    path: pathlib.Path


class _Refused(Exception):
    """Why a file is refused; `read_weights` puts the path in front."""


def read_weights(path: str | pathlib.Path) -> WeightFile:
    """Return the tensors of the weight file at `path` and its SHA-256.

    Raises:
      UserError: the file cannot be read, is of a format that is not supported, is damaged
        (truncated, trailing bytes, sizes that contradict each other), holds something other
        than one flat state dict of finite tensors, or names a global that is not allowed.
        A state dict alone under the one key `state_dict` or `model` is accepted.
    """
    path = pathlib.Path(path)
    try:
        data = _read_bytes(path)
        _check_format(data)
        tensors = _read_legacy(data)
    except _Refused as refusal:
        raise UserError(f"weights file {path}: {refusal}") from None
    except OSError as error:
        raise UserError(f"weights file {path}: {error.strerror or error}") from error
    # A hostile file can make the decoder fail in ways nobody listed; each is the same refusal.
    except Exception as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(f"weights file {path}: damaged ({detail})") from error
    return WeightFile(tensors, hashlib.sha256(data).hexdigest(), "torch-legacy", path)


def _read_bytes(path: pathlib.Path) -> bytes:
    size = path.stat().st_size
    # Opening a named pipe would wait for ever.
    if not path.is_file():
        raise _Refused("not a regular file")
    if not 0 < size <= MAX_FILE_BYTES:
        raise _Refused(f"{size:,} bytes, not between 1 and {MAX_FILE_BYTES:,}")
    return path.read_bytes()


def _check_format(data: bytes) -> None:
    """Refuse every format but a pickle, by content: file suffixes lie."""
    if data.startswith(b"PK\x03\x04"):
        looks = "looks like a zip archive (torch's newer .pth, or .npz)"
    elif data.startswith(b"\x89HDF\r\n\x1a\n"):
        looks = "looks like an HDF5 file (Keras .h5)"
    elif data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8:
        looks = "looks like a .safetensors file"
    elif data.startswith(b"\x80"):
        return
    else:
        looks = "no weight format known here"
    raise _Refused(f"format not supported yet: {looks}; {_ACCEPTED}")


@dataclasses.dataclass(frozen=True)
class _Global:
    """An allowed global of a pickle, by "module name": a marker, nothing that can be called."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    type: _Global
    count: int

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(_STORAGES[self.type])


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A view into a storage; offset and strides count values, as in torch."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    size: int


_ORDERED_DICT = _Global("collections OrderedDict")
_REBUILD_TENSOR = _Global("torch._utils _rebuild_tensor_v2")
_REBUILD_PARAMETER = _Global("torch._utils _rebuild_parameter")
_BFLOAT16 = _Global("torch BFloat16Storage")
_BOOL = _Global("torch BoolStorage")
_STORAGES = {
    _Global("torch FloatStorage"): "<f4",
    _Global("torch DoubleStorage"): "<f8",
    _Global("torch HalfStorage"): "<f2",
    _BFLOAT16: "<u2",
    _Global("torch LongStorage"): "<i8",
    _Global("torch IntStorage"): "<i4",
    _Global("torch ByteStorage"): "|u1",
    _BOOL: "|u1",
}
_GLOBALS = {_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER, *_STORAGES}

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_VALUES = {*_NUMBERS, "BINUNICODE", "SHORT_BINUNICODE"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _PickleMachine:
    """Interprets one pickle; builds None, bool, int, float, str, tuple, list, dict, markers.

    Only strings become dict keys, and nothing is hashed, compared or printed in depth: a
    short pickle can describe a structure that is exponentially large when walked.
    """

    def __init__(self, storages: dict[str, _Storage]):
        self.storages = storages
        self.stack: list = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def load(self, stream: io.BytesIO) -> object:
        for opcode, arg, _ in pickletools.genops(stream):
            self._step(opcode.name, arg)
        if len(self.stack) != 1 or self.marks:
            raise _Refused("a pickle that leaves its stack in disorder")
        return self.stack.pop()

    def _step(self, name: str, arg) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(arg)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(self._pop_mark()))
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("APPEND", "APPENDS"):
            self._extend(self._pop(1) if name == "APPEND" else self._pop_mark())
        elif name in ("SETITEM", "SETITEMS"):
            self._set_items(self._pop(2) if name == "SETITEM" else self._pop_mark())
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if arg is None else arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[arg])
        elif name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            stack.append(_find_global(arg or " ".join(self._pop(2))))
        elif name == "REDUCE":
            stack.append(_reduce(*self._pop(2)))
        elif name == "BUILD":
            self._build(*self._pop(1))
        elif name == "BINPERSID":
            stack.append(self._persistent(*self._pop(1)))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise _Refused(f"pickle opcode {name} is not allowed")

    def _pop(self, count: int) -> list:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise _Refused("a pickle that takes more from its stack than it put there")
        return self._cut(len(self.stack) - count)

    def _pop_mark(self) -> list:
        return self._cut(self.marks.pop())

    def _cut(self, start: int) -> list:
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _extend(self, values: list) -> None:
        if type(self.stack[-1]) is not list:
            raise _Refused("a pickle that appends to something other than a list")
        self.stack[-1].extend(values)

    def _set_items(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise _Refused("a pickle that sets items of something other than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                raise _Refused(f"a dict key of type {type(key).__name__}, only str is allowed")
            if key in target:
                raise _Refused(f"the name {_shown(key)} appears twice")
            target[key] = value

    def _build(self, state) -> None:
        # state_dict() hangs its version numbers on the OrderedDict as `_metadata`.
        dicts = type(self.stack[-1]) is type(state) is dict
        if not dicts or list(state) != ["_metadata"]:
            raise _Refused("a pickle that sets a state other than a state dict's _metadata")

    def _persistent(self, reference) -> _Storage:
        if type(reference) is not tuple or len(reference) not in (5, 6):
            raise _Refused("a persistent id that is not a storage")
        tag, storage_type, key, location, count, view = (*reference, None)[:6]
        texts = type(tag) is type(key) is type(location) is str
        # The type is looked at before it is hashed: it may be any structure.
        known = type(storage_type) is _Global and storage_type in _STORAGES
        if not (texts and tag == "storage" and known and view is None):
            raise _Refused("a persistent id that is not a storage, or a view of another storage")
        if type(count) is not int or count < 0:
            raise _Refused(f"storage {_shown(key)} has no valid size")
        storage = _Storage(key, storage_type, count)
        if self.storages.setdefault(key, storage) != storage:
            raise _Refused(f"storage {_shown(key)} is described twice, differently")
        return storage


def _find_global(name: str) -> _Global:
    found = _Global(name)
    if found not in _GLOBALS:
        raise _Refused(f"forbidden global {_shown(name.replace(' ', '.'))}; nothing was executed")
    return found


def _reduce(function, args) -> dict | _Tensor:
    if type(args) is tuple:
        if function == _ORDERED_DICT and not args:
            return {}
        # A seventh argument carries torch's conjugate and negative bits: values would change.
        plain = len(args) == 6 or (len(args) == 7 and args[6] is None)
        if function == _REBUILD_TENSOR and plain and type(args[0]) is _Storage:
            return _make_tensor(*args[:4])
        if function == _REBUILD_PARAMETER and len(args) == 3 and type(args[0]) is _Tensor:
            return args[0]
    raise _Refused("a call that is not part of a state dict")


def _make_tensor(storage: _Storage, offset, shape, strides) -> _Tensor:
    """A view whose every value lies inside its storage, by the claims of the pickle."""
    where = f"a tensor of storage {_shown(storage.key)}"
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        raise _Refused(f"{where} has a shape and strides that do not belong together")
    if len(shape) > MAX_AXES:
        raise _Refused(f"{where} has {len(shape):,} axes, more than {MAX_AXES}")
    numbers = (offset, *shape, *strides)
    if any(type(number) is not int or not 0 <= number < 2**62 for number in numbers):
        raise _Refused(f"{where} has a negative or invalid offset, size or stride")
    size = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if size == 0 or size > storage.count or last >= storage.count:
        raise _Refused(f"{where} is empty or reaches outside its {storage.count:,} values")
    return _Tensor(storage, offset, shape, strides, size)


def _shown(text: str) -> str:
    """`text` quoted, escaped and cut, fit for one line on a terminal."""
    return repr(text if len(text) <= 100 else f"{text[:100]}...")


def _read_legacy(data: bytes) -> dict[str, np.ndarray]:
    storages: dict[str, _Storage] = {}
    magic, position = _next_pickle(data, 0, "first pickle", storages)
    if magic != _MAGIC:
        raise _Refused(f"format not supported yet: a pickle without torch's magic; {_ACCEPTED}")
    protocol, position = _next_pickle(data, position, "protocol number", storages)
    if protocol != _PROTOCOL:
        raise _Refused(f"torch's legacy protocol must be {_PROTOCOL}")
    system, position = _next_pickle(data, position, "system information", storages)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise _Refused("written on a big-endian machine, or without saying so")
    state, position = _next_pickle(data, position, "object pickle", storages)
    keys, position = _next_pickle(data, position, "list of storage keys", storages)
    records = _state_dict(state)
    asked = sum(t.size * t.storage.dtype.itemsize for t in records.values())
    if asked > MAX_EXPANSION * len(data):
        raise _Refused(f"its tensors would take {asked:,} bytes, the file has {len(data):,}")
    values = _storage_values(data, position, keys, storages)
    return {name: _array(name, record, values) for name, record in records.items()}


def _next_pickle(data: bytes, position: int, what: str, storages: dict) -> tuple[object, int]:
    """The pickle that starts at `position`, and where it ends."""
    stream = io.BytesIO(memoryview(data)[position : position + MAX_PICKLE_BYTES])
    try:
        value = _PickleMachine(storages).load(stream)
    except _Refused as refusal:
        raise _Refused(f"{what}: {refusal}") from None
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise _Refused(f"{what}: damaged, truncated or over {MAX_PICKLE_BYTES:,} bytes") from error
    return value, position + stream.tell()


def _state_dict(state) -> dict[str, _Tensor]:
    """The flat state dict, taken out of a `state_dict` or `model` wrapper if it has one."""
    if type(state) is dict and list(state) in (["state_dict"], ["model"]):
        state = next(iter(state.values()))
    if type(state) is not dict or not state:
        raise _Refused(f"holds a {type(state).__name__} without tensors, not a state dict")
    for name, value in state.items():
        if len(name) > MAX_NAME_LENGTH or not name.isprintable():
            raise _Refused(f"the tensor name {_shown(name)} is not a short printable one")
        if type(value) is not _Tensor:
            found = f"{_shown(name)} is a {type(value).__name__.lstrip('_')}"
            raise _Refused(f"{found}, not a tensor: save the state dict alone, flat")
    return state


def _storage_values(data: bytes, position: int, keys, storages: dict) -> dict[str, np.ndarray]:
    """Storage key -> its values, one axis; every byte of the file is accounted for."""
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise _Refused("the list of storage keys is not a list of strings")
    if sorted(keys) != sorted(storages):
        raise _Refused("the storage keys differ from the storages of its tensors, or repeat")
    values = {}
    for key in keys:
        storage, where = storages[key], f"storage {_shown(key)}"
        count = int.from_bytes(data[position : position + 8], "little", signed=True)
        start = position + 8
        if start > len(data) or storage.count * storage.dtype.itemsize > len(data) - start:
            claim = f"which claims {storage.count:,} values"
            raise _Refused(f"truncated inside {where}, {claim}: copy or download it again")
        if count != storage.count:
            raise _Refused(f"{where} has {count:,} values, the pickle says {storage.count:,}")
        raw = np.frombuffer(data, storage.dtype, count, start)
        values[key] = _decode(raw, storage.type, where)
        position = start + raw.nbytes
    if position != len(data):
        raise _Refused(f"{len(data) - position:,} bytes too many at its end")
    return values


def _decode(raw: np.ndarray, kind: _Global, where: str) -> np.ndarray:
    if kind == _BFLOAT16:
        return (raw.astype("<u4") << 16).view("<f4")
    if kind == _BOOL and raw.max(initial=0) > 1:
        raise _Refused(f"{where} has a bool that is neither 0 nor 1")
    return raw.view(np.bool_) if kind == _BOOL else raw


def _array(name: str, tensor: _Tensor, values: dict[str, np.ndarray]) -> np.ndarray:
    """A copy of the tensor's values; `_make_tensor` has checked that the view stays inside."""
    flat = values[tensor.storage.key]
    view = np.lib.stride_tricks.as_strided(
        flat[tensor.offset :],
        tensor.shape,
        [step * flat.itemsize for step in tensor.strides],
        writeable=False,
    )
    array = view.copy(order="C")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise _Refused(f"tensor {_shown(name)} has NaN or infinite values")
    return array
