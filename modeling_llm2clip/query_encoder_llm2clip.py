"""The query encoder of a model: a small text model that was taught to answer in its space (`llm2clip distill-text`).

Its folder is that of a plain SentenceTransformer: a text model or a table of token vectors, mean pooling, a linear
layer without bias, unit length. One more file says which space it was taught, and has the SHA-256 of the files that
are read here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from .configuration_llm2clip import output_width
from .identity_llm2clip import RULE, digest_weight
from .modeling_llm2clip_decoder import padded_mask, text_model_class
from .modeling_llm2clip_utils import encode_tokens, execution_device, pool
from .tokenization_llm2clip import CaptionTokens, clean_captions, tokenize_and_cut

# In the folder of a model.
FOLDER = "query_encoder"
SPACE_FILE = "llm2clip_space.json"
HEAD = "2_Dense/model.safetensors"
# Files that are read here, as far as there are any: patterns of their names.
RECORDED = (
    *("modules.json", "config.json", "model*.safetensors", "model.safetensors.index.json", HEAD),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)
# What places images and captions in the space of a model.
SPACE_PARTS = ("visual_standardization", "visual_projection", "text_adapter")


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
            ValueError: A text is empty, or an embedding is NaN or infinite.
        """
        texts = clean_captions([texts] if isinstance(texts, str) else list(texts))
        return encode_tokens(
            CaptionTokens(self.tokenize(texts), None, 0),
            self.tokenizer,
            lambda batch: self(batch["input_ids"], batch["attention_mask"]),
            model=self,
            device=execution_device(self),
            width=self.width,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
        )

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> Any:
        """Load the folder or Hub repository of a query encoder, in evaluation mode.

        Args:
            options: Arguments of `from_pretrained` that locate it, such as `subfolder` and `revision`, and `dtype`.

        Raises:
            ValueError: It is not a query encoder, or a file is not the one that was saved.
        """
        name, dtype = os.fspath(name), options.pop("dtype", None)
        record = _checked_record(name, options)
        # Without False, transformers would ask on the terminal whether to run code of the folder.
        loading = {**options, "trust_remote_code": False}
        modules = _read_json(name, "modules.json", options) or []
        kinds = {str(module["type"]).rpartition(".")[2]: module["path"] for module in modules}
        if "Dense" not in kinds or not {"Transformer", "StaticEmbedding"} & set(kinds):
            raise ValueError(f"{name} is not a query encoder: its modules are {', '.join(kinds) or 'unknown'}.")
        head = load_file(_find(name, f"{kinds['Dense']}/model.safetensors", options))["linear.weight"]
        if "StaticEmbedding" in kinds:
            table = load_file(_find(name, "model.safetensors", options))["embedding.weight"]
            backbone: Any = nn.Embedding.from_pretrained(table, freeze=False)
            tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(name, **loading)
        else:
            auto, _ = text_model_class(AutoConfig.from_pretrained(name, **loading))
            backbone = auto.from_pretrained(name, **loading)
            tokenizer = AutoTokenizer.from_pretrained(name, **loading)
        encoder = cls(backbone, tokenizer, len(head), record.get("space"))
        encoder.dense.weight.data = head
        return encoder.to(dtype).eval()


def space_identity(model: Any) -> str:
    """Identify the space of a model: its projection and its text adapter, whose weights are hashed in 16 bits."""
    digests = {
        f"{name}.{key}": digest_weight(weight)
        for name in SPACE_PARTS
        if (part := getattr(model, name, None)) is not None
        for key, weight in part.state_dict().items()
    }
    return RULE + hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:32]


def query_encoder_of(model: Any) -> QueryEncoder:
    """Return the query encoder in the folder of a model, which is loaded once.

    Raises:
        ValueError: There is none, or it was taught the space of another model.
    """
    encoder: QueryEncoder | None = model.__dict__.get("_query_encoder")
    if encoder is None:
        name, options = model.config.name_or_path, dict(getattr(model, "hub_arguments", {}))
        options["subfolder"] = "/".join(part for part in (options.pop("subfolder", ""), FOLDER) if part)
        if not name or _read_json(name, "modules.json", options) is None:
            raise ValueError(
                f"{name or 'this model'} has no {FOLDER}/; `llm2clip distill-text {name or 'MODEL'} --into ...` "
                "makes one."
            )
        encoder = QueryEncoder.from_pretrained(name, **options)
        space = space_identity(model)
        if encoder.space != space:
            raise ValueError(
                f"the query encoder in {name}/{FOLDER} was taught the space {encoder.space} of another model, but "
                f"this model has {space}: their vectors cannot be compared. Distill one from this model."
            )
        model.__dict__["_query_encoder"] = encoder
    # `to` goes through all modules, which takes a twentieth of the time of a short query.
    device = execution_device(model.text_adapter)
    return encoder if encoder.dense.weight.device == device else encoder.to(device)


def record_of_files(folder: Path, space: str | None) -> dict[str, Any]:
    """Return what the saved folder of a query encoder records: its space, and the SHA-256 of the files read here."""
    names = {path.relative_to(folder).as_posix() for pattern in RECORDED for path in folder.glob(pattern)}
    return {"space": space, "files": {name: _sha256(folder / name) for name in sorted(names)}}


def _checked_record(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Read what is recorded of a query encoder; raises ValueError if its files are others."""
    record = _read_json(name, SPACE_FILE, options) or {}
    for file, recorded in record.get("files", {}).items():
        path = _find(name, file, options)
        if _sha256(path) != recorded:
            raise ValueError(
                f"{path} is not the file that was saved with this query encoder: it is damaged, or of another one. "
                f"Copy or download it again; if you changed it yourself, delete `files` in {SPACE_FILE}."
            )
    return record


def _sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find(name: str, file: str, options: dict[str, Any]) -> str:
    path = _path(name, file, options)
    if path is None:
        raise ValueError(f"{name} is not a whole query encoder: it has no {file}.")
    return path


def _read_json(name: str, file: str, options: dict[str, Any]) -> Any:
    path = _path(name, file, options)
    try:
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); copy or download it again.") from None


def _path(name: str, file: str, options: dict[str, Any]) -> str | None:
    path = "/".join(filter(None, (options.get("subfolder"), file)))
    if Path(name).is_dir():
        return str(Path(name, path)) if Path(name, path).is_file() else None
    try:
        return hf_hub_download(name, path, **{key: value for key, value in options.items() if key != "subfolder"})
    except LocalEntryNotFoundError:  # the Hub cannot be asked
        raise
    except EntryNotFoundError:
        return None
