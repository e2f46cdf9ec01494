"""The .safetensors format: bytes laid out by hand, lies in the header, and repeatable writing."""

import hashlib
import json
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from torch_bytes import read, refusal

from medtl_jax.errors import UserError
from medtl_jax.weights import safetensors_files
from medtl_jax.weights.files import read_weights
from medtl_jax.weights.safetensors_files import write_safetensors

BODY = np.arange(6, dtype="<f4").tobytes()


def entry(shape=(6,), start=0, end=24, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def packed(header, body=BODY, length=None):
    """The bytes of a file, by the format's description; `header` is an object or its text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


# --- reading ----------------------------------------------------------------------------------


def test_a_file_by_hand(tmp_path):
    header = {
        "b": entry((2,), 16, 24),
        "a": entry((2, 2), 0, 16),
        "__metadata__": {"format": "pt", "note": "ü"},
    }
    data = packed(header)
    file = read(tmp_path, data)
    assert file.format == "safetensors"
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    assert file.metadata == {"format": "pt", "note": "ü"}
    assert list(file.tensors) == ["b", "a"]
    assert file.tensors["a"].tolist() == [[0, 1], [2, 3]]
    assert file.tensors["b"].tolist() == [4, 5]
    assert all(a.flags.owndata and a.flags.writeable for a in file.tensors.values())


@pytest.mark.parametrize(
    ("dtype", "body", "expected"),
    [
        ("F64", struct.pack("<d", 0.1), np.float64([0.1])),
        ("F16", b"\x00\x3e", np.float16([1.5])),
        ("BF16", b"\x10\xc0", np.float32([-2.25])),
        ("I64", struct.pack("<q", -(2**40)), np.int64([-(2**40)])),
        ("I32", struct.pack("<i", -3), np.int32([-3])),
        ("I16", struct.pack("<h", -300), np.int16([-300])),
        ("I8", b"\xff", np.int8([-1])),
        ("U64", b"\xff" * 8, np.uint64([2**64 - 1])),
        ("U32", b"\xff" * 4, np.uint32([2**32 - 1])),
        ("U16", b"\xff" * 2, np.uint16([2**16 - 1])),
        ("U8", b"\xff", np.uint8([255])),
        ("BOOL", b"\x01", np.array([True])),
    ],
)
def test_dtypes(tmp_path, dtype, body, expected):
    array = read(tmp_path, packed({"w": entry((1,), 0, len(body), dtype)}, body)).tensors["w"]
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)


def test_scalars(tmp_path):
    array = read(tmp_path, packed({"w": entry((), 0, 4)}, BODY[4:8])).tensors["w"]
    assert array.shape == () and array == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (packed({"w": entry()}, length=2**63), "header claims 9,223,372,036,854,775,808 bytes"),
        (packed({"w": entry()}, length=2**22), "truncated inside its header"),
        (packed({"w": entry()})[:40], "truncated inside its header"),
        (packed({"w": entry((7,), 0, 28)}), "'w' ends 4 bytes after the file"),
        (packed({"w": entry((2**30,), 0, 2**32)}), "ends 4,294,967,272 bytes after the file"),
        (packed({"w": entry((2**31, 2**31))}), "24 bytes, its shape and dtype take"),
        (packed({"w": entry((5,))}), "has 24 bytes, its shape and dtype take 20"),
        (packed({"w": entry((5,), 0, 20)}), "4 bytes too many at its end"),
        (packed({"w": entry((5,), 4, 24)}), "'w' leaves a gap"),
        (packed({"w": entry(), "v": entry((2,), 8, 16)}), "'v' overlaps"),
        (packed({"w": entry(), "v": entry()}), "overlaps"),
        (packed({"w": entry((6,), 24, 0)}), "has -24 bytes"),
        (packed({"w": entry((-6,))}), "invalid shape"),
        (packed({"w": entry((6.0,))}), "invalid shape"),
        (packed({"w": entry((True, 6))}), "invalid shape"),
        (packed({"w": entry((0,), 0, 0)}, b""), "'w' is empty"),
        (packed({"w": entry((1,) * 9 + (6,))}), "has 10 axes, more than 8"),
        (packed({"w": entry(dtype="F8_E4M3")}), "has dtype 'F8_E4M3'"),
        (packed({"w": entry(dtype=["F32"])}), "has dtype"),
        (packed({"w": {**entry(), "x": 1}}), "lacks a dtype, shape or data_offsets, or has more"),
        (packed({"w": {"dtype": "F32"}}), "lacks a dtype, shape or data_offsets"),
        (packed({"w": [1]}), "lacks a dtype"),
        (packed({"w": {**entry(), "data_offsets": [0]}}), "invalid shape or data_offsets"),
        (packed({"a\nb": entry()}), r"'a\nb' is not a short printable one"),
        (packed({"": entry()}), "'' is not a short printable one"),
        (packed({}, b""), "holds no tensors"),
        (packed({"__metadata__": {"a": 1}, "w": entry()}), "metadata is not a table of texts"),
        (packed({"__metadata__": [], "w": entry()}), "metadata is not a table of texts"),
        (packed(b'{"w": 1, "w": 2}'), "the name 'w' appears twice"),
        (packed(b'{"w": {"dtype": "F32", "dtype": "F16"}}'), "the name 'dtype' appears twice"),
        (packed(b'{"w": NaN}'), "holds NaN, which is not JSON"),
        (packed(b'{"w": '), "its header is damaged"),
        (packed(b"{\xff}"), "its header is damaged"),
        (packed(b'{"w":' + b"[" * 100_000), "its header is damaged"),
        (packed(b'{"w":' + b"9" * 5000 + b"}"), "its header is damaged"),
    ],
)
def test_lies_are_named(tmp_path, data, words):
    assert words in refusal(tmp_path, data)


def test_a_long_header_or_metadata_is_refused(tmp_path, monkeypatch):
    data = packed({"w": entry(), "__metadata__": {"a": "x" * 100}})
    monkeypatch.setattr(safetensors_files, "MAX_METADATA_BYTES", 100)
    assert "metadata has more than 100 characters" in refusal(tmp_path, data)
    monkeypatch.setattr(safetensors_files, "MAX_HEADER_BYTES", 100)
    assert "more than 100" in refusal(tmp_path, data)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_that_are_not_finite(tmp_path, value, dtype):
    data = safetensors.numpy.save({"good": np.ones(3), "bad": np.array([0, value], dtype)})
    assert "tensor 'bad' has NaN or infinite values" in refusal(tmp_path, data)


def test_a_bool_of_two(tmp_path):
    data = packed({"w": entry((1,), 0, 1, "BOOL")}, b"\x02")
    assert "a bool that is neither 0 nor 1" in refusal(tmp_path, data)


def test_every_truncation_and_any_extra_byte_is_refused(tmp_path):
    whole = packed({"w": entry((2, 3))})
    for length in range(len(whole)):
        refusal(tmp_path, whole[:length])
    assert "1 bytes too many" in refusal(tmp_path, whole + b"\0")


# --- writing ----------------------------------------------------------------------------------

TENSORS = {
    "conv/kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
    "big": np.arange(3, dtype=">f8"),
    "step": np.array(7, np.int64),
    "flag": np.array([True, False]),
    "half": np.array([1.5], ml_dtypes.bfloat16),
}


def test_written_files_are_read_back(tmp_path):
    path = tmp_path / "new" / "w.safetensors"
    metadata = {"z": "1", "a": "ü\n"}
    sha256 = write_safetensors(path, TENSORS, metadata)
    file = read_weights(path)
    assert file.sha256 == sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert file.metadata == metadata
    assert file.tensors.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(file.tensors[name], array.astype(file.tensors[name].dtype))
        assert file.tensors[name].shape == array.shape
    # The library itself accepts the bytes, too.
    library = safetensors.numpy.load(write_and_read(tmp_path, {"w": TENSORS["conv/kernel"]}))
    np.testing.assert_array_equal(library["w"], TENSORS["conv/kernel"])


def write_and_read(folder, tensors):
    write_safetensors(folder / "x", tensors, {})
    return (folder / "x").read_bytes()


def test_the_same_tensors_give_the_same_bytes_in_every_process(tmp_path):
    code = (
        "import sys, numpy as np; from medtl_jax.weights.safetensors_files import *;"
        "print(write_safetensors(sys.argv[1], {k: np.arange(3.) for k in 'cab'},"
        "{k: k for k in 'qwertyuiop'}))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "w")]
    hashes = {subprocess.check_output(command, text=True) for _ in range(2)}
    names = {"c", "a", "b"}
    here = write_safetensors(
        tmp_path / "w", {k: np.arange(3.0) for k in sorted(names)}, {k: k for k in "poiuytrewq"}
    )
    assert hashes == {here + "\n"}


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({}, {}, "there are no tensors"),
        ({"a\n": np.ones(1)}, {}, "printable"),
        ({"__metadata__": np.ones(1)}, {}, "cannot be a tensor's name"),
        ({"w": np.array([np.nan])}, {}, "'w' has NaN"),
        ({"w": np.ones(0)}, {}, "'w' is empty"),
        ({"w": np.array(["x"])}, {}, "no plain number"),
        ({"w": np.array([1j])}, {}, "no plain number"),
        ({"w": np.array([None])}, {}, "no plain number"),
        ({"w": np.ones(1)}, {"epoch": 3}, "not a table of texts"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, tensors, metadata, words):
    path = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match=words) as caught:
        write_safetensors(path, tensors, metadata)
    assert str(caught.value).startswith(f"cannot write {path}: ")
    assert list(tmp_path.iterdir()) == []
