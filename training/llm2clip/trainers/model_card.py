"""The model card of a run, with its training curves."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import MISSING, fields
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from llm2clip.data.table_identity import data_revision
from llm2clip.hub.cards.card import CARD, read_card, render, split_card
from llm2clip.hub.cards.curves import write_curves
from llm2clip.hub.cards.facts import CardFacts, Evaluation, base_models, summary
from llm2clip.utils.files import write_text
from llm2clip.utils.repos import hub_ids

if TYPE_CHECKING:
    from llm2clip.trainers.base_trainer import StageTrainer

logger = logging.getLogger(__name__)

# Settings that the card leaves out: they are about the machine and the account, not about the training.
PRIVATE_SETTINGS = ("output_dir", "hub_", "push_to_hub", "report_to", "run_name", "logging_", "use_cpu", "local_rank")
TOWER_SETTINGS = ("model_name_or_path", "vision_model_name_or_path", "text_model_name_or_path")


class DataRevisions:
    """The revisions of data sets at the start of a run; those of local files are read beside the training.

    The checksum of a folder opens every file in it, which takes hours for millions of images on a network drive.

    Args:
        sources: Fields of the sources, or their paths, by name.
    """

    def __init__(self, sources: Mapping[str, Any]) -> None:
        self._found: dict[str, Future[str | None]] = {name: Future() for name in sources}
        local = {name: source for name, source in sources.items() if not hub_ids(_path(source))}
        # Before training, since a data set on the Hub may change meanwhile.
        self._read({name: source for name, source in sources.items() if name not in local})
        # A daemon, so that a run that ends with an error does not wait for it.
        Thread(target=self._read, args=(local,), daemon=True).start()

    def _read(self, sources: Mapping[str, Any]) -> None:
        for name, source in sources.items():
            try:
                self._found[name].set_result(data_revision(source))
            except OSError as error:
                logger.warning("the revision of %s is unknown: %s", _path(source), error)
                self._found[name].set_result(None)
            except Exception as error:  # raised where the revision is asked for
                self._found[name].set_exception(error)

    def get(self, name: str) -> str | None:
        """Return the revision of a source, waiting for it if necessary; None if it is unknown."""
        return self._found[name].result() if name in self._found else None


def _path(source: Any) -> str:
    return source if isinstance(source, str) else str(source["path"])


def write_model_card(trainer: StageTrainer) -> None:
    """Write the card and the curves of a run into its output folder, keeping what people wrote on the card."""
    args = trainer.args
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    sources = [str(source["path"]) for source in getattr(args, "sources", []) if source.get("path")]
    towers = [getattr(args, name, None) for name in TOWER_SETTINGS]
    facts = CardFacts(
        name=(args.hub_model_id or folder.name).split("/")[-1],
        task=trainer.card_task,
        repo=trainer.hub_model_id or str(args.output_dir),
        summary=summary(model, trainer.processing_class),
        base_models=hub_ids(*towers, *base_models(model.config)),
        datasets=hub_ids(*sources),
        sources=[Path(source).name for source in sources if not hub_ids(source)],
        recipe=_recipe(args),
        evaluations=_evaluations(trainer),
        has_curves=write_curves(folder, _whole_history(trainer)),
        is_adapter=getattr(model, "has_adapter", False),
    )
    on_the_hub = trainer.card_on_the_hub()
    existing = read_card(folder) if on_the_hub is None else split_card(on_the_hub)
    write_text(folder / CARD, render(facts, *existing))


def _whole_history(trainer: StageTrainer) -> list[dict[str, Any]]:
    """The log of all parts of a run, whose steps are counted on."""
    before = max((entry["step"] for entry in trainer.earlier_history), default=0)
    return [
        *trainer.earlier_history,
        *({**entry, "step": before + entry["step"]} for entry in trainer.state.log_history),
    ]


def _recipe(args: TrainingArguments) -> dict[str, Any]:
    """The settings that differ from the defaults and are not a path on this machine."""
    recipe = {}
    for entry in fields(args):
        value = getattr(args, entry.name)
        default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
        public = not entry.name.startswith(PRIVATE_SETTINGS) and entry.name not in ("sources", "eval_sources")
        plain = isinstance(value, (bool, int, float, str, list, dict))
        local = isinstance(value, str) and ("/" in value or Path(value).exists()) and not hub_ids(value)
        if entry.init and public and plain and value != default and not local:
            recipe[entry.name] = value
    return json.loads(json.dumps(recipe, default=str))


def _evaluations(trainer: StageTrainer) -> list[Evaluation]:
    """The latest metrics of each retrieval set."""
    found = []
    for name in trainer.retrieval:
        prefix = f"eval_{name}_"
        others = tuple(f"eval_{other}_" for other in trainer.retrieval if other.startswith(f"{name}_"))
        logged = [entry for entry in trainer.state.log_history if any(key.startswith(prefix) for key in entry)]
        if not logged:
            continue
        source = getattr(trainer.args, "eval_sources", {}).get(name, {})
        source = {"path": source} if isinstance(source, str) else source
        metrics = {
            key.removeprefix(prefix): value
            for key, value in logged[-1].items()
            if key.startswith(prefix) and not key.startswith(others)
        }
        path = str(source.get("path") or name)
        dataset = path if hub_ids(path) else Path(path).name
        split, revision = str(source.get("split") or name), trainer.eval_revisions.get(name)
        found.append(Evaluation(trainer.evaluation_title, dataset, split, revision, metrics))
    return found
