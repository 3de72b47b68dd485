"""What an index in PostgreSQL refuses, and what it keeps to itself."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm2clip import cli
from llm2clip.search.index import IndexConfig
from llm2clip.search.postgres_database import PostgresDatabase
from llm2clip.search.postgres_store import PostgresStore
from llm2clip.search.search import SearchConfig
from llm2clip.search.search_index import SearchIndex
from llm2clip.search.store import open_store

from .conftest import as_json, error
from .test_postgres_store import HNSW, TABLE, TEXT, Model, index, sql


def test_rights_on_the_table_outlive_a_new_one_and_a_reader_needs_no_others(
    pictures: Path, model: Model, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    index(pictures, model[0], url)
    sql(url, "DROP ROLE IF EXISTS reader; CREATE ROLE reader LOGIN")
    reader = url.replace("postgres@", "reader@")
    query = ["search", TABLE, "--image", pictures / "00.png", "--postgres", reader]
    assert "permission denied for schema llm2clip. Let the owner grant it" in error(capsys, *query)
    sql(url, "GRANT USAGE ON SCHEMA llm2clip TO reader; GRANT SELECT ON ALL TABLES IN SCHEMA llm2clip TO reader")
    for settings in ({}, {"overwrite": True}, HNSW):
        index(pictures, model[0], url, **settings)
        (found,) = as_json(capsys, *query[1:])
        assert found["results"][0]["key"] == "00.png"
    message = error(capsys, "index", pictures, "--model", model[0], "--postgres", reader, "--table", "own.pictures")
    assert "permission denied for database postgres" in message
    sql(url, "DROP OWNED BY reader; DROP ROLE reader")


def test_the_password_is_written_nowhere(
    pictures: Path, model: Model, url: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    secret = url.replace("@", ":sesame@")
    with caplog.at_level(logging.DEBUG):
        shown = []
        for command in (
            ["index", pictures, "--model", model[0], "--postgres", secret, "--num-workers", "0", "--table", "open"],
            ["search", "open", "--image", pictures / "00.png", "--postgres", secret],
        ):
            assert cli.main([*map(str, command)]) == 0
            shown.append(str(capsys.readouterr()))
        for given in (
            secret.rpartition("/")[0] + "/nowhere",
            secret.replace("//", "/"),
            secret.replace("sesame", "%sesame"),
            "postgresql://postgres:sesame@127.0.0.1:1/postgres",
            f"{url}?password=sesame&nonsense=1",
        ):
            shown.append(error(capsys, "search", "open", TEXT, "--postgres", given))
        shown.append(error(capsys, "search", secret, TEXT))
        shown.append(error(capsys, "search", "nothing", TEXT, "--postgres", secret))
    shown += [repr(IndexConfig(folder="a", model="b", postgres=secret)), caplog.text]
    shown += [repr(SearchConfig(index="a", query=["b"], postgres=secret))]
    shown += [str(sql(url, f"SELECT * FROM llm2clip.{name}")) for name in ("open", "open_llm2clip")]
    assert not [text for text in shown if "sesame" in text]
    assert "open in postgresql://postgres@127.0.0.1" in shown[0]


@pytest.mark.parametrize("suffix", ["", "_llm2clip"])
def test_a_table_of_others_is_refused_and_not_touched(suffix: str, pictures: Path, model: Model, url: str) -> None:
    sql(url, f"CREATE SCHEMA llm2clip; CREATE TABLE llm2clip.pictures{suffix} AS SELECT 1 AS theirs")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=rf"table llm2clip\.pictures{suffix} in .* is not replaced, because"):
            index(pictures, model[0], url, overwrite=overwrite)
    assert sql(url, f"SELECT theirs FROM llm2clip.pictures{suffix}") == [(1,)]
    assert index(pictures, model[0], url, table="others")[0] == 12


def test_a_search_ends_after_a_while(
    pictures: Path, model: Model, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    index(pictures, model[0], url)
    with PostgresDatabase(url).connection as connection:
        assert connection.execute("SHOW statement_timeout").fetchone() == ("1min",)
    hasty = f"{url}?options=-c%20statement_timeout%3D50"
    database = PostgresDatabase(hasty)
    expected = pytest.raises(TimeoutError, match="due to statement timeout; a search may take 60s, unless the URL has")
    with expected, database.readable():
        database.connection.execute("SELECT pg_sleep(3)")
    # What was a condition once.
    for where in ("pg_sleep(3) IS NULL", "pg_read_file('/etc/passwd') LIKE '%'", "true; DROP TABLE llm2clip.pictures"):
        message = error(capsys, "search", TABLE, TEXT, "--postgres", hasty, "--where", where)
        assert "which is no condition on the columns key, folder, extension, size, mtime_ns: " in message


def test_a_database_without_a_recent_pgvector_is_refused(url: str) -> None:
    sql(url, "CREATE DATABASE plain")
    plain = url.rpartition("/")[0] + "/plain"
    with pytest.raises(ValueError, match=r"plain lacks the extension pgvector, .* owner run: CREATE EXTENSION"):
        SearchIndex.open(TABLE, plain)
    sql(plain, "CREATE EXTENSION vector; UPDATE pg_extension SET extversion = '0.7.4' WHERE extname = 'vector'")
    with pytest.raises(ValueError, match=r"has 0\.7\.4 of the extension pgvector, .* ALTER EXTENSION vector UPDATE"):
        SearchIndex.open(TABLE, plain)
    sql(url, "DROP DATABASE plain")


def test_pgvector_may_be_in_a_schema_of_its_own(pictures: Path, model: Model, url: str) -> None:
    sql(url, "CREATE DATABASE tidy")
    tidy = url.rpartition("/")[0] + "/tidy"
    sql(tidy, 'CREATE SCHEMA "my Types"; CREATE EXTENSION vector SCHEMA "my Types"; CREATE SCHEMA mine')
    assert index(pictures, model[0], tidy, table="mine.images", index_type="hnsw") == (12, 0, 0, 0, 12)
    assert len(SearchIndex.open("mine.images", tidy).search(np.ones((1, 24), np.float32), 3)[0]) == 3
    sql(url, "DROP DATABASE tidy")


def test_settings_that_do_not_go_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(**settings: Any) -> IndexConfig:
        return IndexConfig(folder="pictures", model="model", **settings)

    url = "postgresql:///images"
    for settings, message in (
        ({"postgres": url, "output_dir": "index"}, "output_dir is index, but an index in PostgreSQL has a table"),
        ({"table": "index"}, "table is index, but no database is given: add --postgres URL"),
        ({"postgres": url, "index_type": "faiss"}, "an index in PostgreSQL has one of auto, flat, hnsw"),
        ({"index_type": "hnsw"}, "an index in a folder has one of auto, flat, ivf_rq, faiss"),
        ({"precision": "binary", "index_type": "flat"}, "precision is binary, but .* flat compares the embeddings"),
        ({"postgres": url, "precision": "int8"}, "precision is int8, but .* hnsw has only binary: leave it out"),
        ({"postgres": url, "refine": 3}, "refine is 3, but an index of the type hnsw does not use it"),
        (
            {"index_type": "flat", "cells": 7},
            "cells is 7, but an index of the type flat does not use it",
        ),
        ({"ef_search": 50}, "ef_search is 50, but an index of the type ivf_rq does not use it"),
        ({"postgres": url, "ef_search": 1001}, "ef_search up to 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**settings)
    with pytest.raises(ValueError, match=r"table is 'a\.b\.c', but it has to be NAME or SCHEMA\.NAME"):
        open_store("a.b.c", url)
    types = PostgresStore.index_types
    with pytest.raises(ValueError, match=r"hnsw takes embeddings of up to 2,000 .* the width is 4,000; .* float16"):
        config(postgres=url, index_type="hnsw", dtype="float32").type_of(types, 4000)
    config(postgres=url, index_type="hnsw").type_of(types, 4000)
    config(postgres=url, precision="binary", dtype="float32").type_of(types, 5000)
    assert config(postgres=url).index_of(10**6, 4000, types)["type"] == "hnsw"
    assert config(postgres=url, dtype="float32").index_of(10**6, 4000, types)["type"] == "flat"
    monkeypatch.setitem(sys.modules, "psycopg", None)
    for name in [name for name in sys.modules if name.startswith("llm2clip.search.postgres")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install 'llm2clip\[postgres\]'"):
        open_store("a", url)


def test_the_default_table_has_the_name_of_the_folder(pictures: Path, model: Model, url: str) -> None:
    folder = pictures.rename(pictures.parent / "2024 Ausflüge, Meer")
    index(folder, model[0], url, table=None)
    assert SearchIndex.open("_2024_ausfl_ge_meer", url).manifest.images == 12
