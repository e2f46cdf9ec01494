"""Pickles as torch writes them, interpreted without anything that can be executed.

The pickle is decoded by `pickletools` and interpreted here, not by `pickle.Unpickler`: no
callable is in reach, and a dict key of a million nested tuples or a memo index of 2**31 cannot
take the process down.
"""

import dataclasses
import io
import math
import pickletools

import ml_dtypes
import numpy as np

from medtl_jax.weights.checks import MAX_AXES, RefusedError, shown

MAX_PICKLE_BYTES = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class Global:
    """An allowed global of a pickle, by "module name": a marker, nothing that can be called."""

    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A run of `count` values outside the pickle; `type` is one of torch's storage classes."""

    key: str
    type: Global
    count: int

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(_STORAGES[self.type])


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view into a storage; offset and strides count values, as in torch."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    size: int


_ORDERED_DICT = Global("collections OrderedDict")
_REBUILD_TENSOR = Global("torch._utils _rebuild_tensor_v2")
_REBUILD_PARAMETER = Global("torch._utils _rebuild_parameter")
_STORAGES = {
    Global("torch FloatStorage"): "<f4",
    Global("torch DoubleStorage"): "<f8",
    Global("torch HalfStorage"): "<f2",
    Global("torch BFloat16Storage"): ml_dtypes.bfloat16,
    Global("torch LongStorage"): "<i8",
    Global("torch IntStorage"): "<i4",
    Global("torch ShortStorage"): "<i2",
    Global("torch CharStorage"): "|i1",
    Global("torch ByteStorage"): "|u1",
    Global("torch BoolStorage"): "|b1",
}
_GLOBALS = {_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER, *_STORAGES}

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_VALUES = {*_NUMBERS, "BINUNICODE", "SHORT_BINUNICODE"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """Interprets one pickle; builds None, bool, int, float, str, tuple, list, dict, markers.

    Only strings and integers become dict keys, and nothing is hashed, compared or printed in
    depth: a short pickle can describe a structure that is exponentially large when walked.
    """

    def __init__(self, storages: dict[str, Storage]):
        self.storages = storages
        self.stack: list = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def load(self, stream: io.BytesIO) -> object:
        for opcode, arg, _ in pickletools.genops(stream):
            self._step(opcode.name, arg)
        if len(self.stack) != 1 or self.marks:
            raise RefusedError("a pickle that leaves its stack in disorder")
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
            raise RefusedError(f"pickle opcode {name} is not allowed")

    def _pop(self, count: int) -> list:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise RefusedError("a pickle that takes more from its stack than it put there")
        return self._cut(len(self.stack) - count)

    def _pop_mark(self) -> list:
        return self._cut(self.marks.pop())

    def _cut(self, start: int) -> list:
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _extend(self, values: list) -> None:
        if type(self.stack[-1]) is not list:
            raise RefusedError("a pickle that appends to something other than a list")
        self.stack[-1].extend(values)

    def _set_items(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise RefusedError("a pickle that sets items of something other than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                kind = type(key).__name__
                raise RefusedError(f"a dict key of type {kind}, only str and int are allowed")
            if key in target:
                raise RefusedError(f"the name {shown(str(key))} appears twice")
            target[key] = value

    def _build(self, state) -> None:
        # state_dict() hangs its version numbers on the OrderedDict as `_metadata`.
        dicts = type(self.stack[-1]) is type(state) is dict
        if not dicts or list(state) != ["_metadata"]:
            raise RefusedError("a pickle that sets a state other than a state dict's _metadata")

    def _persistent(self, reference) -> Storage:
        if type(reference) is not tuple or len(reference) not in (5, 6):
            raise RefusedError("a persistent id that is not a storage")
        tag, storage_type, key, location, count, view = (*reference, None)[:6]
        texts = type(tag) is type(key) is type(location) is str
        # The type is looked at before it is hashed: it may be any structure.
        known = type(storage_type) is Global and storage_type in _STORAGES
        if not (texts and tag == "storage" and known and view is None):
            raise RefusedError(
                "a persistent id that is not a storage, or a view of another storage"
            )
        if type(count) is not int or count < 0:
            raise RefusedError(f"storage {shown(key)} has no valid size")
        storage = Storage(key, storage_type, count)
        if self.storages.setdefault(key, storage) != storage:
            raise RefusedError(f"storage {shown(key)} is described twice, differently")
        return storage


def _find_global(name: str) -> Global:
    found = Global(name)
    if found not in _GLOBALS:
        forbidden = f"forbidden global {shown(name.replace(' ', '.'))}; nothing was executed"
        raise RefusedError(f"{forbidden}, save the state dict alone")
    return found


def _reduce(function, args) -> dict | Tensor:
    if type(args) is tuple:
        if function == _ORDERED_DICT and not args:
            return {}
        # A seventh argument carries torch's conjugate and negative bits: values would change.
        plain = len(args) == 6 or (len(args) == 7 and args[6] is None)
        if function == _REBUILD_TENSOR and plain and type(args[0]) is Storage:
            return _make_tensor(*args[:4])
        if function == _REBUILD_PARAMETER and len(args) == 3 and type(args[0]) is Tensor:
            return args[0]
    raise RefusedError("a call that is not part of a state dict")


def _make_tensor(storage: Storage, offset, shape, strides) -> Tensor:
    """Returns a view whose every value lies inside its storage, by the pickle's claims."""
    where = f"a tensor of storage {shown(storage.key)}"
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        raise RefusedError(f"{where} has a shape and strides that do not belong together")
    if len(shape) > MAX_AXES:
        raise RefusedError(f"{where} has {len(shape):,} axes, more than {MAX_AXES}")
    numbers = (offset, *shape, *strides)
    if any(type(number) is not int or not 0 <= number < 2**62 for number in numbers):
        raise RefusedError(f"{where} has a negative or invalid offset, size or stride")
    size = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if size == 0 or size > storage.count or last >= storage.count:
        raise RefusedError(f"{where} is empty or reaches outside its {storage.count:,} values")
    return Tensor(storage, offset, shape, strides, size)


def load_pickle(data: bytes, position: int, what: str, storages: dict[str, Storage]):
    """Returns the value of the pickle at `position` in `data`, and where the pickle ends.

    The value is made of None, bool, int, float, str, tuple, list, dict (keys str or int),
    `Global`, `Storage` and `Tensor`; it may contain itself. Every storage that the pickle names
    is added to `storages`.

    Raises:
      RefusedError: damaged, longer than `MAX_PICKLE_BYTES`, or beyond what a state dict needs;
        `what` names the pickle in the message.
    """
    stream = io.BytesIO(memoryview(data)[position : position + MAX_PICKLE_BYTES])
    try:
        value = _Machine(storages).load(stream)
    except RefusedError as refusal:
        raise RefusedError(f"{what}: {refusal}") from None
    except (ValueError, TypeError, IndexError, KeyError) as error:
        limit = f"{MAX_PICKLE_BYTES:,} bytes"
        raise RefusedError(f"{what}: damaged, truncated or over {limit}") from error
    return value, position + stream.tell()
