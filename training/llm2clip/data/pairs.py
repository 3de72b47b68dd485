"""Data set of text pairs that describe the same thing, for stage 1."""

from __future__ import annotations

import itertools
import logging
import os
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
from safetensors.numpy import save
from safetensors.torch import load_file

from llm2clip.data.formats import SourceError
from llm2clip.data.opened_table import open_table
from llm2clip.data.rows import caption_id, column_texts, column_value, stable_seed
from llm2clip.data.sampling import ConcatenatedTables, SampleIndex
from llm2clip.data.sources import (
    Source,
    first_rows,
    require_columns,
    require_weight,
    row_batches,
    table_columns,
    top_level,
)
from llm2clip.data.table_identity import rows_digest, table_identity
from llm2clip.files.atomic import digest_json
from llm2clip.files.shared_files import shared_file

logger = logging.getLogger(__name__)
InstructionTable = Literal["e5"]
# The data sets of E5-mistral (Wang et al. 2024, arXiv:2401.00368, appendix), under the file names of echo-data.
E5 = {
    "allnli_split1": "Given a premise, retrieve a hypothesis that is entailed by the premise",
    "allnli_split2": "Retrieve semantically similar text",
    "dureader": "Given a Chinese search query, retrieve web passages that answer the question",
    "eli5_question_answer": "Provided a user question, retrieve the highest voted answers on Reddit ELI5 forum",
    "fever": "Given a claim, retrieve documents that support or refute the claim",
    "hotpot_qa": "Given a multi-hop question, retrieve documents that can help answer the question",
    "miracl": "Given a question, retrieve Wikipedia passages that answer the question",
    "mrtydi": "Given a question, retrieve Wikipedia passages that answer the question",
    "msmarco_document": "Given a web search query, retrieve relevant documents that answer the query",
    "msmarco_passage": "Given a web search query, retrieve relevant passages that answer the query",
    "nq": "Given a question, retrieve Wikipedia passages that answer the question",
    "quora_duplicates_split1": (
        "Given a question, retrieve questions that are semantically equivalent to the given question"
    ),
    "quora_duplicates_split2": "Find questions that have the same meaning as the input question",
    "squad": "Retrieve Wikipedia passages that answer the question",
    "t2ranking": "Given a Chinese search query, retrieve web passages that answer the question",
    "trivia_qa": "Retrieve Wikipedia passages that answer the question",
}
# Rows that are drawn before a source counts as one without a random negative.
NEGATIVE_ATTEMPTS = 100

# What the keys of a row depend on; raise the version when they are computed in another way.
KEY_SETTINGS = ("anchor_column", "positive_column", "negative_column", "group_column", "caption_columns")
KEY_VERSION = 1


@dataclass
class PairSource(Source):
    """Source of text pairs: an anchor and a positive column, or columns with captions of the same image.

    A column may contain a text or a list of texts, one of which is drawn in each epoch.

    Attributes:
        path, name, split, revision, max_samples: See [`CaptionSource`].
        anchor_column: Column of the anchors (queries).
        positive_column: Column of the positives.
        negative_column: Column of the hard negatives. Rows without a hard negative that differs from their pair are
            dropped, so that all rows of a batch have one.
        group_column: Rows with the same value in this column, such as an image id, are never negatives of each other.
        caption_columns: Instead of anchor and positive: columns with captions of the same image, two of which are
            drawn in each epoch, in random order.
        weight: Share of batches from this source, relative to the other sources. Set it for all sources or for none;
            by default, each source contributes in proportion to its size.
        instruction: Text before the anchor; context that is not pooled.
        instruction_table: Instead of `instruction`: `e5` looks it up by the label, or the file name (`nq.jsonl`).
        positive_instruction: Text before positive and negative.
        random_negative: Give every row a negative as the original code does: the positive of another row, drawn anew
            in each epoch, of another group and without a text of this row. By chance it can be a text of a third row
            of the batch.
        symmetric: Swap anchor and positive at random.
        label: Name in messages and samples; by default the file name.

    Raises:
        ValueError: If neither or both of the two forms are given, or a number is out of range.
    """

    anchor_column: str | None = None
    positive_column: str | None = None
    negative_column: str | None = None
    group_column: str | None = None
    caption_columns: list[str] | None = None
    weight: float | None = None
    instruction: str | None = None
    instruction_table: InstructionTable | None = None
    positive_instruction: str | None = None
    random_negative: bool = False
    symmetric: bool = False
    label: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        both = bool(self.anchor_column)
        if both != bool(self.positive_column) or both == bool(self.caption_columns):
            raise ValueError(
                f"The pair source {self.path} needs either anchor_column and positive_column, or caption_columns."
            )
        if self.caption_columns and self.negative_column:
            raise ValueError(f"The pair source {self.path} cannot have a negative_column with caption_columns.")
        if self.random_negative and self.negative_column:
            raise ValueError(f"The pair source {self.path} has a negative_column; remove it or random_negative.")
        if self.instruction_table and self.instruction is not None:
            raise ValueError(f"The pair source {self.path} needs either instruction or instruction_table.")
        self.find_instruction()
        require_weight(self.path, self.weight)

    @property
    def base_label(self) -> str:
        """The label, or the file name without its ending."""
        return self.label or os.path.basename(self.path.rstrip("/\\")).split(".")[0]

    def find_instruction(self) -> str | None:
        """Return the instruction of anchors, looked up if there is a table, where it ends in `; ` as in the original.

        Raises:
            ValueError: There is no such table, or it lacks the data set.
        """
        if self.instruction_table is None:
            return self.instruction
        if self.instruction_table != "e5":
            raise ValueError(f"instruction_table must be one of e5, not {self.instruction_table!r}.")
        if self.base_label not in E5:
            raise ValueError(
                f"the instruction table e5 has no data set {self.base_label!r}; set `label` to one of "
                f"{', '.join(E5)}, or set `instruction`."
            )
        return f"{E5[self.base_label]}; "

    @property
    def columns(self) -> list[str]:
        """All columns of the source."""
        names = (self.anchor_column, self.positive_column, self.negative_column, self.group_column)
        return [*filter(None, names), *(self.caption_columns or [])]


class RowTexts(NamedTuple):
    """The candidate texts of a row, the caption ids of its pair, and of the negatives, which share none of these."""

    anchors: list[str]
    positives: list[str]
    pair_ids: set[int]
    negatives: list[str]
    negative_ids: set[int]


class PairTable:
    """The usable rows of a source, with the keys that decide which of them may share a batch.

    Two rows conflict if they share an own key (a text of the pair, or the group), or if a hard negative of one is a
    text of the other: in the same batch, one would be trained as a false negative. The keys cover all candidate texts
    of a row, not only those that are drawn. They are computed once per machine; see [`shared_file`].

    Attributes:
        rows: (n,) positions of the usable rows in the table.
        own_keys, own_starts: The own keys of row i are `own_keys[own_starts[i]:own_starts[i + 1]]`.
        negative_keys, negative_starts: The same for the hard negatives.
        num_dropped: Number of rows without two different texts, or without the hard negative that the source requires.
    """

    def __init__(self, source: PairSource, table: datasets.Dataset, label: str) -> None:
        self.source = source
        self.label = label
        self.table = table
        settings = {name: getattr(source, name) for name in KEY_SETTINGS}
        identity = {"version": KEY_VERSION, "table": table_identity(table), **settings}
        keys = shared_file("pairs", identity, lambda path: path.write_bytes(save(self._build())))
        # Views of the file, in memory that all processes share.
        arrays = {name: tensor.numpy() for name, tensor in load_file(keys).items()}
        self.rows = arrays["rows"]
        self.num_dropped = len(table) - len(self.rows)
        self.own_keys, self.own_starts = arrays["own_keys"], arrays["own_starts"]
        self.negative_keys, self.negative_starts = arrays["negative_keys"], arrays["negative_starts"]
        if not len(self.rows):
            raise ValueError(
                f"None of the {len(table)} rows of {source.path} has a pair of two different texts in "
                f"{', '.join(source.columns)}."
            )
        if self.num_dropped:
            message = "%d of %d rows of %s are left out because they lack two different texts or a hard negative."
            logger.warning(message, self.num_dropped, len(table), label)

    def __len__(self) -> int:
        return len(self.rows)

    def _build(self) -> dict[str, np.ndarray]:
        """Find the usable rows and their sorted keys: the [`caption_id`] of each text, and a hash of the group.

        Raises:
            SourceError: A column of texts contains something else; the message names the first such row.
        """
        source = self.source
        # Arrays grow in place, and the results are views of them.
        arrays = {name: array("q") for name in ("rows", "own_keys", "own_starts", "negative_keys", "negative_starts")}
        arrays["own_starts"].append(0)
        arrays["negative_starts"].append(0)
        for position, row in enumerate(itertools.chain.from_iterable(row_batches(self.table))):
            try:
                texts = self._texts(row)
            except TypeError as error:
                raise SourceError(f"Row {position} of {source.path}: {error}.") from None
            has_pair = len(texts.pair_ids) > 1 and texts.anchors and texts.positives
            if not has_pair or (source.negative_column and not texts.negatives):
                continue
            group = column_value(row, source.group_column) if source.group_column else None
            groups = set() if group is None else {stable_seed("group", str(group))}
            arrays["rows"].append(position)
            arrays["own_keys"].extend(sorted(texts.pair_ids | groups))
            arrays["own_starts"].append(len(arrays["own_keys"]))
            arrays["negative_keys"].extend(sorted(texts.negative_ids))
            arrays["negative_starts"].append(len(arrays["negative_keys"]))
        return {name: np.frombuffer(values, dtype=np.int64) for name, values in arrays.items()}

    def _texts(self, row: Mapping[str, Any]) -> RowTexts:
        source = self.source
        if source.caption_columns:
            captions = [text for column in source.caption_columns for text in column_texts(row, column)]
            by_id = {caption_id(text): text for text in reversed(captions)}
            distinct = list(by_id.values())[::-1]
            return RowTexts(distinct, distinct, set(by_id), [], set())
        anchors, positives, negatives = (
            column_texts(row, column) if column else []
            for column in (source.anchor_column, source.positive_column, source.negative_column)
        )
        pair_ids = set(map(caption_id, (*anchors, *positives)))
        ids = list(map(caption_id, negatives))
        hard = [text for text, number in zip(negatives, ids, strict=True) if number not in pair_ids]
        return RowTexts(anchors, positives, pair_ids, hard, set(ids) - pair_ids)

    def draw(self, index: int, seed: int | None) -> dict[str, Any]:
        """Draw the pair of usable row `index` by `seed`; None takes the first texts."""
        source = self.source
        texts = self._texts(self.table[int(self.rows[index])])
        generator = None if seed is None else random.Random(seed)
        if source.caption_columns:
            anchor, positive = texts.anchors[:2] if generator is None else generator.sample(texts.anchors, 2)
        else:
            both = itertools.product(texts.anchors, texts.positives)
            pairs = [pair for pair in both if caption_id(pair[0]) != caption_id(pair[1])]
            anchor, positive = pairs[0] if generator is None else generator.choice(pairs)
        swapped = generator is not None and source.symmetric and generator.random() < 0.5
        if swapped:
            anchor, positive = positive, anchor
        negative = next(iter(texts.negatives), None)
        if texts.negatives and generator is not None:
            negative = generator.choice(texts.negatives)
        if source.random_negative:
            negative = self._random_negative(index, stable_seed(-1 if seed is None else seed, "negative"), swapped)
        return {
            "anchor": anchor,
            "positive": positive,
            "negative": negative,
            "instruction": source.find_instruction(),
            "positive_instruction": source.positive_instruction,
            "source": self.label,
            "key": f"{self.label}:{self.rows[index]}",
        }

    def _random_negative(self, index: int, seed: int, swapped: bool) -> str:
        generator = random.Random(seed)
        own_keys = set(self._own_keys(index))
        for _ in range(NEGATIVE_ATTEMPTS):
            other = generator.randrange(len(self))
            if own_keys.isdisjoint(self._own_keys(other)):
                texts = self._texts(self.table[int(self.rows[other])])
                return generator.choice(texts.anchors if swapped else texts.positives)
        raise ValueError(
            f"{self.label} has hardly any row without a text or group of row {self.rows[index]}; turn random_negative "
            "off."
        )

    def _own_keys(self, index: int) -> list[int]:
        return self.own_keys[self.own_starts[index] : self.own_starts[index + 1]].tolist()


class PairDataset(ConcatenatedTables):
    """Map-style data set of the text pairs of all sources.

    `dataset[SampleIndex(epoch, index)]` draws the texts of a row as a function of seed, epoch and index;
    `dataset[index]` takes the first ones. A sample is a dict with `anchor`, `positive`, `negative` (or None),
    `instruction`, `positive_instruction` (or None), `source`, the label of the source, and `key`, its label and the
    number of the row.

    Raises:
        FileNotFoundError, SourceError: If a source cannot be read.
        ValueError: If a source has no usable row.
    """

    def __init__(self, sources: PairSource | Sequence[PairSource], seed: int = 0) -> None:
        self.sources = [sources] if isinstance(sources, PairSource) else list(sources)
        if not self.sources:
            raise ValueError("PairDataset needs at least one source.")
        self.seed = seed
        tables: dict[str, PairTable] = {}
        for source in self.sources:
            base = source.base_label
            numbered = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
            label = next(name for name in numbered if name not in tables)
            tables[label] = PairTable(source, _load(source), label)
        super().__init__(list(tables.values()))

    def content_digest(self) -> str:
        return digest_json([rows_digest(table.table) for table in self.tables])

    def __getitem__(self, index: SampleIndex | int) -> dict[str, Any]:
        epoch, position, number, row = self.locate(index)
        seed = None if epoch is None else stable_seed(self.seed, "pair", epoch, position)
        return self.tables[number].draw(row, seed)


def _load(source: PairSource) -> datasets.Dataset:
    opened = open_table(source.path, source.name, source.split, source.revision)
    require_columns(source.path, source.columns, table_columns(opened.table), opened.hint)
    table = opened.table.select_columns(list(dict.fromkeys(top_level(opened.table, name) for name in source.columns)))
    return first_rows(table, source.max_samples)
