"""A model hub on this machine: as much of its protocol as uploads and downloads of small files take."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

Files = dict[str, dict[str, bytes]]
"""Contents by path, by repository."""


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers for the repositories of `files`."""

    files: Files
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, found: Any) -> None:
        self.answer(json.dumps(found).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        repo = "/".join(self.path.split("/")[3:5])
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.files.setdefault(name, {})
            self.answer_json({"url": f"http://{self.headers['Host']}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            wanted = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer_json({"files": wanted})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = commit_of(self.files[repo])
            self.answer_json(
                {"commitOid": commit, "commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{commit}"}
            )
        else:
            self.answer(b"", 404)

    def do_GET(self) -> None:
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.*)", self.path):
            repo, file = found.groups()
            content = self.files.get(repo, {}).get(file)
            if content is None:
                self.answer(b"", 404, X_Error_Code="EntryNotFound" if repo in self.files else "RepoNotFound")
            else:
                tag = hashlib.sha1(content).hexdigest()
                self.answer(content, ETag=f'"{tag}"', X_Repo_Commit=commit_of(self.files[repo]))
        elif (found := re.match(r"/api/models/([^/]+/[^/]+)", self.path)) and found[1] in self.files:
            files = self.files[found[1]]
            if "/tree/" in self.path:
                self.answer_json(
                    [{"type": "file", "path": name, "size": len(x), "oid": ""} for name, x in files.items()]
                )
            else:
                siblings = [{"rfilename": name} for name in files]
                self.answer_json({"id": found[1], "sha": commit_of(files), "siblings": siblings})
        else:
            self.answer(b"", 404, X_Error_Code="RepoNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()


@contextmanager
def hub() -> Iterator[tuple[str, Files]]:
    """Address and files of a hub that is there inside it."""
    files: Files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"files": files}))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", files
    finally:
        server.shutdown()
        server.server_close()
