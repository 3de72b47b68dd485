"""A hub on the loopback interface that speaks the protocol of the real Hub, including its errors.

Tests use it instead of the network. It implements repos, branches, pull requests, commits, LFS uploads, downloads by
range and tokens. `fail_next` makes it answer the next matching requests with an error.
"""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import transformers.utils.hub
from huggingface_hub import constants, hf_api

from tests.loopback_answers import LFS_SUFFIXES, Answer
from tests.loopback_state import CUT, READ_TOKEN, TOKEN, Failure, File, Repo


class LoopbackHub:
    """The server: `with LoopbackHub() as hub: ... hub.url`."""

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
        """Environment variables of a process that uses this hub with an empty cache."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return variables if token is None else {**variables, "HF_TOKEN": token}

    def redirect(self, monkeypatch: Any, cache: Any) -> None:
        """Make this process use this hub with an empty cache (not `datasets`, which has its own settings)."""
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        variables = {"ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache)}
        for name, value in {**variables, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        # Clients that were created with the previous endpoint.
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)

    def fail_next(self, method: str, path: str, status: int, times: int = 1) -> None:
        """Answer the next requests whose path matches a pattern with an error; `CUT` closes the connection instead."""
        self.failures.append(Failure(method, path, status, times))

    def repo(self, name: str, kind: str = "model") -> Repo:
        return self.repos[kind, name]

    def uploads(self) -> list[str]:
        """Paths of the LFS objects that clients have sent."""
        return [path for method, path, status in self.requests if method == "PUT" and status == 200]


__all__ = ["CUT", "LFS_SUFFIXES", "READ_TOKEN", "TOKEN", "File", "LoopbackHub", "Repo"]
