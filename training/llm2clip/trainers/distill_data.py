"""The data of a distillation: texts with the rows of a teacher, and the queries by which the student is judged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm2clip.data import CaptionSource, SampleIndex
from llm2clip.data.sampling import EpochDataset
from llm2clip.evaluation.data import RetrievalData
from llm2clip.evaluation.metrics import KS, retrieval_ranks
from llm2clip.store import Store
from llm2clip.store.store import caption_keys
from llm2clip.trainers.teacher import Teacher
from modeling_llm2clip.tokenization_llm2clip import tokenize_and_cut

# Upper ends of the buckets of length, in tokens of the student.
LENGTHS = (4, 8, 16, 32, 64, 128)
RECALL = "text_to_image_recall@"


class DistillDataset(EpochDataset):
    """Texts with the rows of a teacher: a sample has `text`, `embedding`, `(width,)`, and `index`.

    Args:
        texts: Distinct texts.
        store: The rows of all of them.
    """

    def __init__(self, texts: Sequence[str], store: Store) -> None:
        self.texts, self.store = texts, store
        self._keys = caption_keys(texts)
        self.rows = store.find(self._keys)

    def content_digest(self) -> str:
        made_by = f"{self.store.manifest.fingerprint} {self.store.manifest.identity.get('model_dtype')}"
        return hashlib.sha256(made_by.encode() + self._keys.tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: SampleIndex) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[SampleIndex]) -> Any:
        numbers = np.array([index.index if isinstance(index, SampleIndex) else index for index in indices])
        rows = self.store.read(self.rows[numbers], torch.float32)
        return [
            {"text": self.texts[number], "embedding": row, "index": index}
            for number, row, index in zip(numbers.tolist(), rows, indices, strict=True)
        ]


class TextCollator:
    """Makes a batch of rows with `text` and `embedding`: the student's tokens, and the rows of the teacher.

    Args:
        student: A [`QueryEncoder`](llm2clip.encoders.query_encoder.QueryEncoder).
    """

    def __init__(self, student: Any) -> None:
        # Not the student itself, whose weights worker processes do not need.
        self.tokenizer, self.options = student.tokenizer, {"add_special_tokens": not student.is_static}

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [sample["text"].strip() for sample in samples]
        ids = tokenize_and_cut(self.tokenizer, texts, **self.options)[0]["input_ids"]
        ids = [row or [self.tokenizer.pad_token_id] for row in ids]
        batch = dict(self.tokenizer.pad({"input_ids": ids}, return_tensors="pt"))
        rows = torch.stack([torch.as_tensor(sample["embedding"], dtype=torch.float32) for sample in samples])
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "embeddings": torch.nn.functional.normalize(rows, dim=-1),
            "keys": [f"{text:.80}" for text in texts],
        }


@dataclass
class DistillQueries:
    """Held-out queries with the images that are right for them, as the teacher sees both.

    Attributes:
        texts: The queries.
        pairs: `(pairs, 2)` int64, query and image of all that is right.
        images: Rows of the images, `(images, width)`.
        teacher: The teacher's rows of the queries, `(queries, width)`.
    """

    texts: list[str]
    pairs: Tensor
    images: Tensor
    teacher: Tensor

    @classmethod
    def of(cls, data: RetrievalData, teacher: Teacher) -> DistillQueries:
        """Compute, or read, the teacher's rows of the images and captions of a retrieval set."""
        store = teacher.texts(data.texts, "float32")
        rows = store.read(store.find(caption_keys(data.texts)))
        return cls(data.texts, data.pairs, teacher.images(data.images), rows)

    def compare(self, student: Tensor, lengths: Tensor) -> dict[str, float | int]:
        """Compare a student with its teacher: how many queries find a right image among the first 1, 5 and 10.

        Args:
            student: The student's rows of the queries, `(queries, width)`.
            lengths: Tokens of each query, `(queries,)`.

        Returns:
            `text_to_image_recall@K` of the student, with `_of_teacher` that of the teacher and with `_ratio` their
            quotient, also by length in tokens (`_ratio_of_5-8_tokens`); counts, and the mean `cosine` of both rows.
        """
        of_student, *_ = retrieval_ranks(self.images, student, self.pairs)
        of_teacher, *_ = retrieval_ranks(self.images, self.teacher, self.pairs)
        metrics: dict[str, float | int] = {}
        for k in KS:
            mine, theirs = of_student.hit_probability(k), of_teacher.hit_probability(k)
            name = f"{RECALL}{k}"
            metrics |= {name: mine.mean().item(), f"{name}_of_teacher": theirs.mean().item()}
            metrics[f"{name}_ratio"] = _ratio(mine, theirs)
        buckets = torch.bucketize(lengths, torch.tensor(LENGTHS))
        for bucket in buckets.unique().tolist():
            chosen, first = buckets == bucket, 1 if bucket == 0 else LENGTHS[bucket - 1] + 1
            words = f"{first}-{LENGTHS[bucket] if bucket < len(LENGTHS) else ''}_tokens"
            hits = (ranks.hit_probability(10)[chosen] for ranks in (of_student, of_teacher))
            metrics |= {f"{RECALL}10_ratio_of_{words}": _ratio(*hits), f"num_texts_of_{words}": int(chosen.sum())}
        cosine = (student * self.teacher).sum(dim=1).mean().item()
        return {**metrics, "num_texts": len(self.texts), "num_images": len(self.images), "cosine": cosine}


def _ratio(mine: Tensor, theirs: Tensor) -> float:
    """Return the quotient of two recalls; 1 where that of the teacher is 0."""
    wanted = theirs.sum().item()
    return mine.sum().item() / wanted if wanted else 1.0


def retrieval_sets(sources: Mapping[str, Any]) -> dict[str, RetrievalData]:
    """Read images and captions; each caption column, such as a language, is a set, and those of a source share images.

    Args:
        sources: [`CaptionSource`] fields by name.

    Returns:
        The sets by name, with that of the column behind it if a source has several.
    """
    sets = {}
    for name, fields in sources.items():
        source = CaptionSource.from_dict(fields)
        columns = source.caption_columns
        alone = [replace(source, caption_columns=[column], caption_weights=None) for column in columns]
        data = [RetrievalData.from_source(source) for source in alone]
        for column, part in zip(columns, data, strict=True):
            sets[f"{name}_{column}" if len(columns) > 1 else name] = replace(part, images=data[0].images)
    return sets
