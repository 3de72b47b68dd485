"""An index in PostgreSQL: a real server with pgvector, on a loopback port."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import psycopg
import pyarrow as pa
import pytest
import torch

from llm2clip import cli
from llm2clip.encoders.ours import OurEncoder
from llm2clip.search import postgres_rows, postgres_store, postgres_writing
from llm2clip.search.image_index import ImageIndex
from llm2clip.search.index import IndexConfig, run
from llm2clip.search.index_rows import ID, VECTOR
from llm2clip.search.postgres_store import PostgresStore
from llm2clip.search.postgres_writing import WrittenTable
from llm2clip.search.stores import open_store
from modeling_llm2clip import LLM2CLIPModel
from tests.modeling_llm2clip import tiny
from tests.processes import run_python

from .conftest import COUNTS, encoded, picture, save_table
from .conftest import index as index_in_folder

Model = tuple[Path, LLM2CLIPModel]
TABLE = "pictures"
TEXT = "two children play football"


def index(folder: Path | str, model: Path, url: str, **settings: Any) -> tuple[int, ...]:
    """Run `llm2clip index` on a database; return its counts."""
    settings = {"num_workers": 0, "batch_size": 4, "table": TABLE, **settings}
    result = run(IndexConfig(folder=str(folder), model=str(model), postgres=url, **settings))
    return tuple(result[name] for name in COUNTS)


def sql(url: str, statement: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement)  # type: ignore[arg-type]
        return cursor.fetchall() if cursor.description else []


def content(place: Path | str, postgres: str | None = None) -> dict[str, Any]:
    """All that an index says, apart from versions, in the order of the keys."""
    opened = ImageIndex.open(place, postgres)
    batches = opened.rows.scan([*opened.rows.columns, ID, VECTOR])
    found = [row for batch in batches for row in batch.drop_columns(["_rowid"]).to_pylist()]
    failures = open_store(place, postgres).failures()
    return {"rows": sorted(found, key=lambda row: row["key"]), "failures": failures} | opened.manifest.content()


def as_json(capsys: pytest.CaptureFixture[str], *arguments: Any) -> list[dict[str, Any]]:
    """Return the queries in the output of `llm2clip search --json`."""
    capsys.readouterr()
    assert cli.main(["search", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["queries"]


def error(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Return the error message of a command."""
    capsys.readouterr()
    assert cli.main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("float32", 1e-6)])
@pytest.mark.parametrize(
    ("where", "count"), [(None, 5), ("folder = 'a'", 4), ("size > 0 AND key LIKE '%1.png'", 2), ("key = 'none'", 0)]
)
def test_postgres_and_lancedb_find_the_same(
    dtype: str, tolerance: float, where: str | None, count: int, pictures: Path, model: Model, url: str,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (pictures / "broken.png").write_bytes(b"broken")
    assert index(pictures, model[0], url, dtype=dtype) == (12, 0, 0, 1, 12)
    index_in_folder(pictures, model[0], tmp_path / "index", dtype=dtype)
    assert content(TABLE, url) == content(tmp_path / "index")
    query = [TEXT, "--image", pictures / "a" / "07.png", "--top", 5, *(["--where", where] if where else [])]
    expected, found = as_json(capsys, tmp_path / "index", *query), as_json(capsys, TABLE, *query, "--postgres", url)
    assert [len(one["results"]) for one in found] == [count, count]
    for there, here in zip(expected, found, strict=True):
        assert [one["path"] for one in here["results"]] == [one["path"] for one in there["results"]]
        scores = [[one["score"] for one in results["results"]] for results in (here, there)]
        np.testing.assert_allclose(*scores, atol=tolerance)


def test_an_update_adds_keeps_and_removes(pictures: Path, model: Model, url: str, tmp_path: Path) -> None:
    def both() -> tuple[int, ...]:
        counts = index(pictures, model[0], url)
        assert index_in_folder(pictures, model[0], tmp_path / "index") == counts
        assert content(TABLE, url) == content(tmp_path / "index")
        return counts

    assert both() == (12, 0, 0, 0, 12)
    assert both() == (0, 12, 0, 0, 12)
    (pictures / "new.png").write_bytes(encoded(picture(50)))
    (pictures / "a" / "07.png").write_bytes(encoded(picture(51), "TIFF"))
    (pictures / "00.png").unlink()
    assert both() == (2, 10, 1, 0, 12)
    (pictures / "broken.png").write_bytes(b"broken")
    assert both() == (0, 12, 0, 1, 12)
    assert sql(url, "SELECT count(*) FROM llm2clip.pictures WHERE _reason IS NOT NULL") == [(0,)]
    assert index(pictures, model[0], url, overwrite=True) == (12, 0, 0, 1, 12)
    assert content(TABLE, url) == content(tmp_path / "index")


def test_a_run_without_changes_does_not_write(pictures: Path, model: Model, url: str) -> None:
    index(pictures, model[0], url)
    query = "SELECT xmin::text, ctid::text FROM llm2clip.pictures_llm2clip UNION ALL SELECT xmin::text, ctid::text "
    before = sql(url, query + "FROM llm2clip.pictures")
    assert index(pictures, model[0], url) == (0, 12, 0, 0, 12)
    assert sql(url, query + "FROM llm2clip.pictures") == before


def test_a_data_set_keeps_the_embeddings_of_moved_rows(model: Model, url: str, tmp_path: Path) -> None:
    path = save_table(tmp_path / "data.parquet", [1, 2, 3, 4, 5, 5], caption=["a\0b", None, "c", "d", "e", "e"])
    assert index(path, model[0], url) == (6, 0, 0, 0, 6)
    save_table(path, [9, 5, 4, 3, 1], caption=["new", "e", "d", "c", "a"])
    assert index(path, model[0], url) == (1, 4, 1, 0, 5)
    index_in_folder(path, model[0], tmp_path / "fresh")
    found, expected = content(TABLE, url)["rows"], content(tmp_path / "fresh")["rows"]
    for row, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(row.pop(VECTOR), other.pop(VECTOR), atol=1e-3)
        assert row == other


def test_metadata_columns_have_types_of_sql(model: Model, url: str, tmp_path: Path) -> None:
    import datasets

    columns = {
        "name": pa.string(), "large": pa.large_string(), "flag": pa.bool_(), "tiny": pa.int8(), "big": pa.uint64(),
        "half": pa.float16(), "double": pa.float64(), "day": pa.date32(), "time": pa.timestamp("ns"),
        "zone": pa.timestamp("s", "Europe/Berlin"),
    }  # fmt: skip
    values = {
        "name": "x",
        "large": os.urandom(8000).hex(),
        "flag": True,
        "tiny": -3,
        "big": 2**63 + 1,
        "half": np.float16(0.5),
    }
    values |= {"double": 0.1, "day": 20000, "time": 10**18, "zone": 10**9}
    table = pa.table({name: pa.array([values[name], None], kind) for name, kind in columns.items()})
    images = pa.array([{"bytes": encoded(picture(seed)), "path": None} for seed in range(2)])
    features = datasets.Features.from_arrow_schema(table.schema) | {"image": datasets.Image()}
    stored = datasets.Dataset(table.append_column("image", images)).cast(datasets.Features(features))
    stored.to_parquet(tmp_path / "data.parquet")
    index(tmp_path / "data.parquet", model[0], url, metadata_columns=list(columns))
    index_in_folder(tmp_path / "data.parquet", model[0], tmp_path / "index", metadata_columns=list(columns))
    assert content(TABLE, url) == content(tmp_path / "index")
    (indexed,) = sql(url, "SELECT count(*) FROM pg_indexes WHERE tablename = 'pictures'")[0]
    assert indexed == 2 + len(columns) - 1, "the primary key, key, and all columns but the one of long strings"
    opened = ImageIndex.open(TABLE, url)
    assert opened.rows.count("big = 9223372036854775809 AND day = '2024-10-04' AND zone > '2001-09-09'") == 1


KILLED = """
import os, signal, sys
from llm2clip.encoders.ours import OurEncoder
from llm2clip.search.index import IndexConfig, run

forward, calls = OurEncoder.forward_images, []
def killed(self, inputs):
    calls.append(None)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, inputs)
OurEncoder.forward_images = killed
folder, model, url = sys.argv[1:]
run(IndexConfig(folder=folder, model=model, postgres=url, table="pictures", num_workers=0, batch_size=4, part_size=4))
"""


def test_a_killed_run_is_resumed_with_an_equal_result(
    pictures: Path, model: Model, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(pictures, model[0], url, table="whole", part_size=4)
    killed = run_python(["-c", KILLED, str(pictures), str(model[0]), url], check=False, PYTHONPATH=":".join(sys.path))
    assert killed.returncode == -9, killed.stderr
    with pytest.raises(FileNotFoundError, match="it is not finished; run the same llm2clip index again"):
        ImageIndex.open(TABLE, url)
    forward, again = OurEncoder.forward_images, []

    def counted(self: OurEncoder, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        again.append(len(inputs["pixel_values"]))
        return forward(self, inputs)

    monkeypatch.setattr(OurEncoder, "forward_images", counted)
    assert index(pictures, model[0], url, part_size=4) == (12, 0, 0, 0, 12)
    assert again == [4], "two of three parts were stored"
    assert content(TABLE, url) == content("whole", url)


HNSW = {"index_type": "hnsw"}


@pytest.mark.parametrize(
    ("owner", "method", "settings"),
    [
        (PostgresStore, "begin", {}),
        (WrittenTable, "append", {}),
        (WrittenTable, "delete", {}),
        (WrittenTable, "_merge", {}),
        (PostgresStore, "write_state", {}),
        (PostgresStore, "write_state", HNSW),
        (WrittenTable, "_make_whole", HNSW),
        (WrittenTable, "_index", HNSW),
        (WrittenTable, "_swap", HNSW),
        (PostgresStore, "replace_table", HNSW),
    ],
)
@pytest.mark.parametrize("is_after", [False, True])
def test_a_run_that_dies_anywhere_leaves_the_old_index_and_is_resumed(
    owner: Any, method: str, settings: dict[str, Any], is_after: bool, pictures: Path, model: Model, url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    index(pictures, model[0], url)
    before = content(TABLE, url)
    (pictures / "new.png").write_bytes(encoded(picture(50)))
    (pictures / "00.png").unlink()
    original = getattr(owner, method)

    def dies(self: Any, *arguments: Any, **options: Any) -> Any:
        is_early = method == "write_state" and arguments[0] == "unfinished"
        if is_after or is_early:
            original(self, *arguments, **options)
        if not is_early:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, dies)
        with pytest.raises(KeyboardInterrupt):
            index(pictures, model[0], url, **settings)
    if not (is_after and method in ("_merge", "_swap")):  # after them the run is done
        assert content(TABLE, url) == before
        assert index(pictures, model[0], url, **settings)[-1] == 12
    index(pictures, model[0], url, table="whole", **settings)
    assert content(TABLE, url) == content("whole", url)


def test_a_lost_connection_is_one_error_and_the_run_is_resumed(
    pictures: Path, model: Model, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = OurEncoder.forward_images

    def cut(self: OurEncoder, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        sql(url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'llm2clip'")
        return forward(self, inputs)

    command = ["index", pictures, "--model", model[0], "--postgres", url, "--num-workers", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(OurEncoder, "forward_images", cut)
        assert "does not go on: " in error(capsys, *command)
    assert cli.main([*map(str, command)]) == 0
    assert f"index: llm2clip.pictures in {url}" in capsys.readouterr().out


def test_searches_during_an_update_see_the_old_index(
    pictures: Path, model: Model, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(pictures, model[0], url)
    (pictures / "new.png").write_bytes(encoded(picture(50)))
    (pictures / "00.png").unlink()
    opened, before = ImageIndex.open(TABLE, url), content(TABLE, url)
    query = np.ones((1, 24), np.float32) / 24**0.5
    merge, seen = WrittenTable._merge, []

    def keys() -> set[str]:
        return {row["key"] for _, row in opened.search(query, 20)[0]}

    def watched(self: WrittenTable, *arguments: Any) -> None:
        assert content(TABLE, url) == before
        seen.append(keys())
        merge(self, *arguments)

    monkeypatch.setattr(WrittenTable, "_merge", watched)
    index(pictures, model[0], url)
    assert seen == [{row["key"] for row in before["rows"]}]
    assert keys() == seen[0] - {"00.png"} | {"new.png"}, "an open index goes on with the new rows"
    tiny.save(pictures.parent / "other", projection_dim=40)
    index(pictures, pictures.parent / "other", url, overwrite=True)
    with pytest.raises(ValueError, match="was replaced since it was opened; search again"):
        keys()


def test_a_second_concurrent_run_is_refused(
    pictures: Path, model: Model, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_store, "PATIENCE", 1.0)

    def second(*arguments: Any) -> Any:
        with pytest.raises(ValueError, match=r"another run is writing llm2clip\.pictures in "):
            index(pictures, model[0], url)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OurEncoder, "forward_images", second)
        with pytest.raises(KeyboardInterrupt):
            index(pictures, model[0], url)
    assert index(pictures, model[0], url)[0] == 12


def test_a_session_that_keeps_the_table_open_delays_a_new_index_but_loses_nothing(
    pictures: Path, model: Model, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(pictures, model[0], url)
    monkeypatch.setattr(postgres_writing, "SWAP_PATIENCE", "50ms")
    monkeypatch.setattr(postgres_writing, "SWAP_TRIES", 2)
    with psycopg.connect(url) as connection:
        connection.execute("SELECT FROM llm2clip.pictures")
        with pytest.raises(ValueError, match="another session keeps it open"):
            index(pictures, model[0], url, index_type="hnsw")
        connection.rollback()
    assert index(pictures, model[0], url, index_type="hnsw") == (0, 12, 0, 0, 12)


def test_hnsw_finds_what_comparing_all_finds_also_where_a_condition_rejects_nearly_all(
    pictures: Path, model: Model, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_rows, "EXACT_MATCHES", 0)
    settings = {"index_type": "hnsw", "m": 4, "ef_construction": 32, "ef_search": 1}
    index(pictures, model[0], url, table="flat")
    index(pictures, model[0], url)
    assert index(pictures, model[0], url, **settings) == (0, 12, 0, 0, 12)
    (definition,) = sql(url, "SELECT indexdef FROM pg_indexes WHERE indexname = 'pictures_vector_idx'")[0]
    assert "USING hnsw (vector halfvec_ip_ops) WITH (m='4', ef_construction='32')" in definition
    # The planner has to take the graph, in which a search gives up after the first rows that it finds.
    options = "hnsw.max_scan_tuples=1", "enable_seqscan=off", "enable_bitmapscan=off", "enable_sort=off"
    short = f"{url}?options={quote(' '.join(f'-c {option}' for option in options))}"
    query = np.random.default_rng(0).normal(size=(3, 24)).astype(np.float32)
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    for where, top in ((None, 3), (None, 40), ("folder = 'a'", 4), ("key = 'a/07.png'", 1), ("size = 0", 1)):
        found = [ImageIndex.open(TABLE, short).search(query, top, where)]
        found.append(ImageIndex.open("flat", url).search(query, top, where))
        keys = [[[row["key"] for _, row in rows] for rows in one] for one in found]
        assert keys[0] == keys[1]
        assert len(keys[0][0]) == min(top, {None: 12, "folder = 'a'": 4, "size = 0": 0}.get(where, 1))
    for key in {row["key"] for row in content(TABLE, url)["rows"]}:
        # The server takes this for a condition that half of the rows fulfil.
        where = f"CASE WHEN key = '{key}' THEN true ELSE false END"
        rejecting = ImageIndex.open(TABLE, short).search(query, 1, where)
        assert [[row["key"] for _, row in rows] for rows in rejecting] == [[key]] * 3
    # New rows join the graph, and many of them build another one.
    (pictures / "new.png").write_bytes(encoded(picture(50)))
    table = "SELECT 'llm2clip.pictures'::regclass::oid"
    before = sql(url, table)
    assert index(pictures, model[0], url, **settings) == (1, 12, 0, 0, 13)
    assert sql(url, table) == before
    for number in range(20):
        (pictures / f"more{number}.png").write_bytes(encoded(picture(60 + number)))
    assert index(pictures, model[0], url, **settings) == (20, 13, 0, 0, 33)
    assert sql(url, table) != before
    assert len(ImageIndex.open(TABLE, short).search(query, 40)[0]) == 33


@pytest.mark.parametrize(
    ("where", "effort"),
    [(None, 100), ("key = 'a/07.png'", None), ("folder = 'a'", 300), ("CASE WHEN size > 0 THEN true END", 200)],
)
def test_a_condition_is_searched_harder_the_more_it_rejects_and_exactly_where_it_fits_few(
    where: str | None, effort: int | None, pictures: Path, model: Model, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_rows, "EXACT_MATCHES", 3)
    index(pictures, model[0], url, index_type="hnsw", ef_search=100)
    rows = ImageIndex.open(TABLE, url).rows
    assert isinstance(rows, postgres_rows.PostgresRows)
    with rows._reading(where) as connection:
        assert rows._effort(connection, 10, where) == effort, "of 12 rows 12, 1, 4 and, by the server's guess, 6 fit"
        assert rows._effort(connection, 5000, where) == (effort and 1000)


def test_no_image_leaves_no_table(model: Model, url: str, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("words")
    with pytest.raises(ValueError, match="none of the 1 files or rows"):
        index(tmp_path / "texts", model[0], url)
    assert sql(url, "SELECT relname FROM pg_class WHERE relnamespace = 'llm2clip'::regnamespace") == []
