"""Faults that a text has carried over from a web page or a wrong decoding, and the script it is written in."""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache

ENTITY = re.compile(r"&(?:[A-Za-z][A-Za-z0-9]{1,31}|#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6});")
TAG = re.compile(r"</?[A-Za-z][^<>]*>|<!--")
# White space apart, which tokenizers know and captions of several lines contain.
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# The bytes of one character in UTF-8, of two bytes or more.
UTF8_CHARACTER = (
    rb"(?:[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xef][\x80-\xbf]{2}|\xf0[\x90-\xbf][\x80-\xbf]{2}"
    rb"|[\xf1-\xf4][\x80-\xbf]{3})"
)
# Western letters and signs, punctuation, byte order marks and emoji count when they stand alone. Of the others there
# have to be two: the bytes of one may be the end of a word before a quotation mark (`Spaß“`).
MOJIBAKE = re.compile(
    rb"[\xc2\xc3][\x80-\xbf]|\xe2[\x80-\x9f][\x80-\xbf]|\xef[\xbb-\xbf][\x80-\xbf]|\xf0\x9f[\x80-\xbf]{2}|"
    + UTF8_CHARACTER
    + rb"{2}"
)
SINGLE_BYTES = {
    bytes([code]).decode("cp1252"): code for code in range(0x80, 0xA0) if code not in (129, 141, 143, 144, 157)
}
SINGLE_BYTES |= {chr(code): code for code in range(0x100)}
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


def has_mojibake(text: str) -> bool:
    """Whether parts of a text look like UTF-8 that was decoded as Windows-1252 or Latin-1 (`LÃ©zard` for `Lézard`)."""
    if text.isascii():
        return False
    # A character that is no byte in either encoding ends a sequence.
    return MOJIBAKE.search(bytes(SINGLE_BYTES.get(character, 0) for character in text)) is not None


# What is wrong with a text, in the words of the report.
TEXT_FAULTS: dict[str, Callable[[str], bool]] = {
    "HTML entities": has_entity,
    "HTML tags": has_tag,
    "control characters": has_control_character,
    "U+FFFD": has_replacement_character,
    "mojibake": has_mojibake,
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
