"""Zip archives from outside, and the .npy arrays in them, checked before anything is read."""

import math
import struct
import zipfile
import zlib
from typing import BinaryIO

import numpy as np

MAX_DIRECTORY_BYTES = 16 * 2**20
# Deflate cannot do better than 1032 to 1.
_MAX_DEFLATION = 1032
_END, _END64, _LOCATOR = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_END_BYTES, _END64_BYTES, _LOCATOR_BYTES, _LOCAL_BYTES = 22, 56, 20, 30
_MAX_COMMENT_BYTES = 2**16
# Bits of an entry that is encrypted, patched or strongly encrypted.
_UNREADABLE = 0x1 | 0x20 | 0x40
_NPY_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class ArchiveError(Exception):
    """Why an archive is refused, on one line."""


def open_archive(file: BinaryIO) -> zipfile.ZipFile:
    """Returns the archive in `file`, whose entries' names, places and sizes are sound.

    Raises:
      ArchiveError: not a zip file; a directory of more than `MAX_DIRECTORY_BYTES`; a name that
        is absolute, leaves its folder, is that of a folder or appears twice; an entry that is
        encrypted, of another compression than deflate, outside the file, overlapping another,
        or of a size that its bytes cannot unpack to.
    """
    try:
        size = file.seek(0, 2)
        _check_directory(file, size)
        archive = zipfile.ZipFile(file)
        names = set()
        for info in archive.infolist():
            _check_name(info, names)
            _check_sizes(info)
        _check_places(file, archive)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise ArchiveError(" ".join(str(error).split())) from error
    return archive


def read_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Returns the content of an entry, exactly `info.file_size` bytes with the right checksum.

    Raises:
      ArchiveError: damaged, or not of the size that it declares.
    """
    try:
        data = archive.read(info)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise ArchiveError(f"entry {info.filename!r}: {' '.join(str(error).split())}") from error
    if len(data) != info.file_size:
        raise ArchiveError(f"entry {info.filename!r} unpacks to fewer bytes than it declares")
    return data


def read_npy_header(stream: BinaryIO, name: str, size: int) -> tuple[tuple[int, ...], np.dtype]:
    """Returns shape and dtype of the .npy array of `size` bytes in all that starts at `stream`.

    Raises:
      ArchiveError: a damaged header, an array of Python objects, of another .npy version than
        1 or 2, or one whose header contradicts `size`.
    """
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _NPY_READERS:
            raise ArchiveError(f"{name} has .npy version {version}")
        shape, _, dtype = _NPY_READERS[version](stream)
    except ArchiveError:
        raise
    # A header is a Python literal: there are many ways, TokenError to MemoryError, to be none.
    except Exception as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise ArchiveError(f"{name} has a damaged .npy header ({detail})") from error
    shown = str(shape)[:100]
    if any(type(count) is not int for count in shape):
        raise ArchiveError(f"{name} has a damaged .npy header (its shape is {shown})")
    if dtype.hasobject:
        raise ArchiveError(
            f"{name} is an array of Python objects, which are never unpickled: save it as numbers"
        )
    if min(shape, default=0) < 0 or size != stream.tell() + math.prod(shape) * dtype.itemsize:
        raise ArchiveError(f"{name} declares {shown} {dtype} but the entry has {size} bytes")
    return shape, dtype


def _check_directory(file: BinaryIO, size: int) -> None:
    """Refuses a directory too large to be read; where it is, and how it looks, is for zipfile."""
    tail_bytes = min(size, _END64_BYTES + _LOCATOR_BYTES + _END_BYTES + _MAX_COMMENT_BYTES)
    file.seek(size - tail_bytes)
    tail = file.read(tail_bytes)
    end = tail.rfind(_END)
    if end < 0 or end + _END_BYTES > len(tail):
        raise ArchiveError("truncated, or not a zip file: its directory is missing")
    (length,) = struct.unpack_from("<L", tail, end + 12)
    end64 = end - _LOCATOR_BYTES - _END64_BYTES
    if end64 >= 0 and tail[end - _LOCATOR_BYTES :].startswith(_LOCATOR):
        if not tail[end64:].startswith(_END64):
            raise ArchiveError("its zip64 directory is missing")
        (length,) = struct.unpack_from("<Q", tail, end64 + 40)
    if length > MAX_DIRECTORY_BYTES:
        raise ArchiveError(f"its directory claims {length:,} bytes, over {MAX_DIRECTORY_BYTES:,}")


def _check_name(info: zipfile.ZipInfo, names: set[str]) -> None:
    """Refuses a name that is unsafe or in `names`, and adds it there."""
    name = info.filename
    # A NUL byte cuts `filename` short; on Windows a backslash is turned into a slash.
    if name != info.orig_filename or "\\" in name or name[1:2] == ":":
        raise ArchiveError(f"unsafe entry name {info.orig_filename[:100]!r}")
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise ArchiveError(f"unsafe entry name {name[:100]!r}: absolute, a folder or leaving it")
    if name in names:
        raise ArchiveError(f"entry {name[:100]!r} appears twice")
    names.add(name)


def _check_sizes(info: zipfile.ZipInfo) -> None:
    name = f"entry {info.filename[:100]!r}"
    if info.flag_bits & _UNREADABLE:
        raise ArchiveError(f"{name} is encrypted or patched")
    if info.compress_type not in _METHODS:
        raise ArchiveError(f"{name} has compression method {info.compress_type}, not 0 or 8")
    stored = info.compress_type == zipfile.ZIP_STORED
    most = info.compress_size if stored else info.compress_size * _MAX_DEFLATION
    if info.file_size > most or (stored and info.file_size != most):
        packed = f"{info.compress_size:,} bytes cannot unpack to them"
        raise ArchiveError(f"{name} claims {info.file_size:,} bytes, but its {packed}")


def _check_places(file: BinaryIO, archive: zipfile.ZipFile) -> None:
    """Refuses entries that overlap, or that reach into the directory or beyond."""
    previous_end, previous = 0, "the start of the file"
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        name = f"entry {info.filename[:100]!r}"
        file.seek(max(info.header_offset, 0))
        local = file.read(_LOCAL_BYTES)
        if info.header_offset < 0 or len(local) < _LOCAL_BYTES or local[:4] != b"PK\x03\x04":
            raise ArchiveError(f"{name} is not where the directory says")
        name_bytes, extra_bytes = struct.unpack_from("<HH", local, 26)
        if info.header_offset < previous_end:
            raise ArchiveError(f"{name} overlaps {previous}")
        previous = name
        previous_end = (
            info.header_offset + _LOCAL_BYTES + name_bytes + extra_bytes + info.compress_size
        )
        if previous_end > archive.start_dir:
            raise ArchiveError(f"{name} reaches outside the file's entries")
