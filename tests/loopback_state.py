"""State of the loopback hub: repos with branches and commits, and its rules for the metadata of cards."""

from __future__ import annotations

import hashlib
import re
import uuid
from dataclasses import dataclass, field
from typing import Any

import yaml

TOKEN, READ_TOKEN, USER = "hf_write", "hf_read", "tester"
# Status of a `Failure` that closes the connection without an answer.
CUT = -1
# A selection of the ids that the Hub accepts.
LICENSES = ("apache-2.0", "cc-by-nc-4.0", "gemma", "llama3", "llama3.1", "llama3.2", "mit", "other")
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
        # Random, because clients cache downloads under the name of the commit.
        sha = hashlib.sha1(uuid.uuid4().bytes).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Content of every file by path."""
        return {path: file.content for path, file in self.commits[self.branches[revision]].items()}


@dataclass
class Failure:
    method: str
    path: str
    status: int
    times: int


def metadata_errors(card: str) -> list[str]:
    """Problems that the real Hub reports about the front matter of a model card."""
    match = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else {}
    errors = [] if data.get("license", "mit") in LICENSES else ['"license" must be one of ' + ", ".join(LICENSES)]
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
