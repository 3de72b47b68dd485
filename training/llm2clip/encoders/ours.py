"""The encoder of LLM2CLIP models and their parts: vision halves, text towers, embedding models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, ImageProcessingMixin

from llm2clip.command_line.processes import process_state
from llm2clip.data import EvalTransform, ImageBackend
from llm2clip.encoders.encoder import Encoder, compared_lengths, dtype_for_device
from llm2clip.encoders.loop import TokenizedTexts, encode_texts
from llm2clip.files.atomic import digest_json
from llm2clip.files.manifests import refuse_changed_model
from llm2clip.models.attention_probe import probe_text_tower
from llm2clip.models.identity import RULE, tokenizer_fingerprint, vision_fingerprint, weights_checksum
from llm2clip.models.repos import RepoKind, inspect_repo
from llm2clip.models.towers import open_text_tower
from modeling_llm2clip import (
    LLM2CLIPConfig,
    LLM2CLIPModel,
    LLM2CLIPProcessor,
    LLM2CLIPTextConfig,
    LLM2CLIPVisionModelWithProjection,
    __version__,
    with_pillow,
)
from modeling_llm2clip.modeling_llm2clip_utils import execution_device, hub_arguments, unit_features
from modeling_llm2clip.tokenization_llm2clip import CaptionTokens, pooling_mask, tokenize_captions

BOTH_SIDES = "Texts and images need the whole model."
TEXT_KINDS = (RepoKind.JOINT, RepoKind.TEXT_TOWER, RepoKind.EMBEDDING_MODEL)
IMAGE_KINDS = (RepoKind.JOINT, RepoKind.VISION_HALF)


class OurEncoder(Encoder):
    """An LLM2CLIP model; or its vision half, which embeds images only; or a text tower, which embeds texts only.

    Args:
        model: The loaded model, in evaluation mode.
        processor: Its processor, tokenizer or image processor.
        name, revision: Hub id or folder of the model; branch, tag or commit on the Hub.
        image_backend: Library that decodes and resizes images; see [`EvalTransform`].
    """

    library = f"llm2clip {__version__}"

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str = "",
        revision: str | None = None,
        image_backend: ImageBackend = "exact",
    ) -> None:
        # Compared by model_type: remote code can be imported under several module names.
        kind = model.config.model_type
        self.is_joint = kind == LLM2CLIPConfig.model_type
        self.text_config = model.config.text_config if self.is_joint else model.config
        width = model.config.hidden_size if kind == LLM2CLIPTextConfig.model_type else model.config.projection_dim
        dtype = str(model.dtype).removeprefix("torch.")
        super().__init__(name or model.name_or_path, model, width, execution_device(model), dtype)
        self.revision = revision
        is_image_processor = isinstance(processor, ImageProcessingMixin)
        self.tokenizer: Any = getattr(processor, "tokenizer", None if is_image_processor else processor)
        image_processor = getattr(processor, "image_processor", processor if is_image_processor else None)
        if image_processor is not None and self.is_joint:
            self.transform = EvalTransform(image_processor, image_backend)

    @classmethod
    def load(
        cls,
        name: str,
        revision: str | None = None,
        needs: Sequence[str] = (),
        *,
        processor: Any = None,
        device: torch.device | str | None = None,
        image_backend: ImageBackend = "exact",
        **options: Any,
    ) -> OurEncoder:
        """Load a model, text tower, vision half or embedding model of sentence-transformers.

        Args:
            name, revision, image_backend: See [`OurEncoder`].
            needs: What it has to embed: `image`, `text` or both. For images alone only the vision half is loaded, for
                texts alone no image processor. The default takes what there is.
            processor: Replaces the one that is saved with the model; see [`OurEncoder`].
            device: Device of the model; the default is a GPU if there is one.
            options: Passed to `from_pretrained`, such as `dtype`.

        Raises:
            OSError: There is no such model.
            ValueError: It is another kind of model, or a file of a local folder is not the one that was written.
        """
        kinds = [kind for kind in RepoKind if kind in TEXT_KINDS or kind in IMAGE_KINDS]
        for need, allowed in (("text", TEXT_KINDS), ("image", IMAGE_KINDS)):
            kinds = [kind for kind in kinds if need not in needs or kind in allowed]
        where: dict[str, Any] = {"revision": revision, **hub_arguments(options)}
        refuse_changed_model(name)
        hint = {"hint": BOTH_SIDES} if {"image", "text"} <= set(needs) else {}
        repo = inspect_repo(name, **where).require(*kinds, **hint)
        saved: Any
        model: Any
        if repo.kind not in IMAGE_KINDS:
            model, saved = open_text_tower(name, revision=revision, **options)
        else:
            half = repo.kind is RepoKind.VISION_HALF or list(needs) == ["image"]
            kind: Any = LLM2CLIPVisionModelWithProjection if half else LLM2CLIPModel
            model = kind.from_pretrained(name, revision=revision, **options)
            if "text" in needs and options.get("text_model", True):
                model.config.text_config.require_text_model()
            if getattr(model, "text_model", None) is not None:
                if llm := model.config.text_model_name_or_path:
                    refuse_changed_model(llm)
                probe_text_tower(model.text_model)
            only_images = half or bool(repo.encoders)
            saved = None if processor is not None else cls._saved_processor(name, only_images, needs, where)
        device = device or process_state().device
        if repo.kind in IMAGE_KINDS:
            dtype_for_device(model, options.get("dtype", "float32"), device)
        model = model.to(device).eval()
        processor = saved if processor is None else processor
        return cls(model, processor, name, revision, image_backend)

    @staticmethod
    def _saved_processor(name: str, only_images: bool, needs: Sequence[str], where: dict[str, Any]) -> Any:
        """Load what is needed of the processor of an LLM2CLIP model."""
        if list(needs) == ["text"]:
            return AutoTokenizer.from_pretrained(name, **where)
        image_processor = AutoImageProcessor.from_pretrained(name, **where)
        if only_images:
            return with_pillow(image_processor)
        return LLM2CLIPProcessor(image_processor, AutoTokenizer.from_pretrained(name, **where))

    def settings(self) -> dict[str, Any]:
        settings = {} if self.transform is None else {"vision": self.image_fingerprint()}
        if self.image_backend != "exact":
            settings["image_backend"] = self.image_backend
        return settings if self.tokenizer is None else settings | self._text_settings()

    def fingerprint(self) -> str:
        """Hash the fingerprints of vision half, LLM and tokenizer, and the weights of the adapter.

        Raises:
            ValueError: A weight is offloaded or quantised, and the fingerprint of the LLM is not recorded.
        """
        if self._fingerprint is None:
            self._fingerprint = RULE + digest_json({**self.settings(), **self.cut})
        return self._fingerprint

    def image_fingerprint(self) -> str:
        """Identify the weights and the saved preprocessing of images, not the backend; see [`vision_fingerprint`]."""
        return vision_fingerprint(self.model, self.image_transform().image_processor)

    def text_fingerprint(self) -> str:
        """Identify LLM, tokenizer and, of an LLM2CLIP model, the adapter."""
        return RULE + digest_json(self._text_settings())

    def _text_settings(self) -> dict[str, Any]:
        tower = self.model.text_model if self.is_joint else self.model
        settings: dict[str, Any] = {"text": tower.identity(), "tokenizer": tokenizer_fingerprint(self.tokenizer)}
        if settings["text"] is None:
            name = self.model.name_or_path
            raise ValueError(f"the LLM of {name} cannot be identified: it is quantised, offloaded or float16.")
        if self.is_joint:
            adapter = [weights_checksum(self.model.text_adapter), self.model.config.adapter_normalize]
            return {**settings, "adapter": adapter}
        return settings

    def image_transform(self) -> EvalTransform:
        if not self.is_joint:
            raise ValueError(f"{self._given} is a text tower, which does not embed images.")
        if self.transform is None:
            raise ValueError(f"the processor given with {self._given} has no image processor, which images need.")
        return self.transform

    @property
    def _given(self) -> str:
        return self.name or type(self.model).__name__

    def image_features(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model.get_image_features(**self._on_device(inputs)).pooler_output

    def pooled_features(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model.get_vision_features(**self._on_device(inputs))

    def _on_device(self, inputs: dict[str, Tensor]) -> BatchFeature:
        return BatchFeature(inputs).to(execution_device(self.model.vision_model), self.model.dtype)

    def embed(
        self,
        captions: Sequence[str] | str,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        instruction: str | None = None,
    ) -> tuple[Tensor, int]:
        """Embed captions for a Store or an adapter: rows as the model gives them, which `encode_text` normalises.

        Those of a text tower are not of unit length. `encode_text` takes empty texts too.

        Args:
            captions: Of any length, not empty; one string counts as a list of one.
            batch_size: Largest number of captions per forward pass; the default is as many as their tokens allow.
            show_progress_bar: Show a progress bar.
            instruction: Text before every caption, as in stage 1; it is context and not pooled.

        Returns:
            float32 `(len(captions), full_width)` on the CPU, in input order; and the number of captions that were
            truncated to the maximum length.

        Raises:
            NonFiniteError: An embedding is NaN or infinite; the message names its caption.
        """
        texts = [captions] if isinstance(captions, str) else list(captions)
        tokens = tokenize_captions(texts, self._texts(), self.text_config, instruction)
        embedded = self._embedded(tokens, unit=False)
        rows = encode_texts(embedded, texts, self.full_width, batch_size, show_progress_bar)
        return rows, tokens.num_cut

    def _texts(self) -> Any:
        if self.is_joint and not hasattr(self.model, "text_adapter"):
            raise ValueError(f"{self._given} is the vision half of a model, which does not embed texts.")
        if self.tokenizer is None:
            self.text_config.require_text_model()
            raise ValueError(f"the processor given with {self._given} has no tokenizer, which texts need.")
        return self.tokenizer

    def _embedded(self, tokens: CaptionTokens, unit: bool) -> TokenizedTexts:
        """Return tokenised texts with what embeds them: as a text tower gives them, or unit rows of a whole model."""

        def forward(inputs: Any) -> Tensor:
            if self.is_joint:
                rows = unit_features(self.model.get_text_features(**inputs))
            else:
                rows = self.model(**inputs).pooler_output.float()
            return F.normalize(rows, dim=-1) if unit else rows

        device = execution_device((self.is_joint and self.model.text_model) or self.model)
        return distinct_tokens(tokens, self.tokenizer, self.model, device, forward)

    def tokenized(self, texts: list[str]) -> TokenizedTexts:
        """See [`Encoder.tokenized`].

        An empty text is the prompt alone, as in the original code; pooled as that of a caption.
        """
        kept = [row for row, text in enumerate(texts) if text.strip()]
        tokens = tokenize_captions([texts[row] for row in kept], self._texts(), self.text_config)
        if len(kept) < len(texts):
            tokens = self._with_empty_texts(tokens, kept, len(texts))
        return self._embedded(tokens, unit=True)

    def _with_empty_texts(self, tokens: CaptionTokens, kept: Sequence[int], count: int) -> CaptionTokens:
        """Add the tokens of empty texts: the prompt alone, pooled as that of a caption is, over its suffix.

        Where that leaves no token, the prefix and what the tokenizer itself adds are pooled, and a tokenizer that adds
        nothing gets its padding token.
        """
        prompt = list(self._texts()("")["input_ids"]) or [self.tokenizer.pad_token_id]
        prefix = self.text_config.num_prefix_tokens
        ids, starts = [prompt] * count, [prefix if len(prompt) > prefix else 0] * count
        for index, row in enumerate(kept):
            ids[row] = tokens.ids[index]
            if tokens.starts is not None:
                starts[row] = tokens.starts[index]
        return CaptionTokens(ids, None if self.text_config.pool_prompt else starts, tokens.num_cut)

    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens of each text before truncation, the prompt included, and whether it is cut."""
        tokenizer = self._texts()
        stripped = [text.strip() for text in texts]
        ids = tokenizer(stripped, truncation=False, verbose=False)["input_ids"] if texts else []
        return compared_lengths([len(row) for row in ids], tokenizer.model_max_length)


def distinct_tokens(
    tokens: CaptionTokens, tokenizer: Any, model: nn.Module, device: torch.device, forward: Callable[[Any], Tensor]
) -> TokenizedTexts:
    """Return texts of which repeated ones are embedded once; `forward` gets padded batches on the device."""
    number_of: dict[tuple[int, ...], int] = {}
    numbers = [number_of.setdefault(tuple(ids), len(number_of)) for ids in tokens.ids]
    distinct = list(number_of)
    starts = None if tokens.starts is None else dict(zip(numbers, tokens.starts, strict=True))

    def prepare(chosen: list[int]) -> Any:
        inputs = tokenizer.pad({"input_ids": [list(distinct[number]) for number in chosen]}, return_tensors="pt")
        if starts is not None:
            inputs["pooling_mask"] = pooling_mask(inputs["attention_mask"], [starts[number] for number in chosen])
        return inputs

    lengths = [len(ids) for ids in distinct]
    rows = None if len(distinct) == len(numbers) else numbers
    return TokenizedTexts(model, device, lengths, prepare, lambda inputs: forward(inputs.to(device)), rows)
