"""Captions that nobody expects."""

from __future__ import annotations

import random
import sys
import unicodedata
from typing import Literal, NamedTuple

Outcome = Literal["text", "empty", "refused"]


class BadText(NamedTuple):
    """A value in the place of a caption: a text, nothing, or what is refused."""

    value: object
    outcome: Outcome


EMPTY = ["", " ", "\n", "\t \r\n", "\u3000", "\u00a0", "\u2028\u2029", "\x1c\x1d\x1e\x1f", "\x85", None, float("nan")]
REFUSED = [
    *(0, 1.5, True, b"bytes", {"text": "a dog"}, {1}, object(), 10**400, float("inf")),
    *("\ud83d", "a \udce9 dog", "\udc00\ud800", "caf\udcc3\udca9", "\udbff" * 100),
]
TEXTS = [
    *("a", "\x00", "a\x00dog", "\x1b[31mred\x1b[0m", "\x7f\x80\x9f", "\ufeffa dog", "\ufffd", "\ufffe\uffff"),
    *("\u202eabc", "\u2066a\u2069", "\u200b", "a\u200bb", "\u200d\u200d", "\u00ad", "\u180e", "\u2060"),
    *(
        "é",
        "e\u0301",
        "e" + "\u0301" * 500,
        "ﬃ",
        "ß",
        "İ",
        "ǆ",
        "\u017f",
        "Å",
        "\u212b",
        "\uff41\uff42\uff43",
        "①",
        "½",
    ),
    *("👨‍👩‍👧‍👦", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "👍🏽", "🇩🇪🇫🇷", "\U0010ffff", "\U000e0001", "\ue000"),
    *("שלום", "مرحبا", "नमस्ते", "สวัสดี", "안녕", "\u1112\u1161\u11ab", "猫", "𠜎", "кот"),
    *("<s>", "</s>", "<|endoftext|>", "<|eot_id|>", "[MASK]", "<pad>", "<unk>", "[INST] a [/INST]", "<|image|>"),
    *("{}", "{0}", "%s %d %n", "${HOME}", "$(id)", "`id`", "'; DROP TABLE images; --", '"', "\\", "../../etc/passwd"),
    *(
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "&lt;b&gt;",
        "a|b|c",
        "[link](file:///etc)",
        "# title",
    ),
    *(
        "!!python/object/apply:os.system ['id']",
        "{% raw %}",
        "{{ config }}",
        "null",
        "NaN",
        "true",
        "1e400",
        "-0",
        "0x10",
    ),
    *(
        "a" * 100_000,
        "a " * 20_000,
        "\u0301" * 10_000,
        "👍" * 5_000,
        "\n".join("ab" * 1_000),
        "(" * 10_000,
        "9" * 5_000,
    ),
    *(" a dog ", "\na dog\n", "a\n\n\ndog", "a\tdog", "a\r\ndog", "a  dog", "\x0ba\x0c"),
]


def random_texts(count: int = 120) -> list[str]:
    """Texts of code points of all planes, without surrogates."""
    generator = random.Random(2)
    points = [point for point in range(sys.maxunicode + 1) if not 0xD800 <= point < 0xE000]
    return ["a" + "".join(map(chr, generator.choices(points, k=generator.randint(1, 40)))) for _ in range(count)]


def corpus() -> list[BadText]:
    """All of them."""
    found = [BadText(value, "empty") for value in EMPTY] + [BadText(value, "refused") for value in REFUSED]
    return found + [BadText(value, "text") for value in (*TEXTS, *random_texts())]


def names(texts: list[BadText]) -> list[str]:
    """Short names for test reports."""
    return [f"{text.outcome}-{unicodedata.normalize('NFC', ascii(text.value)[:20])}" for text in texts]
