"""A model folder or Hub repo as a model of mteb (MTEB's text tasks and MIEB's image tasks)."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from llm2clip.data import OnError
from llm2clip.encoders import OurEncoder
from llm2clip.encoders.ours import TEXT_KINDS
from llm2clip.utils.progress import track
from llm2clip.utils.repos import inspect_repo

try:
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction
except ImportError as error:
    raise ImportError(f"{error}: install mteb with pip install 'llm2clip[evaluation]'.") from error

logger = logging.getLogger(__name__)


class LLM2CLIPEncoder(AbsEncoder):
    """A model for `mteb.evaluate`: `mteb.evaluate(LLM2CLIPEncoder(folder), tasks)`.

    Texts go through the LLM and the adapter, images through the vision tower. The embedding of an input with both is
    the sum of the two unit rows. A text tower (stage 1) only embeds texts, and a model loaded with `text_model=False`
    only embeds images. The instructions that mteb has for its tasks are not used: the models were not trained with
    instructions.

    Args:
        model_name: Folder or Hub id of an LLM2CLIP model or of a text tower.
        revision: Branch, tag or commit on the Hub.
        device: Device of the model; the default is a GPU if there is one.
        on_empty: `raise` an error for an empty text, or `skip` it: its embedding is a row of zeros.
        kwargs: Passed to `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: The repository is another kind of model, or `on_empty` is unknown.
    """

    mteb_model_meta: ModelMeta

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        on_empty: OnError = "raise",
        **kwargs: Any,
    ) -> None:
        if on_empty not in ("raise", "skip"):
            raise ValueError(f"on_empty must be 'raise' or 'skip', not {on_empty!r}.")
        self.on_empty = on_empty
        inspect_repo(model_name, revision).require(*TEXT_KINDS)
        self.encoder = OurEncoder.load(model_name, revision, device=device, **kwargs)
        self.model = self.encoder.model
        modalities = ["text"]
        if self.encoder.is_joint:
            modalities = ["image"] if self.model.text_model is None else ["image", "text"]
        self.mteb_model_meta = _describe(
            self.encoder,
            n_parameters=self.model.num_parameters(),
            max_tokens=self.encoder.text_config.max_text_length,
            embed_dim=self.encoder.width,
            modalities=modalities,
            experiment_kwargs={key: str(value) for key, value in kwargs.items()} or None,
        )

    def encode(self, inputs: DataLoader[Any], *, task_metadata: Any, **kwargs: Any) -> Tensor:
        """Embed the inputs of a task.

        Args:
            inputs: Batches with `text`, `image` or both.
            kwargs: `batch_size` and `show_progress_bar`; other arguments of mteb have no effect.

        Returns:
            Unit rows, float32 `(inputs, width)` on the CPU; of inputs with both modalities, sums of two unit rows.

        Raises:
            ValueError: A text is empty, the model lacks a modality, or `precision` is another dtype than float32.
        """
        if kwargs.get("precision") not in (None, "float32"):
            raise ValueError(f"precision {kwargs['precision']!r} is not available; embeddings are float32.")
        batch_size, bar = kwargs.get("batch_size", 32), kwargs.get("show_progress_bar", False)
        texts: list[str] = []
        images: list[Tensor] = []
        show = bar and "image" in inputs.dataset.features  # type: ignore[attr-defined]
        for batch in track(inputs, "Embedding images", unit="batch", show=show):
            texts += batch.get("text", [])
            # Embedded at once, so that only one batch of images is in memory.
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
            raise ValueError(f"task {task} has images, but a text tower only embeds texts.")
        return self.encoder.encode_image(images, batch_size)

    def _encode_texts(self, texts: list[str], batch_size: int, bar: bool, task: str) -> Tensor:
        if "text" not in self.mteb_model_meta.modalities:
            raise ValueError(f"task {task} has texts, but the model was loaded without its LLM (text_model=False).")
        kept = [row for row, text in enumerate(texts) if text.strip()]
        empty = len(texts) - len(kept)
        found = f"{empty} of {len(texts)} texts of task {task} are empty"
        if empty and self.on_empty == "raise":
            raise ValueError(f"{found}; with on_empty='skip' their embeddings are rows of zeros.")
        if empty:
            logger.warning("%s; their embeddings are rows of zeros.", found)
        rows = torch.zeros(len(texts), self.encoder.width)
        rows[kept] = self.encoder.encode_text([texts[row] for row in kept], batch_size, bar)
        return rows


def _describe(encoder: OurEncoder, **fields: Any) -> ModelMeta:
    # mteb stores results by name and revision, and the weights in a folder or branch can change.
    folder = Path(encoder.name)
    if folder.is_dir():
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
        digest = hashlib.sha256()
        for path in files:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        name, revision = f"local/{folder.resolve().name}", digest.hexdigest()[:40]
    else:
        name, revision = encoder.name, encoder.identity()["commit"]
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
