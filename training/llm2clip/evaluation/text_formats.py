"""What published evaluations do to a text before the tokenizer, by name; recalls of two formats are not comparable."""

from __future__ import annotations

import re
from collections.abc import Callable

RAW = "raw"


def choose_text_format(name: str) -> Callable[[str], str]:
    """Return the text format of a name.

    Raises:
        ValueError: There is none; the message lists all.
    """
    if name not in TEXT_FORMATS:
        raise ValueError(f"text format {name!r} is unknown; there are {', '.join(TEXT_FORMATS)}.")
    return TEXT_FORMATS[name]


def raw(text: str) -> str:
    """The text as it stands in its file."""
    return text


def lower(text: str) -> str:
    """Lower case, as FG-CLIP."""
    return text.lower()


def newlines_to_spaces(text: str) -> str:
    """A space for each newline, as Long-CLIP."""
    return text.replace("\n", " ")


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


def _first_words(text: str, count: int = 30) -> str:
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:count])


TEXT_FORMATS: dict[str, Callable[[str], str]] = {
    RAW: raw,
    "lower": lower,
    "albef": albef,
    "blip": blip,
    "flair": joined_sentences,
    "long-clip": newlines_to_spaces,
}
