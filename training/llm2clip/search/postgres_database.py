"""A connection to PostgreSQL with pgvector. Its errors say in one line what to do, and never show a password."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import psycopg
from pgvector.psycopg import register_vector
from psycopg import errors, sql
from psycopg.conninfo import conninfo_to_dict

logger = logging.getLogger(__name__)

SCHEMES = ("postgresql://", "postgres://")
# Connections to a server that has gone end after minutes, not hours; a firewall keeps those that are silent for long.
DEFAULTS = {"application_name": "llm2clip", "connect_timeout": 10, "keepalives_idle": 30}
# The first version that continues to search while a condition rejects the rows that it found.
LEAST_PGVECTOR = (0, 8)
# The longest time that a search may take.
TIMEOUT = "60s"
SETTINGS = {
    "timezone": "UTC",
    # Compiling a query takes longer than running it.
    "jit": "off",
    # A server that builds an index for a killed process stops, and releases its locks.
    "client_connection_check_interval": "2s",
}


class PostgresDatabase:
    """A database, connected at the first use.

    Args:
        url: `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`; what is missing, libpq takes from its own files and
            variables, such as the password from `~/.pgpass`.

    Attributes:
        name: The URL without its password and options.
    """

    def __init__(self, url: str) -> None:
        self._options = _parsed(url)
        user, host = self._options.get("user"), self._options.get("host") or ""
        port = f":{self._options['port']}" if self._options.get("port") else ""
        self.name = f"postgresql://{f'{user}@' if user else ''}{host}{port}/{self._options.get('dbname') or ''}"
        self._connection: psycopg.Connection[Any] | None = None

    @property
    def connection(self) -> psycopg.Connection[Any]:
        """The open connection, in autocommit mode.

        Raises:
            ConnectionError: The server cannot be reached, or refuses the user or the database.
            ValueError: pgvector is missing or too old.
        """
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def _connect(self) -> psycopg.Connection[Any]:
        try:
            connection = psycopg.connect(**{**DEFAULTS, **self._options}, autocommit=True)
        except psycopg.Error as error:
            raise ConnectionError(
                f"no connection to {self.name}: {self.reason(error)}. Check that the server runs, and host, port, "
                "database, user and password in --postgres."
            ) from None
        with self.readable():
            schema = _require_pgvector(connection, self.name)
            set_session(connection, SETTINGS)
            # Unless the URL sets another one.
            connection.execute(
                "SELECT set_config('statement_timeout', %s, false) WHERE current_setting('statement_timeout') = '0'",
                (TIMEOUT,),
            )
            path = sql.SQL("SELECT set_config('search_path', concat_ws(', ', nullif({path}, ''), {schema}), false)")
            current = sql.SQL("current_setting('search_path')")
            connection.execute(path.format(path=current, schema=sql.Literal(sql.Identifier(schema).as_string())))
            register_vector(connection)
        connection.add_notice_handler(_log_notice)
        return connection

    def close(self) -> None:
        """Close the connection; the next use opens another one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Begin a transaction that sees the database as it is at its first query, and cannot change it."""
        with self.connection.transaction():
            self.connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            yield

    @contextlib.contextmanager
    def readable(self) -> Iterator[None]:
        """Turn errors of the server into those of Python, in one line.

        Raises:
            PermissionError: The user lacks a right.
            ConnectionError: The connection was lost, or the server cannot go on (a full disk, say).
            TimeoutError: A statement of a search took a minute.
            ValueError: Any other error.
        """
        try:
            yield
        except errors.InsufficientPrivilege as error:
            raise PermissionError(
                f"{self.name}: {self.reason(error)}. Let the owner grant it. llm2clip index creates tables in the "
                "schema of its --table, and that schema if it does not exist (CREATE SCHEMA llm2clip AUTHORIZATION "
                "USER gives one to a user); llm2clip search needs USAGE on the schema, and SELECT on its tables."
            ) from error
        except errors.QueryCanceled as error:
            raise TimeoutError(
                f"{self.name}: {self.reason(error)}; a search may take {TIMEOUT}, unless the URL has another "
                "statement_timeout among its options."
            ) from error
        except psycopg.OperationalError as error:
            raise ConnectionError(
                f"{self.name} does not go on: {self.reason(error)}. What it has stored is kept: run the same command "
                "again when the server is well."
            ) from error
        except psycopg.Error as error:
            raise ValueError(f"{self.name}: {self.reason(error)}.") from error

    def reason(self, error: Exception) -> str:
        """Return the message of an error in one line, without the statement and the password."""
        said = [error.diag.message_primary, error.diag.message_hint] if isinstance(error, psycopg.Error) else []
        text = ". ".join(filter(None, said)) or str(error) or type(error).__name__
        text = " ".join(text.split()).rstrip(".?")
        password = str(self._options.get("password") or "")
        return text.replace(password, "***") if password else text


def set_session(connection: psycopg.Connection[Any], settings: dict[str, str]) -> None:
    """Set parameters of a session, outside of a transaction; those that the server lacks are left out."""
    for name, value in settings.items():
        with contextlib.suppress(errors.InvalidParameterValue, errors.UndefinedObject):
            connection.execute("SELECT set_config(%s, %s, false)", (name, value))


def _parsed(url: str) -> dict[str, Any]:
    with contextlib.suppress(psycopg.Error):
        if url.startswith(SCHEMES):
            return dict(conninfo_to_dict(url))
    # libpq repeats what it cannot read, with the password in it.
    raise ValueError(
        "postgres has to be a URL such as postgresql://USER@HOST:5432/DATABASE, and what was given is none (it is not "
        "shown here, as it may have a password in it). Write special characters of a password as %XX, or leave it to "
        "~/.pgpass."
    )


def _require_pgvector(connection: psycopg.Connection[Any], name: str) -> str:
    """Return the schema of pgvector; raise ValueError, with what to do, unless the database has a recent version."""
    least = ".".join(map(str, LEAST_PGVECTOR))
    query = "SELECT extversion, nspname FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace"
    extension = connection.execute(f"{query} WHERE extname = 'vector'").fetchone()
    if extension is not None and tuple(map(int, extension[0].split(".")[:2])) >= LEAST_PGVECTOR:
        return str(extension[1])
    state, command = (
        ("lacks the extension", "CREATE EXTENSION vector")
        if extension is None
        else (f"has {extension[0]} of the extension", "ALTER EXTENSION vector UPDATE")
    )
    raise ValueError(
        f"{name} {state} pgvector, and an index needs {least} or newer; let its owner run: {command}; it has to be "
        "installed on the server, on Debian: apt install postgresql-N-pgvector, with N the version of the server."
    )


def _log_notice(notice: errors.Diagnostic) -> None:
    text = " ".join(filter(None, (notice.message_primary, notice.message_detail, notice.message_hint)))
    if not text.endswith("skipping"):
        logger.warning("PostgreSQL: %s", text)
