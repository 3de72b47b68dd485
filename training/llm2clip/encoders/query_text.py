"""An LLM2CLIP model that embeds texts with the small query encoder in its folder, and images as ever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoImageProcessor

from llm2clip.encoders.encoder import compared_lengths
from llm2clip.encoders.loop import TokenizedTexts
from llm2clip.encoders.ours import OurEncoder, distinct_tokens
from llm2clip.models.places import is_repo
from llm2clip.models.repos import RepoKind, find_file, inspect_repo
from llm2clip.models.text_identity import tokenizer_fingerprint
from llm2clip.models.vision_identity import weights_checksum
from modeling_llm2clip.image_decoding_llm2clip import with_pillow
from modeling_llm2clip.modeling_llm2clip_utils import execution_device
from modeling_llm2clip.query_encoder_llm2clip import FOLDER, QueryEncoder, query_encoder_of
from modeling_llm2clip.tokenization_llm2clip import CaptionTokens, clean_captions

# Which of its encoders a model embeds texts with; auto: the query encoder where there is one.
TextEncoder = Literal["llm", "query", "auto"]


def has_query_encoder(name: str, revision: str | None = None) -> bool:
    """Whether a folder or Hub repository is a model with a query encoder."""
    if not is_repo(name) or inspect_repo(name, revision).kind is not RepoKind.JOINT:
        return False
    return find_file(name, f"{FOLDER}/modules.json", revision=revision) is not None


class QueryTextEncoder(OurEncoder):
    """See [`OurEncoder`], whose arguments it has; the model is loaded without its LLM.

    Raises:
        ValueError: The model has no query encoder, or one that was taught the space of another model.
    """

    def __init__(self, model: Any, *args: Any, **options: Any) -> None:
        super().__init__(model, *args, **options)
        self.query: QueryEncoder = query_encoder_of(model)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "query": None}

    @classmethod
    def load(
        cls,
        name: str,
        revision: str | None = None,
        needs: Sequence[str] = ("image", "text"),
        *,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> OurEncoder:
        """Load a model with its query encoder, and without its LLM; see [`OurEncoder.load`]."""
        inspect_repo(name, revision).require(RepoKind.JOINT, hint="Only a whole model has a query encoder.")
        return super().load(name, revision, needs, device=device, text_model=False, **options)

    @staticmethod
    def _saved_processor(name: str, is_half: bool, needs: Sequence[str], where: dict[str, Any]) -> Any:
        # The tokenizer of the LLM takes longer to load than the query encoder.
        return with_pillow(AutoImageProcessor.from_pretrained(name, **where))

    def _text_settings(self) -> dict[str, Any]:
        return {"query": weights_checksum(self.query), "tokenizer": tokenizer_fingerprint(self.query.tokenizer)}

    def tokenized(self, texts: list[str]) -> TokenizedTexts:
        """See [`Encoder.tokenized`]. An empty text is an error."""
        query = self.query
        return distinct_tokens(
            CaptionTokens(query.tokenize(clean_captions(texts)), None, 0),
            query.tokenizer,
            query,
            execution_device(query),
            lambda inputs: query(inputs["input_ids"], inputs["attention_mask"]),
        )

    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens of each text before truncation, and whether it is cut."""
        lengths = [len(ids) for ids in self.query.tokenize([text.strip() for text in texts], truncation=False)]
        return compared_lengths(lengths, self.query.tokenizer.model_max_length)
