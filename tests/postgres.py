"""A PostgreSQL server with pgvector for tests, on a loopback port, with its data in a temporary folder."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

DEBIAN_SERVERS = Path("/usr/lib/postgresql")
EXTENSIONS = Path("/usr/share/postgresql")


def _programs() -> Path | None:
    """Return the folder of the newest server that has pgvector; None if there is none."""
    versions = [path for path in DEBIAN_SERVERS.glob("*/bin") if (path / "initdb").exists()]
    with_vector = [path for path in versions if (EXTENSIONS / path.parent.name / "extension/vector.control").exists()]
    return max(with_vector, key=lambda path: int(path.parent.name), default=None)


@contextmanager
def postgres_server() -> Iterator[str]:
    """Run a server; yield the URL of its database.

    The server refuses to run as root, so that root runs it as the user postgres. The test is skipped where there is no
    server with pgvector.
    """
    programs = _programs()
    if programs is None:
        pytest.skip("there is no PostgreSQL with pgvector; install Debian's postgresql-N-pgvector.")
    # Not in pytest's own folder, which only its owner can enter.
    with tempfile.TemporaryDirectory(prefix="llm2clip-postgres-") as name:
        folder, command = Path(name), []
        if os.getuid() == 0:
            owner = pwd.getpwnam("postgres")
            command = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]
            shutil.chown(folder, owner.pw_uid, owner.pw_gid)
        data = folder / "data"
        options = ["--auth=trust", "--username=postgres", "--encoding=UTF8", "--no-sync", f"--pgdata={data}"]
        _run([*command, str(programs / "initdb"), *options], folder)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        control = [*command, str(programs / "pg_ctl"), f"--pgdata={data}", "--wait"]
        _run([*control, f"--log={folder / 'log'}", f"--options={settings}", "start"], folder)
        try:
            yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
        finally:
            _run([*control, "--mode=immediate", "stop"], folder)


def _run(command: list[str], folder: Path) -> None:
    # The server inherits the pipes of pg_ctl, which would keep a reader of them waiting.
    with (folder / "output").open("ab") as output:
        subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=True)
