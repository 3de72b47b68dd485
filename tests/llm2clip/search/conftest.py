"""A tiny model, a folder of pictures, and one place for indexes in each kind of store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from llm2clip.encoders.ours import OurEncoder
from llm2clip.search import location
from modeling_llm2clip import LLM2CLIPModel
from tests.object_store import KIND, LocalObjects, s3_server
from tests.postgres import postgres_server

from .helpers import encoded, index, picture
from .places import Bucket, LocalUrl, Place, Tables, sql


@pytest.fixture(scope="session")
def model(saved_model: Path) -> tuple[Path, LLM2CLIPModel]:
    """The folder of a tiny model, and the model."""
    return saved_model, LLM2CLIPModel.from_pretrained(saved_model).eval()


@pytest.fixture(autouse=True)
def default_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the embeddings of indexes in databases and object stores are, unless a test says it."""
    monkeypatch.setattr(location, "ROWS_DIR", tmp_path / "default rows")
    return tmp_path / "default rows"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of twelve pictures, at the top and in two subfolders."""
    folder = tmp_path / "pictures"
    for number in range(12):
        path = folder / ("", "a", "b/c")[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number)))
    return folder


@pytest.fixture
def indexed(pictures: Path, model: tuple[Path, LLM2CLIPModel], tmp_path: Path) -> Path:
    """An index of the pictures."""
    index(pictures, model[0], tmp_path / "index")
    return tmp_path / "index"


class Forwards:
    """The images in each batch that models have embedded; the next run ends after `limit` of them.

    Attributes:
        meanwhile: Called before each batch, with the number of those before.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.limit: int | None = None
        self.meanwhile: Callable[[int], Any] = lambda number: None


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Forwards:
    """What models embed from now on."""
    found, forward = Forwards(), OurEncoder.forward_images

    def counted(self: OurEncoder, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if found.limit == len(found.sizes):
            raise KeyboardInterrupt
        meanwhile, found.meanwhile = found.meanwhile, lambda number: None  # it may embed images of its own
        meanwhile(len(found.sizes))
        found.meanwhile = meanwhile
        found.sizes.append(len(inputs["pixel_values"]))
        return forward(self, inputs)

    monkeypatch.setattr(OurEncoder, "forward_images", counted)
    return found


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")
    with postgres_server() as url:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
        yield url


@pytest.fixture
def url(server: str) -> str:
    """A database with pgvector and nothing else."""
    sql(server, "DROP SCHEMA IF EXISTS llm2clip CASCADE")
    return server


@pytest.fixture
def local_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of tmp_path / "store", which is read and written as an object store."""
    fsspec.register_implementation(KIND, LocalObjects, clobber=True)
    monkeypatch.setattr(location, "OBJECT_STORES", (KIND,))
    return f"{KIND}://{tmp_path}/store"


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with s3_server(tmp_path_factory.mktemp("s3")) as environment:
        yield environment


@pytest.fixture
def bucket(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket, which this process and its children can reach."""
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    kind = fsspec.get_filesystem_class("s3")
    kind.clear_instance_cache()  # of another address
    files = kind()
    yield "s3://bucket"
    files.invalidate_cache()
    if found := files.find("bucket"):
        files.rm(found)
    kind.clear_instance_cache()


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """The place of a kind of store, which the test names: folder, local_url, bucket or postgres."""
    if request.param == "folder":
        return Place(tmp_path / "store")
    if request.param == "postgres":
        return Tables(request.getfixturevalue("url"), tmp_path / "rows")
    request.getfixturevalue(request.param)
    return Bucket(tmp_path / "rows") if request.param == "bucket" else LocalUrl(tmp_path / "store", tmp_path / "rows")
