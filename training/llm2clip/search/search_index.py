"""A search index in Python: build, search, update."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from llm2clip.encoders import Encoder, load_encoder
from llm2clip.encoders.load import load_query_encoder
from llm2clip.encoders.mapped_text import MappedTextEncoder
from llm2clip.encoders.query_encoder import QueryTextEncoder, TextEncoder
from llm2clip.models.places import require_recorded_model
from llm2clip.search.folder_items import Items
from llm2clip.search.index_manifest import IndexManifest
from llm2clip.search.index_settings import IndexSettings
from llm2clip.search.index_update import recorded_name, update_index
from llm2clip.search.location import open_store, rows_folder
from llm2clip.search.queries import Query, away_from, embed_queries, query_name, unit_rows
from llm2clip.search.ranking import find
from llm2clip.search.relevance import COMPARED, background_rows, keep_relevant
from llm2clip.search.store import IndexStore
from llm2clip.search.table_items import as_items, items_of


class SearchIndex:
    """An index of images or captions: a folder, or a table of a database.

    Searches see the index as it is when it is opened, in PostgreSQL as it is now: open it again to see updates of
    other processes. One whose files two updates have deleted since is opened again by the next search.

    Args:
        store, encoder, revision, text_encoder, dtype, query_encoder: See [`SearchIndex.open`].

    Attributes:
        manifest: What it consists of, and who made it of what.
        counts: After `build` and `update`, what has been done; see [`update_index`].
    """

    def __init__(
        self,
        store: IndexStore,
        encoder: Encoder | str | None = None,
        revision: str | None = None,
        text_encoder: TextEncoder = "llm",
        dtype: str = "auto",
        query_encoder: str | Path | None = None,
    ) -> None:
        of_loading = {"revision": (revision, None), "text_encoder": (text_encoder, "llm"), "dtype": (dtype, "auto")}
        for name, (given, default) in of_loading.items():
            # The model that the index names has a revision of its own.
            is_unused = (encoder is None and name == "revision") or isinstance(encoder, Encoder)
            if is_unused and given != default:
                raise ValueError(f"{name} is {given}, which is for a model by name: name it (encoder, or --model).")
        self.store, self.location = store, store.location
        self._model = encoder if isinstance(encoder, str) else None
        self._encoder = encoder if isinstance(encoder, Encoder) else None
        self._revision, self._text_encoder, self._dtype = revision, text_encoder, dtype
        self._query_encoder = query_encoder
        self._queries: MappedTextEncoder | None = None
        self._loaded, self._checked = {"image", "text"}, set[str]()
        self._everyday: np.ndarray | None = None
        self.counts: dict[str, Any] = {}
        self._read()

    def _read(self) -> None:
        manifest = self.store.open()
        if manifest is None:
            raise FileNotFoundError(
                f"there is no index in {self.location}, or it is not finished. To create one, or go on with it: "
                "llm2clip index FOLDER --model MODEL"
            )
        self.manifest: IndexManifest = manifest

    @classmethod
    def open(
        cls,
        location: str | Path | IndexStore,
        postgres: str | None = None,
        encoder: Encoder | str | None = None,
        revision: str | None = None,
        text_encoder: TextEncoder = "llm",
        dtype: str = "auto",
        query_encoder: str | Path | None = None,
    ) -> SearchIndex:
        """Open an index.

        Args:
            location: Its folder or URL; in PostgreSQL, its table; or a store of your own.
            postgres: URL of the database.
            encoder: The model that made the index, or its folder or Hub id now; by default it is loaded, when it is
                first needed, from where it was.
            revision: Branch, tag or commit of the model on the Hub.
            text_encoder: `query` for the small encoder in `query_encoder/` of the model in place of its LLM; `auto`
                for that where there is one.
            dtype: What a model by name computes in; see [`load_encoder`].
            query_encoder: Folder of `llm2clip align --keep-images`, which embeds texts. The model that made the index
                is then loaded for images only.

        Raises:
            ConnectionError: The database or object store cannot be reached.
            FileNotFoundError: There is no complete index.
            ImportError: The library of the object store is not installed.
            ValueError: The index is damaged.
        """
        return cls(open_store(location, postgres), encoder, revision, text_encoder, dtype, query_encoder)

    @classmethod
    def build(
        cls,
        encoder: Encoder | str,
        images: str | Path | datasets.Dataset | Sequence[Any] | Items,
        location: str | Path | IndexStore,
        *,
        postgres: str | None = None,
        **settings: Any,
    ) -> SearchIndex:
        """Build an index, or bring an existing one up to date: only what is new or changed is embedded.

        Args:
            encoder: A model that [`load_encoder`] has opened, or the name of one.
            images: A folder, the path or Hub id of a data set, a `datasets.Dataset`, or a list of paths and PIL
                images; or items with options of their own, such as `TableCaptions`.
            location: Where the index is to be: a folder or a URL; in PostgreSQL, a table; or a store of your own.
            postgres: URL of the database.
            settings: Fields of [`IndexSettings`], such as `index_type`.

        Raises:
            ConnectionError: The database or object store cannot be reached.
            FileExistsError: The location contains something else than an index.
            FileNotFoundError: The images or the model do not exist.
            NonFiniteError: The model's embedding of an image is NaN or infinite.
            ValueError: The existing index belongs to another model or source, or no image can be embedded.
        """
        store, chosen = open_store(location, postgres), IndexSettings(**settings)
        items = as_items(images, [rows_folder(store, chosen.rows_dir)])
        loaded = None if isinstance(encoder, str) else encoder

        def open_encoder() -> Encoder:
            nonlocal loaded
            if loaded is None:
                loaded = load_encoder(str(encoder), dtype="auto", needs=["image"] if items.embed == "image" else [])
            return loaded

        asked = {"model": recorded_name(encoder)} if isinstance(encoder, str) else None
        counts = update_index(store, items, open_encoder, chosen, asked)
        index = cls(store, encoder)
        index.counts, index._encoder = counts, loaded
        if isinstance(encoder, str) and items.embed == "image":
            index._loaded = {"image"}  # texts need more of it
        return index

    def update(self, images: Any = None, **settings: Any) -> dict[str, Any]:
        """Embed what is new or changed, drop what is gone, and search the result from now on.

        Args:
            images: The images as they are now; by default they are read from where they were indexed. An index of a
                list needs them.
            settings: As for [`SearchIndex.build`]; the type of the vector index stays as it is.

        Returns:
            See [`update_index`].

        Raises:
            FileNotFoundError, NonFiniteError, ValueError: See [`SearchIndex.build`].
        """
        manifest = self.manifest
        kind = {name: value for name, value in manifest.index.items() if name != "type"}
        kept = {"index_type": manifest.index["type"], "stored_dtype": manifest.stored_dtype, **kind}
        chosen = IndexSettings(**{**kept, **settings})
        exclude = [rows_folder(self.store, chosen.rows_dir)]
        items = items_of(manifest, exclude) if images is None else as_items(images, exclude)
        is_own = self._model is None and self._encoder is None
        open_encoder = partial(self._own_encoder, ["text" if manifest.embed == "caption" else "image"])
        self.counts = update_index(self.store, items, open_encoder, chosen, manifest.asked if is_own else None)
        self._read()
        return self.counts

    def __len__(self) -> int:
        return self.manifest.images

    def search(
        self,
        query: Query | Sequence[Query] | np.ndarray,
        k: int = 10,
        where: str | None = None,
        *,
        without: str | None = None,
        distinct: float | None = None,
        relevant: bool = False,
    ) -> list[Any]:
        """Find the images or captions that are nearest to a query.

        Args:
            query: A text, a PIL image or the `Path` of one; a pair `(image, text)`, which is found by both; a list of
                these; or embeddings `(n, width)`.
            k: How many, at most.
            where: A condition on the columns of the index that they fulfil, such as `"folder = 'a'"`; see
                [`parse_where`].
            without: A text that results move away from; see [`away_from`].
            distinct: Leave out results whose cosine with a better one is larger than this, such as 0.95; others take
                their places.
            relevant: Leave out results that do not fit the text clearly better than everyday captions do; see
                [`background_rows`].

        Returns:
            [`SearchResult`]s, best first, with `score` (the cosine of the query and the stored embedding), `key`,
            `path` and `caption`; for a list or embeddings, such a list for each.

        Raises:
            ConnectionError: The database or object store cannot be reached.
            FileNotFoundError: The model that made the index does not exist any more.
            NonFiniteError: The model's embedding of a query is NaN or infinite.
            ValueError: `k` is no whole number or less than 1, an embedding is zero or not finite, `where` is no
                condition on the columns, `relevant` is asked of images, or another model made the index.
        """
        if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or k < 1:
            raise ValueError(f"k must be a whole number of at least 1, not {k!r}.")
        if distinct is not None and not 0 < distinct < 1:
            raise ValueError(f"distinct is a cosine between 0 and 1, such as 0.95, not {distinct}.")
        is_single = isinstance(query, (str, Path, Image.Image, tuple))
        queries: Any = [query] if is_single else query
        if relevant and not all(isinstance(one, str) for one in queries):
            raise ValueError("relevant compares texts with everyday captions, and a query is none.")
        if where is not None and self._encoder is None:  # before it is loaded, which takes minutes
            self.store.search(np.empty((0, self.manifest.width), np.float32), 1, where)
        rows, others = self._embed(queries, [] if without is None else [without])
        background = self._background() if relevant else None
        for other in others:
            rows = away_from(rows, other)
            background = None if background is None else away_from(background, other)
        found = find(self.store, self.manifest, rows, max(int(k), COMPARED) if relevant else int(k), where, distinct)
        results = [(each.results if background is None else keep_relevant(each, background))[:k] for each in found]
        return results[0] if is_single else results

    def embed(self, queries: Any) -> np.ndarray:
        """Return unit rows `(n, width)`, float32, of a list of texts, images and pairs of both, or of embeddings.

        Raises:
            ValueError: An embedding is zero, NaN or infinite, or of another width; see [`SearchIndex.search`] too.
        """
        if hasattr(queries, "dtype"):
            return unit_rows(queries, self.manifest.width, [str(number) for number in range(len(queries))])
        return unit_rows(embed_queries(queries, self.encoder), self.manifest.width, list(map(query_name, queries)))

    def _embed(self, queries: Any, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Embed queries and further texts, in one call of the model."""
        if hasattr(queries, "dtype"):
            return self.embed(queries), self.embed(texts) if texts else np.empty((0, self.manifest.width), np.float32)
        rows = self.embed([*queries, *texts])
        return rows[: len(queries)], rows[len(queries) :]

    def _background(self) -> np.ndarray:
        """Return the rows of the everyday captions."""
        if self._everyday is None:
            self._everyday = background_rows(self.encoder(["text"]), self.store.local_folder)
        return self._everyday

    def encoder(self, needs: Sequence[str] = ("image", "text")) -> Encoder:
        """Return the model of the index, which is loaded when it is first needed.

        Args:
            needs: What it is to embed: `image`, `text` or both.

        Raises:
            FileNotFoundError: It does not exist any more.
            ValueError: It is not the one that made the index, or does not embed what is needed.
        """
        if self._query_encoder is None:
            return self._own_encoder(needs)
        if self._queries is None:
            queries = load_query_encoder(self._query_encoder, self._dtype)
            queries.require_images(f"the index {self.location}", self.manifest.width, self.manifest.image_fingerprint)
            self._queries = queries
        if "image" in needs and self._queries.images is None:
            self._queries.use_images(self._own_encoder(["image"]))
        return self._queries

    def _own_encoder(self, needs: Sequence[str]) -> Encoder:
        if self._encoder is None or not self._loaded.issuperset(needs):
            # What the index holds is in the space of the image side, if the model has one.
            self._loaded = {*needs, *(["image"] if self.manifest.image_fingerprint else [])}
            name, revision = self._model, self._revision
            if name is None:
                name, revision = self.manifest.model, self.manifest.revision
                require_recorded_model(self.location, name)
            text_encoder = self._text_encoder if "text" in self._loaded else "llm"
            options: dict[str, Any] = {"needs": sorted(self._loaded), "text_encoder": text_encoder}
            options["image_backend"] = self.manifest.image_backend
            self._encoder = load_encoder(name, revision, self._dtype, **options)
            if self._encoder.width > self.manifest.width:
                self._encoder.truncate(self.manifest.width)
            # A query encoder is bound to its model: it was taught the space of its captions.
            self._checked = {"text"} if isinstance(self._encoder, QueryTextEncoder) else set()
        if unchecked := {"image", *needs} - self._checked:  # reading all weights takes seconds
            self.manifest.require_model(self.location, self._encoder, unchecked)
            self._checked |= unchecked
        return self._encoder
