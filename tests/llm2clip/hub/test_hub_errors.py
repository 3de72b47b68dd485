"""A Hub that takes requests and never answers, or answers something else."""

from __future__ import annotations

import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from huggingface_hub import HfApi, close_session, constants

from llm2clip.hub import hub_errors
from llm2clip.hub.upload import Uploader


def test_a_hub_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_errors, "PATIENCE", (5.0, 0.2, 5.0, 5.0))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    try:
        # Connections to a socket that listens are accepted by the system.
        with socket.create_server(("127.0.0.1", 0)) as silent:
            api = HfApi(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}", token="token")
            with pytest.raises(ValueError, match=r"tester/tiny: the connection broke .*timed out.*push again"):
                Uploader("tester/tiny", api=api).create_repo()
    finally:
        close_session()


@pytest.mark.parametrize("body", [b"<html>log in</html>", b""])
def test_what_is_no_answer_of_a_hub_is_one_error(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of the page of a hotel's network, or of a wrong HF_ENDPOINT."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: object) -> None: ...

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    told = r"tester/tiny: .* does not answer as a Hub does .*correct HF_ENDPOINT"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        uploader = Uploader("tester/tiny", api=HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token="token"))
        for request in (uploader.create_repo, uploader.read_card):
            with pytest.raises(ValueError, match=told):
                request()
    finally:
        server.shutdown()
        server.server_close()
        close_session()
