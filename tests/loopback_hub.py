"""A hub on the loopback interface that speaks the real protocol, with its errors, for tests without a network.

It knows repos, branches, pull requests, commits, LFS uploads, downloads by range, and tokens. `fail_next` makes it
answer the next matching requests as the real one does on a bad day.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import transformers.utils.hub
import yaml
from huggingface_hub import constants, hf_api

TOKEN, READ_TOKEN, USER = "hf_write", "hf_read", "tester"
LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".jpg", ".parquet", ".arrow", ".tar")
CUT = -1
DATE = "2026-01-01T00:00:00.000Z"
# Some of those that the real one knows.
LICENCES = ("apache-2.0", "gemma", "llama3.1", "mit", "other")
FIELDS = {"language": r"[a-z]{2,3}|code|multilingual", "datasets": r"(\w[\w.-]*/)?\w[\w.-]*"}
FIELDS["base_model"] = FIELDS["datasets"]


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def entry(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}
        return entry


@dataclass
class Repo:
    name: str
    kind: str
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        # Unlike any other, since clients keep what they downloaded by its name.
        sha = hashlib.sha1(uuid.uuid4().bytes).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Content by path."""
        return {path: file.content for path, file in self.commits[self.branches[revision]].items()}


@dataclass
class Failure:
    method: str
    path: str
    status: int
    times: int


class LoopbackHub:
    """Serves while it is open: `with LoopbackHub() as hub: ... hub.url`."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.failures: list[Failure] = []
        self.lock = threading.RLock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def answer(self) -> None:
                Answer(hub, self).run()

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Any, token: str | None = TOKEN) -> dict[str, str]:
        """Environment variables of a process that uses this hub, with an empty cache."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return variables if token is None else {**variables, "HF_TOKEN": token}

    def redirect(self, monkeypatch: Any, cache: Any) -> None:
        """Make this process use this hub, with an empty cache; `datasets` has settings of its own."""
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        variables = {"ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache)}
        for name, value in {**variables, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        # Clients that were made for the endpoint of that time.
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)

    def fail_next(self, method: str, path: str, status: int, times: int = 1) -> None:
        """Answer the next requests whose path matches a pattern with an error, or with `CUT`: no answer at all."""
        self.failures.append(Failure(method, path, status, times))

    def repo(self, name: str, kind: str = "model") -> Repo:
        return self.repos[kind, name]

    def uploads(self) -> list[str]:
        """Paths of the LFS objects that were received."""
        return [path for method, path, status in self.requests if method == "PUT" and status == 200]


def metadata_errors(card: str) -> list[str]:
    """What the real one has against the front matter of a model's card."""
    match = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else {}
    errors = [] if data.get("license", "mit") in LICENCES else ['"license" must be one of ' + ", ".join(LICENCES)]
    if data.get("license") == "other" and not {"license_name", "license_link"} <= set(data):
        errors.append('"license_name" and "license_link" are required')
    for field_name, pattern in FIELDS.items():
        values = data.get(field_name) or []
        for value in values if isinstance(values, list) else [values]:
            if not re.fullmatch(pattern, str(value)):
                errors.append(f'"{field_name}" with value "{value}" is not valid')
    for entry in data.get("model-index") or []:
        if not entry.get("name"):
            errors.append('"model-index[0].name" is required')
        for result in entry.get("results", []):
            needed = [result.get("task", {}).get("type"), *map((result.get("dataset") or {}).get, ("type", "name"))]
            needed += [metric.get(key) for metric in result["metrics"] for key in ("type", "value")]
            if any(value is None for value in needed):
                errors.append('"model-index[0].results" lacks a type, name or value')
    return errors


class Answer:
    """One request."""

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
                    # In the middle of what the client sends.
                    self.handler.rfile.read(min(1000, int(self.handler.headers.get("Content-Length") or 0)))
                    self.hub.requests.append((self.method, self.path, CUT))
                    self.handler.close_connection = True
                    self.handler.connection.close()
                    return
                self._body()
                return self.error(failure.status, "Failure", "the test asked for this")
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
        """Answer 401 or 403 unless the token may write to a repo."""
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
            return self.error(400, "BadRequest", "the content is not that of the name")
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
        """A repo, after answering 404 or 403 where there is none or the token may not see it."""
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
            if rest.startswith("refs/"):
                return self.error(400, "BadRequest", f"Invalid reference for a branch: {rest}")
            if rest in repo.branches:
                return self.error(409, "Conflict", "Reference already exists")
            start = repo.resolve(json.loads(body or b"{}").get("startingPoint", "main"))
            if start is None:
                return self.error(404, "RevisionNotFound", "Invalid starting point")
            repo.branches[rest] = start
            return self.send(200, {})
        if operation == "refs":
            branches = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": sha}
                for branch, sha in repo.branches.items()
            ]
            return self.send(200, {"branches": branches, "converts": [], "tags": []})
        revision, _, below = rest.partition("/") if operation == "tree" else (rest or "main", "", "")
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
        # A pull request may begin at an older commit.
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
