"""Where an index is: a folder, a URL, or a table in PostgreSQL."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from llm2clip.search.store import IndexStore

# Kinds of URL that LanceDB and fsspec open.
OBJECT_STORES = ("s3", "gs", "az")
# Where what other indexes are made of is.
ROWS_DIR = Path("runs/index")


def open_store(location: str | Path | IndexStore, postgres: str | None = None) -> IndexStore:
    """Open the location of an index.

    Args:
        location: A folder or a URL of `OBJECT_STORES`; in PostgreSQL, a table: `NAME` or `SCHEMA.NAME`; or a store of
            the user, which is returned.
        postgres: URL of the database.

    Raises:
        ImportError: The libraries of the database or object store are not installed; the message has the command that
            installs them.
        ValueError: The URL or the name of the table is none.
    """
    if not isinstance(location, (str, Path)):
        return location
    scheme, separator, rest = str(location).partition("://")
    if postgres is None and separator and scheme not in OBJECT_STORES:
        shown = f"{scheme}://..." if {"@", "?"} & set(rest) else location  # there may be a password in it
        kinds = ", ".join(f"{kind}://" for kind in OBJECT_STORES)
        raise ValueError(
            f"an index is a folder or a URL ({kinds}), not {shown}; one in PostgreSQL is a TABLE with --postgres URL."
        )
    try:
        if postgres is not None:
            from llm2clip.search.postgres_store import PostgresStore

            return PostgresStore(postgres, str(location))
        from llm2clip.search.lance_store import LanceStore

        return LanceStore(location)
    except ImportError as error:
        raise ImportError(f"{error}; install it with: pip install 'llm2clip[search]'") from error


def rows_folder(store: IndexStore, rows_dir: str | None = None) -> Path:
    """Return the local folder of what the table of an index is made of: stored embeddings, and a list of rows.

    Args:
        rows_dir: That of an index at a URL or in a database; by default one of its name in `ROWS_DIR`.

    Raises:
        ValueError: The index is in a local folder, which has them.
    """
    if store.local_folder is not None:
        if rows_dir is not None:
            raise ValueError(
                f"rows_dir is {rows_dir}, but the index {store.location} has its embeddings in its folder."
            )
        return store.local_folder
    if rows_dir is not None:
        return Path(rows_dir)
    name = re.sub(r"[^A-Za-z0-9]+", "_", store.location).strip("_")[-48:]
    return ROWS_DIR / f"{name}-{hashlib.blake2b(store.location.encode(), digest_size=4).hexdigest()}"
