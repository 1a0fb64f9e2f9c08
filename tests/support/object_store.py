"""An object store in memory: as much of S3's protocol as reading and writing Parquet takes."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest


class ObjectStore(ThreadingHTTPServer):
    """Serves ``objects``, by "/bucket/key"; ``fetched`` holds the bytes of each answer.

    While ``refusing`` nothing can be written.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.fetched: list[int] = []
        self.refusing = False

    def environment(self) -> dict[str, str]:
        """What a process must have in its environment to find this store behind s3://."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_address[1]}",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_REGION": "nowhere",
            "AWS_ALLOW_HTTP": "true",
        }


class Handler(BaseHTTPRequestHandler):
    server: ObjectStore
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""

    def do_GET(self) -> None:
        name, _ = self._asked()
        data = self.server.objects.get(name)
        if data is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._answer(200, data)
            return
        if wanted[1]:
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        else:
            first, last = max(0, len(data) - int(wanted[2])), len(data) - 1
        where = f"bytes {first}-{last}/{len(data)}"
        self._answer(206, data[first : last + 1], {"Content-Range": where})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        name, query = self._asked()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refusing:
            self._answer(403, b"<Error><Code>AccessDenied</Code></Error>")
            return
        if "uploadId" in query:
            self.server.parts[name][int(query["partNumber"][0])] = data
        else:
            self.server.objects[name] = data
        self._answer(200, b"", {"ETag": '"x"'})

    def do_POST(self) -> None:
        name, query = self._asked()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refusing:
            self._answer(403, b"<Error><Code>AccessDenied</Code></Error>")
            return
        if "uploads" in query:
            self.server.parts[name] = {}
            found = "<UploadId>1</UploadId>"
            kind = "InitiateMultipartUploadResult"
        else:
            parts = self.server.parts.pop(name)
            self.server.objects[name] = b"".join(parts[number] for number in sorted(parts))
            found, kind = '<ETag>"x"</ETag>', "CompleteMultipartUploadResult"
        _, bucket, key = name.split("/", 2)
        text = f"<{kind}><Bucket>{bucket}</Bucket><Key>{key}</Key>{found}</{kind}>"
        self._answer(200, text.encode())

    def _asked(self) -> tuple[str, dict[str, list[str]]]:
        url = urlsplit(self.path)
        return url.path, parse_qs(url.query, keep_blank_values=True)

    def _answer(self, code: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {
            "Content-Length": str(len(data)),
            "ETag": '"x"',
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.server.fetched.append(len(data))
            self.wfile.write(data)


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    store = ObjectStore()
    thread = threading.Thread(target=store.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.shutdown()
        store.server_close()
        thread.join()


@contextmanager
def store_for_this_process() -> Iterator[ObjectStore]:
    """A store that s3:// means in this process; use a bucket of your own: polars remembers it."""
    with object_store() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment().items():
            patch.setenv(name, value)
        yield store
