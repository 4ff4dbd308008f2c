"""The hub of hub_server.py, taking uploads: accounts, new repositories, large files by the LFS protocol, commits.

Large files are kept by their hash as soon as they arrived, as the hub does; a commit makes them part of a repository.
"""

import base64
import hashlib
import json
import re
from urllib.parse import unquote, urlsplit

import yaml

from helpers.hub_server import Handler, Hub, Repository, Request, is_large

USER, WRITES, READS = "user", "hf_writes", "hf_reads"  # an account, its token, and one that may only read


class UploadHub(Hub):
    """`with UploadHub() as hub:` starts without repositories. `answers` holds the errors that a test requests."""

    def __init__(self, repositories: dict[str, Repository] | None = None):
        super().__init__(repositories or {}, UploadHandler)
        self.stored: dict[str, bytes] = {}  # large files that arrived, by hash
        self.arrived: list[str] = []  # the hashes of large files that were sent whole, in order
        self.commits = 0
        self.answers: list[tuple[str, int, str]] = []  # (regex of a path, status, message): answered so in place
        self.hold_puts: int | None = None  # large files to take before one is held in its middle
        self.grants: dict | None = None  # the token of a Xet storage, with its address


class UploadHandler(Handler):
    hub: UploadHub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.wrong(path):
            return None
        if path == "/api/whoami-v2":
            token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
            if token not in (WRITES, READS):
                return self.refuse(401, None, "Invalid username or password.")
            return self.send_json({"type": "user", "name": USER, "orgs": [], "auth": {}})
        if self.hub.grants and re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/xet-write-token/main", path):
            return self.send_json(self.hub.grants)
        return super().do_GET()

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        body = self.body()
        self.hub.requests.append(Request(self.command, path, self.headers["Host"], token, None))
        if self.wrong(path):
            return None
        if path == "/api/validate-yaml":
            card = json.loads(body)["content"]
            sound = isinstance(yaml.safe_load(card.split("---")[1]), dict)
            return self.send_json({"errors": [] if sound else [{"message": "no metadata"}], "warnings": []})
        if token != WRITES:
            return self.refuse(403, None, "You don't have the rights to write here")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/preupload/main", path):
            return self.answer_modes(self.hub.repositories[found[1]], json.loads(body)["files"])
        if re.fullmatch(r"/datasets/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.answer_batch(json.loads(body)["objects"])
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/commit/main", path):
            return self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        return self.refuse(404, None, "nothing here")

    def do_PUT(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(Request(self.command, path, self.headers["Host"], None, None))
        if self.wrong(path):
            return None
        if self.hub.hold_puts is not None and len(self.hub.arrived) >= self.hub.hold_puts:
            self.rfile.read(1000)
            self.hub.held.set()
            self.hub.released.wait(60)
            self.close_connection = True
            return None
        data = self.body()
        oid = path.rpartition("/")[2]
        if hashlib.sha256(data).hexdigest() != oid:
            return self.refuse(400, None, "another content than its hash")
        self.hub.stored[oid] = data
        self.hub.arrived.append(oid)
        return self.send_json("{}")

    def body(self) -> bytes:
        """The whole body of the request."""
        if self.headers["Content-Length"] is not None:
            return self.rfile.read(int(self.headers["Content-Length"]))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def wrong(self, path: str) -> bool:
        """Answer as a test configured it."""
        for pattern, status, message in self.hub.answers:
            if re.fullmatch(pattern, path):
                self.send_json({"error": message, "errors": [{"message": message}]}, status)
                return True
        return False

    def create(self, requested: dict) -> None:
        name = f"{requested['organization'] or USER}/{requested['name']}"
        if requested["organization"] not in (None, USER):
            return self.refuse(403, None, f"You don't have the rights to create a repository under {name}")
        url = {"url": f"{self.hub.url}/datasets/{name}"}
        if name in self.hub.repositories:
            return self.send_json(url, 409)
        first = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.hub.repositories[name] = Repository(first, private=requested.get("visibility") == "private")
        return self.send_json(url)

    def answer_modes(self, repository: Repository, requested: list[dict]) -> None:
        """For each file: how it must be sent, and the hash of the existing one."""
        there = {path: self.listed(repository, path) for path in repository.files}
        told = []
        for path in (file["path"] for file in requested):
            _, _, blob, lfs = there.get(path, (None, None, None, None))
            mode = "lfs" if is_large(path) else "regular"
            told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": lfs["oid"] if lfs else blob})
        self.send_json({"files": told})

    def answer_batch(self, objects: list[dict]) -> None:
        """For each large file: where to send it, unless it exists."""
        told = [{"oid": file["oid"], "size": file["size"]} for file in objects]
        for file in told:
            if file["oid"] not in self.hub.stored:
                file["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{file['oid']}"}}
        self.send_json({"transfer": "basic", "objects": told})

    def commit(self, name: str, lines: list[dict]) -> None:
        repository, files = self.hub.repositories[name], {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    return self.refuse(400, None, f"{value['path']} was never sent")
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        self.hub.commits += 1
        repository.files.update(files)
        repository.commit = hashlib.sha1(repr(self.hub.commits).encode()).hexdigest()
        url = f"{self.hub.url}/datasets/{name}/commit/{repository.commit}"
        return self.send_json({"success": True, "commitOid": repository.commit, "commitUrl": url})
