"""The license of a built model follows those of the models that it was made from."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from llm2clip import cli
from llm2clip.hub.cards.card import CARD, read_card
from llm2clip.hub.licenses import (
    LICENSE_IDS,
    PERMISSIVE,
    TERMS,
    bases_of,
    check_license,
    choose_license,
    code_license,
    license_of_name,
)
from tests.builders import tiny
from tests.llm2clip.hub.conftest import REPO, Refused, upload
from tests.loopback_hub import File, LoopbackHub, Repo

META = "Copyright © Meta Platforms, Inc. All Rights Reserved."
NOTICE = f"Llama 3.1 is licensed under the Llama 3.1 Community License, {META}\n"
AGREEMENT = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT"


@pytest.fixture
def run(tmp_path: Path, unchecked: None) -> Path:
    """The folder of a stage 2 whose LLM and vision tower are folders beside it."""
    tiny.save_apart(tmp_path)
    towers = {"vision": "vision_model_name_or_path", "llm": "text_model_name_or_path"}
    settings = {field: str(tmp_path / name) for name, field in towers.items()}
    (tmp_path / "clip" / "settings.json").write_text(json.dumps({**settings, "model_name_or_path": None}))
    return tmp_path / "clip"


def state(folder: Path, license: str, more: str = "") -> None:
    folder.mkdir(exist_ok=True)
    (folder / CARD).write_text(f"---\nlicense: {license}\n{more}---\n\nA model.\n")


def built(run: Path, name: str, *arguments: str) -> Path:
    assert cli.main(["build", str(run), str(run.parent / name), *arguments]) == 0
    return run.parent / name


def test_a_model_made_from_llama_is_under_its_license(run: Path, refused: Refused) -> None:
    base = run.parent / "Llama-3.1-8B-Instruct"
    state(base, "llama3.1")
    (base / "LICENSE").write_text(AGREEMENT)
    state(run.parent / "vision", "mit")
    (run.parent / "llm" / "settings.json").write_text(json.dumps({"model_name_or_path": str(base)}))
    mine = ("build", run, run.parent / "Llama-mine")
    error = refused("give --license llama3.1, or give --license other", *mine, "--license", "apache-2.0")
    assert "does not keep the license of Llama-3.1-8B-Instruct (llama3.1)" in error
    folder = built(run, "Llama-first")
    data, text = read_card(folder)
    assert data["license"] == "llama3.1"
    assert "**Built with Llama**" in text
    assert "It was made from: vision (mit), Llama-3.1-8B-Instruct (llama3.1)." in text
    # What is built from the built folder keeps all of it.
    for model in (folder, built(folder, "Llama-again")):
        texts = [(model / name).read_text() for name in ("NOTICE", "LICENSE", "LICENSE-CODE")]
        assert texts == [NOTICE, AGREEMENT, code_license()]
    own = ("--license", "other", "--license-name", "both", "--license-link", "LICENSE")
    other = built(run, "Llama-other", *own)
    assert read_card(other)[0]["license_name"] == "both"
    assert [(other / name).read_text() for name in ("LICENSE-llama3.1", "NOTICE")] == [AGREEMENT, NOTICE]
    # An edited card has to show the words that the license demands.
    state(run, "llama3.1")
    refused("does not show 'Built with Llama'", *mine)


def test_gemma_needs_its_notice_and_no_name(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    state(run.parent / "llm", "gemma")
    with caplog.at_level(logging.WARNING):
        folder = built(run, "mine")
    assert read_card(folder)[0]["license"] == "gemma"
    assert "Gemma Terms of Use found at ai.google.dev/gemma/terms" in (folder / "NOTICE").read_text()
    assert "put it into the model's folder as LICENSE" in caplog.text
    caplog.clear()
    check_license(folder, "me/mine", (folder / CARD).read_text())
    assert "put it into the model's folder as LICENSE" in caplog.text


def test_the_strictest_license_is_the_default_and_none_is_invented(run: Path) -> None:
    state(run.parent / "llm", "mit")
    data, text = read_card(built(run, "unknown"))
    assert "license" not in data
    assert "is not stated; see the licenses" in text
    assert "It was made from: llm (mit), vision (license not known)." in text
    assert not (run.parent / "unknown" / "LICENSE").exists()
    state(run.parent / "vision", "apache-2.0")
    folder = built(run, "strict")
    assert read_card(folder)[0]["license"] == "apache-2.0"
    assert (folder / "LICENSE").read_text() == code_license()
    (run.parent / "llm" / "LICENSE").write_text("MIT License")
    assert (built(run, "chosen", "--license", "mit") / "LICENSE").read_text() == "MIT License"


def test_a_license_that_binds_is_kept(run: Path, refused: Refused) -> None:
    command = ("build", run, run.parent / "both")
    state(run.parent / "llm", "mit")
    state(run.parent / "vision", "cc-by-nc-4.0")
    refused("mit does not keep the license of vision (cc-by-nc-4.0)", *command, "--license", "mit")
    assert read_card(built(run, "mine"))[0]["license"] == "cc-by-nc-4.0"
    state(run.parent / "llm", "gemma")
    refused("so that no license is right: give --license other", *command)
    refused("does not keep the license of llm (gemma)", *command, "--license", "cc-by-nc-4.0")
    state(run, "apache-2.0")
    refused("license: apache-2.0 on its card does not keep the license of llm (gemma)", *command)
    assert not (run.parent / "both").exists()


def test_bases_on_the_hub_have_the_license_of_their_card_or_name(hub: LoopbackHub, tmp_path: Path) -> None:
    repo = Repo("tester/tuned", "model")
    card = "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n"
    repo.commit("main", {CARD: File(card.encode(), lfs=False)}, "a model")
    hub.repos["model", "tester/tuned"] = repo
    state(tmp_path / "clip", "mit", "base_model: [tester/tuned, tester/unsaid]\n")
    found = bases_of(tmp_path / "clip", ["meta-llama/Llama-3.3-70B-Instruct"])
    assert list(map(str, found)) == [
        "meta-llama/Llama-3.3-70B-Instruct (llama3.3)",
        "tester/tuned (llama3)",
        "tester/unsaid (license not known)",
    ]
    assert choose_license({}, {}, found[1:]).stated == {"license": "llama3"}


LICENSES = {
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama3",
    "/models/Llama-3.2-1B-Instruct": "llama3.2",
    "meta-llama/Llama-3.3-70B-Instruct": "llama3.3",
    "microsoft/LLM2CLIP-Llama3.1-8B-siglip2": "llama3.1",
    "google/gemma-2-9b": "gemma",
    "google/gemma-3n-E4B-it": "gemma",
    **dict.fromkeys(["google/gemma-4-27b", "TinyLlama-1.1B", "open_llama_3b", "Sheared-Llama-3B", "smollm2"]),
}


def test_the_name_of_a_model_says_its_license() -> None:
    assert {name: license_of_name(name) for name in LICENSES} == LICENSES


def test_push_demands_what_the_license_on_the_card_or_in_the_notice_demands(hub: LoopbackHub, model: Path) -> None:
    card = (model / CARD).read_text().replace("license: apache-2.0", "license: llama3.1")
    (model / CARD).write_text(card)
    with pytest.raises(ValueError, match=r"under llama3\.1, which demands more: .*'Built with Llama'; NOTICE"):
        upload(hub, model, repo_id="Llama/tiny")
    (model / CARD).write_text(f"{card}\nBuilt with Llama\n")
    (model / "NOTICE").write_text(TERMS["llama3.1"].notice)
    with pytest.raises(ValueError, match="begin with 'Llama', unlike Llama/tiny: push to another repo"):
        upload(hub, model, repo_id="Llama/tiny")
    upload(hub, model, repo_id="tester/Llama-tiny")
    (model / CARD).write_text((model / CARD).read_text().replace("license: llama3.1", "license: mit"))
    with pytest.raises(ValueError, match=r"mit in .*README\.md does not keep the license of model \(llama3\.1\)"):
        upload(hub, model, repo_id="tester/Llama-tiny")


@pytest.mark.parametrize("license", ["mit", "MIT", "Apache-2.0", "openrail", "unknown"])
def test_no_spelling_and_no_door_frees_a_model_of_the_license_of_its_base(
    license: str, run: Path, refused: Refused
) -> None:
    """Neither `build --license`, nor `push` of a built folder whose card was edited; the base is not beside it."""
    state(run.parent / "vision", "cc-by-nc-4.0")
    words = "does not keep the license of vision (cc-by-nc-4.0), which the model was made from"
    refused(words, "build", run, run.parent / "mine", "--license", license)
    folder = built(run, "mine")
    card = (folder / CARD).read_text()
    assert "license: cc-by-nc-4.0\n" in card
    (folder / CARD).write_text(card.replace("license: cc-by-nc-4.0\n", f"license: {license}\n"))
    push = ("push", folder, "me/mine", "--no-check", "--dry-run")
    refused(words, *push)
    (folder / CARD).write_text(card.replace("license: cc-by-nc-4.0\n", ""))
    refused("README.md has to state license: cc-by-nc-4.0", *push)
    # Nor does what is built from the built folder.
    (folder / CARD).write_text(card)
    refused(words, "build", folder, run.parent / "again", "--license", license)


def test_a_license_is_an_id_of_the_hub_in_any_case(run: Path, refused: Refused) -> None:
    mine = ("build", run, run.parent / "mine", "--license")
    refused("--license apache2.0: the Hub has no license of this id; did you mean 'apache-2.0'?", *mine, "apache2.0")
    refused(
        "--license cc-by-nc-9: the Hub has no license of this id; did you mean 'cc-by-nc-4.0'?", *mine, "cc-by-nc-9"
    )
    folder = built(run, "mine", "--license", " Apache-2.0")
    card = (folder / CARD).read_text()
    assert read_card(folder)[0]["license"] == "apache-2.0"
    assert (folder / "LICENSE").read_text() == code_license()
    (folder / CARD).write_text(card.replace("license: apache-2.0", "license: apache2.0"))
    refused("README.md: the Hub has no license of this id", "push", folder, "me/mine", "--no-check", "--dry-run")
    assert {*PERMISSIVE, *TERMS} <= set(LICENSE_IDS)


def test_the_license_that_a_name_says_does_not_depend_on_the_network(hub: LoopbackHub, tmp_path: Path) -> None:
    """As of Microsoft's LLM, whose card states another license than that of the Llama that it was made from."""
    llm = "tester/Llama-3.2-1B-Instruct-CC"
    state(tmp_path / "clip", "apache-2.0", f"base_model: [{llm}]\n")
    (offline,) = bases_of(tmp_path / "clip")
    hub.repos["model", llm] = Repo(llm, "model")
    hub.repos["model", llm].commit("main", {CARD: File(b"---\nlicense: apache-2.0\n---\n", lfs=False)}, "a model")
    (online,) = bases_of(tmp_path / "clip")
    assert str(offline) == str(online) == f"{llm} (llama3.2)"


def test_a_card_on_the_hub_that_a_push_keeps_has_to_keep_the_license(hub: LoopbackHub, run: Path) -> None:
    state(run.parent / "llm", "gemma")
    folder = built(run, "mine")
    upload(hub, folder)
    repo = hub.repo(REPO)
    edited = repo.files()[CARD].replace(b"license: gemma", b"license: mit")
    repo.commit("main", {**repo.commits[repo.branches["main"]], CARD: File(edited, lfs=False)}, "edit")
    with pytest.raises(ValueError, match=rf"mit in README.md of {REPO} on the Hub does not keep .* \(gemma\)"):
        upload(hub, folder)
