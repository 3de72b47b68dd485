"""`llm2clip merge`: the weights between two models, (1 - alpha) * A + alpha * B (WiSE-FT, arXiv 2109.01903)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from torch import Tensor

from llm2clip.data import CaptionSource, OnError, PairSource
from llm2clip.encoders import OurEncoder
from llm2clip.encoders.cache_of_model import open_cache_of_model
from llm2clip.encoders.stored import StoredEncoder
from llm2clip.evaluation.data import CaptionPairData, RetrievalData
from llm2clip.evaluation.protocols.caption_retrieval import caption_pair_metrics
from llm2clip.evaluation.protocols.retrieval import image_text_metrics
from llm2clip.evaluation.session import Session
from llm2clip.hub.build_card import own_evaluation
from llm2clip.hub.cards.card import as_list, read_card, write_card
from llm2clip.hub.cards.curves import write_merge_curve
from llm2clip.hub.cards.facts import MERGE_CURVE, TEXT_TASK, CardFacts, public_name, summary
from llm2clip.hub.licenses import bases_of, license_facts, strictest, write_license_files
from llm2clip.hub.mixture import Mixture, mix_joint, mix_text_towers, mix_vision
from llm2clip.hub.source_model import SourceModel
from llm2clip.utils.folders import atomic_folder, refuse_existing, refuse_nested
from llm2clip.utils.manifests import refuse_damaged
from llm2clip.utils.processes import on_main_process, process_state
from llm2clip.utils.repos import RepoKind, hub_ids, inspect_repo, referred_folders
from llm2clip.utils.settings import build_config, check_choices, refuse, setting
from llm2clip.utils.tables import print_table, recalls_in_percent

logger = logging.getLogger(__name__)

DIRECTIONS = {"text_to_image_": "text → image", "image_to_text_": "image → text", "": "query → target"}
# Settings of the evaluation that are about images.
OF_IMAGES = ("num_workers", "on_error")


@dataclass
class MergeConfig:
    """Settings of `llm2clip merge`."""

    first: str = setting(
        "",
        "Model A: an LLM2CLIP model or a vision tower if B is an LLM2CLIP model; a text tower or its LLM if B is one.",
    )
    second: str = setting("", "Model B: an LLM2CLIP model, or a text tower. The result has its processor and card.")
    destination: str = setting("", "Folder to write.")
    alpha: list[float] = setting(
        [0.5],
        "Share of B, from 0 (A) to 1 (B). Of several, each is measured on eval_source, and the one with the highest "
        "mean of all recalls is written; of equal ones the smallest.",
    )
    parts: Literal["all", "vision"] | None = setting(
        None,
        "What is merged of LLM2CLIP models. all: everything but the LLM; vision: the vision tower, while projection, "
        "adapter and logit scale are those of B. Unset: all if A has them too, otherwise vision.",
    )
    first_revision: str | None = setting(None, "Branch, tag or commit of A on the Hub.")
    second_revision: str | None = setting(None, "Branch, tag or commit of B on the Hub.")
    eval_source: dict[str, Any] | str = setting(
        "",
        "Validation data: a path or Hub id, or a mapping with the fields of CaptionSource (LLM2CLIP models) or "
        "PairSource (text towers). Do not report results on it: alpha is chosen there.",
    )
    split: str = setting("validation", "Split of eval_source, unless the mapping names one.")
    caption_columns: list[str] | None = setting(None, "Columns of the captions of eval_source.")
    query_column: str | None = setting(None, "Text towers: column of the queries of eval_source.")
    target_column: str | None = setting(None, "Text towers: column of the targets of eval_source.")
    embedding_cache: str | None = setting(
        None, "Embedding cache of the captions of eval_source, from `llm2clip embed`; the LLM is not needed then."
    )
    batch_size: int = setting(64, "Images or captions per forward pass of the evaluation.")
    num_workers: int = setting(0, "Worker processes that read images.")
    on_error: OnError = setting("raise", "How to treat an image that cannot be read: raise an error, or skip it.")
    name: str | None = setting(None, "Title of the card. Default: name of the folder.")
    overwrite: bool = setting(False, "Replace a destination that an earlier merge wrote and that holds nothing else.")

    def __post_init__(self) -> None:
        check_choices(self)
        self.alpha = sorted(set(self.alpha))
        if not self.alpha or not all(0 <= alpha <= 1 for alpha in self.alpha):
            raise ValueError(f"alpha is {self.alpha}, but every share of B has to be from 0 (A) to 1 (B).")
        if not self.eval_source:
            if len(self.alpha) > 1:
                raise ValueError("several alphas need eval_source, the validation data on which the best is chosen.")
            names = ("split", "caption_columns", "query_column", "target_column", "embedding_cache", *OF_IMAGES)
            refuse(self, [*names, "batch_size"], "without eval_source nothing is measured")
        if bool(self.query_column) != bool(self.target_column):
            raise ValueError("query_column and target_column go together: give both, or caption_columns.")


def merge_models(
    first: str | Path,
    second: str | Path,
    destination: str | Path,
    alpha: float | Sequence[float] = 0.5,
    **settings: Any,
) -> dict[str, Any]:
    """Write the model whose weights are `(1 - alpha) * A + alpha * B`, of two LLM2CLIP models or two text towers.

    Args:
        first: A: an LLM2CLIP model, or a vision tower, of which only the vision tower is merged; or a text tower, or
            the plain LLM that one was trained from. A Hub id or folder.
        second: B, an LLM2CLIP model or a text tower, with equal architecture and LLM.
        destination: Folder to write.
        alpha: Share of B. Of several, the best on `eval_source` is written, by the mean of all recalls.
        settings: Other fields of [`MergeConfig`].

    Returns:
        `written`, the destination; `alpha`; with `eval_source` also the metrics of the written model.

    Raises:
        FileExistsError: The destination exists and `overwrite` is off, or it holds what a merge did not write.
        ValueError: A setting is wrong, or the models do not fit; the message names both.
    """
    alphas = list(alpha) if isinstance(alpha, Sequence) else [alpha]
    fields = {"first": first, "second": second, "destination": destination, "alpha": alphas, **settings}
    return run(build_config(MergeConfig, fields, "MergeConfig"))


def run(config: MergeConfig) -> dict[str, Any]:
    """Run `llm2clip merge`; see [`merge_models`]."""
    if not config.first or not config.second or not config.destination:
        raise ValueError("give two models and a destination: llm2clip merge A B DESTINATION")
    destination = Path(config.destination)
    for source in (config.first, config.second):
        refuse_nested(source, destination)
        on_main_process(partial(refuse_damaged, source))
        for needed in referred_folders(source):
            refuse_nested(needed, destination)
    refuse_existing(destination, "merge", config.overwrite)
    mixture = _open(config)
    curve: dict[float, dict[str, Any]] = {}
    if config.eval_source:
        mixture.model.to(process_state().device)
        measure = _open_measure(config, mixture)
        for alpha in config.alpha:
            logger.info("alpha %g of %s", alpha, ", ".join(f"{alpha:g}" for alpha in config.alpha))
            mixture.mix(alpha)
            curve[alpha] = measure()
    # The smallest of equal ones, since the alphas are sorted.
    chosen = max(config.alpha, key=lambda alpha: mean_recall(curve[alpha]) if curve else 0)
    mixture.mix(chosen)
    metrics = curve.get(chosen, {})
    if process_state().is_main_process:
        if curve:
            _print_curve(curve, chosen, str(config.eval_source))
        with atomic_folder(destination, "merge", config.overwrite) as folder:
            _write(config, mixture, folder, chosen, curve)
    return {"written": str(destination), "alpha": chosen, **metrics}


def mean_recall(metrics: dict[str, Any]) -> float:
    """Compute the mean of all recalls, at every k and in every direction."""
    recalls = [value for name, value in metrics.items() if "recall@" in name]
    return sum(recalls) / len(recalls)


def _open(config: MergeConfig) -> Mixture:
    second = inspect_repo(config.second, config.second_revision).require(
        RepoKind.JOINT, RepoKind.TEXT_TOWER, hint="B gives the result its projection, adapter and processor."
    )
    first = inspect_repo(config.first, config.first_revision)
    if second.kind is RepoKind.TEXT_TOWER:
        refuse(config, ["parts", "embedding_cache", *OF_IMAGES], f"{second.name} is a text tower")
        return mix_text_towers(first, second)
    with_llm = bool(config.eval_source) and config.embedding_cache is None
    is_joint = first.kind is RepoKind.JOINT
    if config.parts == "all" and not is_joint:
        raise ValueError(f"{first.name} has no text adapter to merge with that of {second.name}; leave parts unset.")
    mix = mix_joint if is_joint and config.parts != "vision" else mix_vision
    return mix(first, second, with_llm)


def _source_fields(config: MergeConfig) -> dict[str, Any]:
    given = config.eval_source
    fields: dict[str, Any] = dict(given) if isinstance(given, dict) else {"path": given}
    fields.setdefault("split", config.split)
    if config.caption_columns is not None:
        fields["caption_columns"] = config.caption_columns
    if config.query_column:
        fields |= {"anchor_column": config.query_column, "positive_column": config.target_column}
    return fields


def _open_measure(config: MergeConfig, mixture: Mixture) -> Callable[[], dict[str, Any]]:
    """Return a function that measures the mixture as it is then; what its LLM makes of captions is computed once."""
    model: Any = mixture.model.eval()
    fields, processor = _source_fields(config), mixture.processor
    if mixture.task == TEXT_TASK:
        pairs = CaptionPairData.from_source(PairSource.from_dict(fields))
        return partial(caption_pair_metrics, Session(OurEncoder(model, processor), None, config.batch_size), pairs)
    data = RetrievalData.from_source(CaptionSource.from_dict(fields))
    if config.embedding_cache is not None:
        cache = open_cache_of_model(config.embedding_cache, model.config, processor.tokenizer, is_trained=True)
        lookup: Callable[[list[str]], Tensor] = cache.lookup
    else:
        embedded = OurEncoder(model.text_model, processor).embed(data.texts, config.batch_size, True)
        rows = {text: row for row, text in enumerate(data.texts)}
        lookup = lambda texts: embedded[[rows[text] for text in texts]]  # noqa: E731
    encoder = StoredEncoder(model, processor, lookup)
    session = Session(encoder, None, config.batch_size, config.num_workers, config.on_error)
    return partial(image_text_metrics, session, data)


def _print_curve(curve: dict[float, dict[str, Any]], chosen: float, data: str) -> None:
    directions = [way for way in DIRECTIONS if f"{way}recall@1" in curve[chosen]]
    rows = [
        [
            f"{alpha:g}{' *' if alpha == chosen else ''}",
            *(recalls_in_percent(metrics, way) for way in directions),
            f"{100 * mean_recall(metrics):.2f}",
        ]
        for alpha, metrics in curve.items()
    ]
    title = f"R@1 / 5 / 10 in % on {data}; * is written: the highest mean"
    print_table(Console(), title, ["alpha", *(DIRECTIONS[way] for way in directions), "mean"], rows)


def _write(
    config: MergeConfig, mixture: Mixture, folder: Path, chosen: float, curve: dict[float, dict[str, Any]]
) -> None:
    SourceModel(mixture.model, mixture.processor, mixture.task, False).save(folder)
    if len(curve) > 1:
        write_merge_curve(folder / MERGE_CURVE, curve, chosen, "Between A and B")
    folders = [Path(name) for name in (config.first, config.second)]
    cards = [read_card(folder)[0] for folder in folders]
    bases = bases_of(folder, [config.first, config.second])
    # None of parents that ask for different ones: of these, people have to decide.
    license = strictest(bases)
    facts = CardFacts(
        name=config.name or Path(config.destination).name,
        task=mixture.task,
        repo=config.destination,
        summary=summary(mixture.model, mixture.processor),
        base_models=hub_ids(config.first, config.second),
        datasets=list(dict.fromkeys(value for card in cards for value in as_list(card.get("datasets")))),
        languages=list(dict.fromkeys(value for card in cards for value in as_list(card.get("language")))),
        merged=_in_words(config, mixture, chosen, list(curve)),
        evaluations=[own_evaluation(mixture.task, _source_fields(config), curve[chosen])] if curve else [],
        **license_facts(license, bases),
    )
    write_card(folder, facts)
    write_license_files(folder, folder, license, bases)


def _in_words(config: MergeConfig, mixture: Mixture, chosen: float, alphas: list[float]) -> str:
    words = [
        f"Merged, not trained: the weights are {1 - chosen:g} × A + {chosen:g} × B (WiSE-FT, arXiv 2109.01903), where "
        f"A is {public_name(config.first)} and B is {public_name(config.second)}."
    ]
    if mixture.task != TEXT_TASK:
        is_whole = any(name.startswith("text_adapter.") for name in mixture.first)
        words.append("Both have the same LLM." if is_whole else "Beside the vision tower, everything is that of B.")
    if len(alphas) > 1:
        shares = ", ".join(f"{alpha:g}" for alpha in alphas)
        words.append(
            f"The share of B was chosen from {shares} by the mean of all recalls on the data of the results above, "
            f"which are therefore not those of a test.\n\n![Recall by the share of B]({MERGE_CURVE})"
        )
    return " ".join(words)
