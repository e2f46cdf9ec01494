"""Weights in .npz archives: names and values kept, nothing unpickled, no lie believed."""

import io
import pickle
import struct

import numpy as np
import pytest
from torch_bytes import Evil, read, refusal, zipped

from medtl_jax.weights import checks
from medtl_jax.weights.files import read_weights


def npz(write=np.savez, **arrays):
    stream = io.BytesIO()
    write(stream, **arrays)
    return stream.getvalue()


def npy(shape, descr="<f4", body=b""):
    stream = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + body


def raw_npy(header):
    """A .npy array of one float32 whose header is the text `header`."""
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(4)


# A bracket left open, too deep, unhashable keys, a bool for a size.
MALFORMED = [
    "{'descr': (",
    "-" * 9000 + "1",
    "{[]: 1}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}",
]


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_names_values_and_layout(tmp_path, write):
    arrays = {
        "inception_3a/1x1/w": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "scalar": np.array(3, np.int64),
        "half": np.array([1.5], np.float16),
        "flag": np.array([True, False]),
    }
    data = npz(write, **arrays)
    file = read(tmp_path, data)
    assert (file.format, file.metadata) == ("npz", {})
    assert list(file.tensors) == list(arrays)
    for name, array in arrays.items():
        found = file.tensors[name]
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype.newbyteorder("=") and found.dtype.isnative
        assert found.flags.c_contiguous and found.flags.owndata and found.flags.writeable


def test_real_files(shared):
    googlenet = read_weights(shared / "weights" / "bvlc_googlenet_caffe.npz")
    # Counts and hash from the publisher's description of the file.
    assert len(googlenet.tensors) == 116
    assert sum(array.size for array in googlenet.tensors.values()) == 6_998_552
    assert googlenet.tensors["inception_3a/1x1/w"].shape == (64, 192, 1, 1)
    assert googlenet.sha256.startswith("ef4a5840ad123fe4")
    vgg = read_weights(shared / "weights" / "vgg16_imagenet_notop_keras_HWIO.npz")
    assert len(vgg.tensors) == 26
    assert sum(array.size for array in vgg.tensors.values()) == 14_714_688
    assert vgg.tensors["block1_conv1/kernel"].shape == (3, 3, 3, 64)


def test_objects_are_never_unpickled(tmp_path):
    marker = tmp_path / "executed"
    body = pickle.dumps(Evil(marker))
    data = zipped({"w.npy": npy((1,), "<f4", bytes(4)), "x.npy": npy((1,), "|O", body)})
    assert "x is an array of Python objects, which are never unpickled" in refusal(tmp_path, data)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"w.npy": npy((2**20, 2**10), body=bytes(24))}, "declares (1048576, 1024) float32 but"),
        ({"w.npy": npy((2,), body=bytes(7))}, "but the entry has"),
        ({"w.npy": npy((2,), body=bytes(9))}, "but the entry has"),
        ({"w.npy": npy((0,))}, "'w' is empty"),
        ({"w.npy": npy((1,) * 9, body=bytes(4))}, "has 9 axes, more than 8"),
        ({"w.npy": npy((1,), "<U1", bytes(4))}, "no plain number"),
        ({"w.npy": npy((1,), "<c8", bytes(8))}, "no plain number"),
        ({"w.npy": npy((1,), "<M8[s]", bytes(8))}, "no plain number"),
        ({"w.npy": npy((1,), [("a", "<f4")], bytes(4))}, "no plain number"),
        ({"w.npy": npy((1,), "|b1", b"\x02")}, "a bool that is neither 0 nor 1"),
        ({"w.npy": npy((1,), "<f4", b"\x00\x00\xc0\x7f")}, "tensor 'w' has NaN"),
        ({"w.npy": npy((1,), "<f4", b"\x00\x00\x80\x7f")}, "tensor 'w' has NaN or infinite"),
        ({"w.npy": b"\x93NUMPY\x01\x00\xff\xff"}, "w has a damaged .npy header (ValueError: "),
        ({"w.npy": b""}, "w has a damaged .npy header (ValueError: "),
        *(({"w.npy": raw}, "w has a damaged .npy header (") for raw in map(raw_npy, MALFORMED)),
        ({".npy": npy((1,), body=bytes(4))}, "'' is not a short printable one"),
        ({"../w.npy": npy((1,), body=bytes(4))}, "unsafe entry name"),
        ({"/w.npy": npy((1,), body=bytes(4))}, "unsafe entry name"),
        ({"w.npy": npy((1,), body=bytes(4)), "x.txt": b""}, "neither torch's nor an .npz"),
    ],
)
def test_lies_are_named(tmp_path, entries, words):
    assert words in refusal(tmp_path, zipped(entries))


def test_bombs_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "MIN_UNPACKED_BYTES", 1000)
    data = npz(np.savez_compressed, w=np.zeros(100_000, np.float32))
    assert "its tensors would take 400,128 bytes" in refusal(tmp_path, data)
    assert len(data) < 1024
    honest = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    assert read(tmp_path, npz(np.savez_compressed, w=honest)).tensors["w"].size == 10_000


def test_every_truncation_is_refused(tmp_path):
    whole = npz(w=np.ones((2, 3), np.float32))
    for length in range(len(whole)):
        refusal(tmp_path, whole[:length])
    assert read(tmp_path, whole).tensors["w"].tolist() == [[1, 1, 1]] * 2
