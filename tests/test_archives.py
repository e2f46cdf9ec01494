"""Zip archives from outside: honest ones are read, each lie of a hostile one is named."""

import io
import math
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl_jax.archives import ArchiveError, open_archive, read_entry, read_npy_header

END64 = struct.Struct("<4sQHHLLQQQQ")


def zipped(entries, method=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return stream.getvalue()


def directory_entry(data, index=0):
    """Where the directory's entry `index` starts."""
    start = -1
    for _ in range(index + 1):
        start = data.index(b"PK\x01\x02", start + 1)
    return start


def patched(data, offset, layout, value, index=0):
    """`data` with one field of a directory's entry replaced."""
    result = bytearray(data)
    struct.pack_into(layout, result, directory_entry(data, index) + offset, value)
    return bytes(result)


def refusal(data):
    with pytest.raises(ArchiveError) as caught:
        archive = open_archive(io.BytesIO(data))
        for info in archive.infolist():
            read_entry(archive, info)
    assert str(caught.value).isprintable()
    return str(caught.value)


METHOD, FLAGS, CRC, PACKED, SIZE, PLACE = 10, 8, 16, 20, 24, 42
TWO = zipped({"a/x": bytes(100), "a/y": b"1" * 50})
DEFLATED = zipped({"a": bytes(range(200)) * 3}, zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_honest_archives(method):
    entries = {"a/x": bytes(1000), "b": b"", "ü/kernel:0.npy": bytes(range(256))}
    archive = open_archive(io.BytesIO(zipped(entries, method)))
    assert {i.filename: read_entry(archive, i) for i in archive.infolist()} == entries


def test_zip64_and_comments():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        with archive.open("a", "w", force_zip64=True) as entry:
            entry.write(b"abc")
        archive.comment = b"PK" * 100
    archive = open_archive(stream)
    assert read_entry(archive, archive.getinfo("a")) == b"abc"


@pytest.mark.parametrize(
    "name",
    ["../a", "a/../../b", "/etc/passwd", "a//b", "a/./b", "a/", "C:/a", "..\\a", "a\x00b"],
)
def test_unsafe_names(name):
    # zipfile itself would cut the name at the NUL byte when writing it.
    written = name.replace("\x00", "0")
    data = zipped({written: b"1"})
    data = data.replace(written.encode(), name.encode()) if written != name else data
    assert "unsafe entry name" in refusal(data)


def test_a_name_twice():
    with pytest.warns(UserWarning, match="Duplicate"):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("a", b"1")
            archive.writestr("a", b"2")
    assert "appears twice" in refusal(stream.getvalue())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (patched(TWO, FLAGS, "<H", 1), "is encrypted"),
        (patched(TWO, FLAGS, "<H", 0x20), "is encrypted or patched"),
        (patched(TWO, METHOD, "<H", 12), "compression method 12"),
        (patched(TWO, METHOD, "<H", 99), "compression method 99"),
        (patched(TWO, SIZE, "<L", 101), "claims 101 bytes"),
        (patched(TWO, SIZE, "<L", 99), "claims 99 bytes"),
        (patched(TWO, SIZE, "<L", 2**32 - 2), "claims 4,294,967,294 bytes"),
        (patched(DEFLATED, SIZE, "<L", 2**32 - 2), "claims 4,294,967,294 bytes"),
        (patched(DEFLATED, SIZE, "<L", 601), "fewer bytes than it declares"),
        (patched(DEFLATED, SIZE, "<L", 599), "CRC"),
        (patched(TWO, CRC, "<L", 1), "CRC"),
        (patched(TWO, PLACE, "<L", 0, index=1), "overlaps entry 'a/x'"),
        (patched(TWO, PLACE, "<L", 7, index=1), "not where the directory says"),
        (patched(TWO, PLACE, "<L", 2**31), "not where the directory says"),
        (patched(patched(TWO, SIZE, "<L", 150), PACKED, "<L", 150), "overlaps entry 'a/x'"),
        (
            patched(patched(TWO, SIZE, "<L", 999, index=1), PACKED, "<L", 999, index=1),
            "reaches outside",
        ),
        (b"PK\x03\x04" + bytes(200), "directory is missing"),
        (b"", "directory is missing"),
    ],
)
def test_lies_are_named(data, words):
    assert words in refusal(data)


def test_every_truncation_is_refused():
    for length in range(len(TWO)):
        refusal(TWO[:length])


@pytest.mark.parametrize("wide", [False, True])
def test_a_directory_of_a_gibibyte_is_not_read(wide):
    data = bytearray(TWO)
    end = data.rindex(b"PK\x05\x06")
    if wide:
        record = END64.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, 2, 2, 2**30, 0)
        locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
        data = data[:end] + record + locator + data[end:]
    else:
        struct.pack_into("<L", data, end + 12, 2**30)
    assert "directory claims 1,073,741,824 bytes" in refusal(bytes(data))


def test_a_bomb_of_nested_overlaps_is_refused():
    # Many directory entries that share one deflated block (David Fifield, 2019).
    data = zipped({"a": bytes(10_000), "b": bytes(10_000)}, zipfile.ZIP_DEFLATED)
    assert "overlaps" in refusal(patched(data, PLACE, "<L", 0, index=1))


def npy(shape, descr="<f4", body=b"", version=(1, 0)):
    stream = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    write = {
        (1, 0): np.lib.format.write_array_header_1_0,
        (2, 0): np.lib.format.write_array_header_2_0,
    }[version]
    write(stream, header)
    return stream.getvalue() + body


def raw_npy(header):
    """A .npy array of one float32 whose header is the text `header`."""
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(4)


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': %s}"
MALFORMED = {
    "empty": "",
    "no dict": "1",
    "open bracket": "{'descr': (",
    "open text": '{\'descr\': """',
    "bad indentation": " x\n  y\n z",
    "NUL": "{\0}",
    "unhashable key": "{[]: 1}",
    "keys of two types": "{1: 1, 'a': 1}",
    "key missing": "{'descr': '<f4', 'fortran_order': False}",
    "deep": HEADER % ("(" * 4000),
    "deep signs": HEADER % ("-" * 9000 + "1"),
    "long": HEADER % ("1," * 9000),
    "call": HEADER % "__import__('os').getpid()",
    "shape of texts": HEADER % "('a',)",
    "shape is a number": HEADER % "1",
    "shape of floats": HEADER % "(1.0,)",
    "shape of bools": HEADER % "(True,)",
    "shape of many bools": HEADER % f"({'True,' * 1900})",
    "many digits": HEADER % f"({'9' * 5000},)",
    "dtype of a dict": HEADER.replace("'<f4'", "{'a': 1}") % "(1,)",
    "no dtype": HEADER.replace("'<f4'", "'nothing'") % "(1,)",
    "dtype of a tuple": HEADER.replace("'<f4'", "('<f4', -1)") % "(1,)",
    "a huge dtype": HEADER.replace("'<f4'", "'V99999999999999'") % "(1,)",
}


@pytest.mark.parametrize("header", MALFORMED.values(), ids=MALFORMED)
def test_malformed_npy_headers(header):
    data = raw_npy(header)
    with pytest.raises(ArchiveError) as caught:
        read_npy_header(io.BytesIO(data), "w", len(data))
    message = str(caught.value)
    assert message.startswith("w has a damaged .npy header (") and "\n" not in message
    assert len(message) < 300


@settings(max_examples=300)
@given(st.lists(st.sampled_from([*"{}()[]'\\\n\0-1LT,: #~", "descr", "shape", "lambda"])))
def test_any_npy_header_is_an_array_or_refused(parts):
    for header in ("".join(parts), HEADER % "".join(parts)):
        data = raw_npy(header)
        try:
            shape, dtype = read_npy_header(io.BytesIO(data), "w", len(data))
        except ArchiveError:
            continue
        assert math.prod(shape) == 1 and dtype == np.float32


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_npy_headers(version):
    data = npy((2, 3), body=bytes(24), version=version)
    shape, dtype = read_npy_header(io.BytesIO(data), "w", len(data))
    assert (shape, dtype) == ((2, 3), np.float32)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (npy((2**20, 2**12), body=bytes(24)), r"declares \(1048576, 4096\) float32 but"),
        (npy((2, 3), body=bytes(23)), "but the entry has"),
        (npy((2, 3), body=bytes(25)), "but the entry has"),
        (npy((-2, -3), body=bytes(24)), "but the entry has"),
        (npy((1,), "|O", bytes(8)), "Python objects, which are never unpickled"),
        (b"\x93NUMPY\x03\x00" + npy((1,))[8:], r"version \(3, 0\)"),
    ],
)
def test_npy_headers_that_lie(data, words):
    with pytest.raises(ArchiveError, match=words):
        read_npy_header(io.BytesIO(data), "w", len(data))
