"""The one entry to weight files: formats told by content, and no damage that escapes."""

import io
import json
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_bytes import Evil, dumps, legacy, read, refusal, tensor, torch_entries, zipped

from medtl_jax.errors import UserError
from medtl_jax.weights import files
from medtl_jax.weights.files import read_weights

STATE = {"w": tensor((2, 3), (3, 1)), "v": tensor((3,), (2,), 1)}
ARRAYS = {"w": np.arange(6, dtype="f4").reshape(2, 3), "v": np.array([1, 3, 5], "f4")}


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


WHOLE = {
    "torch-legacy": legacy(STATE),
    "torch-zip": zipped(torch_entries(STATE)),
    "safetensors": safetensors.numpy.save(ARRAYS, {"a": "b"}),
    "npz": zipped({f"{name}.npy": npy(array) for name, array in ARRAYS.items()}),
}


@pytest.mark.parametrize("kind", list(WHOLE))
def test_formats_are_told_by_content(tmp_path, kind):
    file = read(tmp_path, WHOLE[kind])
    assert file.format == kind
    assert file.path == tmp_path / "weights"
    assert file.metadata == ({"a": "b"} if kind == "safetensors" else {})
    assert file.tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(file.tensors[name], array)


def test_a_header_that_starts_like_a_pickle(tmp_path):
    # 128 bytes of header: the file then starts with 0x80, as a pickle does.
    text = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    data = (128).to_bytes(8, "little") + text.ljust(128) + bytes(4)
    assert read(tmp_path, data).format == "safetensors"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes, not between 1 and"),
        (b"GIF89a" + bytes(100), "no weight format known here; accepted: torch's .pth (legacy"),
        (b"<html><body>404</body></html>", "no weight format known here"),
        (b"\x80", "damaged"),
        (b"\x80\x02}.", "a pickle without torch's magic number"),
        (dumps({"w": [1.0]}), "a pickle without torch's magic number"),
        (zipped({}), "no weight format known here"),
        (zipped({"a.txt": b""}), "neither torch's nor an .npz"),
        (zipped({"data.pkl": b""}), "neither torch's nor an .npz"),
        (zipped({"config.json": b"", "model.weights.h5": b""}), "unpack its model.weights.h5"),
        (b"PK\x03\x04", "directory is missing"),
    ],
)
def test_other_content_is_refused(tmp_path, data, words):
    assert words in refusal(tmp_path, data)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_weights(tmp_path / "absent.pth")
    with pytest.raises(UserError, match="not a regular file"):
        read_weights(tmp_path)
    with pytest.raises(UserError, match="embedded null byte"):
        read_weights("a\0b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        read_weights(tmp_path / "pipe")


def test_a_file_without_permission(tmp_path, monkeypatch):
    def deny(path):
        raise PermissionError(13, "Permission denied", str(path))

    # The tests may run as root, whom no mode stops.
    monkeypatch.setattr(files.pathlib.Path, "read_bytes", deny)
    (tmp_path / "w").write_bytes(b"1")
    with pytest.raises(UserError, match=r"w: Permission denied$"):
        read_weights(tmp_path / "w")


def test_a_huge_file_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 10)
    monkeypatch.setattr(files.pathlib.Path, "read_bytes", lambda path: pytest.fail("read"))
    assert "not between 1 and 10" in refusal(tmp_path, WHOLE["npz"])


# --- fuzzing --------------------------------------------------------------------------------

EDITS = st.lists(
    st.tuples(
        st.integers(0, 10_000),
        st.sampled_from(["flip", "byte", "number", "splice", "cut"]),
        st.integers(0, 2**32 - 1),
    ),
    max_size=4,
)
NUMBERS = [0, 1, 2**31 - 1, 2**32 - 1]


def damaged(data, edits):
    """`data` with bits flipped, bytes and numbers replaced, pieces moved, and its end cut off."""
    result = bytearray(data)
    for position, kind, value in edits:
        if not result:
            break
        place = position % len(result)
        if kind == "flip":
            result[place] ^= 1 << value % 8
        elif kind == "byte":
            result[place] = value % 256
        elif kind == "number":
            result[place : place + 4] = NUMBERS[value % 4].to_bytes(4, "little")
        elif kind == "splice":
            start = value % len(data)
            result[place : place + 16] = data[start : start + 16]
        elif value % 3 == 0:
            del result[place:]
    return bytes(result)


def rezipped(data, edits):
    """The archive `data` with its entries damaged and their checksums right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    # One in two edits goes to the first entry (data.pkl, or an array with its header).
    for number, edit in enumerate(edits):
        name = list(entries)[edit[0] % len(entries) if number % 2 else 0]
        entries[name] = damaged(entries[name], [edit])
    return zipped(entries)


def outcome(folder, data, limit):
    """Reads `data`; the only ends are the tensors, which are returned, and None, a refusal."""
    path = folder / "fuzz"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        tensors = read_weights(path).tensors
    except UserError as error:
        assert str(error).isprintable()
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # Deflate's own claim may be believed up to `MIN_UNPACKED_BYTES`.
        assert peak < 40 * 2**20
    assert tensors
    assert sum(array.nbytes for array in tensors.values()) <= limit
    assert all(np.isfinite(array).all() for array in tensors.values())
    return tensors


@pytest.mark.parametrize("kind", list(WHOLE))
@settings(max_examples=150, deadline=None)
@given(edits=EDITS, inside=st.booleans())
def test_damage_gives_weights_or_one_refusal(tmp_path_factory, kind, edits, inside):
    whole = WHOLE[kind]
    change = rezipped if inside and whole.startswith(b"PK") else damaged
    data = change(whole, edits)
    tensors = outcome(tmp_path_factory.getbasetemp(), data, 4 * len(whole))
    assert tensors is not None or data != whole


@pytest.mark.parametrize("make", [legacy, lambda state: zipped(torch_entries(state))])
@settings(max_examples=150, deadline=None)
@given(edits=EDITS)
def test_no_damage_makes_a_pickle_run(tmp_path_factory, make, edits):
    folder = tmp_path_factory.getbasetemp()
    marker = folder / "executed"
    data = make({**STATE, "x": Evil(marker)})
    changed = rezipped(data, edits) if data.startswith(b"PK") else damaged(data, edits)
    tensors = outcome(folder, changed, 4 * len(data))
    assert tensors is None or "x" not in tensors
    assert not marker.exists()
