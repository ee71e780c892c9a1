"""As much of the Hub's HTTP API as a push and a download need, on this machine, with repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_of_the_stand_in"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandIn(ThreadingHTTPServer):
    """A server.

    Attributes:
        repositories: id → path → content.
        requests: (method, path) of every request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Routes by regular expression; LFS for tensors and images, commits for the rest."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.dispatch(
            {
                r"/api/models/(\w+/[\w-]+)(?:/revision/\w+)?": self.info,
                r"/api/models/(\w+/[\w-]+)/tree/\w+": self.tree,
                r"/(\w+/[\w-]+)/resolve/\w+/(.+)": self.resolve,
            }
        )

    do_HEAD = do_GET

    def take_body(self):
        # All of it, needed or not: the next request comes through the same connection.
        self.body = self.rfile.read(int(self.headers.get("content-length", 0)))

    def do_POST(self):
        self.take_body()
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        self.dispatch(
            {
                r"/api/repos/create": self.create,
                r"/api/validate-yaml": lambda: self.answer(200, {"errors": [], "warnings": []}),
                r"/api/models/(\w+/[\w-]+)/preupload/main": self.preupload,
                r"/(\w+/[\w-]+)\.git/info/lfs/objects/batch": self.batch,
                r"/api/models/(\w+/[\w-]+)/commit/main": self.commit,
            }
        )

    def do_PUT(self):
        self.take_body()
        self.server.large[self.path.rsplit("/", 1)[-1]] = self.body
        self.answer(200, {})

    def dispatch(self, routes):
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path))
        for pattern, action in routes.items():
            if found := re.fullmatch(pattern, path):
                return action(*found.groups())
        self.answer(404, {"error": f"no {path}"})

    def answer(self, status, content, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        if status in (401, 404) and "/resolve/" not in self.path:
            headers = [("X-Error-Code", "RepoNotFound"), *headers] if status == 404 else headers
        self.send_response(status)
        for key, value in [
            ("content-type", "application/json"),
            ("content-length", str(len(data))),
            *headers,
        ]:
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def create(self):
        facts = json.loads(self.body)
        name = f"{facts.get('organization') or 'you'}/{facts['name']}"
        self.server.repositories.setdefault(name, {})
        self.answer(200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def preupload(self, name):
        files = json.loads(self.body)["files"]
        modes = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".png")) else "regular",
                "shouldIgnore": False,
            }
            for f in files
        ]
        self.answer(200, {"files": modes})

    def batch(self, name):
        objects = json.loads(self.body)["objects"]
        self.answer(
            200,
            {
                "transfer": "basic",
                "objects": [
                    o | {"actions": {"upload": {"href": f"{self.server.url}/put/{o['oid']}"}}}
                    for o in objects
                ],
            },
        )

    def commit(self, name):
        repository = self.server.repositories[name]
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repository[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self.server.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                repository[value["path"]] = content
        self.answer(
            200,
            {
                "success": True,
                "commitOid": COMMIT,
                "commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}",
                "pullRequestUrl": None,
            },
        )

    def info(self, name):
        if name not in self.server.repositories:
            return self.answer(404, {"error": "Repository not found"})
        files = self.server.repositories[name]
        self.answer(
            200,
            {
                "id": name,
                "modelId": name,
                "sha": COMMIT,
                "private": False,
                "tags": [],
                "siblings": [{"rfilename": path} for path in files],
            },
        )

    def tree(self, name):
        files = self.server.repositories.get(name, {})
        self.answer(
            200,
            [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ],
        )

    def resolve(self, name, path):
        content = self.server.repositories.get(name, {}).get(path)
        if content is None:
            return self.answer(404, {"error": "Entry not found"}, [("X-Error-Code", "EntryNotFound")])
        self.answer(
            200, content, [("etag", f'"{hashlib.sha256(content).hexdigest()}"'), ("x-repo-commit", COMMIT)]
        )


@contextmanager
def running():
    """A server, for as long as the block lasts."""
    server = StandIn()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
