"""Multimodal embedding models of sentence-transformers as encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from llm2clip.encoders.encoder import Encoder, compared_lengths
from llm2clip.encoders.loop import TokenizedTexts
from llm2clip.models.identity import preprocessing, tokenizer_fingerprint

OPTIONS: dict[str, Any] = {"show_progress_bar": False, "convert_to_tensor": True, "normalize_embeddings": True}
DTYPES = ("auto", "float32", "bfloat16", "float16")


class SentenceTransformerEncoder(Encoder):
    """A model of sentence-transformers that embeds texts and images, such as Qwen3-VL-Embedding.

    Texts are queries and images are documents: each has the instruction that the model's files name so.

    Args:
        name, device, dtype: See [`Encoder`].
        model: The `SentenceTransformer`, in evaluation mode.

    Raises:
        ValueError: The model embeds no images.
    """

    def __init__(self, name: str, model: Any, device: torch.device, dtype: str = "float32") -> None:
        import sentence_transformers

        self.library = f"sentence-transformers {sentence_transformers.__version__}"
        if not (model.supports("text") and model.supports("image")):
            raise ValueError(
                f"{name} does not embed both texts and images, but {', '.join(map(str, model.modalities))}."
            )
        super().__init__(name, model, 0, device, dtype)
        self.width = self.full_width = self._embed_texts(["a"]).shape[1]

    @classmethod
    def load(cls, name: str, revision: str | None, dtype: str, device: torch.device) -> SentenceTransformerEncoder:
        """Load a model; code in its repository is not run.

        Raises:
            ImportError: sentence-transformers is not installed.
            OSError: There is no such model.
            ValueError: The dtype is unknown, or the model embeds no images.
        """
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(
                f"{name} is a model of sentence-transformers ({error}); install it with: pip install 'llm2clip[eval]'"
            ) from error
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is unknown; choose {', '.join(DTYPES)}.")
        model = SentenceTransformer(name, revision=revision, device=str(device), model_kwargs={"dtype": dtype})
        used = str(next(model.parameters()).dtype).removeprefix("torch.")
        encoder = cls(name, model.eval(), device, used)
        encoder.revision = revision
        return encoder

    def settings(self) -> dict[str, Any]:
        first = self.model[0]
        return {
            "model": repr(self.model),
            "preprocessing": preprocessing(first.processor.image_processor),
            "tokenizer": tokenizer_fingerprint(first.tokenizer),
            "template": getattr(first.processor, "chat_template", None) or first.tokenizer.chat_template,
            "prompts": self.model.prompts,
            "default_prompt": self.model.default_prompt_name,
            "text": self.model.max_seq_length,
        }

    def prepare(self, image: Any, key: str) -> dict[str, Tensor]:
        """Return the pixels as bytes: how many patches the model makes of an image depends on its size."""
        return {"pixels": V.pil_to_tensor(image)}

    def image_features(self, inputs: dict[str, Tensor]) -> Tensor:
        images = [V.to_pil_image(pixels) for pixels in inputs["pixels"]]
        return self.model.encode_document(images, batch_size=len(images), **OPTIONS)

    def pooled_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the embeddings: such a model has no projection after its pooling."""
        return self.image_features(inputs)

    def _embed_texts(self, texts: list[str]) -> Tensor:
        return self.model.encode_query(texts, batch_size=len(texts), **OPTIONS)

    def tokenized(self, texts: list[str]) -> TokenizedTexts:
        """See [`Encoder.tokenized`]; the lengths leave out instruction and chat template."""

        def prepare(rows: list[int]) -> list[str]:
            return [texts[row] for row in rows]

        return TokenizedTexts(self.model, self.device, self._lengths(texts), prepare, self._embed_texts)

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        ids = self.model.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"] if texts else []
        return [max(1, len(row)) for row in ids]

    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens of each text before truncation, without instruction and chat template, and whether it is cut."""
        lengths = self._lengths(texts)
        return compared_lengths(lengths, self.model.max_seq_length or max(lengths, default=0))
