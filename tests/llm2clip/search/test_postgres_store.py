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

from llm2clip import cli
from llm2clip.search import postgres_store
from llm2clip.search.index import IndexConfig, run
from llm2clip.search.postgres_store import PostgresStore
from llm2clip.search.search_index import SearchIndex
from llm2clip.search.store import ID, VECTOR
from modeling_llm2clip import LLM2CLIPModel
from tests.modeling_llm2clip import tiny
from tests.processes import run_python

from .conftest import COUNTS, Forwards, encoded, error, picture, stored_rows
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
    opened = SearchIndex.open(place, postgres)
    found = sorted(stored_rows(opened, ID, VECTOR), key=lambda row: row["key"])
    return {"rows": found, "failures": failures(place, postgres)} | opened.manifest.content()


def failures(place: Path | str, postgres: str | None = None) -> Any:
    if postgres is None:
        return json.loads((Path(place) / "failures.json").read_text())
    state = PostgresStore(postgres, str(place))._state("committed")
    return state and state[1]


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
    where = "big = 9223372036854775809 AND day = '2024-10-04' AND zone > '2001-09-09' AND tiny < 0 AND double = 0.1"
    for opened in (SearchIndex.open(TABLE, url), SearchIndex.open(tmp_path / "index")):
        assert [found.key for found in opened.search(np.ones((1, 24), np.float32), 9, where)[0]] == ["0"]


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
    pictures: Path, model: Model, url: str, forwards: Forwards
) -> None:
    index(pictures, model[0], url, table="whole", part_size=4)
    killed = run_python(["-c", KILLED, str(pictures), str(model[0]), url], check=False, PYTHONPATH=":".join(sys.path))
    assert killed.returncode == -9, killed.stderr
    with pytest.raises(FileNotFoundError, match="it is not finished; run the same llm2clip index again"):
        SearchIndex.open(TABLE, url)
    del forwards.sizes[:]
    assert index(pictures, model[0], url, part_size=4) == (12, 0, 0, 0, 12)
    assert forwards.sizes == [4], "two of three parts were stored"
    assert content(TABLE, url) == content("whole", url)


HNSW = {"index_type": "hnsw"}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("begin", {}),
        ("upsert", {}),
        ("delete", {}),
        ("_finish", {}),
        ("_write_state", {}),
        ("_index", HNSW),
        ("_finish", HNSW),
        ("_write_state", HNSW),
        ("upsert", {"overwrite": True}),
        ("_finish", {"overwrite": True}),
    ],
)
@pytest.mark.parametrize("is_after", [False, True])
def test_a_run_that_dies_anywhere_leaves_the_old_index_and_is_resumed(
    method: str, settings: dict[str, Any], is_after: bool, pictures: Path, model: Model, url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    index(pictures, model[0], url)
    before = content(TABLE, url)
    (pictures / "new.png").write_bytes(encoded(picture(50)))
    (pictures / "00.png").unlink()
    original = getattr(PostgresStore, method)

    def dies(self: Any, *arguments: Any, **options: Any) -> Any:
        is_early = method == "_write_state" and arguments[0] == "begun"
        if is_after or is_early:
            original(self, *arguments, **options)
        if not is_early:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PostgresStore, method, dies)
        with pytest.raises(KeyboardInterrupt):
            index(pictures, model[0], url, **settings)
    if not (is_after and method == "_finish"):  # after them the run is done
        assert content(TABLE, url) == before
        assert index(pictures, model[0], url, **settings)[-1] == 12
    index(pictures, model[0], url, table="whole", **settings)
    assert content(TABLE, url) == content("whole", url)


def test_a_lost_connection_is_one_error_and_the_run_is_resumed(
    pictures: Path, model: Model, url: str, forwards: Forwards, capsys: pytest.CaptureFixture[str]
) -> None:
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'llm2clip'"
    forwards.meanwhile = lambda number: sql(url, end)
    command = ["index", pictures, "--model", model[0], "--postgres", url, "--num-workers", "0"]
    assert "does not go on: " in error(capsys, *command)
    forwards.meanwhile = lambda number: None
    assert cli.main([*map(str, command)]) == 0
    assert f"index: llm2clip.pictures in {url}" in capsys.readouterr().out


def test_searches_during_an_update_see_the_old_index(
    pictures: Path, model: Model, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(pictures, model[0], url)
    (pictures / "new.png").write_bytes(encoded(picture(50)))
    (pictures / "00.png").unlink()
    opened, before = SearchIndex.open(TABLE, url), content(TABLE, url)
    query = np.ones((1, 24), np.float32) / 24**0.5
    finish, seen = PostgresStore._finish, []

    def keys() -> set[str]:
        return {row.key for row in opened.search(query, 20)[0]}

    def watched(self: PostgresStore, *arguments: Any) -> None:
        assert content(TABLE, url) == before
        seen.append(keys())
        finish(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(PostgresStore, "_finish", watched)
        index(pictures, model[0], url)
    assert seen == [{row["key"] for row in before["rows"]}]
    assert keys() == seen[0] - {"00.png"} | {"new.png"}, "an open index goes on with the new rows"
    tiny.save(pictures.parent / "other", projection_dim=40)
    index(pictures, pictures.parent / "other", url, overwrite=True)
    with pytest.raises(ValueError, match="was replaced since it was opened; search again"):
        keys()


def test_a_second_concurrent_run_is_refused(
    pictures: Path, model: Model, url: str, forwards: Forwards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_store, "PATIENCE", 1.0)

    def second(number: int) -> None:
        with pytest.raises(ValueError, match=r"another run is writing llm2clip\.pictures in "):
            index(pictures, model[0], url)

    forwards.meanwhile = second
    assert index(pictures, model[0], url)[0] == 12


def test_hnsw_finds_what_comparing_all_finds_also_where_a_condition_rejects_nearly_all(
    pictures: Path, model: Model, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_store, "EXACT_MATCHES", 0)
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
        found = [SearchIndex.open(TABLE, short).search(query, top, where)]
        found.append(SearchIndex.open("flat", url).search(query, top, where))
        keys = [[[row.key for row in rows] for rows in one] for one in found]
        assert keys[0] == keys[1]
        assert len(keys[0][0]) == min(top, {None: 12, "folder = 'a'": 4, "size = 0": 0}.get(where, 1))
    # New rows join the graph, and other parameters build another one.
    graph = "SELECT indexname FROM pg_indexes WHERE tablename = 'pictures' AND indexdef LIKE '%hnsw%'"
    before = sql(url, graph)
    for number in range(20):
        (pictures / f"more{number}.png").write_bytes(encoded(picture(60 + number)))
    assert index(pictures, model[0], url, **settings) == (20, 12, 0, 0, 32)
    assert sql(url, graph) == before
    assert len(SearchIndex.open(TABLE, short).search(query, 40)[0]) == 32
    assert index(pictures, model[0], url, **settings | {"m": 5}) == (0, 32, 0, 0, 32)
    assert len(sql(url, graph)) == 1
    assert sql(url, graph) != before
    assert index(pictures, model[0], url, index_type="flat") == (0, 32, 0, 0, 32)
    assert sql(url, graph) == []


def test_binary_hnsw_ranks_by_signs_and_rescores_by_the_embeddings(
    pictures: Path, model: Model, url: str, tmp_path: Path
) -> None:
    index(pictures, model[0], url, index_type="hnsw")
    settings = {"precision": "binary", "m": 4, "ef_construction": 32}
    assert index(pictures, model[0], url, **settings, refine=1) == (0, 12, 0, 0, 12)
    graphs = sql(url, "SELECT indexdef FROM pg_indexes WHERE tablename = 'pictures' AND indexdef LIKE '%hnsw%'")
    assert "((binary_quantize(vector))::bit(24)) bit_hamming_ops) WITH (m='4', ef_construction='32')" in graphs[0][0]
    assert len(graphs) == 1, "it replaces the other graph"
    # With one candidate per result, those of the smallest Hamming distance; with more, the same as in a folder.
    planned = f"{url}?options={quote('-c enable_seqscan=off -c enable_sort=off')}"
    opened = SearchIndex.open(TABLE, planned)
    found = {row["key"]: np.asarray(row["vector"], np.float32) for row in stored_rows(opened, VECTOR)}
    query = np.random.default_rng(0).normal(size=(1, 24)).astype(np.float32)
    distances = sorted(((vector > 0) != (query[0] > 0)).sum() for vector in found.values())
    keys = [row.key for row in opened.search(query, 3)[0]]
    assert sorted(((found[key] > 0) != (query[0] > 0)).sum() for key in keys) == distances[:3]
    assert index(pictures, model[0], url, **settings) == (0, 12, 0, 0, 12)
    index_in_folder(pictures, model[0], tmp_path / "index", precision="binary")
    index_in_folder(pictures, model[0], tmp_path / "flat")
    wanted = SearchIndex.open(tmp_path / "flat").search(query, 5)
    for place, postgres in ((TABLE, planned), (tmp_path / "index", None)):
        assert SearchIndex.open(place, postgres).search(query, 5) == wanted
    where = "folder = 'a'"
    assert {row.key[:2] for row in SearchIndex.open(TABLE, planned).search(query, 2**62, where)[0]} == {"a/"}


@pytest.mark.parametrize(("where", "effort"), [(None, 100), ("key = 'a/07.png'", None), ("folder = 'a'", 300)])
def test_a_condition_is_searched_harder_the_more_it_rejects_and_exactly_where_it_fits_few(
    where: str | None, effort: int | None, pictures: Path, model: Model, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_store, "EXACT_MATCHES", 3)
    index(pictures, model[0], url, index_type="hnsw", ef_search=100)
    store = SearchIndex.open(TABLE, url).store
    assert isinstance(store, PostgresStore)
    with store._reading(False) as (connection, types, _):
        condition, values = store._condition(where, types)
        assert store._effort(connection, condition, values, 10, where) == effort, "of 12 rows 12, 1 and 4 fit"
        assert store._effort(connection, condition, values, 5000, where) == (effort and 1000)


def test_no_image_leaves_no_table(model: Model, url: str, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("words")
    with pytest.raises(ValueError, match="none of the 1 files or rows"):
        index(tmp_path / "texts", model[0], url)
    assert sql(url, "SELECT relname FROM pg_class WHERE relnamespace = 'llm2clip'::regnamespace") == []
