"""Torch's zip format: right values from torch's own files, one clear line from hostile ones."""

import os
import pathlib
import struct
import zipfile

import numpy as np
import pytest
from torch_bytes import (
    SIX,
    Call,
    Evil,
    Global,
    dumps,
    read,
    refusal,
    system_calls,
    tensor,
    torch_entries,
    zipped,
)

from medtl_jax.weights import checks
from medtl_jax.weights.files import read_weights
from medtl_jax.weights.pickles import MAX_PICKLE_BYTES

# Written by torch 2.13 with torch.save.
GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "formats"
GOOD = torch_entries({"w": tensor((2, 3), (3, 1))})


def changed(**entries):
    """The entries of a good file, some added, replaced or (None) left out."""
    return {k: v for k, v in (GOOD | entries).items() if v is not None}


def test_every_dtype_and_view_as_torch_wrote_them():
    file = read_weights(GOLDEN / "torch_zip_mixed.pth")
    expected = {
        "a": np.array([[0, 6, 12, 18], [1, 7, 13, 19]], np.float32),
        "b": np.array([5, 6, 7, 8], np.float32),
        "h": np.array([1.5, -2], np.float16),
        "bf": np.array([1.5, -2.25, 3], np.float32),
        "l": np.array(7, np.int64),
        "bo": np.array([True, False]),
        "i": np.array([[1, -2]], np.int32),
        "u": np.array([200], np.uint8),
        "s": np.array([-300], np.int16),
        "c": np.array([-3], np.int8),
        "d": np.array([0.1], np.float64),
        "p": np.array([2.5], np.float32),
    }
    assert (file.format, file.metadata) == ("torch-zip", {})
    assert list(file.tensors) == list(expected)
    for name, array in expected.items():
        assert file.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(file.tensors[name], array)
        flags = file.tensors[name].flags
        assert flags.c_contiguous and flags.owndata and flags.writeable


def test_a_checkpoint_with_optimizer_written_by_torch():
    # {"epoch", "state_dict" of a DataParallel model, Adam's state, a float, lists, tuples}
    tensors = read_weights(GOLDEN / "torch_zip_checkpoint.pth").tensors
    names = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(tensors) == ["conv.weight"] + [f"bn.{name}" for name in names]
    assert tensors["conv.weight"].shape == (2, 1, 3, 3)
    first = [-0.0033592884428799152, 0.17787575721740723, -0.27337902784347534]
    np.testing.assert_array_equal(tensors["conv.weight"].ravel()[:3], np.float32(first))
    # float64 sums printed by torch.
    sums = {"conv.weight": -0.5630528489127755, "bn.running_var": 1.8051828742027283}
    for name, expected in sums.items():
        assert tensors[name].sum(dtype=np.float64) == pytest.approx(expected, rel=1e-12)
    assert tensors["bn.num_batches_tracked"] == 1


def test_the_prefix_of_some_names_stays(tmp_path):
    state = {"module.w": tensor(), "v": tensor()}
    assert list(read(tmp_path, zipped(torch_entries(state))).tensors) == ["module.w", "v"]


def test_numbers_become_scalars(tmp_path):
    state = {"w": tensor(), "num_batches_tracked": 7, "scale": 0.5}
    tensors = read(tmp_path, zipped(torch_entries(state))).tensors
    assert tensors["num_batches_tracked"] == 7 and tensors["scale"] == 0.5
    assert tensors["num_batches_tracked"].dtype == np.int64
    assert tensors["scale"].dtype == np.float64 and tensors["scale"].shape == ()
    nan = torch_entries({"w": tensor(), "scale": np.nan})
    assert "tensor 'scale' has NaN" in refusal(tmp_path, zipped(nan))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("root", ["archive", "resnet18-f37072fd"])
def test_any_root_and_honest_compression(tmp_path, method, root):
    entries = torch_entries({"w": tensor((2, 3), (3, 1))}, root=root)
    tensors = read(tmp_path, zipped(entries, method)).tensors
    assert tensors["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_files_before_torch_2_1_name_no_byte_order(tmp_path):
    entries = changed(**{"archive/byteorder": None})
    assert read(tmp_path, zipped(entries)).tensors["w"].shape == (2, 3)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"archive/byteorder": b"big"}, "byte order is 'big'"),
        ({"archive/version": b"x"}, "version is 'x'"),
        ({"archive/version": b"3" * 2000}, "'version' is longer"),
        ({"archive/constants.pkl": b""}, "TorchScript"),
        ({"archive/code/__torch__.py": b""}, "TorchScript"),
        ({"archive/readme": b""}, "'readme', an entry that torch.save does not write"),
        ({"archive/sub/data.pkl": b""}, "'sub/data.pkl', an entry"),
        ({"other/data.pkl": b""}, "2 folders at its root"),
        ({"archive/data.pkl": None, "archive/data/data.pkl": b""}, "has no 'archive/data.pkl'"),
        ({"loose": b""}, "2 folders at its root"),
        ({"archive/data/../0": b""}, "unsafe entry name"),
        ({"../data.pkl": b""}, "unsafe entry name"),
        ({"/archive/data.pkl": b""}, "unsafe entry name"),
        ({"archive/data/0": bytes(20)}, "storage '0' has 20 bytes, the pickle claims 24"),
        ({"archive/data/0": bytes(28)}, "storage '0' has 28 bytes, the pickle claims 24"),
        ({"archive/data/0": None}, "storage '0' is in the pickle alone"),
        ({"archive/data/1": bytes(4)}, "storage '1' is in the file alone"),
        ({"archive/data.pkl": GOOD["archive/data.pkl"] + b"."}, "1 bytes too many"),
        ({"archive/data.pkl": GOOD["archive/data.pkl"][:-1]}, "damaged"),
        ({"archive/data.pkl": b""}, "damaged"),
    ],
)
def test_entries_that_torch_does_not_write(tmp_path, entries, words):
    assert words in refusal(tmp_path, zipped(changed(**entries)))


def test_nan_is_refused_by_name(tmp_path):
    buffers = {"0": np.array([0, 1, 2, np.nan], "<f4")}
    state = {"good": tensor((3,), (1,), count=4), "bad": tensor((4,), (1,), count=4)}
    message = refusal(tmp_path, zipped(torch_entries(state, buffers)))
    assert "tensor 'bad' has NaN or infinite values" in message


@pytest.mark.parametrize("where", list(system_calls("")))
def test_os_system_is_named_and_not_run(tmp_path, where):
    marker = tmp_path / "executed"
    message = refusal(tmp_path, zipped(torch_entries(system_calls(marker)[where])))
    assert f"forbidden global '{os.system.__module__}.system'; nothing was executed" in message
    assert not marker.exists()


def test_os_system_beside_the_state_dict(tmp_path):
    marker = tmp_path / "executed"
    checkpoint = {"state_dict": {"w": tensor()}, "optimizer": {0: Evil(marker)}}
    assert "nothing was executed" in refusal(tmp_path, zipped(torch_entries(checkpoint)))
    assert not marker.exists()


def test_a_foreign_class_beside_the_state_dict_is_named(tmp_path):
    arguments = Call(Global("argparse", "Namespace"), ())
    message = refusal(tmp_path, zipped(torch_entries({"model": {"w": tensor()}, "a": arguments})))
    assert "forbidden global 'argparse.Namespace'" in message
    assert "save the state dict alone" in message


def test_huge_claims_allocate_nothing(tmp_path):
    claim = 2**32
    state = {"w": tensor((claim,), (1,), kind="ByteStorage", count=claim)}
    data = zipped(torch_entries(state, {"0": np.zeros(100, "u1")}))
    assert len(data) < 1024
    assert "would take 4,294,967,296 bytes" in refusal(tmp_path, data)
    small = {"w": tensor((1,), (1,), kind="ByteStorage", count=claim)}
    data = zipped(torch_entries(small, {"0": np.zeros(100, "u1")}))
    assert "has 100 bytes, the pickle claims 4,294,967,296" in refusal(tmp_path, data)
    lying = bytearray(zipped(GOOD))
    entry = lying.index(b"archive/data/0", lying.index(b"PK\x01\x02")) - 46
    struct.pack_into("<LL", lying, entry + 20, 2**32 - 2, 2**32 - 2)
    assert "reaches outside the file's entries" in refusal(tmp_path, bytes(lying))


def test_bombs_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "MIN_UNPACKED_BYTES", 1000)
    count = 10**6
    view = {"w": tensor((1,), (1,), kind="ByteStorage", count=count)}
    data = zipped(torch_entries(view, {"0": np.zeros(count, "u1")}), zipfile.ZIP_DEFLATED)
    assert len(data) < 2000
    assert "would take 1,000,000 bytes" in refusal(tmp_path, data)
    # A storage that no tensor needs is not unpacked.
    beside = {"state_dict": {"w": tensor()}, "optimizer": [tensor(key="1", count=count // 4)]}
    buffers = {**SIX, "1": np.zeros(count // 4, "<f4")}
    data = zipped(torch_entries(beside, buffers), zipfile.ZIP_DEFLATED)
    assert list(read(tmp_path, data).tensors) == ["w"]
    long = changed(**{"archive/data.pkl": bytes(MAX_PICKLE_BYTES + 1)})
    assert "data.pkl is longer than" in refusal(tmp_path, zipped(long, zipfile.ZIP_DEFLATED))


def test_every_truncation_is_refused(tmp_path):
    whole = (GOLDEN / "torch_zip_mixed.pth").read_bytes()
    assert len(read(tmp_path, whole).tensors) == 12
    for length in range(0, len(whole), 7):
        refusal(tmp_path, whole[:length])
    refusal(tmp_path, whole[:-1])


def test_one_storage_seen_very_often_is_refused(tmp_path):
    buffers = {"0": np.zeros(10_000, "<f4")}
    many = {f"w{i}": tensor((10_000,), (1,), count=10_000) for i in range(20)}
    assert "would take 800,000 bytes" in refusal(tmp_path, zipped(torch_entries(many, buffers)))


def test_a_number_is_no_state_dict(tmp_path):
    entries = {"archive/data.pkl": dumps(3), "archive/version": b"3\n"}
    assert "holds a int, not a state dict" in refusal(tmp_path, zipped(entries))
