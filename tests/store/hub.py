"""A hub on this machine: resolve, redirect to storage, ranges, trees, ModelScope; and every way it can go wrong."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from kinema.schema import Hub

COMMIT = "c0ffee"


@dataclass
class Stored:
    """A file of the hub. `large`: kept in LFS, so with a sha256; else with git's sha1."""

    data: bytes
    large: bool = True
    gated: bool = False

    @property
    def etag(self) -> str:
        if self.large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Faults:
    """What goes wrong, each consumed as it happens where it is a list or a count."""

    cuts: list[int] = field(default_factory=list)  # absolute offsets at which the connection breaks
    down_after_cut: bool = False  # and from then on everything answers 503
    down: bool = False
    busy: int = 0  # so many answers are 503
    flips: list[int] = field(default_factory=list)  # offsets of a byte whose lowest bit is wrong, once
    says_bytes: int | None = None  # what the first answer claims the length to be
    range_total: int | None = None  # what Content-Range claims it to be
    shifted: int = 0  # so many ranges begin a byte late
    no_ranges: bool = False
    slow: float = 0.0  # seconds a 16 KiB


class FakeHub:
    """files by "owner/name/path"; `served` counts bytes of storage, `log` what was asked."""

    def __init__(self) -> None:
        self.files: dict[str, Stored] = {}
        self.modelscope: dict[str, Stored] = {}
        self.faults = Faults()
        self.served = 0
        self.log: list[str] = []
        self.tokens: list[str | None] = []
        self.url = ""

    @property
    def hub(self) -> Hub:
        return Hub(endpoint=self.url, modelscope=f"{self.url}/ms")

    def add(self, name: str, data: bytes, **options: bool) -> bytes:
        self.files[name] = Stored(data, **options)
        return data


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """Serve a FakeHub on a free port of this machine."""
    fake = FakeHub()

    class Handler(_Handler):
        hub = fake

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            return  # clients that go away are the point of these tests

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        return

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        fake, path = self.hub, unquote(self.path)
        fake.log.append(f"{self.command} {path}")
        fake.tokens.append(self.headers.get("Authorization"))
        if fake.faults.down or fake.faults.busy:
            fake.faults.busy = max(0, fake.faults.busy - 1)
            return self._plain(503)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/main\?.*", path):
            return self._tree(match[1])
        if match := re.fullmatch(r"/ms/api/v1/models/([^/]+/[^/]+)/repo/files\?.*", path):
            return self._ms_tree(match[1])
        if match := re.fullmatch(r"/ms/models/([^/]+/[^/]+)/resolve/master/(.+)", path):
            return self._data(fake.modelscope[f"{match[1]}/{match[2]}"], body)
        if match := re.fullmatch(r"/storage/(.+)", path):
            return self._data(fake.files[match[1]], body)
        if match := re.fullmatch(r"/old/([^/]+)/resolve/([^/]+)/(.+)", path):
            return self._plain(307, Location=f"/new/{match[1]}/resolve/{match[2]}/{match[3]}")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._resolve(match[1], match[2])
        return self._plain(404)

    def _resolve(self, repository: str, path: str) -> None:
        stored = self.hub.files.get(f"{repository}/{path}")
        if stored is None:
            known = any(name.startswith(f"{repository}/") for name in self.hub.files)
            if not known:
                return self._plain(401, **{"X-Error-Code": "RepoNotFound"})
            return self._plain(404, **{"X-Error-Code": "EntryNotFound"})
        if stored.gated and self.headers.get("Authorization") != "Bearer hf_good":
            return self._plain(401 if "Authorization" not in self.headers else 403, **{"X-Error-Code": "GatedRepo"})
        size = self.hub.faults.says_bytes or len(stored.data)
        if not stored.large:
            return self._data(stored, self.command == "GET")
        headers = {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{stored.etag}"', "X-Repo-Commit": COMMIT}
        return self._plain(302, Location=f"{self.hub.url}/storage/{repository}/{path}", **headers)

    def _data(self, stored: Stored, body: bool) -> None:
        faults, data = self.hub.faults, stored.data
        begin, end, status = 0, len(data), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and not faults.no_ranges:
            begin, end, status = int(asked[1]), min(int(asked[2]) + 1, len(data)), 206
            if begin >= len(data):
                return self._plain(416)
            if faults.shifted:
                faults.shifted -= 1
                begin += 1
        self.send_response(status)
        self.send_header("ETag", f'"{stored.etag}"')
        self.send_header("Content-Length", str(end - begin))
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{faults.range_total or len(data)}")
        self.end_headers()
        if body:
            self._send(bytearray(data[begin:end]), begin)

    def _send(self, data: bytearray, begin: int) -> None:
        faults = self.hub.faults
        for flip in {flip for flip in faults.flips if begin <= flip < begin + len(data)}:
            data[flip - begin] ^= 1
            faults.flips.remove(flip)
        cut = min((cut for cut in faults.cuts if begin < cut < begin + len(data)), default=None)
        if cut is not None:
            faults.cuts.remove(cut)
            data = data[: cut - begin]
            faults.down = faults.down_after_cut
        for at in range(0, len(data), 16384):
            piece = data[at : at + 16384]
            if faults.slow:
                time.sleep(faults.slow)
            try:
                self.wfile.write(piece)
            except OSError:
                self.close_connection = True
                return
            self.hub.served += len(piece)
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()

    def _tree(self, repository: str) -> None:
        rows = []
        for name, stored in sorted(self.hub.files.items()):
            if name.startswith(f"{repository}/"):
                row = {"type": "file", "path": name.removeprefix(f"{repository}/"), "size": len(stored.data)}
                rows.append(row | ({"lfs": {"oid": stored.etag}} if stored.large else {"oid": stored.etag}))
        half = len(rows) // 2 if "cursor" not in self.path and len(rows) > 3 else 0
        part = rows[:half] if half else rows[len(rows) // 2 if "cursor" in self.path else 0 :]
        link = {"Link": f'<{self.hub.url}{self.path}&cursor=2>; rel="next"'} if half else {}
        return self._plain(200 if rows else 404, json.dumps(part).encode(), **link)

    def _ms_tree(self, repository: str) -> None:
        files = [
            {"Path": name.removeprefix(f"{repository}/"), "Type": "blob", "Size": len(s.data), "Sha256": s.etag}
            for name, s in self.hub.modelscope.items()
            if name.startswith(f"{repository}/")
        ]
        return self._plain(200, json.dumps({"Code": 200, "Data": {"Files": files}}).encode())

    def _plain(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
