"""Answers of the loopback hub to single requests, in the protocol of the real Hub."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlparse

from tests.loopback_state import CUT, READ_TOKEN, TOKEN, USER, File, Repo, metadata_errors

if TYPE_CHECKING:
    from tests.loopback_hub import LoopbackHub

LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".jpg", ".parquet", ".arrow", ".tar")
DATE = "2026-01-01T00:00:00.000Z"


class Answer:
    """The answer to one request."""

    def __init__(self, hub: LoopbackHub, handler: BaseHTTPRequestHandler) -> None:
        self.hub, self.handler, self.method = hub, handler, handler.command
        url = urlparse(handler.path)
        self.path, self.query = unquote(url.path), parse_qs(url.query)

    def run(self) -> None:
        body = b""
        for failure in self.hub.failures:
            if failure.times and failure.method == self.method and re.search(failure.path, self.path):
                failure.times -= 1
                if failure.status == CUT:
                    # Close the connection while the client is still sending.
                    self.handler.rfile.read(min(1000, int(self.handler.headers.get("Content-Length") or 0)))
                    self.hub.requests.append((self.method, self.path, CUT))
                    self.handler.close_connection = True
                    self.handler.connection.close()
                    return
                self._body()
                return self.error(failure.status, "Failure", "requested by the test")
        if self.method in ("POST", "PUT", "DELETE"):
            body = self._body()
        with self.hub.lock:
            self.route(body)

    def _body(self) -> bytes:
        if self.handler.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.handler.rfile.read(int(self.handler.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.handler.rfile.readline().split(b";")[0], 16):
            parts.append(self.handler.rfile.read(size))
            self.handler.rfile.readline()
        self.handler.rfile.readline()
        return b"".join(parts)

    def send(self, status: int, value: Any = None, raw: bytes | None = None, **headers: str) -> None:
        data = raw if raw is not None else b"" if value is None else json.dumps(value).encode()
        kind = "application/octet-stream" if raw is not None else "application/json"
        self.handler.send_response(status)
        fields = {"Content-Type": kind, "Content-Length": str(len(data))}
        for key, content in {**fields, **{key.replace("_", "-"): value for key, value in headers.items()}}.items():
            self.handler.send_header(key, content)
        self.handler.end_headers()
        if self.method != "HEAD":
            self.handler.wfile.write(data)
        self.hub.requests.append((self.method, self.path, status))

    def error(self, status: int, code: str, message: str) -> None:
        retry = {"Retry_After": "0"} if status == 429 else {}
        self.send(status, {"error": message}, X_Error_Code=code, X_Error_Message=message, **retry)

    @property
    def token(self) -> str | None:
        given = self.handler.headers.get("Authorization", "")
        return given.removeprefix("Bearer ") if given else None

    def may_write(self, name: str) -> bool:
        """Whether the token has write access to a repo; otherwise answer 401 or 403."""
        if self.token not in (TOKEN, READ_TOKEN):
            self.error(401, "Unauthorized", "Invalid username or password.")
        elif self.token == READ_TOKEN or name.split("/")[0] != USER:
            self.error(403, "Forbidden", f"You don't have the rights to write to {name}")
        else:
            return True
        return False

    def route(self, body: bytes) -> None:
        if self.path == "/api/whoami-v2":
            if self.token not in (TOKEN, READ_TOKEN):
                return self.error(401, "Unauthorized", "Invalid username or password.")
            role = "write" if self.token == TOKEN else "read"
            auth = {"accessToken": {"role": role, "displayName": "test"}}
            return self.send(200, {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": auth})
        if self.path == "/api/validate-yaml":
            errors = [{"message": message} for message in metadata_errors(json.loads(body)["content"])]
            return self.send(400 if errors else 200, {"errors": errors, "warnings": []})
        if self.path == "/api/repos/create":
            return self.create(json.loads(body))
        if match := re.fullmatch(r"/_lfs/([0-9a-f]{64})", self.path):
            return self.lfs_object(match[1], body)
        if match := re.fullmatch(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.path):
            return self.lfs_batch(match[2], json.loads(body))
        operations = "revision|tree|paths-info|preupload|commit|refs|branch"
        pattern = rf"/api/(model|dataset|space)s/([^/]+/[^/]+?)(?:/({operations})(?:/(.*))?)?"
        if match := re.fullmatch(pattern, self.path):
            return self.api(match[1], match[2], match[3] or "info", match[4] or "", body)
        if match := re.fullmatch(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/resolve/(.+?)/([^/].*)", self.path):
            return self.download(match[1] or "model", match[2], match[3], match[4])
        self.error(404, "NotFound", self.path)

    def create(self, fields: dict[str, Any]) -> None:
        kind, name = fields.get("type") or "model", f"{fields.get('organization') or USER}/{fields['name']}"
        if not self.may_write(name):
            return
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.hub.repos:
            return self.send(409, {"error": "You already created this model repo", "url": url})
        self.hub.repos[kind, name] = Repo(
            name, kind, private=bool(fields.get("private")) or fields.get("visibility") == "private"
        )
        self.send(200, {"url": url, "name": name, "id": name})

    def lfs_object(self, oid: str, body: bytes) -> None:
        if self.method != "PUT":
            return self.send(200, raw=self.hub.blobs[oid])
        if hashlib.sha256(body).hexdigest() != oid:
            return self.error(400, "BadRequest", "the content does not match its hash")
        self.hub.blobs[oid] = body
        self.send(200, {})

    def lfs_batch(self, name: str, fields: dict[str, Any]) -> None:
        if not self.may_write(name):
            return
        objects = []
        for wanted in fields["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/_lfs/{wanted['oid']}", "header": {}}}
            objects.append(entry)
        self.send(200, {"transfer": "basic", "objects": objects})

    def visible(self, kind: str, name: str) -> Repo | None:
        """A repo; None after a 404 or 403, if it does not exist or the token has no access."""
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and self.token is None):
            self.error(404, "RepoNotFound", "Repository not found")
            return None
        if repo.gated and self.token != TOKEN:
            self.error(403, "GatedRepo", f"Access to model {name} is restricted")
            return None
        return repo

    def api(self, kind: str, name: str, operation: str, rest: str, body: bytes) -> None:
        repo = self.visible(kind, name)
        if repo is None or (operation in ("commit", "branch", "preupload") and not self.may_write(name)):
            return
        if operation == "branch":
            return self.create_branch(repo, rest, json.loads(body or b"{}"))
        if operation == "refs":
            branches = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": sha}
                for branch, sha in repo.branches.items()
            ]
            return self.send(200, {"branches": branches, "converts": [], "tags": []})
        revision, below = rest or "main", ""
        if operation == "tree":
            revision, below = re.fullmatch(r"(refs/[^/]+/[^/]+|[^/]*)/?(.*)", rest).groups()  # type: ignore[union-attr]
        sha = repo.resolve(revision)
        if sha is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[sha]
        if operation in ("info", "revision"):
            siblings = [{"rfilename": path, "size": len(file.content)} for path, file in sorted(files.items())]
            fields = {"_id": name, "id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": []}
            fields |= {"private": repo.private, "gated": repo.gated, "disabled": False, "downloads": 0, "likes": 0}
            return self.send(200, {**fields, "lastModified": DATE, "createdAt": DATE})
        if operation == "tree":
            return self.tree(files, below)
        if operation == "paths-info":
            is_json = "json" in self.handler.headers.get("Content-Type", "")
            paths = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
            return self.send(200, [files[path].entry(path) for path in paths if path in files])
        if operation == "preupload":
            asked = json.loads(body)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"}
                for file in asked
            ]
            return self.send(200, {"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})
        self.commit(repo, revision, sha, body)

    def create_branch(self, repo: Repo, name: str, fields: dict[str, Any]) -> None:
        if name.startswith("refs/"):
            return self.error(400, "BadRequest", f"Invalid reference for a branch: {name}")
        if name in repo.branches:
            return self.error(409, "Conflict", "Reference already exists")
        start = repo.resolve(fields.get("startingPoint", "main"))
        if start is None:
            return self.error(404, "RevisionNotFound", "Invalid starting point")
        repo.branches[name] = start
        return self.send(200, {})

    def tree(self, files: dict[str, File], below: str) -> None:
        inside = {path: file for path, file in files.items() if not below or path.startswith(below.rstrip("/") + "/")}
        if below and not inside:
            return self.error(404, "EntryNotFound", f"{below} does not exist")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        start = len(below.rstrip("/")) + 1 if below else 0
        entries, folders = [], set()
        for path, file in sorted(inside.items()):
            if recursive or "/" not in path[start:]:
                entries.append(file.entry(path))
            else:
                folders.add(path[: path.index("/", start)])
        listed = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        self.send(200, listed + entries)

    def commit(self, repo: Repo, revision: str, parent: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        opens_pr = self.query.get("create_pr", ["0"])[0].lower() in ("1", "true")
        expected = header.get("parentCommit") or parent
        if expected != parent and not opens_pr:
            return self.error(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
        if expected not in repo.commits:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {expected}")
        # A pull request may start from an older commit.
        files = dict(repo.commits[expected])
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self.error(400, "BadRequest", f"LFS object of {value['path']} is missing")
                files[value["path"]] = File(self.hub.blobs[value["oid"]], lfs=True)
            elif key == "deletedFile":
                files.pop(value["path"])
        answer = {"success": True, "hookOutput": ""}
        if opens_pr:
            number = 1 + sum(branch.startswith("refs/pr/") for branch in repo.branches)
            sha = repo.commit(f"refs/pr/{number}", files, header["summary"])
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo.name}/discussions/{number}"
        else:
            sha = repo.commit(revision, files, header["summary"])
        self.send(200, {**answer, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo.name}/commit/{sha}"})

    def download(self, kind: str, name: str, revision: str, path: str) -> None:
        repo = self.visible(kind, name)
        if repo is None:
            return
        sha = repo.resolve(revision)
        if sha is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        file = repo.commits[sha].get(path)
        if file is None:
            return self.send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        headers = {"X_Repo_Commit": sha, "ETag": f'"{file.etag}"', "Accept_Ranges": "bytes"}
        if file.lfs:
            headers |= {"X_Linked_Size": str(len(file.content)), "X_Linked_Etag": f'"{file.sha256}"'}
        wanted = self.handler.headers.get("Range")
        if wanted is None or self.method == "HEAD":
            return self.send(200, raw=file.content, **headers)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first or 0), min(int(last or len(file.content) - 1), len(file.content) - 1)
        content_range = f"bytes {start}-{end}/{len(file.content)}"
        self.send(206, raw=file.content[start : end + 1], Content_Range=content_range, **headers)
