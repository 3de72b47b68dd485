"""The query encoder of a model: a small text model that was taught to answer in its space (`llm2clip distill-text`).

Its folder is that of a plain SentenceTransformer: a text model or a table of token vectors, mean pooling, a linear
layer without bias, unit length. One more file says which space it was taught.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from llm2clip.encoders.encoder import compared_lengths
from llm2clip.encoders.loop import TokenizedTexts, encode_texts
from llm2clip.encoders.ours import OurEncoder, distinct_tokens
from llm2clip.files.manifests import QUERY_ENCODER, refuse_changed_model
from llm2clip.models.identity import space_identity, tokenizer_fingerprint, weights_checksum
from llm2clip.models.places import is_repo
from llm2clip.models.repos import RepoKind, find_file, inspect_repo, read_json_file
from modeling_llm2clip import with_pillow
from modeling_llm2clip.configuration_llm2clip import output_width
from modeling_llm2clip.modeling_llm2clip_decoder import padded_mask, text_model_class
from modeling_llm2clip.modeling_llm2clip_utils import execution_device, pool
from modeling_llm2clip.tokenization_llm2clip import CaptionTokens, clean_captions, tokenize_and_cut

SPACE_FILE = "llm2clip_space.json"
HEAD = "2_Dense/model.safetensors"
# Which of its encoders a model embeds texts with; auto: the query encoder where there is one.
TextEncoder = Literal["llm", "query", "auto"]


class QueryEncoder(nn.Module):
    """A text model, the mean of its token states, and a linear head into the space of another model.

    Args:
        backbone: A text model of transformers, or a table of token vectors. What it puts on its first token is not
            used.
        tokenizer: Its tokenizer.
        width: Width of the space.
        space: [`space_identity`] of the model whose space it is; None if that is unknown.
    """

    def __init__(self, backbone: nn.Module, tokenizer: Any, width: int, space: str | None = None) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.tokenizer, self.width, self.space = tokenizer, width, space
        self.is_static = isinstance(backbone, nn.Embedding)
        config: Any = PretrainedConfig() if self.is_static else self.backbone.config
        if self.is_static:
            config.hidden_size = self.backbone.embedding_dim
        self.config = config
        if getattr(backbone, "pooler", None) is not None:
            self.backbone.pooler.requires_grad_(False)
        self.dense = nn.Linear(output_width(config), width, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed texts, given their tokens `(texts, tokens)`: unit rows, float32 `(texts, width)`."""
        pooled = self.pooled_states(input_ids, attention_mask)
        return F.normalize(self.dense(pooled.to(self.dense.weight.dtype)).float(), dim=-1)

    def pooled_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the mean token states of texts, float32 `(texts, hidden_size)`."""
        if self.is_static:
            states = self.backbone(input_ids)
        else:
            # A cut of an LLM, which attends in both directions.
            both_directions = getattr(self.config, "is_causal", None) is False
            mask = padded_mask(self.backbone, attention_mask, both_directions)
            states = self.backbone(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return pool(states, attention_mask, attention_mask, "mean")

    def tokenize(self, texts: Sequence[str], truncation: bool = True) -> list[list[int]]:
        """Return the tokens of each text; a text without any has the padding token."""
        options: dict[str, Any] = {"truncation": truncation, "add_special_tokens": not self.is_static}
        ids = tokenize_and_cut(self.tokenizer, texts, **options)[0]["input_ids"] if texts else []
        return [row or [self.tokenizer.pad_token_id] for row in ids]

    def encode(
        self, texts: Sequence[str] | str, batch_size: int | None = None, show_progress_bar: bool = False
    ) -> Tensor:
        """Embed texts.

        Returns:
            Unit rows, float32 `(len(texts), width)` on the CPU, in input order.

        Raises:
            ValueError: A text is empty.
            NonFiniteError: An embedding is NaN or infinite; the message names its text.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        return encode_texts(self.tokenized(texts), texts, self.width, batch_size, show_progress_bar)

    def tokenized(self, texts: Sequence[str]) -> TokenizedTexts:
        """See [`Encoder.tokenized`]. An empty text is an error."""
        return distinct_tokens(
            CaptionTokens(self.tokenize(clean_captions(texts)), None, 0),
            self.tokenizer,
            self,
            execution_device(self),
            lambda batch: self(batch["input_ids"], batch["attention_mask"]),
        )

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> Any:
        """Load the folder or Hub repository of a query encoder, in evaluation mode.

        Args:
            options: Arguments of `from_pretrained` that locate it, such as `subfolder` and `revision`, and `dtype`.

        Raises:
            ValueError: It is not a query encoder, or a file is missing.
        """
        name, dtype = os.fspath(name), options.pop("dtype", None)
        record = read_json_file(name, SPACE_FILE, **options) or {}
        # Without False, transformers would ask on the terminal whether to run code of the folder.
        loading = {**options, "trust_remote_code": False}
        modules = read_json_file(name, "modules.json", **options) or []
        kinds = {str(module["type"]).rpartition(".")[2]: module["path"] for module in modules}
        if "Dense" not in kinds or not {"Transformer", "StaticEmbedding"} & set(kinds):
            raise ValueError(f"{name} is not a query encoder: its modules are {', '.join(kinds) or 'unknown'}.")
        head = _load_weights(name, f"{kinds['Dense']}/model.safetensors", options)["linear.weight"]
        if "StaticEmbedding" in kinds:
            table = _load_weights(name, "model.safetensors", options)["embedding.weight"]
            backbone: Any = nn.Embedding.from_pretrained(table, freeze=False)
            tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(name, **loading)
        else:
            auto, _ = text_model_class(AutoConfig.from_pretrained(name, **loading))
            backbone = auto.from_pretrained(name, **loading)
            tokenizer = AutoTokenizer.from_pretrained(name, **loading)
        encoder = cls(backbone, tokenizer, len(head), record.get("space"))
        encoder.dense.weight.data = head
        return encoder.to(dtype).eval()


def _load_weights(name: str, file: str, options: dict[str, Any]) -> dict[str, Tensor]:
    path = find_file(name, file, **options)
    if path is None:
        raise ValueError(f"{name} is not a whole query encoder: it has no {file}.")
    return load_file(path)


def query_encoder_of(model: Any) -> QueryEncoder:
    """Load the query encoder in the folder of an LLM2CLIP model, onto its device.

    Raises:
        ValueError: There is none, or it was taught the space of another model.
    """
    name, options = model.config.name_or_path, dict(getattr(model, "hub_arguments", {}))
    options["subfolder"] = "/".join(filter(None, (options.pop("subfolder", None), QUERY_ENCODER)))
    if not name or read_json_file(name, "modules.json", **options) is None:
        raise ValueError(
            f"{name or 'this model'} has no {QUERY_ENCODER}/; `llm2clip distill-text {name or 'MODEL'} --into ...` "
            "makes one."
        )
    encoder: QueryEncoder = QueryEncoder.from_pretrained(name, **options)
    if encoder.space != (space := space_identity(model)):
        raise ValueError(
            f"the query encoder in {name}/{QUERY_ENCODER} was taught the space {encoder.space} of another model, but "
            f"this model has {space}: their vectors cannot be compared. Distill one from this model."
        )
    return encoder.to(execution_device(model.text_adapter))


def has_query_encoder(name: str, revision: str | None = None) -> bool:
    """Tell whether a folder or Hub repository is a model with a query encoder."""
    if not is_repo(name) or inspect_repo(name, revision).kind is not RepoKind.JOINT:
        return False
    return find_file(name, f"{QUERY_ENCODER}/modules.json", revision=revision) is not None


class QueryTextEncoder(OurEncoder):
    """An LLM2CLIP model that embeds texts with its query encoder, and images as ever; it is loaded without its LLM.

    See [`OurEncoder`], whose arguments it has.

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
        cls, name: str, revision: str | None = None, needs: Sequence[str] = ("image", "text"), **options: Any
    ) -> OurEncoder:
        """Load a model with its query encoder, and without its LLM; see [`OurEncoder.load`]."""
        refuse_changed_model(Path(name, QUERY_ENCODER))
        return super().load(name, revision, needs, text_model=False, **options)

    @staticmethod
    def _saved_processor(name: str, is_half: bool, needs: Sequence[str], where: dict[str, Any]) -> Any:
        # The tokenizer of the LLM takes longer to load than the query encoder.
        return with_pillow(AutoImageProcessor.from_pretrained(name, **where))

    def _text_settings(self) -> dict[str, Any]:
        return {"query": weights_checksum(self.query), "tokenizer": tokenizer_fingerprint(self.query.tokenizer)}

    def tokenized(self, texts: list[str]) -> TokenizedTexts:
        return self.query.tokenized(texts)

    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens of each text before truncation, and whether it is cut."""
        lengths = [len(ids) for ids in self.query.tokenize([text.strip() for text in texts], truncation=False)]
        return compared_lengths(lengths, self.query.tokenizer.model_max_length)
