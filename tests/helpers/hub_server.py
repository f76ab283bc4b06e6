"""Stand-in for the Hugging Face Hub: the part of its API that uploads and downloads a model."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

# Users by token; the second may not write to the first's repositories.
USERS = {"hf_ada": "ada", "hf_grace": "grace"}


class Hub:
    """Repositories of the server, and what was requested.

    Attributes:
        url: Address of the server.
        commits: Files by path of each commit, by repository.
        lfs: Large files by their SHA-256.
        requests: Methods and paths of all requests.
        failures: Status codes that replace the answers to paths which match a pattern; 0: the
            connection is closed.
        private: Repositories that were created as private.
    """

    def __init__(self, url: str):
        self.url = url
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failures: dict[str, int] = {}
        self.private: set[str] = set()

    def files(self, repo: str) -> dict[str, bytes]:
        """Returns the files of a repository at its last commit."""
        return self.commits[repo][-1] if self.commits[repo] else {}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing."""

    def do_HEAD(self) -> None:
        self.handle_request("HEAD")

    def do_GET(self) -> None:
        self.handle_request("GET")

    def do_POST(self) -> None:
        self.handle_request("POST")

    def do_PUT(self) -> None:
        self.handle_request("PUT")

    def handle_request(self, method: str) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{method} {path}")
        content = self.read_body()
        for pattern, code in self.hub.failures.items():
            if re.search(pattern, path):
                if code:
                    self.answer(code, {"error": f"refused with {code}"})
                else:
                    self.close_connection = True
                return
        routes: list[tuple[str, Any]] = [
            ("GET /api/whoami-v2", self.whoami),
            ("POST /api/repos/create", self.create),
            ("POST /api/validate-yaml", self.validate_yaml),
            ("POST /api/models/(.+)/preupload/main", self.preupload),
            ("POST /(.+).git/info/lfs/objects/batch", self.lfs_batch),
            ("PUT /lfs/([0-9a-f]+)", self.put_lfs),
            ("POST /api/models/(.+)/commit/main", self.commit),
            ("(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ]
        for pattern, route in routes:
            if match := re.fullmatch(pattern, f"{method} {path}"):
                route(content, *match.groups())
                return
        self.answer(404, {"error": f"no route for {method} {path}"})

    def read_body(self) -> bytes:
        """Reads the body of a request, which may come in chunks of unknown total length."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def user(self) -> str:
        """Returns the user whose token the request has; answers 401 and returns "" if none."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in USERS:
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
            return ""
        return USERS[token]

    def answer(self, code: int, data: Any, headers: dict[str, str] | None = None) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def whoami(self, content: bytes) -> None:
        if user := self.user():
            self.answer(200, {"type": "user", "name": user, "orgs": []})

    def create(self, content: bytes) -> None:
        data = json.loads(content)
        owner = self.user()
        if not owner:
            return
        repo = f"{data['organization']}/{data['name']}"
        if data["organization"] != owner:
            self.answer(403, {"error": f"You don't have the rights to create {repo}"})
        elif repo in self.hub.commits:
            url = f"{self.hub.url}/{repo}"
            self.answer(409, {"error": "You already created this model repo", "url": url})
        else:
            self.hub.commits[repo] = []
            if data.get("visibility") == "private":
                self.hub.private.add(repo)
            self.answer(200, {"url": f"{self.hub.url}/{repo}"})

    def validate_yaml(self, content: bytes) -> None:
        card = json.loads(content)["content"]
        if "license: not-a-license" in card:
            self.answer(400, {"errors": [{"message": '"license" must be one of [mit]'}]})
        else:
            self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, content: bytes, repo: str) -> None:
        modes = {True: "lfs", False: "regular"}
        files = [
            {
                "path": file["path"],
                "uploadMode": modes[file["path"].endswith(".safetensors")],
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(content)["files"]
        ]
        self.answer(200, {"files": files})

    def lfs_batch(self, content: bytes, repo: str) -> None:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}
            for item in json.loads(content)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put_lfs(self, content: bytes, oid: str) -> None:
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.lfs[oid] = content
        self.answer(200, {})

    def commit(self, content: bytes, repo: str) -> None:
        if not self.user():
            return
        files = dict(self.hub.files(repo))
        for item in map(json.loads, content.splitlines()):
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
        self.hub.commits[repo].append(files)
        oid = f"{len(self.hub.commits[repo]):040x}"
        self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid})

    def resolve(self, content: bytes, repo: str, revision: str, path: str) -> None:
        commits = self.hub.commits.get(repo)
        if commits is None:
            self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
            return
        number = len(commits) if revision == "main" else int(revision, 16)
        file = commits[number - 1].get(path) if commits else None
        if file is None:
            self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})
            return
        etag = f'"{hashlib.sha256(file).hexdigest()}"'
        self.answer(200, file, {"ETag": etag, "X-Repo-Commit": f"{number:040x}"})


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    """Runs the server in a thread, on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def hub_environment(hub: Hub, cache: str, token: str = "hf_ada") -> dict[str, str]:
    """Returns environment variables with which the Hub's library uses the server."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": cache,
        "HF_TOKEN": token,
        # Its protocol is not part of the server; files are uploaded over HTTP instead.
        "HF_HUB_DISABLE_XET": "1",
    }


def use_hub(hub: Hub, cache: str, monkeypatch: pytest.MonkeyPatch, token: str = "hf_ada") -> None:
    """Makes the Hub's library use the server in this process, whose environment it has read."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{cache}/token")
    monkeypatch.setenv("HF_TOKEN", token)
