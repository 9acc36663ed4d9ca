"""A small object store that speaks as much of S3's protocol as blobs need, in a thread."""

import re
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_OLD = "2001-01-01T00:00:00.000Z"


class Bucket(ThreadingHTTPServer):
    """One bucket, in memory."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.largest = 0
        """Size of the largest body that was sent."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Bucket  # pyright: ignore[reportIncompatibleVariableOverride] - it is made for this one
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *_: object) -> None:  # noqa: A002
        """Say nothing."""

    @property
    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).split("/", 2)[2]

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        self.server.largest = max(self.server.largest, len(body))
        return body

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self.server.objects[self._key] = self._body()
        self._answer(200, ETag='"1"')

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            prefix = query.get("prefix", [""])[0]
            found = [
                f"<Contents><Key>{escape(key)}</Key><Size>{len(body)}</Size><ETag>1</ETag>"
                f"<LastModified>{_OLD}</LastModified></Contents>"
                for key, body in sorted(self.server.objects.items())
                if key.startswith(prefix)
            ]
            listed = f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(found)}</ListBucketResult>"
            self._answer(200, listed.encode())
            return
        body = self.server.objects.get(self._key)
        if body is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        start, end = (int(asked[1]), int(asked[2]) + 1) if asked else (0, len(body))
        part = body[start:end]
        told = {"Content_Range": f"bytes {start}-{start + len(part) - 1}/{len(body)}"} if asked else {}
        self._answer(206 if asked else 200, part, ETag='"1"', Last_Modified="Mon, 01 Jan 2001 00:00:00 GMT", **told)

    def do_POST(self) -> None:
        keys = [unquote(key) for key in re.findall(r"<Key>(.*?)</Key>", self._body().decode())]
        for key in keys:
            self.server.objects.pop(key, None)
        deleted = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        self._answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())

    def do_DELETE(self) -> None:
        self.server.objects.pop(self._key, None)
        self._answer(204)


@contextmanager
def bucket() -> Generator[Bucket, None, None]:
    """Serve a bucket for the length of the block."""
    server = Bucket()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
