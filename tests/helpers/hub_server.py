"""A hub on 127.0.0.1: the part of the Hugging Face hub's HTTP protocol that a download needs, over a real socket.

Large files are redirected to a second host name (as to the hub's CDN). It can hold or drop a connection in the middle
of a file, and it records each request with the bytes that it sent.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE = 1 << 16


@dataclass
class Repository:
    files: dict[str, bytes]
    gated: bool = False  # files only for the token "hf_granted"
    private: bool = False  # not there for those without a token
    license: str | list | dict = "mit"
    commit: str = COMMIT
    tags: tuple[str, ...] = ()  # other names of this commit
    told_sizes: dict[str, int] = field(default_factory=dict)  # sizes that the listing gives instead of the real ones
    told_hashes: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    method: str
    path: str
    host: str
    token: str | None
    range: str | None
    sent: int = 0


class Hub:
    """`with Hub({"org/name": Repository({...})}) as hub:` serves until the block ends; hub.url is its HF_ENDPOINT."""

    def __init__(self, repositories: dict[str, Repository], handler: type | None = None):
        self.repositories = repositories
        self.requests: list[Request] = []
        self.hold: dict[str, int] = {}  # file name: bytes after which it sends nothing more, until released
        self.drop: dict[str, int] = {}  # file name: bytes after which it drops the connection, once
        self.held, self.released = threading.Event(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler or Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def of(self, name: str, method: str = "GET") -> list[Request]:
        """The requests for one file's content, redirects not counted."""
        return [r for r in self.requests if r.method == method and r.path.endswith(f"/{name}") and r.sent]

    def sent(self, name: str) -> int:
        """How many bytes of a file were sent."""
        return sum(request.sent for request in self.of(name))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and content are sent apart, and each would wait for the other's receipt
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        self.noted = Request(self.command, path, self.headers["Host"], token, self.headers["Range"])
        self.hub.requests.append(self.noted)
        if path.startswith("/a page/"):
            return self.send_json("<html>a login page, say</html>")
        if path.startswith("/an error/"):
            return self.send_json({"error": "of a proxy, say"})
        if token == "hf_wrong":
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        if found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            return self.answer_about(*found.groups())
        if found := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.answer_file(*found.groups())
        if found := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            return self.send_content(found[2], self.hub.repositories[found[1]].files[found[2]], {})
        return self.refuse(404, None, "nothing here")

    def answer_about(self, name: str, what: str | None, revision: str | None) -> None:
        """The repository's description, or its list of files."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.noted.token is None):
            return self.refuse(401 if self.noted.token is None else 404, "RepoNotFound", "Repository not found")
        if revision not in (None, "main", repository.commit, *repository.tags):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        listed = [self.listed(repository, path) for path in repository.files]
        if what == "tree":
            return self.send_json([
                {"type": "file", "path": path, "size": size, "oid": blob, **({"lfs": lfs} if lfs else {})}
                for path, size, blob, lfs in listed
            ])  # fmt: skip
        siblings = [
            {
                "rfilename": path,
                "size": size,
                "blobId": blob,
                **({"lfs": {"sha256": lfs["oid"], "size": size, "pointerSize": 134}} if lfs else {}),
            }
            for path, size, blob, lfs in listed
        ]
        card = {"license": repository.license}
        return self.send_json(
            {
                "id": name,
                "sha": repository.commit,
                "private": repository.private,
                "cardData": card,
                "siblings": siblings,
                "tags": [],
            }
        )

    @staticmethod
    def listed(repository: Repository, path: str) -> tuple[str, int, str, dict | None]:
        """Name, size, git blob id and, for weights, the large-file entry of a file."""
        data = repository.files[path]
        size = repository.told_sizes.get(path, len(data))
        blob = repository.told_hashes.get(path, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())
        if not is_large(path):
            return path, size, blob, None
        sha256 = repository.told_hashes.get(path, hashlib.sha256(data).hexdigest())
        return path, size, blob, {"oid": sha256, "size": size, "pointerSize": 134}

    def answer_file(self, name: str, revision: str, path: str) -> None:
        """A file of a repository at a revision, or the way to it."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if repository.gated and self.noted.token != "hf_granted":
            return self.refuse(403 if self.noted.token else 401, "GatedRepo", "Access to this model is restricted")
        if path not in repository.files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        _, size, blob, lfs = self.listed(repository, path)
        headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{blob}"'}
        if lfs is None:
            return self.send_content(path, repository.files[path], headers)
        port = self.hub.server.server_port
        self.send_response(302)
        headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": f'"{lfs["oid"]}"', "Content-Length": "0"}
        for key, value in {**headers, "Location": f"http://localhost:{port}/cdn/{name}/{quote(path)}"}.items():
            self.send_header(key, value)
        self.end_headers()

    def send_content(self, path: str, data: bytes, headers: dict[str, str]) -> None:
        """Send a file's content, from the requested byte on."""
        start = int(found[1]) if (found := re.fullmatch(r"bytes=(\d+)-", self.noted.range or "")) else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        for key, value in {**headers, "Content-Length": str(len(data) - start), "Accept-Ranges": "bytes"}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for position in range(start, len(data), PIECE):
            if position >= self.hub.hold.get(path, len(data)) and not self.hub.released.is_set():
                self.hub.held.set()
                self.hub.released.wait(60)
            if position >= self.hub.drop.get(path, len(data)):
                del self.hub.drop[path]
                self.close_connection = True
                return
            piece = data[position : position + PIECE]
            try:
                self.wfile.write(piece)
            except OSError:  # the client is gone
                self.close_connection = True
                return
            self.noted.sent += len(piece)

    def send_json(self, value, status: int = 200) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, code: str | None, message: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


def is_large(path: str) -> bool:
    """Whether the hub would keep a file as a large one, with a SHA-256 and behind a redirect."""
    return Path(path).suffix in (".safetensors", ".bin", ".gguf", ".parquet", ".png") or ".archive" in path
