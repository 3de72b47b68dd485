"""The tables of the README are those of the committed results, and its other numbers stand where they come from."""

from __future__ import annotations

import json
import re
import runpy

import yaml

from tests.documents.reading import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_of_the_quickstart_are_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "make_quickstart.py"))
    made = page["pages"](json.loads(page["RESULT"].read_text(encoding="utf-8")))
    assert {path.name for path in made} == {"README.md", "quickstart.md"}
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text


def test_the_table_of_costs_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "make_costs.py"))
    costs = json.loads(page["RESULT"].read_text(encoding="utf-8"))
    assert page["with_table"](README, costs) == README
    assert page["table"](costs) in README


def numbers(line: str) -> list[str]:
    return re.findall(r"\d+\.\d", line)


def row(page: str, start: str) -> str:
    return next(line for line in page.splitlines() if line.startswith(start))


def test_the_papers_numbers_are_those_of_the_pages_about_the_models() -> None:
    checkpoints = (ROOT / "docs" / "start" / "checkpoints.md").read_text(encoding="utf-8")
    scores = (ROOT / "hub_configs" / "README.md").read_text(encoding="utf-8").partition("| model | table |")[2]
    home = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for shown, source in (("CLIP L/14-336", "CLIP L/14-336"), ("LLM2CLIP L/14-336", "LLM2CLIP-Openai-L-14-336")):
        flickr, coco, _, urban, docci = numbers(row(checkpoints, f"| {source}"))[1::2]
        for page in (README, home):
            assert numbers(row(page, f"| {shown}")) == [flickr, coco, urban, docci]
    for name in ("LLM2CLIP-Openai-L-14-336", "LLM2CLIP-EVA02-L-14-336"):
        flickr, _, _, urban, _ = numbers(row(scores, f"| [{name}]"))[1::2]
        assert row(README, f"| `microsoft/{name}`").split("|")[3].strip() == f"{flickr}, {urban}"
    assert "LLM2CLIP-Llama3.2-1B-EVA02-L-14-336" not in scores.partition("| config without")[0]


def test_hours_of_training_are_those_of_the_page_that_computes_them() -> None:
    page = (ROOT / "docs" / "start" / "reproduce.md").read_text(encoding="utf-8")
    for command, step in (("stage1", "| stage 1,"), ("embed", "| embed "), ("stage2", "| stage 2,")):
        hours = row(page, step).split("|")[2].strip()
        shown = re.search(r"([\d.]+) hours", row(README, f"| `{command}`"))
        assert shown
        assert shown[1] in (hours, f"{float(hours):.0f}")


def test_what_another_instruction_set_changes_is_that_of_the_committed_runs() -> None:
    here, there = (
        json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))["caption_retrieval"]
        for name in ("quickstart", "quickstart_avx2")
    )
    largest = {
        encoder: max(abs(found[task]["recall@10"] - here[encoder][task]["recall@10"]) for task in found)
        for encoder, found in there.items()
    }
    before, after = (f"{100 * largest[name]:.1f}" for name in ("raw LLM, causal", "LLM after stage 1"))
    text = " ".join(README.split())
    assert f"by up to {before} points before stage 1 and by up to {after} after it" in text


def test_the_versions_are_those_that_ci_tests() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    assert min(jobs["test"]["strategy"]["matrix"]["python"]) in README
