"""Files from the network: downloaded once, resumed, and verified before they get their name."""

import contextlib
import errno
import http
import os
import pathlib
import re
import shutil
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO, TypeVar

import requests
import requests.adapters
import requests.structures

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

from medtl_jax.console import Advance
from medtl_jax.errors import UserError
from medtl_jax.weights.digests import check_sha256, file_sha256, shown_sha256
from medtl_jax.weights.files import MAX_FILE_BYTES

# Only addresses that begin so are asked, whatever a server redirects to.
_ALLOWED = ("https://",)
_CONNECT_SECONDS, _READ_SECONDS = 10, 30
_WAITS = (0.5, 1.0, 2.0)
_MAX_REDIRECTS = 5
_BLOCK = 2**18
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})

_Answer = TypeVar("_Answer")


class _Refused(Exception):
    """Why a download cannot succeed, however often it is tried."""


class _Broken(Exception):
    """Why one try failed; the next may succeed."""


def fetch(
    url: str,
    folder: pathlib.Path,
    sha256: str,
    advance: Advance | None = None,
    *,
    name: str | None = None,
) -> pathlib.Path:
    """Return the path of the file behind `url`, kept in `folder` and verified at each call.

    A file that is there is used without a request. Otherwise it is written to `<name>.part`,
    which a later call resumes if the server still has the same file (`Range`, `If-Range`), and
    gets its name once its digest is right. Processes that fetch the same file at once do not
    disturb each other: the second writes a part of its own.

    Args:
      url: https, and only https after redirects too.
      folder: made if missing.
      sha256: lower-case hex, all 64 digits or the first 8 and more.
      advance: called as `advance(done bytes, total bytes, text)` where the server says the total.
      name: of the file in `folder`; None is `cache_name(url, sha256)`.

    Raises:
      UserError: no connection, an answer other than the file, more than 4 GiB, another digest
        than expected, a disk that is full or not writable. The line says where to put the file
        by hand.
    """
    path = folder / (name or cache_name(url, sha256))
    if path.exists():
        return check_sha256(path, sha256, "delete it to download it anew")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _claim(path) as part:
            # Another process may have finished it since.
            if path.exists():
                return check_sha256(path, sha256, "delete it to download it anew")
            _persistently(lambda session: _download(session, url, part, path.name, advance))
            found = file_sha256(part)
            if not found.startswith(sha256):
                _discard(part)
                raise _Refused(
                    f"what came was deleted, as its sha256 is {found}, "
                    f"expected {shown_sha256(sha256)}"
                )
            _tag_file(part).unlink(missing_ok=True)
            part.replace(path)
    except _Refused as refusal:
        raise UserError(
            f"cannot download {url}: {refusal}; put the file at {path} or set model.weights to the "
            "path of a file"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space there, or download "
            f"{url} by hand and set model.weights to its path"
        ) from error
    return path


def describe(url: str) -> Mapping[str, str]:
    """Return the headers with which the server of `url` describes the file (HTTP HEAD).

    Redirects inside the server are followed. One to another server ends the search: it says
    where the bytes lie, and this server's headers say what they are.

    Raises:
      UserError: no connection, or no such file.
    """
    return _ask(url, _head)


def read_small(url: str, most_bytes: int) -> bytes | None:
    """Return the file behind `url`, or None where the server has none (404).

    Raises:
      UserError: no connection, another answer, or more than `most_bytes`.
    """
    return _ask(url, lambda session, url: _get_small(session, url, most_bytes))


def _ask(url: str, question: Callable[[requests.Session, str], _Answer]) -> _Answer:
    try:
        return _persistently(lambda session: question(session, url))
    except _Refused as refusal:
        raise UserError(
            f"cannot ask {url}: {refusal}; download the weights by hand and set model.weights to "
            "their path"
        ) from None


def cache_name(url: str, sha256: str) -> str:
    """Return the name of the file behind `url`, with the first 8 digits of its digest in it.

    >>> cache_name("https://example.org/a/net.pth?download=1", "0123456789abcdef")
    'net-01234567.pth'

    Raises:
      UserError: the URL does not end in a plain file name.
    """
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,127}", name):
        raise UserError(
            f"weights {url}: the address must end in a file name of letters, digits and ._+-"
        )
    if sha256[:8] in name:
        return name
    plain = pathlib.PurePosixPath(name)
    return f"{plain.stem}-{sha256[:8]}{plain.suffix}"


def _persistently(attempt: Callable[[requests.Session], _Answer]) -> _Answer:
    """What `attempt(session)` returns, tried again a few times if the connection breaks."""
    with requests.Session() as session:
        session.headers.update({"User-Agent": "medtl_jax", "Accept-Encoding": "identity"})
        session.max_redirects = _MAX_REDIRECTS
        # A session without an adapter for a scheme refuses it, in redirects too.
        session.adapters.clear()
        for prefix in _ALLOWED:
            session.mount(prefix, requests.adapters.HTTPAdapter())
        for wait in (*_WAITS, None):
            try:
                return attempt(session)
            except requests.RequestException as error:
                failure = _failure(error)
            except ValueError as error:
                failure = _Refused(f"a redirect to what is no address ({error})")
            except _Broken as broken:
                failure = broken
            if wait is None or isinstance(failure, _Refused):
                raise _Refused(str(failure)) from failure
            time.sleep(wait)


def _failure(error: requests.RequestException) -> _Broken | _Refused:
    """What an exception of requests means; the special cases come before their base classes."""
    match error:
        case requests.exceptions.InvalidSchema():
            return _Refused("it leads to an address that is not https://")
        case requests.TooManyRedirects():
            return _Refused(f"more than {_MAX_REDIRECTS} redirects")
        case requests.ConnectTimeout():
            return _Refused(f"no connection within {_CONNECT_SECONDS} s")
        case requests.exceptions.SSLError():
            return _Refused("the server's certificate cannot be verified")
        case requests.exceptions.ProxyError():
            return _Broken("no connection through the proxy")
        case requests.Timeout():
            return _Broken(f"no answer within {_READ_SECONDS} s")
        case requests.ConnectionError():
            return _Broken("no connection")
        case requests.exceptions.ChunkedEncodingError():
            return _Broken("the connection broke off")
    return _Refused(f"the request fails ({type(error).__name__})")


def _head(session: requests.Session, url: str) -> Mapping[str, str]:
    headers = requests.structures.CaseInsensitiveDict()
    for _ in range(_MAX_REDIRECTS + 1):
        with session.head(
            url, allow_redirects=False, timeout=(_CONNECT_SECONDS, _READ_SECONDS)
        ) as response:
            target = urllib.parse.urljoin(url, response.headers.get("Location", ""))
            inside = urllib.parse.urlsplit(target)[:2] == urllib.parse.urlsplit(url)[:2]
            if not response.is_redirect:
                _check_status(response, {200})
            headers.update(response.headers)
            if not (response.is_redirect and inside):
                return headers
        url = target
    raise _Refused(f"more than {_MAX_REDIRECTS} redirects")


def _get_small(session: requests.Session, url: str, most_bytes: int) -> bytes | None:
    with session.get(url, stream=True, timeout=(_CONNECT_SECONDS, _READ_SECONDS)) as response:
        if response.status_code == http.HTTPStatus.NOT_FOUND:
            return None
        _check_status(response, {200})
        _check_plain(response)
        content = b""
        for block in response.iter_content(_BLOCK):
            content += block
            if len(content) > most_bytes:
                raise _Refused(f"it has more than {most_bytes:,} bytes")
    if response.headers.get("Content-Length", str(len(content))) != str(len(content)):
        raise _Broken("the connection broke off")
    return content


def _check_status(response: requests.Response, good: set[int]) -> None:
    status = response.status_code
    if status in good:
        return
    # Not the server's own words, which could hold control characters.
    known = {known.value: known.phrase for known in http.HTTPStatus}
    text = f"the server answers {status} {known.get(status, '')}".rstrip()
    raise _Broken(text) if status in _TRY_AGAIN else _Refused(text)


def _check_plain(response: requests.Response) -> None:
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise _Refused("the server compresses the file on its way")


def _download(
    session: requests.Session, url: str, part: pathlib.Path, name: str, advance: Advance | None
) -> None:
    """Makes `part` the whole file behind `url`, from where it ends now."""
    done, validator = _resumable(part, url)
    headers = {"Range": f"bytes={done}-", "If-Range": validator} if done else {}
    with session.get(
        url, headers=headers, stream=True, timeout=(_CONNECT_SECONDS, _READ_SECONDS)
    ) as response:
        try:
            start, total = _extent(response, done, validator)
        except _Broken:
            if response.status_code in {206, 416}:
                os.truncate(part, 0)
            raise
        _check_room(part, start, total)
        if start == 0:
            _begin(part, url, response)
        end = start
        with part.open("ab") as file:
            for block in response.iter_content(_BLOCK):
                end += len(block)
                if end > (total or MAX_FILE_BYTES):
                    file.truncate(0)
                    raise _Refused("more bytes come than announced or allowed")
                file.write(block)
                if advance and total:
                    advance(end, total, f"downloading {name}")
            file.flush()
            os.fsync(file.fileno())
    if total and end != total:
        raise _Broken(f"the connection broke off after {end} of {total} bytes")


def _extent(response: requests.Response, done: int, validator: str) -> tuple[int, int]:
    """Where the bytes of an answer begin, and the size of the whole file (0 if not said)."""
    if response.status_code == 416 and done:
        raise _Broken("the server has fewer bytes than the part that is here")
    _check_status(response, {200, 206} if done else {200})
    _check_plain(response)
    length = response.headers.get("Content-Length", "0")
    if not re.fullmatch(r"[0-9]{1,19}", length):
        raise _Refused("the server announces no proper length")
    if response.status_code == 200:
        return 0, int(length)
    extent = re.fullmatch(
        r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})",
        response.headers.get("Content-Range", ""),
    )
    first, last, total = map(int, extent.groups()) if extent else (-1, -1, -1)
    same_file = _validator(response) in ("", validator)
    if first != done or not first <= last == total - 1 or not same_file:
        raise _Broken("the server continues another file than the part that is here")
    return first, total


def _check_room(part: pathlib.Path, start: int, total: int) -> None:
    if total > MAX_FILE_BYTES:
        limit = MAX_FILE_BYTES // 2**30
        raise _Refused(f"it has {total} bytes, more than the {limit} GiB of a weights file")
    if total - start > shutil.disk_usage(part.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _validator(response: requests.Response) -> str:
    """What names this version of the file in `If-Range`, `""` if the server says nothing."""
    tag = response.headers.get("ETag", "")
    # A weak tag may stand for other bytes; If-Range does not take it (RFC 9110, 13.1.5).
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified", "")


def _tag_file(part: pathlib.Path) -> pathlib.Path:
    return part.with_name(f"{part.name}.tag")


def _begin(part: pathlib.Path, url: str, response: requests.Response) -> None:
    """Empties `part` and notes beside it which version of which file it will hold."""
    part.write_bytes(b"")
    _tag_file(part).write_text(f"{url}\n{_validator(response)}\n", encoding="utf-8")


def _resumable(part: pathlib.Path, url: str) -> tuple[int, str]:
    """The bytes that are there and their file's validator; `(0, "")` to begin anew."""
    try:
        done = part.stat().st_size
        lines = _tag_file(part).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        return 0, ""
    if done and len(lines) == 2 and lines[0] == url and lines[1]:
        return done, lines[1]
    return 0, ""


def _discard(part: pathlib.Path) -> None:
    part.unlink(missing_ok=True)
    _tag_file(part).unlink(missing_ok=True)


@contextlib.contextmanager
def _claim(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """The file to download into: `<name>.part`, or a private one if another process has that."""
    with contextlib.ExitStack() as stack:
        part = path.with_name(f"{path.name}.part")
        handle = _lock(stack, part)
        if handle is None:
            part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            yield part
        except OSError:
            # On a full disk, nothing is worth keeping.
            with contextlib.suppress(OSError):
                os.truncate(part, 0)
            raise
        finally:
            if handle is None or (_is_at(handle, part) and part.stat().st_size == 0):
                _discard(part)


def _lock(stack: contextlib.ExitStack, part: pathlib.Path) -> BinaryIO | None:
    """`part`, opened and this process's alone until `stack` closes; None if it cannot be."""
    if fcntl is None:
        return None
    try:
        handle = stack.enter_context(part.open("ab"))
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return None
    # Between opening and locking, its owner may have renamed or deleted it.
    return handle if _is_at(handle, part) else None


def _is_at(handle: BinaryIO, path: pathlib.Path) -> bool:
    """Whether the file that is open is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False
