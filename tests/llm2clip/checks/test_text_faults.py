from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm2clip.checks.row_checks import TEXT_FAULTS, script
from tests.llm2clip.data.conftest import EXAMPLES


def faults(text: str) -> list[str]:
    return [name for name, has_fault in TEXT_FAULTS.items() if has_fault(text)]


def garbled(text: str) -> str:
    """Decode UTF-8 as Windows-1252."""
    return text.encode().decode("cp1252")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Chodovian&#39;s dog", ["HTML entities"]),
        ("&#x27;", ["HTML entities"]),
        ("a dog<br />and a cat", ["HTML tags"]),
        ("Mikolá\x9a", ["control characters", "mojibake"]),
        ("a\x00dog", ["control characters"]),
        ("caf\ufffd", ["U+FFFD"]),
        ("LÃ©zard", ["mojibake"]),
        ("Mikola\u0301s of the dogâ€™s owner", ["mojibake"]),
        (garbled("😀"), ["mojibake"]),
        (garbled("猫") + " and a dog", ["mojibake"]),
    ],
)
def test_each_fault_is_found(text: str, expected: list[str]) -> None:
    assert faults(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "AT&T; R&D; rock & roll",
        "3 < 4 and 5 > 4",
        "<3",
        "first line\n\tsecond line\r\n",
        "Ein großer Spaß“, sagte er; SCHLOẞ; Fuß…",
        "CAFÉ», DÉGÂT, NÃO, MÃE",
        "Lézard, Mikoláš Aleš, ñandú, Åre",
        "पट्\u200dटी, 面白い猫, кот, قطة",
        "touches\u202f: 0",
        "",
    ],
)
def test_sound_texts_have_no_fault(text: str) -> None:
    assert faults(text) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog, 12", "latin"),
        ("собака dog", "cyrillic"),
        ("猫", "cjk"),
        ("面白い猫", "kana"),
        ("ﾈｺ", "kana"),
        ("강아지", "hangul"),
        ("قطة", "arabic"),
        ("बिल्ली", "devanagari"),
        ("1 + 1 = 2 😀", "none"),
    ],
)
def test_script_is_that_of_most_letters(text: str, expected: str) -> None:
    assert script(text) == expected


@pytest.mark.parametrize(
    "path", sorted(EXAMPLES.rglob("*.parquet")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_texts_of_the_bundled_data_have_no_fault(path: Path) -> None:
    table = pq.read_table(path)
    texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
    assert texts
    found = [
        (column, text, faults(text) or "white space around it")
        for column in texts
        for text in table[column].to_pylist()
        if text is not None and (faults(text) or text != text.strip())
    ]
    assert found == []
