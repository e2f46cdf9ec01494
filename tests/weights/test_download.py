"""Downloads against a real server on this machine, one that misbehaves."""

import contextlib
import hashlib
import os
import resource
import shutil
import socket
import threading

import pytest
from fileserver import serve

from medtl_jax.errors import UserError
from medtl_jax.weights import download
from medtl_jax.weights.download import cache_name, describe, fetch, read_small

BODY = bytes(range(256)) * 400
DIGEST = hashlib.sha256(BODY).hexdigest()
NAME = f"net-{DIGEST[:8]}.pth"


@pytest.fixture
def site(monkeypatch):
    """A server of `BODY` that may be asked although it has no https, without waits in between."""
    monkeypatch.setattr(download, "_ALLOWED", ("http://127.0.0.1:",))
    monkeypatch.setattr(download, "_WAITS", (0.0, 0.0))
    monkeypatch.setattr(download, "_BLOCK", 1000)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve(BODY) as running:
        yield running


def get(site, folder, sha256=DIGEST, advance=None):
    return fetch(f"{site.address}/net.pth", folder, sha256, advance)


def refusal(site, folder, sha256=DIGEST):
    with pytest.raises(UserError) as caught:
        get(site, folder, sha256)
    message = str(caught.value)
    assert "\n" not in message and f"{site.address}/net.pth" in message
    return message


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def leave_part(folder, site, count, *, etag=None, url=None):
    """What an interrupted download of `count` bytes leaves."""
    folder.mkdir(exist_ok=True)
    (folder / f"{NAME}.part").write_bytes(BODY[:count])
    url, etag = url or f"{site.address}/net.pth", site.etag if etag is None else etag
    (folder / f"{NAME}.part.tag").write_text(f"{url}\n{etag}\n")


# ---- what works ---------------------------------------------------------------------------------


def test_whole_file_with_progress(site, tmp_path):
    calls = []
    path = get(site, tmp_path / "new" / "folder", advance=lambda *call: calls.append(call))
    assert path == tmp_path / "new" / "folder" / NAME
    assert path.read_bytes() == BODY
    assert names(path.parent) == [NAME]
    assert calls[-1] == (len(BODY), len(BODY), f"downloading {NAME}")
    assert [done for done, _, _ in calls] == sorted({done for done, _, _ in calls})
    assert site.requests[0][2]["Accept-Encoding"] == "identity"


def test_cached_file_needs_no_request(site, tmp_path):
    get(site, tmp_path)
    get(site, tmp_path)
    assert len(site.requests) == 1


def test_file_put_there_by_hand(site, tmp_path):
    (tmp_path / NAME).write_bytes(BODY)
    assert get(site, tmp_path).read_bytes() == BODY
    assert site.requests == []


def test_file_of_eight_known_digits(site, tmp_path):
    assert get(site, tmp_path, DIGEST[:8]).name == NAME
    message = refusal(site, tmp_path, "00000000")
    assert f"its sha256 is {DIGEST}, expected 00000000...;" in message


def test_resumes_after_a_cut_connection(site, tmp_path):
    site.cuts = [30_000, 20_000]
    assert get(site, tmp_path).read_bytes() == BODY
    asked = [headers.get("Range") for _, _, headers in site.requests]
    assert asked == [None, "bytes=30000-", "bytes=50000-"]
    assert [headers.get("If-Range") for _, _, headers in site.requests] == [None, '"v1"', '"v1"']


def test_resumes_in_a_later_call(site, tmp_path):
    site.cuts = [10_000, 10_000, 10_000]
    assert "the connection broke off;" in refusal(site, tmp_path)
    assert names(tmp_path) == [f"{NAME}.part", f"{NAME}.part.tag"]
    assert (tmp_path / f"{NAME}.part").read_bytes() == BODY[:30_000]
    site.requests.clear()
    assert get(site, tmp_path).read_bytes() == BODY
    assert [headers["Range"] for _, _, headers in site.requests] == ["bytes=30000-"]
    assert names(tmp_path) == [NAME]


def test_server_that_knows_no_ranges(site, tmp_path):
    site.ranges = False
    site.cuts = [30_000]
    assert get(site, tmp_path).read_bytes() == BODY
    assert len(site.requests) == 2


@pytest.mark.parametrize("tag", ["", 'W/"v1"'])
def test_server_without_a_strong_version_is_not_resumed(site, tmp_path, tag):
    site.etag = tag
    site.cuts = [30_000]
    assert get(site, tmp_path).read_bytes() == BODY
    assert [headers.get("Range") for _, _, headers in site.requests] == [None, None]


def test_last_modified_stands_in_for_an_etag(site, tmp_path):
    site.etag = ""
    site.extra = {"Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT"}
    site.cuts = [30_000]
    # This server knows versions by ETag only, so it sends the whole file again.
    assert get(site, tmp_path).read_bytes() == BODY
    assert site.requests[1][2]["If-Range"] == "Wed, 01 Jan 2025 00:00:00 GMT"


def test_file_that_changed_since_the_part(site, tmp_path):
    leave_part(tmp_path, site, 5000, etag='"v0"')
    (tmp_path / f"{NAME}.part").write_bytes(b"x" * 5000)
    assert get(site, tmp_path).read_bytes() == BODY


def test_part_of_another_address(site, tmp_path):
    leave_part(tmp_path, site, 5000, url="https://example.org/net.pth")
    assert get(site, tmp_path).read_bytes() == BODY
    assert "Range" not in site.requests[0][2]


def test_part_longer_than_the_file(site, tmp_path):
    leave_part(tmp_path, site, 5000)
    site.status = [416]
    assert get(site, tmp_path).read_bytes() == BODY
    assert [headers.get("Range") for _, _, headers in site.requests] == ["bytes=5000-", None]


@pytest.mark.parametrize(
    "extra",
    [
        {"Content-Range": f"bytes 4999-{len(BODY) - 1}/{len(BODY)}"},
        {"Content-Range": f"bytes 5000-{len(BODY) - 1}/{len(BODY) + 1}"},
        {"Content-Range": "bytes five-six/seven"},
        {"Content-Range": ""},
        {"ETag": '"v2"'},
    ],
)
def test_server_that_resumes_wrongly(site, tmp_path, extra):
    leave_part(tmp_path, site, 5000)
    site.extra = extra
    assert get(site, tmp_path).read_bytes() == BODY
    assert [headers.get("Range") for _, _, headers in site.requests] == ["bytes=5000-", None]


def test_redirect_and_busy_server(site, tmp_path):
    site.redirects = {"/net.pth": "/elsewhere/blob"}
    site.status = [503]
    assert get(site, tmp_path).read_bytes() == BODY
    assert [path for _, path, _ in site.requests] == ["/net.pth", "/net.pth", "/elsewhere/blob"]


def test_two_at_once(site, tmp_path):
    """The second finds the part taken and writes one of its own; both end with the file."""
    started, go_on = threading.Event(), threading.Event()

    def slow(*_):
        started.set()
        assert go_on.wait(10)

    results = []
    first = threading.Thread(target=lambda: results.append(get(site, tmp_path, advance=slow)))
    first.start()
    try:
        assert started.wait(10)
        assert get(site, tmp_path).read_bytes() == BODY
    finally:
        go_on.set()
        first.join()
    assert results == [tmp_path / NAME]
    assert results[0].read_bytes() == BODY
    assert names(tmp_path) == [NAME]


def test_file_that_another_process_finished_meanwhile(site, tmp_path, monkeypatch):
    claim = download._claim

    @contextlib.contextmanager
    def late_claim(path):
        with claim(path) as part:
            path.write_bytes(BODY)
            yield part

    monkeypatch.setattr(download, "_claim", late_claim)
    assert get(site, tmp_path) == tmp_path / NAME
    assert site.requests == []
    assert names(tmp_path) == [NAME]


def test_an_interrupted_call_leaves_a_part_that_is_resumed(site, tmp_path):
    def interrupt(done, *_):
        if done >= 40_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(site, tmp_path, advance=interrupt)
    assert (tmp_path / f"{NAME}.part").stat().st_size == 40_000
    site.requests.clear()
    assert get(site, tmp_path).read_bytes() == BODY
    assert site.requests[0][2]["Range"] == "bytes=40000-"


# ---- what is refused ----------------------------------------------------------------------------


def test_wrong_checksum(site, tmp_path):
    wrong = "0" * 64
    message = refusal(site, tmp_path, wrong)
    assert f"what came was deleted, as its sha256 is {DIGEST}, expected {wrong};" in message
    assert f"put the file at {tmp_path / 'net-00000000.pth'}" in message
    assert names(tmp_path) == []


def test_resumed_part_of_other_bytes_fails_the_checksum(site, tmp_path):
    leave_part(tmp_path, site, 5000)
    (tmp_path / f"{NAME}.part").write_bytes(b"x" * 5000)
    assert "expected" in refusal(site, tmp_path)
    assert names(tmp_path) == []
    assert get(site, tmp_path).read_bytes() == BODY


def test_cached_file_that_was_changed(site, tmp_path):
    get(site, tmp_path).write_bytes(b"tampered")
    with pytest.raises(UserError) as caught:
        get(site, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"weights file {tmp_path / NAME}: its sha256 is ")
    assert message.endswith("delete it to download it anew")
    assert (tmp_path / NAME).read_bytes() == b"tampered"


@pytest.mark.parametrize(
    ("status", "tries", "text"),
    [
        (404, 1, "the server answers 404 Not Found"),
        (403, 1, "the server answers 403 Forbidden"),
        (206, 1, "the server answers 206 Partial Content"),
        (599, 1, "the server answers 599;"),
        (503, 3, "the server answers 503 Service Unavailable"),
    ],
)
def test_answers_that_are_no_file(site, tmp_path, status, tries, text):
    site.status = [status] * 5
    message = refusal(site, tmp_path)
    assert text in message
    assert message.endswith(
        f"put the file at {tmp_path / NAME} or set model.weights to the path of a file"
    )
    assert len(site.requests) == tries
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"Content-Length": str(4 * 2**30 + 1)}, "has 4294967297 bytes, more than the 4 GiB"),
        ({"Content-Length": "9" * 30}, "no proper length"),
        ({"Content-Length": "-1"}, "no proper length"),
        ({"Content-Encoding": "gzip"}, "compresses"),
    ],
)
def test_claims_that_are_refused(site, tmp_path, extra, text):
    site.extra = extra
    assert text in refusal(site, tmp_path)
    assert names(tmp_path) == []
    assert len(site.requests) == 1


def test_body_shorter_than_claimed(site, tmp_path):
    site.extra = {"Content-Length": str(len(BODY) + 1)}
    assert "broke off" in refusal(site, tmp_path)
    assert NAME not in names(tmp_path)


def test_endless_body(site, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_FILE_BYTES", 50_000)
    site.extra = {"Content-Length": ""}
    assert "more bytes come than announced or allowed" in refusal(site, tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "target", ["file:///etc/hostname", "http://localhost:9/net.pth", "ftp://127.0.0.1/net.pth"]
)
def test_redirect_to_another_scheme(site, tmp_path, target):
    site.redirects = {"/net.pth": target}
    assert "it leads to an address that is not https://" in refusal(site, tmp_path)
    assert len(site.requests) == 1
    assert names(tmp_path) == []


def test_http_is_never_asked(site, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_ALLOWED", ("https://",))
    assert "not https://" in refusal(site, tmp_path)
    assert site.requests == []


@pytest.mark.parametrize(
    ("target", "text"), [("/net.pth", "more than 5 redirects"), ("http://[", "no address")]
)
def test_redirects_that_lead_nowhere(site, tmp_path, target, text):
    site.redirects = {"/net.pth": target}
    assert text in refusal(site, tmp_path)
    with pytest.raises(UserError, match=text):
        describe(f"{site.address}/net.pth")


def test_no_connection(site, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        site.address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    assert refusal(site, tmp_path) == (
        f"cannot download {site.address}/net.pth: no connection; put the file at "
        f"{tmp_path / NAME} or set model.weights to the path of a file"
    )
    assert names(tmp_path) == []


def test_server_that_falls_silent(site, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_READ_SECONDS", 0.05)
    # The system takes the connection; nobody ever answers.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        site.address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "no answer within 0.05 s;" in refusal(site, tmp_path)


def test_full_disk(site, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage._replace(free=100))
    message = refusal(site, tmp_path)
    assert message.startswith(f"cannot write {tmp_path / NAME}: No space left on device; ")
    assert names(tmp_path) == []


def test_disk_that_fills_up_on_the_way(site, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        message = refusal(site, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.startswith(f"cannot write {tmp_path / NAME}: File too large; ")
    assert names(tmp_path) == []


def test_folder_that_cannot_be_made(site, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refusal(site, tmp_path / "file" / "weights")
    assert site.requests == []


# ---- names and descriptions ---------------------------------------------------------------------


def test_cache_names():
    sha256 = "0123456789" * 6 + "0123"
    assert cache_name("https://a.org/x/resnet18-01234567.pth", sha256) == "resnet18-01234567.pth"
    assert cache_name("https://a.org/net.pth?download=1", sha256) == "net-01234567.pth"
    assert cache_name("https://a.org/weights", sha256) == "weights-01234567"
    assert cache_name("https://a.org/net.v1.pth", sha256) == "net.v1-01234567.pth"


@pytest.mark.parametrize("end", ["", "/", "/..", "/.net.pth", "/a%2F..%2Fb", "/a%00b", "/a b"])
def test_names_that_are_not_files(end):
    with pytest.raises(UserError, match=r"must end in a file name of letters, digits and \._\+-$"):
        cache_name(f"https://a.org{end}", "0" * 64)


def test_describe_stays_on_the_server(site):
    site.redirects = {"/old": "/new", "/new": "https://cdn.example.org/blob"}
    headers = describe(f"{site.address}/old")
    assert headers["location"] == "https://cdn.example.org/blob"
    assert [(method, path) for method, path, _ in site.requests] == [
        ("HEAD", "/old"),
        ("HEAD", "/new"),
    ]


def test_describe_says_what_is_wrong(site):
    site.status = [404]
    with pytest.raises(UserError) as caught:
        describe(f"{site.address}/net.pth")
    assert str(caught.value) == (
        f"cannot ask {site.address}/net.pth: the server answers 404 Not Found; download the "
        "weights by hand and set model.weights to their path"
    )


# ---- small files --------------------------------------------------------------------------------


def test_a_small_file_or_none(site):
    url = f"{site.address}/config.json"
    assert read_small(url, len(BODY)) == BODY
    site.others["/config.json"] = None
    assert read_small(url, len(BODY)) is None
    site.others["/config.json"] = b""
    assert read_small(url, 0) == b""


@pytest.mark.parametrize("length", [{}, {"Content-Length": ""}])
def test_a_small_file_that_is_large(site, length):
    site.extra = length
    with pytest.raises(UserError, match=rf"it has more than {len(BODY) - 1:,} bytes; download the"):
        read_small(f"{site.address}/config.json", len(BODY) - 1)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"Content-Length": str(len(BODY) + 1)}, "the connection broke off"),
        ({"Content-Encoding": "gzip"}, "the server compresses the file"),
    ],
)
def test_a_small_file_that_comes_damaged(site, extra, words):
    site.extra = extra
    with pytest.raises(UserError, match=words):
        read_small(f"{site.address}/config.json", 2 * len(BODY))


def test_digest_of_a_folder(site, tmp_path):
    os.mkdir(tmp_path / NAME)
    with pytest.raises(UserError, match=r"Is a directory; delete it to download it anew$"):
        get(site, tmp_path)
