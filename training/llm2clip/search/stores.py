"""Where an index is: in a folder, in an object store, or in a database."""

from __future__ import annotations

from pathlib import Path

from llm2clip.search.index_rows import IndexStore
from llm2clip.search.lance_store import LanceStore

# Kinds of URL that LanceDB and fsspec open.
OBJECT_STORES = ("s3", "gs", "az")


def open_store(place: str | Path, postgres: str | None = None) -> IndexStore:
    """Open the place of an index.

    Args:
        place: A folder or a URL of `OBJECT_STORES`; in a database, a table: `NAME` or `SCHEMA.NAME`.
        postgres: URL of the database.

    Raises:
        ImportError: The libraries of the database or object store are not installed; the message has the command that
            installs them.
        ValueError: The URL or the name of the table is none.
    """
    if postgres is None:
        scheme, separator, rest = str(place).partition("://")
        if separator and scheme not in OBJECT_STORES:
            shown = f"{scheme}://..." if {"@", "?"} & set(rest) else place  # there may be a password in it
            kinds = ", ".join(f"{kind}://" for kind in OBJECT_STORES)
            raise ValueError(
                f"an index is a folder or a URL ({kinds}), not {shown}; one in PostgreSQL is a TABLE with --postgres "
                "URL."
            )
        return LanceStore(place)
    try:
        from llm2clip.search.postgres_store import PostgresStore
    except ImportError as error:
        raise ImportError(f"{error}; install it with: pip install 'llm2clip[postgres]'") from error
    return PostgresStore(postgres, str(place))
