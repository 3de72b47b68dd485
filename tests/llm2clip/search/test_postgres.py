"""What is PostgreSQL's own: graphs, rights, secrets, lost connections; see test_store_contract.py for the rest."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

from llm2clip import cli
from llm2clip.search.index import IndexConfig
from llm2clip.search.location import open_store
from llm2clip.search.search import SearchConfig
from llm2clip.search.search_index import SearchIndex

from .helpers import Model, as_json, encoded, error, picture
from .helpers import index as index_in_folder
from .places import Place, sql

pytest.importorskip("psycopg", reason="psycopg is not installed")
from llm2clip.search.postgres_store import PostgresStore

TEXT = "two children play football"
IN_POSTGRES = pytest.mark.parametrize("place", ["postgres"], indirect=True)
GRAPHS = "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'index' AND indexdef LIKE '%hnsw%'"


def test_a_lost_connection_is_one_error_and_the_run_is_resumed(
    pictures: Path, model: Model, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'llm2clip'"
    command = ["index", pictures, "--model", model[0], "--postgres", url, "--num-workers", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(PostgresStore, "_index", lambda self, *_: sql(url, end) and self._query("SELECT 1"))
        assert "does not go on: " in error(capsys, *command)
    assert cli.main([*map(str, command)]) == 0
    assert f"index: llm2clip.pictures in {url}" in capsys.readouterr().out, "the table has the name of the folder"


@IN_POSTGRES
def test_hnsw_finds_what_comparing_all_finds_also_where_a_condition_rejects_nearly_all(
    place: Place, url: str, pictures: Path, model: Model
) -> None:
    settings = {"index_type": "hnsw", "m": 4, "ef_construction": 32, "ef_search": 1}
    place.index(pictures, model[0], "flat")
    place.index(pictures, model[0])
    assert place.index(pictures, model[0], **settings) == (0, 12, 0, 0, 12)
    before = sql(url, GRAPHS)
    assert "USING hnsw (vector halfvec_cosine_ops) WITH (m='4', ef_construction='32')" in before[0][1]
    # The planner has to take the graph, in which a search gives up after the first rows that it finds.
    options = "hnsw.max_scan_tuples=1", "enable_seqscan=off", "enable_bitmapscan=off", "enable_sort=off"
    short = f"{url}?options={quote(' '.join(f'-c {option}' for option in options))}"
    query = np.random.default_rng(0).normal(size=(3, 24)).astype(np.float32)
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    for where, top, count in (
        (None, 3, 3), (None, 40, 12), ("folder = 'a'", 4, 4), ("key = 'a/07.png'", 1, 1), ("size = 0", 1, 0)
    ):  # fmt: skip
        found = SearchIndex.open("index", short).search(query, top, where)
        keys, expected = (
            [[row.key for row in rows] for rows in one]
            for one in (found, place.open("flat").search(query, top, where))
        )
        assert keys == expected
        assert len(keys[0]) == count
    # A new table has a graph of its own.
    for number in range(20):
        (pictures / f"more{number}.png").write_bytes(encoded(picture(60 + number)))
    assert place.index(pictures, model[0], **settings | {"m": 5}) == (20, 12, 0, 0, 32)
    assert len(SearchIndex.open("index", short).search(query, 40)[0]) == 32
    assert ["m='5'" in definition for _, definition in sql(url, GRAPHS)] == [True]
    place.index(pictures, model[0], index_type="flat")
    assert sql(url, GRAPHS) == []


@IN_POSTGRES
def test_rights_on_the_table_outlive_a_new_one_and_a_reader_needs_no_others(
    place: Place, url: str, pictures: Path, model: Model, default_rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place.index(pictures, model[0])
    sql(url, "DROP ROLE IF EXISTS reader; CREATE ROLE reader LOGIN")
    reader = url.replace("postgres@", "reader@")
    query = ["search", "index", "--image", pictures / "00.png", "--postgres", reader]
    assert "permission denied for schema llm2clip. Let the owner grant it" in error(capsys, *query)
    sql(url, "GRANT USAGE ON SCHEMA llm2clip TO reader; GRANT SELECT ON ALL TABLES IN SCHEMA llm2clip TO reader")
    for settings in ({"overwrite": True}, {"index_type": "hnsw"}):
        place.index(pictures, model[0], **settings)
        (found,) = as_json(capsys, *query[1:])
        assert found["results"][0]["key"] == "00.png"
    for table in ("own.pictures", "index"):  # before anything is embedded
        message = error(capsys, "index", pictures, "--model", model[0], "--postgres", reader, "--table", table)
        assert "permission denied for" in message
        assert not list(default_rows.glob("*"))
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


@IN_POSTGRES
def test_the_second_table_of_an_index_is_not_taken_from_others(place: Place, pictures: Path, model: Model) -> None:
    is_there = place.write_theirs("index_llm2clip")
    with pytest.raises(FileExistsError, match=r"table llm2clip\.index_llm2clip .* is not replaced"):
        place.index(pictures, model[0], overwrite=True)
    assert is_there()


def test_a_search_ends_after_the_timeout_of_the_url_or_a_minute(url: str) -> None:
    from llm2clip.search.postgres_database import PostgresDatabase

    with PostgresDatabase(url).connection as connection:
        assert connection.execute("SHOW statement_timeout").fetchone() == ("1min",)
    hasty = PostgresDatabase(f"{url}?options=-c%20statement_timeout%3D50")
    expected = pytest.raises(TimeoutError, match="a search may take 60s, unless the URL has")
    with expected, hasty.readable():
        hasty.connection.execute("SELECT pg_sleep(3)")


def test_a_database_without_a_recent_pgvector_is_refused(url: str) -> None:
    sql(url, "CREATE DATABASE plain")
    plain = url.rpartition("/")[0] + "/plain"
    with pytest.raises(ValueError, match="CREATE EXTENSION"):
        SearchIndex.open("index", plain)
    sql(plain, "CREATE EXTENSION vector; UPDATE pg_extension SET extversion = '0.7.4' WHERE extname = 'vector'")
    with pytest.raises(ValueError, match="ALTER EXTENSION vector UPDATE"):
        SearchIndex.open("index", plain)
    sql(url, "DROP DATABASE plain")


def test_a_table_has_the_name_of_the_folder_in_letters_of_sql(pictures: Path, model: Model, url: str) -> None:
    folder = pictures.rename(pictures.parent / "2024 Ausflüge, Meer")
    index_in_folder(folder, model[0], None, postgres=url)
    assert SearchIndex.open("_2024_ausfl_ge_meer", url).manifest.images == 12


def test_hnsw_is_refused_or_left_out_where_embeddings_are_too_wide_for_it() -> None:
    def config(**settings: Any) -> IndexConfig:
        return IndexConfig(folder="pictures", model="model", postgres="postgresql:///images", **settings)

    types = ("flat", "hnsw")
    with pytest.raises(ValueError, match=r"hnsw takes up to 2,000 values of float32, but the width is 4,000"):
        config(index_type="hnsw", stored_dtype="float32").type_of(types, 4000)
    config(index_type="hnsw").type_of(types, 4000)
    assert config().index_of(10**6, 4000, types)["type"] == "hnsw"
    assert config(stored_dtype="float32").index_of(10**6, 4000, types)["type"] == "flat"


def test_a_name_that_is_no_table_and_a_missing_library_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"table is 'a\.b\.c'"):
        open_store("a.b.c", "postgresql:///images")
    monkeypatch.setitem(sys.modules, "psycopg", None)
    for name in [name for name in sys.modules if name.startswith("llm2clip.search.postgres")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install 'llm2clip\[search\]'"):
        open_store("a", "postgresql:///images")


def test_pgvector_may_be_in_a_schema_of_its_own(pictures: Path, model: Model, url: str) -> None:
    sql(url, "DROP DATABASE IF EXISTS tidy")
    sql(url, "CREATE DATABASE tidy")
    tidy = url.rpartition("/")[0] + "/tidy"
    sql(tidy, 'CREATE SCHEMA "my Types"; CREATE EXTENSION vector SCHEMA "my Types"; CREATE SCHEMA mine')
    settings = {"postgres": tidy, "table": "mine.images", "index_type": "hnsw"}
    assert index_in_folder(pictures, model[0], None, **settings) == (12, 0, 0, 0, 12)
    assert len(SearchIndex.open("mine.images", tidy).search(np.ones((1, 24), np.float32), 3)[0]) == 3
