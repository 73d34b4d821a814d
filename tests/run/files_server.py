"""A server of files on this machine, in plain HTTP, which only an injected opener reaches."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any


class FilesServer:
    """Answers with files, in memory; what it lacks is 404.

    Attributes:
        files: path → content.
        redirects: path → where to.
        lengths: path → the length that is told instead of the true one.
        asked: paths, in order.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.lengths: dict[str, int] = {}
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                server.asked.append(path)
                if path in server.redirects:
                    self.send_response(302)
                    self.send_header("Location", server.redirects[path])
                    self.end_headers()
                    return
                if path not in server.files:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(server.lengths.get(path, len(server.files[path]))))
                self.end_headers()
                self.wfile.write(server.files[path])

            def log_message(self, *arguments: Any) -> None:
                """Nothing: it is a test's."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[FilesServer]:
        """Answers on a thread until the block ends."""
        thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, name="files")
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            thread.join(10)
            self._http.server_close()


class FakeHub:
    """What of huggingface_hub is used: snapshots in folders, by (id, revision)."""

    constants = SimpleNamespace(ENDPOINT="https://hub.example", HF_HUB_OFFLINE=False)

    def __init__(self) -> None:
        self.snapshots: dict[tuple[str, str | None], Any] = {}
        self.downloads: list[tuple[str, str | None, list[str]]] = []

    def snapshot_download(
        self, name: str, allow_patterns: list[str], revision: str | None = None, local_files_only: bool = False
    ) -> str:
        if local_files_only:
            raise FileNotFoundError("not in the cache")
        self.downloads.append((name, revision, allow_patterns))
        if (name, revision) not in self.snapshots:
            raise OSError("404: no such repository")
        return str(self.snapshots[name, revision])
