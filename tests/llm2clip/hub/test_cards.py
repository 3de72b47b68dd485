"""Model cards: valid metadata, correct content, and merging that keeps the edits of people."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_eval_result
from PIL import Image

from llm2clip.hub.cards.card import (
    CARD,
    license_of,
    merge_cards,
    read_card,
    render,
    split_card,
    validate_card,
    with_repo,
    write_card,
)
from llm2clip.hub.cards.curves import write_curves
from llm2clip.hub.cards.facts import CURVES, JOINT_TASK, CardFacts, Evaluation, summary
from tests.modeling_llm2clip import tiny

METRICS = {f"{side}_recall@{k}": k / 20 for side in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
FACTS = CardFacts(
    name="tiny",
    task=JOINT_TASK,
    repo="runs/tiny",
    summary="A tiny model.",
    license="mit",
    base_models=["someone/tower", "someone/llm"],
    datasets=["someone/pictures"],
    recipe={"learning_rate": 1e-3, "caption_weights": [3, 1]},
    evaluations=[Evaluation("image-text retrieval", "someone/pictures", "test", "abc", METRICS, "caption")],
    captions=['a "red" bus', "a dog, with\ntwo lines"],
    has_example=True,
)


def test_model_card_class_reads_the_metadata(tmp_path: Path) -> None:
    write_card(tmp_path, FACTS)
    validate_card(tmp_path)
    data = ModelCard.load(tmp_path / CARD).data
    assert data.license == "mit"
    assert license_of(tmp_path) == {"license": "mit"}
    assert license_of(tmp_path / "elsewhere") == license_of(None) == {}
    assert data.pipeline_tag == "zero-shot-image-classification"
    assert data.library_name == "transformers"
    assert data.base_model == ["someone/tower", "someone/llm"]
    assert data.datasets == ["someone/pictures"]
    assert data.widget == [{"src": "example.png", "candidate_labels": 'a "red" bus, a dog with two lines'}]
    results = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == METRICS
    assert all(result.dataset_revision == "abc" and result.dataset_split == "test" for result in results.values())


def test_the_hub_sees_what_is_compared_and_the_text_the_rest() -> None:
    ranks = {"text_to_image_mean_rank": 3.25, "num_texts": 1200, "runtime": 1.5, "text_to_image_recall@100": 0.9}
    own = replace(FACTS.evaluations[0], metrics={**METRICS, **ranks}, protocol="protocol distinct")
    scores = {"images": 50_000, "tied_images": 7, "top1": 0.75, "top5": 0.9, "mean_per_class": 0.7}
    classes = Evaluation(
        "zero-shot classification", "imagenet-1k", "", "0f", scores, "openai-80", "ties expected value", "ImageNet-1k"
    )
    text = render(replace(FACTS, evaluations=[own, classes]))
    results = split_card(text)[0]["model-index"][0]["results"]
    found = [{metric["type"]: metric["value"] for metric in result["metrics"]} for result in results]
    assert found == [METRICS, {"accuracy": 0.75, "mean_per_class_accuracy": 0.7}]
    assert results[1]["dataset"] == {
        "name": "ImageNet-1k (openai-80)", "type": "imagenet-1k", "config": "openai-80", "revision": "0f",
    }  # fmt: skip
    assert "| zero-shot classification | ImageNet-1k (openai-80) | accuracy | 75.0 |" in text
    assert (
        "- image-text retrieval, someone/pictures (test, caption): protocol distinct; text to image mean rank 3.2, "
        "texts 1,200.\n" in text
    )
    assert (
        "- zero-shot classification, ImageNet-1k (openai-80): ties expected value; images 50,000, tied images 7."
        in text
    )


def test_text_contains_results_captions_settings_and_license() -> None:
    card = render(FACTS)
    assert "| image-text retrieval | someone/pictures (test, caption) | text → image | 5.0 | 25.0 | 50.0 |" in card
    assert 'captions = ["a \\"red\\" bus", "a dog, with\\ntwo lines"]' in card
    settings = card.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(settings) == FACTS.recipe
    assert "The license of the weights is mit" in card
    assert "is not stated; see the licenses" in render(replace(FACTS, license=None))
    other = replace(FACTS, license="other", license_name="own", license_link="LICENSE")
    assert "The license of the weights is [own](LICENSE)." in render(other)
    # Sections without content are left out.
    bare = render(CardFacts("x", JOINT_TASK, "x", "A model."))
    assert "## Results" not in bare
    assert "## Training" not in bare
    assert "model-index" not in bare


def test_edited_sections_are_kept_and_the_others_replaced(tmp_path: Path) -> None:
    write_card(tmp_path, FACTS)
    card = (tmp_path / CARD).read_text()
    edited = card.replace("A tiny model.", "My own words.").replace("license: mit", "license: apache-2.0\nmy_key: 1")
    edited = edited.replace("## Citation", "## Notes\n\nBetween the sections.\n\n## Citation", 1)
    start = edited.index("<!-- llm2clip:limits")
    end = edited.index("<!-- /llm2clip:limits -->") + len("<!-- /llm2clip:limits -->")
    edited = edited[:start] + "My own limits." + edited[end:]
    (tmp_path / CARD).write_text(edited)
    better = {name: value + 0.1 for name, value in METRICS.items()}
    new = replace(FACTS, evaluations=[replace(FACTS.evaluations[0], metrics=better)], datasets=["someone/more"])
    write_card(tmp_path, new)
    data, text = read_card(tmp_path)
    assert "My own words." in text
    assert "A tiny model." not in text
    assert "Between the sections." in text
    assert "My own limits." in text
    assert "Intended use" not in text
    assert data["license"] == "apache-2.0"
    assert data["my_key"] == 1
    assert data["datasets"] == ["someone/pictures", "someone/more"]
    assert "| 15.0 | 35.0 | 60.0 |" in text
    assert "| 5.0 | 25.0 | 50.0 |" not in text
    values = [metric["value"] for metric in data["model-index"][0]["results"][0]["metrics"]]
    assert values == list(better.values())


def test_card_without_generated_sections_only_gains_metadata() -> None:
    mine = "---\nlicense: mit\n---\n\n# Mine\n\nAll of it.\n"
    merged = merge_cards(mine, render(replace(FACTS, license="apache-2.0")))
    data, text = split_card(merged)
    assert text == "# Mine\n\nAll of it.\n"
    assert data["license"] == "mit"
    assert data["pipeline_tag"] == JOINT_TASK
    # The card of a repo created on the website has only front matter.
    assert "A tiny model." in merge_cards("---\nlicense: mit\n---\n", render(FACTS))


def test_merging_a_card_with_itself_changes_nothing() -> None:
    card = render(FACTS)
    assert merge_cards(card, card) == card
    assert with_repo(with_repo(card, "a/b", "x"), "a/b", "x") == with_repo(card, "a/b", "x")


def test_code_examples_load_the_repo_after_a_push() -> None:
    card = with_repo(render(FACTS), "someone/tiny", "address/example.png")
    assert 'AutoModel.from_pretrained("someone/tiny"' in card
    assert 'model="someone/tiny"' in card
    assert 'SentenceTransformer("someone/tiny"' in card
    assert 'cached_file("someone/tiny", "example.png")' in card
    assert "runs/tiny" not in card
    assert split_card(card)[0]["widget"][0]["src"] == "address/example.png"


def test_results_that_others_added_are_kept() -> None:
    result = metadata_eval_result(
        model_pretty_name="tiny",
        task_pretty_name="x",
        task_id="y",
        metrics_pretty_name="recall",
        metrics_id="recall",
        metrics_value=0.5,
        dataset_pretty_name="d",
        dataset_id="d",
    )
    card = f"---\n{yaml.safe_dump(result)}---\n\ntext\n"
    assert split_card(merge_cards(card, render(CardFacts("x", JOINT_TASK, "x", "A."))))[0]["model-index"]
    results = split_card(merge_cards(card, render(FACTS)))[0]["model-index"][0]["results"]
    assert [entry["task"]["name"] for entry in results] == ["image-text retrieval", "x"]
    assert len(split_card(merge_cards(render(FACTS), render(FACTS)))[0]["model-index"][0]["results"]) == 1


def test_invalid_front_matter_or_missing_card_is_refused(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(ValueError, match=r"the front matter of README\.md is not valid YAML"):
        read_card(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"lacks README\.md; `llm2clip build` writes one"):
        validate_card(tmp_path / "elsewhere")


def curves(folder: Path, history: list[dict[str, Any]]) -> bytes | None:
    (folder / CURVES).unlink(missing_ok=True)
    assert write_curves(folder, history) == (folder / CURVES).exists()
    return (folder / CURVES).read_bytes() if (folder / CURVES).exists() else None


def test_curves_show_losses_and_recalls_of_the_training(tmp_path: Path) -> None:
    name, end = "eval_validation_text_to_image_recall@10", {"step": 8, "train_runtime": 3.0}
    assert curves(tmp_path, [{"epoch": 1.0, **end}]) is None
    losses = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
    recalls = [{"step": step, name: step / 9} for step in (2, 4, 6, 8)]
    curves(tmp_path, losses)
    width = Image.open(tmp_path / CURVES).width
    drawn = curves(tmp_path, [*losses, *recalls])
    assert Image.open(tmp_path / CURVES).width > width
    # After the training, the best model is measured at the last step.
    assert curves(tmp_path, [*losses, *recalls, end, {"step": 8, name: 0.1}]) == drawn
    assert curves(tmp_path, [end, {"step": 8, name: 0.1}])  # without evaluations before, it is all there is
    both = {name: 0.5, "eval_validation_image_to_text_recall@10": 0.0}
    ordered = [curves(tmp_path, [{"step": 1, **dict(items)}]) for items in (both.items(), sorted(both.items()))]
    assert ordered[0] == ordered[1]


def test_the_image_size_is_that_of_the_image_processor() -> None:
    model = tiny.joint_model()
    assert "28 px" in summary(model)
    for processor in (tiny.processor(14), tiny.processor(14).image_processor):
        assert "(eva02_vision_model, 14 px)" in summary(model, processor)
    wide = tiny.processor()
    wide.image_processor.crop_size = {"height": 14, "width": 28}
    assert "14 × 28 px" in summary(model, wide)
    assert "(eva02_vision_model)" in summary(model, tiny.naflex_processor())
