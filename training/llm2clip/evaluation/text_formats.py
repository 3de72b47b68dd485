"""What published evaluations do to a text before the tokenizer, by name; recalls of two formats are not comparable."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, Literal

from llm2clip.evaluation.data import MultilingualData

TextFormat = Literal["raw", "lower", "albef", "blip", "flair", "long-clip"]
RAW: TextFormat = "raw"
# Fields of the data of benchmarks that hold captions.
CAPTIONS = ("texts", "queries", "targets", "right", "wrong")


def format_captions(data: Any, name: TextFormat) -> Any:
    """Apply a text format to the captions of a benchmark: those of each language, and not the prompts of classes.

    Returns:
        A copy of the data, or the data itself if it has no caption.
    """
    if isinstance(data, MultilingualData):
        return MultilingualData({language: format_captions(part, name) for language, part in data.items()})
    fields = [field for field in CAPTIONS if hasattr(data, field)]
    if not fields:
        return data
    changed = copy.copy(data)  # which may be of a stranger's class
    for field in fields:
        setattr(changed, field, list(map(TEXT_FORMATS[name], getattr(data, field))))
    return changed


def joined_sentences(text: str) -> str:
    """Split at full stops, drop outer blanks and empty sentences, and join with `. `, as FLAIR and FLAME."""
    return ". ".join(filter(None, (sentence.strip() for sentence in text.split("."))))


def albef(text: str) -> str:
    """Lower case, without punctuation, hyphens and slashes as spaces, the first 30 words, as ALBEF."""
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower()).replace("-", " ").replace("/", " ")
    return _first_words(text.replace("<person>", "person"))


def blip(text: str) -> str:
    """Lower case, a space for each of `.!"()*#:;~`, the first 30 words, as BLIP; commas, hyphens and `?` stay."""
    return _first_words(re.sub(r"[.!\"()*#:;~]", " ", text.lower()))


def _first_words(text: str) -> str:
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:30])


TEXT_FORMATS: dict[TextFormat, Callable[[str], str]] = {
    "raw": str,
    "lower": str.lower,  # as FG-CLIP
    "albef": albef,
    "blip": blip,
    "flair": joined_sentences,
    "long-clip": lambda text: text.replace("\n", " "),
}
