"""Where indexes are in each kind of store, and how they are read back, for the tests that all stores have to pass."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec

from llm2clip.search.location import open_store
from llm2clip.search.search_index import SearchIndex
from llm2clip.search.store import IndexStore
from tests.object_store import KIND

from .helpers import index, stored_rows


class Place:
    """Indexes by name in a folder.

    Attributes:
        has_versions: Whether an open index goes on with the rows that it was opened with, after an update.
        approximate: Its type of vector index for many images.
    """

    has_versions, approximate = True, "ivf_rq"
    postgres: str | None = None

    def __init__(self, root: Path | str, rows: Path | None = None) -> None:
        """Args: `rows` is the folder of the stored embeddings, if they are elsewhere."""
        self.root, self.rows = root, rows

    def location(self, name: str) -> str:
        return f"{self.root}/{name}"

    def store(self, name: str = "index") -> IndexStore:
        return open_store(self.location(name), self.postgres)

    def open(self, name: str = "index") -> SearchIndex:
        return SearchIndex.open(self.location(name), self.postgres)

    def settings(self, name: str) -> dict[str, Any]:
        """What `llm2clip index` is told of where an index is."""
        return {"output_dir": self.location(name), **self.rows_dir(name)}

    def rows_dir(self, name: str = "index") -> dict[str, str]:
        """Where the stored embeddings are, if that is elsewhere."""
        return {} if self.rows is None else {"rows_dir": str(self.rows / name)}

    def index(self, source: Path | str, model: Path, name: str = "index", **settings: Any) -> tuple[int, ...]:
        """Run `llm2clip index`; return its counts."""
        return index(source, model, None, **self.settings(name), **settings)

    def content(self, name: str = "index") -> dict[str, Any]:
        """All that an index says, apart from versions, in the order of the keys."""
        opened = self.open(name)
        return {"rows": rows_of(opened)} | opened.manifest.content()

    def lose_table(self, name: str = "index") -> None:
        """Delete the table of an index, and not its manifest."""
        for path in (Path(self.root) / name).glob("*.lance"):
            shutil.rmtree(path)

    def state(self) -> Any:
        """What differs after anything has been written."""
        files = (path for path in Path(self.root).rglob("*") if path.is_file() and not path.name.startswith(".lock"))
        return {str(path): path.stat().st_mtime_ns for path in files}

    def is_empty(self) -> bool:
        return not self.state()

    def write_theirs(self, name: str = "index") -> Callable[[], bool]:
        """Write what is no index; return whether it is still there."""
        theirs = Path(self.root) / name / "theirs.txt"
        theirs.parent.mkdir(parents=True)
        theirs.write_text("theirs")
        return lambda: [*theirs.parent.iterdir()] == [theirs]


class LocalUrl(Place):
    """Local files at a URL that LanceDB opens as an object store."""

    def location(self, name: str) -> str:
        return f"{KIND}://{self.root}/{name}"


class Bucket(Place):
    """A folder in an empty bucket of S3."""

    def __init__(self, rows: Path) -> None:
        super().__init__("s3://bucket", rows)

    def files(self) -> dict[str, Any]:
        return fsspec.filesystem("s3", skip_instance_cache=True).find("bucket", detail=True)

    def lose_table(self, name: str = "index") -> None:
        files = fsspec.filesystem("s3", skip_instance_cache=True)
        files.rm([path for path in files.find(f"bucket/{name}") if ".lance/" in path])

    def state(self) -> Any:
        return {name: str(info["LastModified"]) for name, info in self.files().items()}

    def write_theirs(self, name: str = "index") -> Callable[[], bool]:
        fsspec.filesystem("s3", skip_instance_cache=True).pipe_file(f"bucket/{name}/theirs.txt", b"theirs")
        return lambda: list(self.files()) == [f"bucket/{name}/theirs.txt"]


class Tables(Place):
    """Tables of PostgreSQL, in the schema llm2clip."""

    has_versions, approximate = False, "hnsw"

    def __init__(self, url: str, rows: Path) -> None:
        super().__init__("", rows)
        self.postgres = url

    def location(self, name: str) -> str:
        return name

    def settings(self, name: str) -> dict[str, Any]:
        return {"postgres": self.postgres, "table": name, **self.rows_dir(name)}

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        return sql(str(self.postgres), statement)

    def lose_table(self, name: str = "index") -> None:
        self.sql(f"DROP TABLE llm2clip.{name}")

    def state(self) -> Any:
        tables = ("index", "index_llm2clip")
        return [self.sql(f"SELECT xmin::text, ctid::text FROM llm2clip.{name}") for name in tables]

    def is_empty(self) -> bool:
        return not self.sql("SELECT FROM pg_class WHERE relnamespace = to_regnamespace('llm2clip')")

    def write_theirs(self, name: str = "index") -> Callable[[], bool]:
        self.sql(f"CREATE SCHEMA IF NOT EXISTS llm2clip; CREATE TABLE llm2clip.{name} AS SELECT 1 AS theirs")
        return lambda: self.sql(f"SELECT theirs FROM llm2clip.{name}") == [(1,)]


def sql(url: str, statement: str) -> list[tuple[Any, ...]]:
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement)  # type: ignore[arg-type]
        return cursor.fetchall() if cursor.description else []


def content(folder: Path) -> dict[str, Any]:
    """All that an index in a folder says, apart from versions, in the order of the keys."""
    return Place(folder.parent).content(folder.name)


def rows_of(index: SearchIndex) -> list[dict[str, Any]]:
    """The rows of an open index with their embeddings; PostgreSQL stores no zeros in texts."""
    rows = stored_rows(index)
    for row in rows:
        if row.get("caption"):
            row["caption"] = row["caption"].replace("\0", "\N{REPLACEMENT CHARACTER}")
    return sorted(rows, key=lambda row: (row["key"], str(row.get("caption_column")), row.get("caption_number") or 0))
