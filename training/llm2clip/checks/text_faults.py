"""Faults that a text has carried over from a web page or a wrong decoding, and the script it is written in."""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache

from ftfy.badness import is_bad

ENTITY = re.compile(r"&(?:[A-Za-z][A-Za-z0-9]{1,31}|#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6});")
TAG = re.compile(r"</?[A-Za-z][^<>]*>|<!--")
# White space apart, which tokenizers know and captions of several lines contain.
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Forms of letters, which are part of their names but no script.
FORMS = ("FULLWIDTH", "HALFWIDTH", "MODIFIER", "MATHEMATICAL")
KANA = ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")


def has_entity(text: str) -> bool:
    """Whether a text contains HTML entities, such as `&amp;` and `&#39;`."""
    return any(html.unescape(entity) != entity for entity in ENTITY.findall(text))


def has_tag(text: str) -> bool:
    """Whether a text contains tags or comments of HTML."""
    return TAG.search(text) is not None


def has_control_character(text: str) -> bool:
    """Whether a text contains control characters other than white space."""
    return CONTROL.search(text) is not None


def has_replacement_character(text: str) -> bool:
    """Whether a text contains U+FFFD, in whose place a decoder did not understand the bytes."""
    return REPLACEMENT in text


# What is wrong with a text, in the words of the report.
TEXT_FAULTS: dict[str, Callable[[str], bool]] = {
    "HTML entities": has_entity,
    "HTML tags": has_tag,
    "control characters": has_control_character,
    "U+FFFD": has_replacement_character,
    # UTF-8 that was decoded as something else (`LÃ©zard` for `Lézard`).
    "mojibake": is_bad,
}


def script(text: str) -> str:
    """Name the script of most letters of a text by the first word of their Unicode names, such as `latin` and `cjk`.

    A text with kana is `kana` even if most of it is Chinese characters, since it is Japanese. A text without letters
    is `none`.
    """
    counts = Counter(_script_of_letter(letter) for letter in text if letter.isalpha())
    if not counts:
        return "none"
    most = counts.most_common(1)[0][0]
    return "kana" if most == "cjk" and counts["kana"] else most


@cache
def _script_of_letter(letter: str) -> str:
    words = unicodedata.name(letter, "UNNAMED").split()
    word = next((word for word in words if word not in FORMS), words[0])
    return "kana" if word in KANA else word.lower()
