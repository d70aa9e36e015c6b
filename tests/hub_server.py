"""A stand-in for the hub on loopback: repositories are folders, and every request is recorded.

Speaks what huggingface_hub needs of a hub: file metadata (HEAD), files (GET, with ranges), the revision and the tree of a
repository. Tests start it, point HF_ENDPOINT of a fresh process at it, and read `requests` afterwards.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+)/?(?P<path>.*))?")


class HubServer:
    """Serves `root/<organisation>/<repository>/<files>`.

    Attributes:
        url: the endpoint.
        requests: (method, path) of every request, in order.
        truncated: file names whose bodies break off half-way.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.requests: list[tuple[str, str]] = []
        self.truncated: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def downloads(self, name: str) -> int:
        """How often the body of the file `name` was asked for."""
        return sum(method == "GET" and path.endswith(f"/{name}") for method, path in self.requests)

    def commit(self, repo: str) -> str:
        """The commit id of a repository: a digest of its file names and sizes."""
        folder = self.root / repo
        listing = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in self._files(folder)]
        return hashlib.sha1(json.dumps(listing).encode()).hexdigest()

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        return sorted(path for path in folder.rglob("*") if path.is_file())

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.requests.append((request.command, path))
        file, api = _FILE.fullmatch(path), _API.fullmatch(path)
        repo = (file or api)["repo"] if file or api else ""
        if not repo or not (self.root / repo).is_dir():
            self._send(
                request, 404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, body
            )
        elif file:
            self._send_file(request, repo, file["file"], body)
        else:
            self._send_api(request, repo, api["what"], api["path"] or "", body)

    def _send_file(self, request: BaseHTTPRequestHandler, repo: str, name: str, body: bool) -> None:
        path = self.root / repo / name
        commit = self.commit(repo)
        if not path.is_file():
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit}
            self._send(request, 404, b"", headers, body)
            return
        content = path.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if asked:
            start = int(asked[1])
            stop = min(int(asked[2]) if asked[2] else len(content) - 1, len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{stop}/{len(content)}"
            content = content[start : stop + 1]
        cut = path.name in self.truncated
        self._send(request, 206 if asked else 200, content, headers, body, cut=cut)

    def _send_api(self, request: BaseHTTPRequestHandler, repo: str, what: str | None, path: str, body: bool) -> None:
        folder = self.root / repo
        files = self._files(folder)
        if what == "tree" and path:  # none of the served repositories has the folders that clients look for
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self._send(request, 404, b"", headers, body)
            return
        if what == "tree":
            answer = [
                {
                    "type": "file",
                    "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                    "size": path.stat().st_size,
                    "path": path.relative_to(folder).as_posix(),
                }
                for path in files
            ]
        else:
            names = [{"rfilename": path.relative_to(folder).as_posix()} for path in files]
            answer = {
                "id": repo,
                "modelId": repo,
                "sha": self.commit(repo),
                "siblings": names,
                "tags": [],
                "private": False,
            }
        self._send(request, 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)

    @staticmethod
    def _send(
        request: BaseHTTPRequestHandler,
        status: int,
        content: bytes,
        headers: dict[str, str],
        body: bool,
        *,
        cut: bool = False,
    ) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if body:
            request.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            request.close_connection = True
