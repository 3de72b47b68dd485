"""The model that a folder is built from: loading, saving, and comparing it with its saved copy in a new process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from llm2clip.hub.cards.facts import JOINT_TASK, TEXT_TASK, VISION_TASK, public_name
from llm2clip.hub.new_process import outputs_of, outputs_of_new_process
from llm2clip.hub.sentence_transformers import write_sentence_transformers_files
from llm2clip.models.attention_probe import probe_text_tower
from llm2clip.models.embeddings import require_finite_rows
from llm2clip.models.repos import OUR_MODELS, Repo, RepoKind, hub_ids, inspect_repo
from llm2clip.models.towers import save_text_tower
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModelWithProjection, with_pillow

TOLERANCE = 1e-5
CAPTIONS = ("a photo of a dog", "two children play football in a green park behind a red brick church")


@dataclass
class SourceModel:
    """A model that a folder is built from.

    Attributes:
        model: A joint model, a vision half or a text tower.
        processor: Its processor, image processor or tokenizer.
        task: Pipeline tag of its card.
        with_captions: Whether its LLM is loaded, so that captions can be compared.
    """

    model: Any
    processor: Any
    task: str
    with_captions: bool

    @classmethod
    def load(
        cls,
        repo: Repo,
        text_model: str | None = None,
        bundle_text_model: bool | None = None,
        merge_adapter: bool | None = None,
    ) -> SourceModel:
        """Load the model of a repo or folder.

        Args:
            repo: One of the kinds in `OUR_MODELS`.
            text_model: Hub id of a joint model's LLM, which is then not bundled.
            bundle_text_model: Whether a joint model contains its LLM; by default it does unless the LLM is on the Hub.
            merge_adapter: Whether the LoRA adapter of a text tower is merged; by default it is.

        Raises:
            ValueError: Other machines could not load the result, because it refers to a local folder.
        """
        options: dict[str, Any] = {"revision": repo.revision}
        if repo.kind is RepoKind.TEXT_TOWER:
            tower = LLM2CLIPTextModel.from_pretrained(repo.name, **options).eval()
            if _is_merged(tower, merge_adapter):
                tower.merge_adapter()
            probe_text_tower(tower)
            return cls(tower, AutoTokenizer.from_pretrained(repo.name, **options), TEXT_TASK, True)
        if repo.kind is RepoKind.VISION_HALF:
            half = LLM2CLIPVisionModelWithProjection.from_pretrained(repo.name, **options).eval()
            image_processor = with_pillow(AutoImageProcessor.from_pretrained(repo.name, **options))
            return cls(half, image_processor, VISION_TASK, False)
        if repo.encoders:
            model = LLM2CLIPModel.from_pretrained(repo.name, **options).eval()
            for encoder in model.config.text_config.encoders:
                encoder["name"] = public_name(encoder["name"])
            image_processor = with_pillow(AutoImageProcessor.from_pretrained(repo.name, **options))
            return cls(model, image_processor, VISION_TASK, False)
        llm = text_model or repo.config.get("text_model_name_or_path")
        is_on_hub = text_model is not None or bool(llm and hub_ids(llm))
        bundle = not is_on_hub if bundle_text_model is None else bundle_text_model
        if not bundle and not is_on_hub:
            raise ValueError(
                f"the LLM is in {llm!r}, which others cannot load; bundle it (the default), or give its Hub id with "
                "--text-model."
            )
        model = LLM2CLIPModel.from_pretrained(repo.name, text_model=bundle, **options).eval()
        if bundle:
            if merge_adapter is not False:
                model.text_model.merge_adapter()
            probe_text_tower(model.text_model)
            model.config.text_model_name_or_path = model.config.text_model_revision = None
        elif text_model is not None:
            model.config.text_model_name_or_path, model.config.text_model_revision = text_model, None
        return cls(model, AutoProcessor.from_pretrained(repo.name, **options), JOINT_TASK, bundle)

    def save(self, folder: Path) -> None:
        """Save model, processor and the files of sentence-transformers."""
        if self.task == TEXT_TASK:
            save_text_tower(self.model, self.processor, folder)
        else:
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
        if self.task == JOINT_TASK or (self.task == TEXT_TASK and not self.model.has_adapter):
            write_sentence_transformers_files(folder)

    def compare(self, folder: Path, picture: Image.Image | None = None, captions: Sequence[str] = ()) -> float:
        """Load a folder in a new process without this package and compare its outputs with those of this model.

        The weights of this model are freed before, so that the new process does not hold the model a second time.

        Args:
            folder: The saved model.
            picture, captions: What is embedded; by default a pattern and two captions.

        Returns:
            The largest difference, relative to the largest entry.

        Raises:
            NonFiniteError: An output of this model is NaN or infinite.
            RuntimeError: The folder does not load there, or its outputs differ.
        """
        inputs = picture or sample_picture(), list(captions or CAPTIONS)
        parts = self.task != TEXT_TASK, self.with_captions
        image_processor = getattr(self.processor, "image_processor", self.processor) if parts[0] else None
        tokenizer = getattr(self.processor, "tokenizer", self.processor) if parts[1] else None
        expected = outputs_of(self.model, image_processor, tokenizer, self.processor, *inputs)
        for name, rows in expected.items():
            require_finite_rows(rows, [f"{name} {row}" for row in range(len(rows))].__getitem__, "samples")
        self.model.to("meta")
        loading: dict[str, Any] = {"text_model": False} if self.task == JOINT_TASK and not self.with_captions else {}
        outputs, worst = outputs_of_new_process(folder, parts, *inputs, **loading), 0.0
        for name, rows in expected.items():
            difference = ((outputs[name] - rows).abs().max() / rows.abs().max().clamp(min=1)).item()
            worst = max(worst, difference)
            # Not `>`, which is false for NaN.
            if not difference <= TOLERANCE:
                raise RuntimeError(f"the {name} outputs of {folder} in a new process differ by {difference:.1e}.")
        return worst


def _is_merged(tower: LLM2CLIPTextModel, merge_adapter: bool | None) -> bool:
    if not tower.has_adapter:
        return False
    decoder: Any = tower.decoder
    base = decoder.peft_config[decoder.active_adapter].base_model_name_or_path
    if merge_adapter is False and not hub_ids(base):
        raise ValueError(f"the LLM of the adapter is in {base!r}, which others cannot load; merge the adapter.")
    return merge_adapter is not False


def validate_folder(folder: Path) -> None:
    """Load a built folder and compare the outputs with those in a new process; see [`SourceModel.compare`]."""
    SourceModel.load(inspect_repo(folder).require(*OUR_MODELS), merge_adapter=False).compare(folder)


def sample_picture() -> Image.Image:
    """Return an image with edges and colors."""
    ramp = torch.arange(96 * 96 * 3).reshape(96, 96, 3)
    return Image.fromarray((ramp * 7 % 251).to(torch.uint8).numpy())
