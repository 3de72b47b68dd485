"""R3: encoding captions of mixed lengths, against sentence-transformers with the same folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work
from benchmarks.small_llama import captions, new_folder, write_text_tower

CAPTIONS = 512


def _text_tower() -> Path:
    from llm2clip.hub.sentence_transformers import write_sentence_transformers_files

    folder = write_text_tower(new_folder())
    write_sentence_transformers_files(folder)
    return folder


def _ours(device: str) -> Work:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = _text_tower()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = captions(CAPTIONS)

    def work() -> Outcome:
        rows = model.encode(texts, tokenizer)
        return Outcome({"embeddings": torch.nn.functional.normalize(rows, dim=-1)})

    return work


def _sentence_transformers(packed: bool, device: str) -> Work:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(_text_tower()), device=device, trust_remote_code=True)
    if not packed:
        model[0].auto_model._packing = lambda *arguments: None
    texts = captions(CAPTIONS)

    def work() -> Outcome:
        rows = model.encode(texts, normalize_embeddings=True, convert_to_tensor=True)
        return Outcome({"embeddings": rows})

    return work


def contests(device: str) -> list[Contest]:
    peers = {"sentence-transformers": True, "sentence-transformers, padded": False}
    contestants = {"ours": Contestant(partial(_ours, device))}
    contestants |= {
        name: Contestant(partial(_sentence_transformers, packed, device)) for name, packed in peers.items()
    }
    return [
        Contest(
            f"{CAPTIONS} captions of 12 to 450 tokens, 23M parameters",
            contestants,
            tuple(Goal(name, "cpu", 0.80) for name in peers),
            {"embeddings": 1e-4},
            rounds=3,
            note="The limit is the one of R2. The folder's own code packs the short captions of a batch into shared "
            "rows for sentence-transformers too; *padded* is without that, as it runs an ordinary decoder.",
        )
    ]


SHORTFALL = (
    "the code in the folder packs the captions of a batch for sentence-transformers too, which reduces its time "
    "from 1.7 to 1.2 of ours; against its batches without packing the goal is reached."
)
ROW = Row("R3", "encode captions with a small Llama", contests, ("cpu", "cuda"), shortfall=SHORTFALL)
