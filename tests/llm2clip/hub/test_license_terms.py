"""Terms of licenses: which models are under them, and what a pushed folder has to have."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llm2clip.hub.cards.card import CARD
from llm2clip.hub.license_terms import TERMS, license_of_name
from tests.llm2clip.hub.conftest import upload
from tests.loopback_hub import LoopbackHub


def test_the_name_of_a_model_says_its_license() -> None:
    for name, license in {
        "meta-llama/Meta-Llama-3-8B-Instruct": "llama3",
        "meta-llama/Llama-3.1-8B": "llama3.1",
        "/models/Llama-3.2-1B-Instruct": "llama3.2",
        "meta-llama/Llama-3.3-70B-Instruct": "llama3.3",
        "microsoft/LLM2CLIP-Llama3.1-8B-siglip2": "llama3.1",
        "google/gemma-2-9b": "gemma",
        "google/gemma-3n-E4B-it": "gemma",
    }.items():
        assert license_of_name(name) == license, name
    for name in ("TinyLlama-1.1B", "openlm-research/open_llama_3b", "someone/Sheared-Llama-3B", "google/gemma-4-27b"):
        assert license_of_name(name) is None, name
    assert license_of_name("smollm2-135m-instruct") is None


def test_the_name_of_a_derived_model_begins_as_its_license_demands() -> None:
    assert TERMS["llama3.1"].fits_name("someone/Llama-mine")
    assert not TERMS["llama3.1"].fits_name("Llama/mine")
    assert TERMS["llama3"].fits_name("Llama3-mine")
    assert TERMS["llama3"].fits_name("Llama-3-8B-mine")
    assert not TERMS["llama3"].fits_name("Llama-mine")
    assert TERMS["gemma"].fits_name("mine")


def test_push_demands_what_the_license_on_the_card_or_in_the_notice_demands(
    hub: LoopbackHub, built: Path, tmp_path: Path
) -> None:
    folder, terms = tmp_path / "model", TERMS["llama3.1"]
    shutil.copytree(built, folder)
    card = (folder / CARD).read_text().replace("license: apache-2.0", "license: llama3.1")
    (folder / CARD).write_text(card)
    with pytest.raises(ValueError, match=r"begin with 'Llama', unlike tester/tiny; .*'Built with Llama'; NOTICE"):
        upload(hub, folder)
    (folder / CARD).write_text(f"{card}\nBuilt with Llama\n")
    (folder / "NOTICE").write_text(terms.notice)
    upload(hub, folder, repo_id="tester/Llama-tiny")
    (folder / CARD).write_text((folder / CARD).read_text().replace("license: llama3.1", "license: mit"))
    with pytest.raises(ValueError, match=r"is under llama3\.1, which demands more: README\.md has to state"):
        upload(hub, folder, repo_id="tester/Llama-tiny")
