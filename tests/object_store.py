"""An S3 server for tests (moto's), on a loopback port; local files at a URL that LanceDB opens as an object store."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from fsspec.implementations.local import LocalFileSystem

KIND = "file-object-store"


class LocalObjects(LocalFileSystem):
    """What fsspec lacks of this kind of URL, which LanceDB knows."""

    protocol = KIND

    def __init__(self, **options: Any) -> None:
        super().__init__(auto_mkdir=True, **options)

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return super()._strip_protocol(str(path).removeprefix(f"{KIND}://"))

    def unstrip_protocol(self, name: str) -> str:
        return f"{KIND}://{name}"


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """Run a server with the bucket `bucket`; yield the environment of its clients.

    The test is skipped where moto or s3fs is not installed.
    """
    missing = [name for name in ("moto", "flask_cors", "s3fs") if importlib.util.find_spec(name) is None]
    if missing:
        needed = "pip install 'moto[s3]' flask flask-cors s3fs"
        pytest.skip(f"there is no S3 server, since {', '.join(missing)} cannot be imported; {needed}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    environment = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", address.rpartition(":")[2]]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ})
    try:
        _wait(address, server)
        import boto3

        boto3.client("s3", endpoint_url=address, region_name="us-east-1", aws_access_key_id="key",
                     aws_secret_access_key="secret").create_bucket(Bucket="bucket")  # fmt: skip
        yield environment
    finally:
        server.kill()
        server.wait()


def _wait(address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, "the S3 server has ended"
        try:
            with urlopen(f"{address}/moto-api/", timeout=5):
                return
        except (URLError, ConnectionError):
            time.sleep(0.1)
    raise TimeoutError(f"the S3 server at {address} does not answer.")
