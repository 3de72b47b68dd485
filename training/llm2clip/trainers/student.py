"""The student of a distillation: a query encoder made of another model, and saved as a plain SentenceTransformer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from llm2clip.encoders import Encoder
from llm2clip.encoders.ours import OurEncoder
from llm2clip.utils.embedding_models import TRANSFORMER_FILES, with_lower_case
from llm2clip.utils.files import read_json, write_json
from llm2clip.utils.progress import ProgressBar
from modeling_llm2clip.compatibility_llm2clip import make_readable_by_version_4
from modeling_llm2clip.modeling_llm2clip_decoder import LENGTH, find_file, text_model_class
from modeling_llm2clip.modeling_llm2clip_utils import apply_umask, encode_tokens, execution_device
from modeling_llm2clip.query_encoder_llm2clip import SPACE_FILE, QueryEncoder
from modeling_llm2clip.tokenization_llm2clip import CaptionTokens

# Texts of similar length in one forward pass of a batch.
TOGETHER = 16
# Texts between two drawings of the progress bar.
FITTED_AT_ONCE = 1024
# Of the mean square of a state, what is added to all of them in the closed form of the head.
RIDGE = 0.01
LAYERS, STATIC = "layers:", "static"
# The names that every version of sentence-transformers and other servers of embeddings know.
MODULES = "sentence_transformers.models"


class Student(QueryEncoder):
    """A query encoder that is trained and saved; [`Student.create`] makes one, [`QueryEncoder`] has its arguments."""

    @classmethod
    def create(
        cls,
        spec: str,
        width: int,
        teacher: Callable[[], Encoder],
        *,
        space: str | None = None,
        revision: str | None = None,
        max_length: int | None = None,
    ) -> Student:
        """Make a student, with a new head.

        Args:
            spec: Hub id or folder of a text encoder; `layers:N`, N layers of the teacher's own text model, two thirds
                of them the first and the others the last ones; `static`, the token vectors of that, or `static:NAME`,
                those of another text model.
            width: Width of the space.
            teacher: Loads the teacher, which is only called if the student is made of it.
            space: The space that it is taught.
            revision: Branch, tag or commit of the text encoder on the Hub.
            max_length: Largest length of a text in tokens; by default that of the text encoder, at most 512.

        Raises:
            ValueError: There is no such text model, or it has other layers than expected.
        """
        name = spec.removeprefix(STATIC).removeprefix(":") if spec.partition(":")[0] == STATIC else spec
        if spec.startswith(LAYERS) or not name:
            backbone, tokenizer = _text_model_of(teacher(), spec)
        else:
            backbone, tokenizer = _open(name, revision)
        if spec.startswith(LAYERS):
            _cut(backbone, spec)
        limits = (tokenizer.model_max_length, getattr(backbone.config, "max_position_embeddings", None) or LENGTH)
        tokenizer.model_max_length = min(max_length or LENGTH, *limits)
        # Another limit of the text encoder, which some programs would read.
        tokenizer.init_kwargs.pop("max_length", None)
        # Positions of some models are counted from the first token, also if that is padding.
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if spec.partition(":")[0] == STATIC:
            # A static student reads no special tokens, but not every program that reads its tokenizer leaves them out.
            tokenizer.backend_tokenizer.post_processor = None
            table = backbone.get_input_embeddings().weight.detach().float().clone()
            backbone = nn.Embedding.from_pretrained(table, freeze=False)
        return cls(backbone.float(), tokenizer, width, space)

    def fit_head(self, texts: Sequence[str], rows: Tensor) -> None:
        """Set the head to the linear map that brings the states of some texts nearest to the rows of a teacher.

        Training starts from there: the text model need not change while a random head is learned.

        Args:
            texts: Some thousands of texts.
            rows: The teacher's rows of them, `(texts, width)`.
        """
        was_training = self.training
        ids = self.eval().tokenize([text.strip() for text in texts])
        device, hidden = execution_device(self), self.config.hidden_size
        encode = lambda batch: self.pooled_states(batch["input_ids"], batch["attention_mask"])  # noqa: E731
        products = torch.zeros(hidden, hidden, dtype=torch.float64)
        targets = torch.zeros(hidden, self.width, dtype=torch.float64)
        with ProgressBar("Fitting the head", len(ids), "text") as bar:
            for start in range(0, len(ids), FITTED_AT_ONCE):
                part = slice(start, start + FITTED_AT_ONCE)
                tokens = CaptionTokens(ids[part], None, 0)
                states = encode_tokens(tokens, self.tokenizer, encode, device=device, width=hidden).double()
                products += states.T @ states
                targets += states.T @ rows[part].double()
                bar.update(len(states))
        products += RIDGE * products.diagonal().mean() * torch.eye(hidden, dtype=torch.float64)
        solution = torch.linalg.solve(products, targets)
        with torch.no_grad():
            self.dense.weight.copy_(solution.T)
        self.train(was_training)

    def pooled_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See [`QueryEncoder.pooled_states`]; texts of similar length are computed together, with less padding."""
        if self.is_static or len(input_ids) <= TOGETHER:
            return super().pooled_states(input_ids, attention_mask)
        lengths = attention_mask.sum(dim=1)
        order = lengths.argsort()
        parts = []
        for rows in order.split(TOGETHER):
            longest = int(lengths[rows[-1]])
            parts.append(super().pooled_states(input_ids[rows, :longest], attention_mask[rows, :longest]))
        return torch.cat(parts)[order.argsort()]

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in backward; see transformers."""
        self.backbone.gradient_checkpointing_enable(**options)

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save it as the folder of a plain SentenceTransformer, which needs no code of this package."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state_dict is None else state_dict
        prefix = "backbone."
        inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if self.is_static:
            _write_weights(folder / "model.safetensors", {"embedding.weight": inner["weight"]})
            self.config.save_pretrained(folder)
        else:
            self.backbone.save_pretrained(folder, state_dict=inner)
            apply_umask(*folder.glob("*.safetensors"))  # transformers lets nobody else read it, such as a server
        # For programs that read tokenizer.json alone; the last call has left its own options there.
        self.tokenizer.backend_tokenizer.enable_truncation(self.tokenizer.model_max_length)
        self.tokenizer.backend_tokenizer.no_padding()
        self.tokenizer.save_pretrained(folder)
        make_readable_by_version_4(folder)
        # Transformers 5 writes it no more, and other libraries read it.
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        write_json(folder / "special_tokens_map.json", special)
        hidden = self.config.hidden_size
        # At the path "", versions 3 and 4 of sentence-transformers expect a Transformer.
        parts = [("StaticEmbedding", ".")] if self.is_static else [("Transformer", ""), ("Pooling", "1_Pooling")]
        parts.append(("Dense", "2_Dense"))
        parts.append(("Normalize", "3_Normalize"))
        files: dict[str, Any] = {
            "modules.json": [
                {"idx": number, "name": str(number), "path": path, "type": f"{MODULES}.{kind}"}
                for number, (kind, path) in enumerate(parts)
            ],
            "config_sentence_transformers.json": {
                "prompts": {},
                "default_prompt_name": None,
                "similarity_fn_name": "cosine",
            },
            "2_Dense/config.json": {
                "in_features": hidden,
                "out_features": self.width,
                "bias": False,
                "activation_function": "torch.nn.modules.linear.Identity",
            },
            SPACE_FILE: {"space": self.space},
        }
        if not self.is_static:
            length = self.tokenizer.model_max_length
            files["sentence_bert_config.json"] = {"max_seq_length": length, "do_lower_case": False}
            files["1_Pooling/config.json"] = {
                "word_embedding_dimension": hidden,
                "pooling_mode_cls_token": False,
                "pooling_mode_mean_tokens": True,
                "pooling_mode_max_tokens": False,
                "pooling_mode_mean_sqrt_len_tokens": False,
            }
        for file, content in files.items():
            write_json(folder / file, content)
        _write_weights(folder / "2_Dense" / "model.safetensors", {"linear.weight": state["dense.weight"]})


def _write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path, metadata={"format": "pt"})
    apply_umask(path)


def _open(name: str, revision: str | None) -> tuple[Any, Any]:
    """Load a text encoder, of a SentenceTransformer the text model alone, with its tokenizer."""
    auto, _ = text_model_class(AutoConfig.from_pretrained(name, revision=revision))
    backbone = auto.from_pretrained(name, revision=revision, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision)
    described = (find_file(name, file, revision=revision) for file in TRANSFORMER_FILES)
    settings = next((read_json(path) for path in described if path is not None), {})
    tokenizer.model_max_length = min(tokenizer.model_max_length, settings.get("max_seq_length") or LENGTH)
    return backbone, with_lower_case(tokenizer) if settings.get("do_lower_case") else tokenizer


def _text_model_of(encoder: Encoder, spec: str) -> tuple[Any, Any]:
    """Copy the text model of a teacher, with its tokenizer, which adds the prompt."""
    tower = getattr(encoder.model, "text_model", encoder.model) if isinstance(encoder, OurEncoder) else None
    if tower is None or not isinstance(encoder, OurEncoder):
        raise ValueError(f"the student {spec} is made of the text model of the teacher, but {encoder.name} has none.")
    if tower.has_adapter:
        tower.merge_adapter()
    backbone = copy.deepcopy(tower.decoder)
    if tower.config.bidirectional:
        backbone.config.is_causal = False
    # Without what ties it to the model and its code.
    tokenizer = encoder.tokenizer
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        model_max_length=tokenizer.model_max_length,
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    )
    return backbone, plain


def _cut(backbone: Any, spec: str) -> None:
    """Leave some of a text model's first layers, and half as many of its last ones.

    The head of the teacher reads what the last layers make; those in the middle are missed least.
    """
    config = backbone.config
    count = spec.removeprefix(LAYERS)
    there = config.num_hidden_layers
    if not count.isdecimal() or not 0 < int(count) <= there:
        raise ValueError(f"student is {spec}, but the teacher's text model has {there} layers: layers:1 to {there}.")
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList) and len(module) == there]
    if not lists:
        raise ValueError(f"the layers of a {config.model_type} are not found; name a text encoder as the student.")
    last = int(count) // 3
    kept = [*range(int(count) - last), *range(there - last, there)]
    layers = [lists[0][number] for number in kept]
    del lists[0][:]
    lists[0].extend(layers)
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    config.num_hidden_layers = int(count)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[number] for number in kept]
