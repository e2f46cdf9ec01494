"""A server on 127.0.0.1 for tests, which serves one file and misbehaves as it is told."""

import contextlib
import dataclasses
import http.server
import threading
from collections.abc import Iterator


@dataclasses.dataclass
class Site:
    """What the server does; tests change it between requests.

    Attributes:
      body: the file, at every path that is not in `others`.
      others: path -> another file, or None where there is none (404).
      etag: its version, `""` for none.
      ranges: whether `Range` is understood.
      cuts: for each coming request, after how many bytes the connection breaks.
      status: for each coming request, the status to answer with instead of the file.
      extra: headers that are added, or replace the server's own.
      redirects: path -> address to redirect to.
      requests: method, path and headers of every request so far.
    """

    body: bytes
    others: dict[str, bytes | None] = dataclasses.field(default_factory=dict)
    etag: str = '"v1"'
    ranges: bool = True
    cuts: list[int] = dataclasses.field(default_factory=list)
    status: list[int] = dataclasses.field(default_factory=list)
    extra: dict[str, str] = dataclasses.field(default_factory=dict)
    redirects: dict[str, str] = dataclasses.field(default_factory=dict)
    requests: list[tuple[str, str, dict]] = dataclasses.field(default_factory=list)
    address: str = ""


@contextlib.contextmanager
def serve(body: bytes) -> Iterator[Site]:
    """A running `Site`; its `address` is `http://127.0.0.1:<port>`."""
    site = Site(body)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(site))
    site.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(site: Site) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            """Nothing: the tests read `site.requests`."""

        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            body = self.answer()
            if body is not None:
                cut = site.cuts.pop(0) if site.cuts else len(body)
                # The client may have read enough and gone.
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(body[:cut])

        def answer(self) -> bytes | None:
            site.requests.append((self.command, self.path, dict(self.headers)))
            if site.status or self.path in site.redirects:
                status = site.status.pop(0) if site.status else 302
                self.head(status, {"Location": site.redirects.get(self.path, "")} | site.extra)
                return None
            body = site.others.get(self.path, site.body)
            if body is None:
                self.head(404, {})
                return None
            headers = {"ETag": site.etag} if site.etag else {}
            start = self.first_byte()
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            headers["Content-Length"] = str(len(body) - start)
            self.head(206 if start else 200, headers | site.extra)
            return body[start:]

        def first_byte(self) -> int:
            wanted = self.headers.get("Range")
            fresh = self.headers.get("If-Range") in (None, site.etag)
            if not (wanted and site.ranges and fresh):
                return 0
            return int(wanted.removeprefix("bytes=").removesuffix("-"))

        def head(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                if value:
                    self.send_header(key, value)
            self.end_headers()

    return Handler
