"""R2: encoding captions of mixed lengths with a small LLM, against llm2vec."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work
from benchmarks.small_llama import HEADS, PROMPT, captions, new_folder, write_llm

CAPTIONS = 512
# Batch sizes of llm2vec: its default, and the fastest on the device.
PEER_BATCHES = {"cpu": (32, 8), "cuda": (32, 128)}


def _unit(rows: object) -> Outcome:
    import torch

    return Outcome({"embeddings": torch.nn.functional.normalize(rows, dim=-1)})


def _ours(device: str) -> Work:
    from llm2clip.utils.towers import open_text_tower

    model, tokenizer = open_text_tower(
        str(write_llm(new_folder())), dtype="float32", attn_implementation="sdpa", **PROMPT
    )
    model.to(device).eval()
    texts = captions(CAPTIONS)
    return lambda: _unit(model.encode(texts, tokenizer))


def _llm2vec(batch_size: int, device: str) -> Work:
    import torch
    from llm2vec import LLM2Vec

    model = LLM2Vec.from_pretrained(
        str(write_llm(new_folder())), torch_dtype=torch.float32, max_length=512, doc_max_length=512
    )
    texts = captions(CAPTIONS)
    return lambda: _unit(model.encode(texts, batch_size, show_progress_bar=False, device=device))


def _products(device: str) -> Work:
    """The matrix products alone: linear layers on all tokens without padding, attention caption by caption."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = write_llm(new_folder())
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).to(device)
    weights = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = "{prompt_prefix}{caption}{prompt_suffix}"
    texts = [prompt.format(caption=caption, **PROMPT) for caption in captions(CAPTIONS)]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    chunk = 512 if device == "cpu" else 16384
    states = {width: torch.randn(chunk, width, device=device) for width in {weight.shape[1] for weight in weights}}
    heads = torch.randn(HEADS, max(lengths), model.config.head_dim, device=device)

    def work() -> Outcome:
        with torch.inference_mode():
            for start in range(0, sum(lengths), chunk):
                tokens = min(chunk, sum(lengths) - start)
                for weight in weights:
                    torch.nn.functional.linear(states[weight.shape[1]][:tokens], weight)
            for length in lengths:
                own = heads[:, :length]
                for _ in range(model.config.num_hidden_layers):
                    own @ own.transpose(1, 2) @ own
        return Outcome()

    return work


def contests(device: str) -> list[Contest]:
    default, fastest = PEER_BATCHES[device]
    peers: dict[str, Callable[[], Work]] = {
        "llm2vec": partial(_llm2vec, default, device),
        f"llm2vec, batches of {fastest}": partial(_llm2vec, fastest, device),
    }
    contestants = {
        "ours": Contestant(partial(_ours, device)),
        **{name: Contestant(set_up, environment="llm2vec") for name, set_up in peers.items()},
        "matrix products": Contestant(partial(_products, device), is_limit=True),
    }
    goals = [Goal(name, "cpu", 0.75) for name in peers] + [Goal("matrix products", "cpu", 1.25)]
    work = f"{CAPTIONS} captions of 12 to 450 tokens, 23M parameters"
    note = "llm2vec in batches of 32 as it comes, and of the size at which it is fastest here."
    return [Contest(work, contestants, tuple(goals), {"embeddings": 1e-4}, rounds=3, note=note)]


SHORTFALL = (
    "reached against llm2vec with its defaults. With batches of 8, its fastest, its padding shrinks too, and the "
    "matrix products alone are 0.6 of its time (0.71 on an AMD EPYC); ours takes 1.3 of them (1.15 there), most "
    "of the rest inside the decoder of transformers (attention, norms, rotary positions). Tried: batches of 256 "
    "to 2,048 tokens, with and without packing; with 512, padding is 2.7%. Keeping freed memory instead of "
    "requesting fresh pages for every layer reduced 0.86 to 0.82 on the EPYC."
)
ROW = Row("R2", "encode captions with a small Llama", contests, ("cpu", "cuda"), shortfall=SHORTFALL)
