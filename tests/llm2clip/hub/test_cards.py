"""Model cards: valid metadata, correct content, and merging that keeps the edits of people."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, metadata_eval_result
from PIL import Image

from llm2clip.hub.cards.card import (
    BEGIN,
    CARD,
    END,
    merge_cards,
    read_card,
    render,
    split_card,
    validate_card,
    with_repo,
    write_card,
)
from llm2clip.hub.cards.curves import write_curves
from llm2clip.hub.cards.facts import CURVES, JOINT_TASK, CardFacts, Evaluation

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
BARE = CardFacts("x", JOINT_TASK, "x", "A model.")


def results_on(card: str) -> list[dict[str, Any]]:
    return split_card(card)[0]["model-index"][0]["results"]


def test_model_card_class_of_the_hub_reads_the_metadata(tmp_path: Path) -> None:
    write_card(tmp_path, FACTS)
    validate_card(tmp_path)
    data = ModelCard.load(tmp_path / CARD).data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        *("mit", "transformers", "zero-shot-image-classification"),
    )
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
    imagenet = ("imagenet-1k", "", "0f", scores, "openai-80", "ties expected value", "ImageNet-1k")
    text = render(replace(FACTS, evaluations=[own, Evaluation("zero-shot classification", *imagenet)]))
    results = results_on(text)
    found = [{metric["type"]: metric["value"] for metric in result["metrics"]} for result in results]
    assert found == [METRICS, {"accuracy": 0.75, "mean_per_class_accuracy": 0.7}]
    dataset = {"name": "ImageNet-1k (openai-80)", "type": "imagenet-1k", "config": "openai-80", "revision": "0f"}
    assert results[1]["dataset"] == dataset
    for line in (
        "| image-text retrieval | someone/pictures (test, caption) | text → image | 5.0 | 25.0 | 50.0 |",
        "| zero-shot classification | ImageNet-1k (openai-80) | accuracy | 75.0 |",
        "- image-text retrieval, someone/pictures (test, caption): protocol distinct; text to image mean rank 3.2, "
        "texts 1,200.",
        "- zero-shot classification, ImageNet-1k (openai-80): ties expected value; images 50,000, tied images 7.",
    ):
        assert line in text.splitlines()


def test_text_contains_captions_settings_and_license() -> None:
    card = render(FACTS)
    assert 'captions = ["a \\"red\\" bus", "a dog, with\\ntwo lines"]' in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == FACTS.recipe
    assert "The license of the weights is mit" in card
    assert "is not stated; see the licenses" in render(replace(FACTS, license=None))
    # Sections without content are left out.
    assert not any(part in render(BARE) for part in ("## Results", "## Training", "model-index"))


def test_text_outside_of_the_two_marks_stays_and_what_is_between_is_written_anew(tmp_path: Path) -> None:
    write_card(tmp_path, FACTS)
    card = (tmp_path / CARD).read_text()
    assert [card.count(mark) for mark in (BEGIN, END)] == [1, 1]
    edited = card.replace("A tiny model.", "Between the marks.").replace(
        "license: mit", "license: apache-2.0\nmine: 1"
    )
    (tmp_path / CARD).write_text(edited.replace(BEGIN, f"# Mine\n\n{BEGIN}") + "\n## Notes\n\nBelow \\1.\n")
    better = {name: value + 0.1 for name, value in METRICS.items()}
    new = replace(FACTS, evaluations=[replace(FACTS.evaluations[0], metrics=better)], datasets=["someone/more"])
    write_card(tmp_path, new)
    data, text = read_card(tmp_path)
    assert text.startswith(f"# Mine\n\n{BEGIN}\n# tiny\n")
    assert text.endswith(f"{END}\n\n## Notes\n\nBelow \\1.\n")
    assert "| 15.0 | 35.0 | 60.0 |" in text
    assert "A tiny model." in text
    for words in ("Between the marks.", "| 5.0 | 25.0 | 50.0 |"):
        assert words not in text
    assert (data["license"], data["mine"]) == ("apache-2.0", 1)
    assert data["datasets"] == ["someone/pictures", "someone/more"]
    values = [metric["value"] for metric in data["model-index"][0]["results"][0]["metrics"]]
    assert values == list(better.values())


def test_a_card_without_results_keeps_those_of_the_earlier_and_a_build_keeps_its_training() -> None:
    data, text = split_card(render(FACTS))
    again = render(replace(FACTS, evaluations=[], recipe={}), data, text)
    assert "| 5.0 | 25.0 | 50.0 |" in again
    assert "caption_weights" not in again
    assert results_on(again) == results_on(render(FACTS))
    assert "caption_weights" in render(replace(FACTS, recipe={}), data, text, keep_training=True)


def test_interval_and_baseline_are_beside_a_score_which_is_once_in_the_index() -> None:
    """Where the evaluation has them; a later one of the same columns replaces the number, and does not repeat it."""
    run = replace(FACTS.evaluations[0], baseline={name: value / 2 for name, value in METRICS.items()})
    data, text = split_card(render(replace(FACTS, evaluations=[run])))
    assert "| text → image, before | 2.5 | 12.5 | 25.0 |" in text
    first = data["model-index"][0]["results"][0]["metrics"][0]
    assert first["args"] == {"baseline": METRICS["text_to_image_recall@1"] / 2}
    measured = replace(FACTS.evaluations[0], intervals={"text_to_image_recall@1": [0.01, 0.09]})
    known = {"intervals": {"top1": [0.4, 0.6]}, "baseline": {"top1": 0.1}}
    scores = Evaluation("probe", "digits", "test", None, {"top1": 0.5}, **known)
    card = render(replace(FACTS, evaluations=[measured, scores]), data, text)
    for line in (
        "| text → image | 5.0 (1.0-9.0) | 25.0 | 50.0 |",
        "| probe | digits (test) | accuracy | 50.0 (40.0-60.0) |",
        "| probe | digits (test) | accuracy, before | 10.0 |",
    ):
        assert line in card
    metrics = [metric for result in results_on(card) for metric in result["metrics"]]
    assert [metric["type"] for metric in metrics] == [*METRICS, "accuracy"]
    assert metrics[0]["args"] == {"interval_95": [0.01, 0.09]}
    assert metrics[-1]["args"] == {"interval_95": [0.4, 0.6], "baseline": 0.1}


def test_card_without_marks_only_gains_metadata() -> None:
    mine = "---\nlicense: mit\n---\n\n# Mine\n\nAll of it.\n"
    data, text = split_card(merge_cards(mine, render(replace(FACTS, license="apache-2.0"))))
    assert text == "# Mine\n\nAll of it.\n"
    assert (data["license"], data["pipeline_tag"]) == ("mit", JOINT_TASK)
    # The card of a repo created on the website has only front matter.
    assert "A tiny model." in merge_cards("---\nlicense: mit\n---\n", render(FACTS))


def test_merging_a_pushed_card_again_changes_nothing() -> None:
    card = with_repo(render(FACTS), "someone/tiny", "address/example.png")
    assert "runs/tiny" not in card
    assert merge_cards(card, card) == with_repo(card, "someone/tiny", "address/example.png") == card


def test_results_that_others_added_are_kept() -> None:
    names = ("model_pretty_name", "task_pretty_name", "task_id", "metrics_pretty_name", "metrics_id")
    names += ("dataset_pretty_name", "dataset_id")
    theirs = metadata_eval_result(**dict.fromkeys(names, "theirs"), metrics_value=0.5)
    card = f"---\n{yaml.safe_dump(theirs)}---\n\ntext\n"
    assert [entry["task"]["name"] for entry in results_on(merge_cards(card, render(BARE)))] == ["theirs"]
    names_found = [entry["task"]["name"] for entry in results_on(merge_cards(card, render(FACTS)))]
    assert names_found == ["image-text retrieval", "theirs"]


def test_curves_leave_out_the_chosen_model_which_is_measured_after_the_last_step(tmp_path: Path) -> None:
    name, end = "eval_validation_text_to_image_recall@10", {"step": 8, "train_runtime": 3.0}
    assert not write_curves(tmp_path, [{"epoch": 1.0, **end}])
    losses, recalls = ([{"step": step, key: step / 9} for step in (2, 4, 6, 8)] for key in ("loss", name))
    drawn = []
    for history in (losses, [*losses, *recalls], [*losses, *recalls, end, {"step": 8, name: 0.1}]):
        assert write_curves(tmp_path, history)
        drawn.append(Image.open(tmp_path / CURVES).copy())
    assert drawn[1].width > drawn[0].width
    assert drawn[2].tobytes() == drawn[1].tobytes()
