"""Embed many captions with a text tower or an LLM2CLIP model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from llm2clip.encoders.opening import open_embedder
from llm2clip.utils.files import digest_json
from llm2clip.utils.manifests import refuse_changed_model
from llm2clip.utils.model_identity import weights_checksum
from llm2clip.utils.non_finite import require_finite_rows
from llm2clip.utils.processes import process_state
from llm2clip.utils.progress import progress_bar
from llm2clip.utils.repos import RepoKind, inspect_repo
from llm2clip.utils.text_identity import tokenizer_fingerprint
from llm2clip.utils.towers import open_text_tower
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel
from modeling_llm2clip.identity_llm2clip import RULE
from modeling_llm2clip.modeling_llm2clip_utils import encode_tokens, execution_device, unit_features
from modeling_llm2clip.tokenization_llm2clip import CaptionTokens, tokenize_captions


class CaptionEmbedder:
    """A model that embeds captions, with its tokenizer.

    Args:
        model: An `LLM2CLIPModel`, which gives unit rows in the space that captions share with images, or an
            `LLM2CLIPTextModel`, which gives the LLM's own embeddings, not normalised. In evaluation mode.
        processor: The model's processor or tokenizer.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.tokenizer = getattr(processor, "tokenizer", processor)
        # Compared by model_type: remote code can be imported under several module names.
        self.is_joint = model.config.model_type == LLM2CLIPConfig.model_type
        self.text_config = model.config.text_config if self.is_joint else model.config
        self.width: int = model.config.projection_dim if self.is_joint else model.config.hidden_size

    @classmethod
    def load(
        cls, name: str, revision: str | None = None, device: torch.device | str | None = None, **options: Any
    ) -> CaptionEmbedder:
        """Load an LLM2CLIP model, a text tower or an embedding model of sentence-transformers.

        Args:
            name: Hub id or folder.
            revision: Branch, tag or commit on the Hub.
            device: Device of the model; the default is a GPU if there is one.
            options: Passed to `from_pretrained`, such as `dtype`.

        Raises:
            OSError: There is no such model.
            ValueError: It is another kind of model, or a file of a local folder is not the one that was written.
        """
        model: Any
        repo = inspect_repo(name, revision).require(RepoKind.JOINT, RepoKind.TEXT_TOWER, RepoKind.EMBEDDING_MODEL)
        refuse_changed_model(name)
        if repo.kind is RepoKind.JOINT:
            model = LLM2CLIPModel.from_pretrained(name, revision=revision, **options)
            tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision)
        else:
            model, tokenizer = open_text_tower(name, revision=revision, **options)
        return cls(model.to(device or process_state().device).eval(), tokenizer)

    def identity(self) -> dict[str, Any]:
        """Describe in JSON what the embeddings depend on: LLM, tokenizer and, of an LLM2CLIP model, the adapter.

        Raises:
            ValueError: A weight is offloaded or quantised, and the fingerprint of the LLM is not recorded.
        """
        tower = self.model.text_model if self.is_joint else self.model
        found = {"text": tower.identity(), "tokenizer": tokenizer_fingerprint(self.tokenizer)}
        if found["text"] is None:
            name = self.model.name_or_path
            raise ValueError(f"the LLM of {name} cannot be identified: it is quantised, offloaded or float16.")
        if self.is_joint:
            adapter = [weights_checksum(self.model.text_adapter), self.model.config.adapter_normalize]
            return {**found, "adapter": adapter}
        return found

    def fingerprint(self) -> str:
        """Hash the [`identity`](CaptionEmbedder.identity)."""
        return RULE + digest_json(self.identity())

    def embed(
        self,
        captions: Sequence[str] | str,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        instruction: str | None = None,
    ) -> Tensor:
        """Embed captions of any length; one string counts as a list of one.

        Args:
            batch_size: Largest number of captions per forward pass. Captions are grouped by length, and a batch has
                at most 512 tokens on a CPU, 16,384 elsewhere; the default is as many as these allow.
            show_progress_bar: `False` hides the progress bar.
            instruction: Text before every caption, as in stage 1; it is context and not pooled.

        Returns:
            float32 `(len(captions), width)` on the CPU, in input order.
        """
        return self.embed_and_count(captions, batch_size, show_progress_bar, instruction)[0]

    def embed_and_count(
        self,
        captions: Sequence[str] | str,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        instruction: str | None = None,
    ) -> tuple[Tensor, int]:
        """Embed captions, and count those that were truncated to the model's maximum length; see `embed`."""
        tokens = tokenize_captions(captions, self.tokenizer, self.text_config, instruction)
        return self._encode(tokens, batch_size, show_progress_bar is not False), tokens.num_cut

    def embed_empty(self) -> Tensor:
        """Embed the empty caption, which `embed` refuses, for benchmarks whose queries count whatever they are.

        It is the prompt alone, pooled as that of a caption: over the suffix. Where that leaves no token, the prefix
        and what the tokenizer itself adds are pooled, and a tokenizer that adds nothing gets its padding token.

        Returns:
            float32 `(1, width)` on the CPU.
        """
        ids = list(self.tokenizer("")["input_ids"]) or [self.tokenizer.pad_token_id]
        pooled = len(ids) > self.text_config.num_prefix_tokens and not self.text_config.pool_prompt
        return self._encode(
            CaptionTokens([ids], [self.text_config.num_prefix_tokens if pooled else 0], 0), None, False
        )

    def _encode(self, tokens: CaptionTokens, batch_size: int | None, show: bool) -> Tensor:
        num_distinct = len(set(map(tuple, tokens.ids))) if show else None
        device = execution_device((self.is_joint and self.model.text_model) or self.model)
        with progress_bar("Embedding captions", num_distinct, "caption", show) as bar:

            def forward(inputs: Any) -> Tensor:
                output = self.model.get_text_features(**inputs) if self.is_joint else self.model(**inputs)
                bar.update(advance=len(output.pooler_output))
                return unit_features(output) if self.is_joint else output.pooler_output

            options: dict[str, Any] = {"device": device, "width": self.width, "batch_size": batch_size}
            # The callers name the captions of embeddings that are not finite.
            return encode_tokens(tokens, self.tokenizer, forward, **options, finite=False)


def embed_captions(
    captions: Sequence[str] | str,
    model: Any,
    processor: Any = None,
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    show_progress_bar: bool | None = None,
    instruction: str | None = None,
) -> Tensor:
    """Embed captions with an LLM2CLIP model or a text tower.

    Args:
        captions: The captions, of any length; one string counts as a list of one.
        model: A loaded `LLM2CLIPModel` or `LLM2CLIPTextModel`, which is put into evaluation mode, or the Hub id or
            folder of one.
        processor: The model's processor or tokenizer; required with a loaded model.
        batch_size: Largest number of captions per forward pass; the default is as many as the device keeps up with.
        device: Device of the model. By default a loaded model stays where it is, and another one uses a GPU if there
            is one.
        show_progress_bar: `False` hides the progress bar.
        instruction: Text before every caption, as in stage 1; it is context and not pooled.

    Returns:
        float32 on the CPU, in input order. Of an LLM2CLIP model unit rows `(len(captions), projection_dim)` in the
        space that captions share with images; of a text tower its own embeddings `(len(captions), hidden_size)`.

    Raises:
        NonFiniteError: An embedding is NaN or infinite.
        ValueError: A caption is empty, the repository is another kind of model, or a loaded model comes without its
            processor.
    """
    embedder = open_embedder(CaptionEmbedder, model, processor, device)
    rows = embedder.embed(captions, batch_size, show_progress_bar, instruction)
    texts = [captions] if isinstance(captions, str) else captions
    require_finite_rows(rows, texts.__getitem__, "captions")
    return rows
