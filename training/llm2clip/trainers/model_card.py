"""The model card of a run, with its training curves."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from threading import Thread
from typing import Any

from llm2clip.command_line.settings import defaults_of
from llm2clip.data.table_identity import data_revision
from llm2clip.files.atomic import write_text
from llm2clip.hub.cards.card import CARD, read_card, render
from llm2clip.hub.cards.curves import write_curves
from llm2clip.hub.cards.facts import VISION_TASK, CardFacts, Evaluation, base_models, summary
from llm2clip.hub.licenses import ModelLicense
from llm2clip.models.repos import hub_ids
from llm2clip.trainers.stage2_config import Stage2Recipe

logger = logging.getLogger(__name__)

# Settings that the card leaves out: they are about the machine and the account, not about the training.
PRIVATE_SETTINGS = (
    *("output_dir", "hub_", "push_to_hub", "report_to", "run_name", "logging_", "use_cpu", "local_rank", "debug"),
    *("disable_tqdm", "dataloader_pin_memory", "gradient_checkpointing"),
)
# Settings that are false if they are unset.
FILLED_IN = ("activation_checkpointing",)
TOWER_SETTINGS = (
    *("model_name_or_path", "vision_model_name_or_path", "text_model_name_or_path", "keep_space_of"),
    *("model", "student"),
)
PROCLIP = "[arXiv 2510.18795](https://arxiv.org/abs/2510.18795)"


class DataRevisions:
    """The revisions of data sets at the start of a run; those of local files are read beside the training.

    The checksum of a folder opens every file in it, which takes hours for millions of images on a network drive.

    Args:
        sources: Fields of the sources, or their paths, by name.
    """

    def __init__(self, sources: Mapping[str, Any]) -> None:
        self._revisions: dict[str, Future[str | None]] = {name: Future() for name in sources}
        local = {name: source for name, source in sources.items() if not hub_ids(_path(source))}
        # Before training, since a data set on the Hub may change meanwhile.
        self._read({name: source for name, source in sources.items() if name not in local})
        self._closed = False
        self._thread = Thread(target=self._read, args=(local,))
        self._thread.start()

    def close(self) -> None:
        """Stop reading: what runs while Python exits may abort the process."""
        self._closed = True
        self._thread.join()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ValueError("the run has ended before the revisions of its data were read.")

    def _read(self, sources: Mapping[str, Any]) -> None:
        for name, source in sources.items():
            try:
                self._revisions[name].set_result(data_revision(source, self._refuse_closed))
            except OSError as error:
                logger.warning("the revision of %s is unknown: %s", _path(source), error)
                self._revisions[name].set_result(None)
            except Exception as error:  # raised where the revision is asked for
                self._revisions[name].set_exception(error)

    def get(self, name: str, wait: bool) -> str | None:
        """Return the revision of a source, waiting for it if asked; None if it is unknown."""
        known = self._revisions.get(name)
        return known.result() if known is not None and (wait or known.done()) else None


def _path(source: Any) -> str:
    return source if isinstance(source, str) else str(source["path"])


def write_model_card(
    args: Any,
    model: Any,
    processing_class: Any,
    *,
    task: str,
    evaluations: Sequence[Evaluation],
    history: Sequence[dict[str, Any]],
    comparison: str = "",
    repo: str | None = None,
    license: ModelLicense | None = None,
) -> None:
    """Write the card and the curves of a run into its output folder, keeping what people wrote on the card.

    Args:
        args: The settings of the run, or of an alignment.
        model, processing_class: What the card describes, without wrappers.
        task: Its pipeline tag.
        evaluations: Results; see [`latest_evaluations`].
        history: The log of the run.
        comparison: A table of a student beside its teacher.
        repo: Hub id of the repo that the run pushes to.
        license: The license of the model, of a run that pushes.
    """
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    sources = [str(source["path"]) for source in getattr(args, "sources", []) if source.get("path")]
    description = summary(model, processing_class)
    if isinstance(args, Stage2Recipe) and args.lora_rank:
        description += f" Stage 2 trained the LLM too (LoRA of rank {args.lora_rank}, alpha {args.lora_alpha})."
    facts = CardFacts(
        name=(getattr(args, "hub_model_id", None) or folder.name).split("/")[-1],
        task=VISION_TASK if getattr(getattr(model.config, "text_config", None), "encoders", None) else task,
        repo=repo or str(args.output_dir),
        summary=description,
        base_models=hub_ids(*made_from(args, model)),
        datasets=hub_ids(*sources),
        methods=_methods(args),
        sources=[Path(source).name for source in sources if not hub_ids(source)],
        recipe=_recipe(args),
        evaluations=[*evaluations],
        comparison=comparison,
        has_curves=write_curves(folder, [*history]),
        is_adapter=getattr(model, "has_adapter", False),
        **(license.facts() if license else {}),
    )
    write_text(folder / CARD, render(facts, *read_card(folder)))
    if license:
        license.write_files(folder, folder)


def made_from(args: Any, model: Any) -> list[str]:
    """Return the models that a run starts from, as Hub ids and folders."""
    names: list[Any] = [*(getattr(args, name, None) for name in TOWER_SETTINGS), *base_models(model.config)]
    # `static:NAME` is a student made of the token vectors of another model, `layers:N` one of its teacher.
    names = [name.removeprefix("static:") for name in names if name]
    return [name for name in names if Path(name).is_dir() or hub_ids(name)]


def _methods(args: Any) -> list[str]:
    """Describe what is not in the settings of a usual run, with the paper that it is from."""
    if (former := getattr(args, "keep_space_of", None)) is None:
        return []
    name = next(iter(hub_ids(former)), "a former text tower")
    return [f"Its texts are in the space of {name}, mapped from texts alone (as ProCLIP, stage I, {PROCLIP})."]


def _recipe(args: Any) -> dict[str, Any]:
    """Return the settings that differ from the defaults and are not a path on this machine."""
    recipe, defaults = {}, defaults_of(args)

    def is_local(value: Any) -> bool:
        return isinstance(value, str) and ("/" in value or Path(value).exists()) and not hub_ids(value)

    for entry in fields(args):
        value = getattr(args, entry.name)
        public = not entry.name.startswith(PRIVATE_SETTINGS) and entry.name not in ("sources", "eval_sources")
        public = public and (value or entry.name not in FILLED_IN)
        plain = isinstance(value, (bool, int, float, str, list, dict))
        if entry.init and public and plain and value != defaults[entry.name] and not is_local(value):
            if isinstance(value, dict):
                value = {name: inner for name, inner in value.items() if not is_local(inner)}
            recipe[entry.name] = value
    return json.loads(json.dumps(recipe, default=str))


def continued(earlier: Sequence[dict[str, Any]], log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the log of a run to that of an earlier part of it, whose steps come first."""
    before = max((entry["step"] for entry in earlier), default=0)
    return [*earlier, *({**entry, "step": before + entry["step"]} for entry in log)]


def latest_evaluations(
    names: Sequence[str],
    history: Sequence[dict[str, Any]],
    sources: Mapping[str, Any],
    title: str,
    revisions: DataRevisions | None,
    wait: bool,
) -> list[Evaluation]:
    """Find the latest metrics of retrieval sets in the log of a run.

    Args:
        names: The sets.
        sources: Their sources by name, as far as they have one.
        title: Of the table.
        revisions: Their revisions, if they are known.
        wait: Whether to wait for those that are not known yet; within a run, other processes would wait too.
    """
    evaluations = []
    for name in names:
        prefix = f"eval_{name}_"
        others = tuple(f"eval_{other}_" for other in names if other.startswith(f"{name}_"))
        logged = [entry for entry in history if any(key.startswith(prefix) for key in entry)]
        if not logged:
            continue
        source = sources.get(name, {})
        source = {"path": source} if isinstance(source, str) else source

        def scores(entry: dict[str, Any], prefix: str = prefix, others: tuple[str, ...] = others) -> dict[str, Any]:
            mine = [key for key in entry if key.startswith(prefix) and not key.startswith(others)]
            return {key.removeprefix(prefix): entry[key] for key in mine}

        path = str(source.get("path") or name)
        dataset = path if hub_ids(path) else Path(path).name
        split, revision = str(source.get("split") or name), None if revisions is None else revisions.get(name, wait)
        note = ", ".join(source.get("caption_columns") or ())
        before = scores(logged[0]) if logged[0].get("step") == 0 and len(logged) > 1 else {}
        evaluations.append(Evaluation(title, dataset, split, revision, scores(logged[-1]), note, baseline=before))
    return evaluations
