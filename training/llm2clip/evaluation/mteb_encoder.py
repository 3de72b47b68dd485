"""A model folder or Hub repo as a model of mteb (MTEB's text tasks and MIEB's image tasks)."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, PretrainedConfig
from transformers.utils import CONFIG_NAME

from llm2clip.utils.towers import open_text_tower
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPTextConfig

try:
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction
except ImportError as error:
    raise ImportError(f"{error}: pip install 'llm2clip[evaluation]' brings it") from error

logger = logging.getLogger(__name__)

READ_SIZE = 1 << 22


class LLM2CLIPEncoder(AbsEncoder):
    """What `mteb.evaluate` takes for a model: `mteb.evaluate(LLM2CLIPEncoder(folder), tasks)`.

    Texts go through the LLM and the adapter, images through the vision tower; an input with both gets the sum of the
    two unit rows. A text tower (stage 1) takes texts alone, a model loaded with `text_model=False` images alone.
    The instructions that mteb has for its tasks are not used, since these models were not trained with any.

    Args:
        model_name: Folder or Hub id of an LLM2CLIP model or of a text tower.
        revision: Branch, tag or commit of a Hub id.
        device: Where it runs; the default is a GPU where there is one.
        on_empty: `raise` for an empty text, or `skip` it: it gets a row of zeros, which is similar to nothing.
        kwargs: Passed to `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: The repo holds another kind of model, or `on_empty` is unknown.
    """

    mteb_model_meta: ModelMeta

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        on_empty: str = "raise",
        **kwargs: Any,
    ) -> None:
        if on_empty not in ("raise", "skip"):
            raise ValueError(f"on_empty must be 'raise' or 'skip', not {on_empty!r}.")
        self.on_empty = on_empty
        kind = PretrainedConfig.get_config_dict(model_name, revision=revision)[0].get("model_type")
        if kind == LLM2CLIPConfig.model_type:
            self.model = LLM2CLIPModel.from_pretrained(model_name, revision=revision, **kwargs)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model_name, revision=revision)
            self.image_processor: Any = AutoImageProcessor.from_pretrained(model_name, revision=revision)
            self.encode_text, self.width = self.model.encode_text, self.model.config.projection_dim
            text_config = self.model.config.text_config
            modalities = ["image"] if self.model.text_model is None else ["image", "text"]
        elif kind == LLM2CLIPTextConfig.model_type:
            self.model, self.tokenizer = open_text_tower(model_name, revision=revision, **kwargs)
            self.encode_text, self.width = self.model.encode, self.model.config.hidden_size
            text_config, modalities = self.model.config, ["text"]
        else:
            raise ValueError(f"{model_name} holds a model of type {kind!r}, not an LLM2CLIP model or text tower.")
        self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        self.mteb_model_meta = _describe(
            model_name,
            revision,
            n_parameters=self.model.num_parameters(),
            max_tokens=text_config.max_text_length,
            embed_dim=self.width,
            modalities=modalities,
            experiment_kwargs={key: str(value) for key, value in kwargs.items()} or None,
        )

    def encode(self, inputs: DataLoader[Any], *, task_metadata: Any, **kwargs: Any) -> Tensor:
        """Embed the inputs of a task.

        Args:
            inputs: Batches with `text`, `image` or both.
            task_metadata: The task, for errors.
            kwargs: `batch_size` and `show_progress_bar`; what else mteb tells about the task changes nothing.

        Returns:
            Unit rows, float32 `(inputs, width)` on the CPU; of inputs with both modalities, sums of two.

        Raises:
            ValueError: A text is empty, the model lacks a modality, or `precision` asks for another dtype.
        """
        if kwargs.get("precision") not in (None, "float32"):
            raise ValueError(f"precision {kwargs['precision']!r} is not available; embeddings are float32.")
        batch_size, bar = kwargs.get("batch_size", 32), kwargs.get("show_progress_bar", False)
        texts: list[str] = []
        images: list[Tensor] = []
        for batch in tqdm(inputs, desc="Reading and encoding images", disable=not bar or _has_no_images(inputs)):
            texts += batch.get("text", [])
            # At once, so that no more images than a batch are in memory.
            if "image" in batch:
                images.append(self._encode_images(batch["image"], batch_size, task_metadata.name))
        rows = [torch.cat(images)] if images else []
        if texts:
            rows.append(self._encode_texts(texts, batch_size, bar, task_metadata.name))
        if not rows:
            raise ValueError(f"task {task_metadata.name} has neither texts nor images for this model.")
        return rows[0] if len(rows) == 1 else rows[0] + rows[1]

    def _encode_images(self, images: list[Any], batch_size: int, task: str) -> Tensor:
        if "image" not in self.mteb_model_meta.modalities:
            raise ValueError(f"task {task} has images, but a text tower takes texts alone.")
        return self.model.encode_image(images, self.image_processor, batch_size)

    def _encode_texts(self, texts: list[str], batch_size: int, bar: bool, task: str) -> Tensor:
        if "text" not in self.mteb_model_meta.modalities:
            raise ValueError(f"task {task} has texts, but the model was loaded without its LLM (text_model=False).")
        kept = [row for row, text in enumerate(texts) if text.strip()]
        empty = len(texts) - len(kept)
        if empty and self.on_empty == "raise":
            raise ValueError(
                f"{empty} of {len(texts)} texts of task {task} are empty; on_empty='skip' gives them a row of zeros."
            )
        if empty:
            logger.warning(f"{empty} of {len(texts)} texts of task {task} are empty; they are similar to nothing.")
        rows = torch.zeros(len(texts), self.width)
        encoded = self.encode_text([texts[row] for row in kept], self.tokenizer, batch_size, show_progress_bar=bar)
        rows[kept] = F.normalize(encoded, dim=-1)
        return rows


def _has_no_images(inputs: DataLoader[Any]) -> bool:
    return "image" not in inputs.dataset.features  # type: ignore[attr-defined]


def _describe(name: str, revision: str | None, **fields: Any) -> ModelMeta:
    # mteb keeps results by name and revision, and a folder or a branch may hold other weights tomorrow.
    if Path(name).is_dir():
        name, revision = f"local/{Path(name).resolve().name}", _digest(Path(name))
    else:
        # Downloads lie in folders that are named by the commit.
        revision = Path(hf_hub_download(name, CONFIG_NAME, revision=revision)).parent.name
    return ModelMeta(
        loader=LLM2CLIPEncoder,
        name=name,
        revision=revision,
        release_date=None,
        languages=None,
        memory_usage_mb=None,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch", "Transformers", "safetensors"],
        similarity_fn_name=ScoringFunction("cosine"),
        use_instructions=False,
        training_datasets=None,
        **fields,
    )


def _digest(folder: Path) -> str:
    """40 hexadecimal digits of everything in a folder that decides what its model computes."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            for block in iter(lambda: stream.read(READ_SIZE), b""):
                digest.update(block)
    return digest.hexdigest()[:40]


__all__ = ["LLM2CLIPEncoder"]
