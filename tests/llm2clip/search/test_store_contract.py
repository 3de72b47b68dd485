"""What each store promises: equal rows and answers, updates that are seen in one step, and nothing lost to kills."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from llm2clip.search.folder_items import BINARY, digest
from llm2clip.search.index_settings import IndexSettings
from llm2clip.search.search_index import SearchIndex
from llm2clip.search.store import DIGEST, KEY, IndexStore
from llm2clip.search.verify_index import verify_index
from tests.builders import tiny

from .conftest import Forwards
from .helpers import QUERY, Model, encoded, picture, save_table
from .places import Place
from .updates import build, run_until_killed, with_embeddings

IN_S3 = pytest.param("bucket", marks=pytest.mark.slow)
ALL = pytest.mark.parametrize("place", ["folder", "local_url", "postgres", IN_S3], indirect=True)
# All but the folder, with which they are compared.
OTHERS = pytest.mark.parametrize("place", ["local_url", "postgres", IN_S3], indirect=True)


def change(pictures: Path) -> None:
    """Add an image, replace one, and delete one."""
    (pictures / "new.png").write_bytes(encoded(picture(50)))
    (pictures / "a" / "07.png").write_bytes(encoded(picture(51), "TIFF"))
    (pictures / "00.png").unlink()


@OTHERS
@pytest.mark.parametrize("is_approximate", [False, True], ids=["flat", "approximate"])
def test_an_index_is_that_of_a_folder_after_each_update(
    is_approximate: bool, place: Place, pictures: Path, model: Model, tmp_path: Path
) -> None:
    folder = Place(tmp_path)

    def both(**settings: Any) -> tuple[int, ...]:
        counts = folder.index(pictures, model[0], **settings)
        if is_approximate:
            settings["index_type"] = place.approximate
        assert place.index(pictures, model[0], **settings) == counts
        for name in ("rows", "failures", "listing"):
            assert place.content()[name] == folder.content()[name]
        found, expected = (each.open().search(QUERY, 20)[0] for each in (place, folder))
        assert [(result.key, result.score) for result in found] == [(result.key, result.score) for result in expected]
        return counts

    assert both() == (12, 0, 0, 0, 12)
    change(pictures)
    (pictures / "broken.png").write_bytes(b"broken")
    assert both() == (2, 10, 1, 1, 12)
    assert both(overwrite=True) == (12, 0, 0, 1, 12)


@ALL
def test_a_run_without_changes_writes_nothing(place: Place, pictures: Path, model: Model) -> None:
    place.index(pictures, model[0])
    before = place.state()
    assert place.index(pictures, model[0]) == (0, 12, 0, 0, 12)
    assert place.state() == before


@ALL
def test_a_killed_run_is_resumed_with_an_equal_result(
    place: Place, pictures: Path, model: Model, forwards: Forwards
) -> None:
    (pictures / "02 broken.png").write_bytes(b"broken")
    place.index(pictures, model[0], "whole", shard_size=4)
    del forwards.sizes[:]
    forwards.limit = 2
    with pytest.raises(KeyboardInterrupt):
        place.index(pictures, model[0], shard_size=4)
    with pytest.raises(FileNotFoundError, match="not finished"):
        place.open()
    forwards.limit = None
    assert place.index(pictures, model[0], shard_size=4) == (5, 7, 0, 1, 12), "of one of the shards one is broken"
    assert sum(forwards.sizes) == 12, "nothing that is stored is embedded again"
    assert place.content() == place.content("whole")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", "postgres", "bucket"], indirect=True)
def test_a_run_killed_by_a_signal_leaves_the_old_index_and_is_resumed(
    place: Place, pictures: Path, model: Model, forwards: Forwards
) -> None:
    for name in ("index", "whole"):
        place.index(pictures, model[0], name)
    before, opened = place.content(), place.open()
    found = opened.search(QUERY, 20)
    for number in range(12):
        (pictures / f"new {number:02}.png").write_bytes(encoded(picture(50 + number)))
    (pictures / "00.png").unlink()
    place.index(pictures, model[0], "whole", shard_size=4)
    run_until_killed(folder=str(pictures), model=str(model[0]), **place.settings("index"))
    assert place.content() == before
    assert opened.search(QUERY, 20) == place.open().search(QUERY, 20) == found
    del forwards.sizes[:]
    assert place.index(pictures, model[0], shard_size=4) == (4, 19, 1, 0, 23)
    assert forwards.sizes == [4], "two of three shards were stored"
    assert place.content() == place.content("whole")


@ALL
def test_no_image_and_a_run_killed_before_its_first_one_leave_nothing(
    place: Place, pictures: Path, model: Model, tmp_path: Path, forwards: Forwards
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("words")
    with pytest.raises(ValueError, match="none of the 1 files or rows"):
        place.index(tmp_path / "texts", model[0])
    forwards.limit = 0
    with pytest.raises(KeyboardInterrupt):
        place.index(pictures, model[0], "killed")
    assert place.is_empty()


# Methods of the stores, of which one call ends the run before it does anything; what is there then; other settings.
STEPS: dict[str, dict[str, tuple[int, str, dict[str, Any]]]] = {
    "folder": {
        "replace": (1, "old", {"overwrite": True}),
        "_index": (1, "old", {"index_type": "ivf_rq"}),
        "_clean": (2, "new", {}),
    },
    "postgres": {
        "_create": (1, "old", {}),
        "_copy": (1, "old", {"overwrite": True}),
        "_index": (1, "old", {"index_type": "hnsw"}),
        "_swap": (1, "old", {"overwrite": True, "stored_dtype": "float32"}),
    },
}


@pytest.mark.parametrize(
    ("place", "step"), [(kind, step) for kind, steps in STEPS.items() for step in steps], indirect=["place"]
)
def test_an_update_that_dies_anywhere_leaves_one_whole_index_and_is_resumed(
    step: str, place: Place, pictures: Path, model: Model, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    times, left, settings = STEPS[request.node.callspec.params["place"]][step]
    for name in ("index", "whole"):
        place.index(pictures, model[0], name)
    before = place.content()
    change(pictures)
    place.index(pictures, model[0], "whole", **settings)
    kind, calls = type(place.store()), []
    original = getattr(kind, step)

    def dies(self: IndexStore, *arguments: Any, **options: Any) -> Any:
        calls.append(step)
        if len(calls) == times:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(kind, step, dies)
        with pytest.raises(KeyboardInterrupt):
            place.index(pictures, model[0], **settings)
    assert place.content() == (before if left == "old" else place.content("whole"))
    if not place.postgres:
        assert verify_index(Path(place.location("index"))).faults == []
    place.index(pictures, model[0], **settings)
    assert place.content() == place.content("whole")


@ALL
def test_searches_see_the_old_index_until_an_update_is_done(
    place: Place, pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.index(pictures, model[0])
    opened, before = place.open(), place.content()
    found = opened.search(QUERY, 20)
    kind, seen = type(place.store()), []
    index = kind._index  # type: ignore[attr-defined]

    def watched(self: IndexStore, *arguments: Any) -> None:
        seen.append(place.content() == before and opened.search(QUERY, 20) == found)
        index(self, *arguments)

    change(pictures)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "_index", watched)
        place.index(pictures, model[0])
    assert seen == [True]
    after = place.open().search(QUERY, 20)
    assert {row.key for row in after[0]} ^ {row.key for row in found[0]} == {"00.png", "new.png"}
    assert opened.search(QUERY, 20) == (found if place.has_versions else after)
    tiny.save(tmp_path / "wide", projection_dim=40)
    place.index(pictures, tmp_path / "wide", overwrite=True)
    assert place.open().manifest.width == 40
    # The table that it has open is gone, or was replaced.
    with pytest.raises(ValueError, match="replaced since it was opened"):
        opened.search(QUERY, 20)


@ALL
def test_a_search_goes_on_with_the_new_index_when_the_one_that_it_has_open_is_gone(
    place: Place, pictures: Path, model: Model
) -> None:
    place.index(pictures, model[0])
    opened = place.open()
    opened.search(QUERY, 20)
    for number in range(2):
        (pictures / f"new {number}.png").write_bytes(encoded(picture(50 + number)))
        place.index(pictures, model[0])
    assert opened.search(QUERY, 20) == place.open().search(QUERY, 20)
    assert len(opened.search(QUERY, 20)[0]) == 14


@ALL
def test_a_lost_table_is_made_again_without_the_model(place: Place, pictures: Path, model: Model) -> None:
    (pictures / "broken.png").write_bytes(b"broken")
    place.index(pictures, model[0])
    before = place.content()
    place.lose_table()
    with pytest.raises((ValueError, ConnectionError), match=r"llm2clip index again|does not exist"):
        place.open()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm2clip.encoders.load.load_encoder", lambda *_, **__: pytest.fail("the model was loaded"))
        assert place.index(pictures, model[0]) == (0, 12, 0, 1, 12)
    assert place.content() == before


@ALL
def test_the_old_index_is_found_until_one_of_another_width_that_overwrites_it_is_whole(
    place: Place, pictures: Path, model: Model, tmp_path: Path, forwards: Forwards
) -> None:
    tiny.save(tmp_path / "wide", projection_dim=40)
    place.index(pictures, model[0], index_type=place.approximate)
    before, opened = place.content(), place.open()
    found = opened.search(QUERY, 20)
    settings = {"overwrite": True, "stored_dtype": "float32", "index_type": place.approximate}
    for _ in range(2):
        forwards.limit = len(forwards.sizes) + 1
        with pytest.raises(KeyboardInterrupt):
            place.index(pictures, tmp_path / "wide", shard_size=4, **settings)
        assert place.content() == before
        assert opened.search(QUERY, 20) == place.open().search(QUERY, 20) == found
    forwards.limit = None
    (pictures / "00.png").unlink()
    assert place.index(pictures, model[0], index_type=place.approximate) == (0, 11, 1, 0, 11), "it is updated"
    for name in ("index", "whole"):
        place.index(pictures, tmp_path / "wide", name, **settings)
    assert place.content() == place.content("whole")
    wide = np.ones((1, 40), np.float32)
    assert place.open().search(wide, 20) == place.open("whole").search(wide, 20)
    (pictures / "new.png").write_bytes(encoded(picture(50)))
    settings.pop("overwrite")
    assert place.index(pictures, tmp_path / "wide", **settings) == (1, 11, 0, 0, 12)


@ALL
def test_a_second_run_at_the_same_time_is_refused(
    place: Place, pictures: Path, model: Model, forwards: Forwards
) -> None:
    def second(number: int) -> None:
        # A thread of its own: the thread that holds a lock may enter it again.
        with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="another run"):
            pool.submit(place.index, pictures, model[0]).result()

    forwards.meanwhile = second
    assert place.index(pictures, model[0])[0] == 12


@ALL
def test_what_others_have_stored_is_not_replaced(place: Place, pictures: Path, model: Model) -> None:
    is_there = place.write_theirs()
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="llm2clip index did not write it"):
            place.index(pictures, model[0], overwrite=overwrite)
    assert is_there()
    assert place.index(pictures, model[0], "other")[0] == 12


@OTHERS
def test_columns_of_all_types_are_those_of_a_folder(place: Place, model: Model, tmp_path: Path) -> None:
    columns = {
        "name": (pa.string(), "x"),
        "large": (pa.large_string(), os.urandom(8000).hex()),
        "flag": (pa.bool_(), True),
        "tiny": (pa.int8(), -3),
        "big": (pa.uint64(), 2**63 + 1),
        "half": (pa.float16(), np.float16(0.5)),
        "double": (pa.float64(), 0.1),
        "day": (pa.date32(), 20000),
        "time": (pa.timestamp("ns"), 10**18),
        "zone": (pa.timestamp("s", "Europe/Berlin"), 10**9),
    }
    table = pa.table({name: pa.array([value, None], kind) for name, (kind, value) in columns.items()})
    images = pa.array([{"bytes": encoded(picture(seed)), "path": None} for seed in range(2)])
    features = datasets.Features.from_arrow_schema(table.schema) | {"image": datasets.Image()}
    stored = datasets.Dataset(table.append_column("image", images)).cast(datasets.Features(features))
    stored.to_parquet(tmp_path / "data.parquet")
    where = "big = 9223372036854775809 AND day = '2024-10-04' AND zone > '2001-09-09' AND tiny < 0 AND double = 0.1"
    folder = Place(tmp_path)
    for each in (place, folder):
        each.index(tmp_path / "data.parquet", model[0], metadata_columns=list(columns))
        assert [found.key for found in each.open().search(QUERY, 9, where)[0]] == ["0"]
    assert place.content() == folder.content()


@OTHERS
def test_captions_are_those_of_a_folder_after_each_update(place: Place, model: Model, tmp_path: Path) -> None:
    data, folder = tmp_path / "data.parquet", Place(tmp_path)

    def both(captions: list[str | None], long: list[Any], **settings: Any) -> tuple[int, ...]:
        save_table(data, [0, 1, 2, 3], caption=captions, long=long, key=list("abcd"))
        settings |= {"embed": "caption", "caption_columns": ["caption", "long"]}
        counts = place.index(data, model[0], **settings)
        assert folder.index(data, model[0], **settings) == counts
        assert place.content() == folder.content()
        found, expected = (each.open().search(QUERY, 5, "caption_column = 'caption'")[0] for each in (place, folder))
        assert [result.key for result in found] == [result.key for result in expected]
        return counts

    long = [["two children play", " football in a park "], [], ["", "a red bus"], None]
    assert both(["a small dog", "a red bus", "a steam train", "a red bus"], long) == (7, 0, 0, 0, 7)
    captions = ["a\0b", "a red bus", None, "a cat"]
    assert both(captions, [None] * 3 + [["new"]], allow_removals=True) == (3, 1, 4, 1, 4)


DAY, TIME = date(2026, 1, 2), datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
COLUMNS: dict[str, tuple[pa.DataType, list[Any]]] = {
    KEY: (pa.string(), ["a", "b", "c", "d", "e"]),
    "text": (pa.string(), ["Dog", "dog's", "100%_\\", "éa", None]),
    "size": (pa.int64(), [1, 2, -3, 4, None]),
    "share": (pa.float32(), [0.1, 0.5, 1e20, -2, None]),
    "is_new": (pa.bool_(), [True, False, True, False, None]),
    "day": (pa.date32(), [DAY, date(2025, 1, 1), DAY, date(1960, 2, 29), None]),
    "time": (pa.timestamp("us", "UTC"), [TIME, TIME, datetime(2000, 1, 1, tzinfo=UTC), TIME, None]),
    "zone": (pa.timestamp("us", "Europe/Berlin"), [TIME, TIME, TIME, TIME, None]),
    "Odd \"name\" %": (pa.int64(), [1, 2, 3, 4, None]),
}  # fmt: skip
FOUND = {
    "size > 1": "bd",
    "size >= 1 AND NOT size = 2": "ad",
    "NOT (size = 2 OR text = 'Dog')": "cd",
    "size IN (1, 4, 9) OR key = 'e'": "ade",
    "size NOT IN (1, 4)": "bc",
    "size IS NULL": "e",
    "text IS NOT NULL AND size <> 1": "bcd",
    "NOT text IS NULL": "abcd",
    "text = 'dog''s'": "b",
    "text LIKE 'd%'": "b",
    "text LIKE '%\\'": "c",
    "text LIKE '100__\\'": "c",
    "text NOT LIKE 'D_g'": "bcd",
    "text < 'a'": "ac",
    "text >= 'dog'": "bd",
    "share = 0.1": "a",
    "share > 1e19": "c",
    "is_new": "ac",
    "NOT is_new": "bd",
    "is_new = false OR is_new IS NULL": "bde",
    "day = '2026-01-02'": "ac",
    "day < '1970-01-01'": "d",
    "time > '2026-01-02'": "abd",
    "time = '2026-01-02T03:04:05'": "abd",
    "time = '2026-01-02 04:04:05+01:00' and is_new": "a",
    '"Odd ""name"" %" <= 2': "ab",
    "size > -9223372036854775808": "abcd",
    "size = 9223372036854775807": "",
    "zone > '0001-01-01'": "abcd",
    "text = 'none\0'": "",
    "text = '; LIMIT 1 -- \0)' OR size < 0": "c",
}


@ALL
def test_a_condition_has_the_answer_of_sql(place: Place) -> None:
    columns = {name: pa.array(values, kind) for name, (kind, values) in COLUMNS.items()}
    columns[DIGEST] = pa.array([digest(key) for key in "abcde"], BINARY)
    store = place.store()
    build(store, [with_embeddings(pa.table(columns), np.eye(5, 24))], IndexSettings("flat"))
    opened = SearchIndex.open(store)
    found = {where: "".join(sorted(one.key for one in opened.search(QUERY, 9, where)[0])) for where in FOUND}
    assert found == FOUND
