"""R19: one query to a unit vector, by a student, its teacher and CLIP's text tower."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work

if TYPE_CHECKING:
    from torch import Tensor

QUERIES, TOKENS = 50, 12
# SmolLM2-135M, the LLM of the quickstart, except for its vocabulary.
TEACHER = {"hidden": 576, "mlp": 1536, "layers": 30}
MS = "ms/query"
SetUp = Callable[[], Work]


def _one_by_one(encode: Callable[[str], Tensor]) -> Work:
    from benchmarks.student_inputs import queries

    texts = queries(QUERIES, TOKENS)

    def work() -> Outcome:
        import time

        import torch

        start = time.process_time()
        rows = [encode(text) for text in texts]
        milliseconds = (time.process_time() - start) / len(rows) * 1000
        embeddings = torch.cat(rows)
        return Outcome({"embeddings": embeddings, "lengths": embeddings.norm(dim=1)}, {MS: milliseconds})

    return work


def _torch(dtype: str = "float32") -> Work:
    import torch

    from benchmarks.small_llama import new_folder
    from benchmarks.student_inputs import write_student
    from llm2clip.encoders.query_encoder import QueryEncoder

    folder = write_student(new_folder())
    return _one_by_one(QueryEncoder.from_pretrained(folder, dtype=getattr(torch, dtype)).encode)


def _int8() -> Work:
    import numpy as np
    import onnxruntime
    import torch
    from onnxruntime.quantization import quantize_dynamic
    from tokenizers import Tokenizer

    from benchmarks.small_llama import new_folder
    from benchmarks.student_inputs import INPUTS, export_graph, write_student

    folder = write_student(new_folder())
    quantize_dynamic(export_graph(folder), folder / "int8.onnx", per_channel=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "int8.onnx", options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(text: str) -> Tensor:
        tokens = tokenizer.encode(text)
        inputs = dict(zip(INPUTS, (np.array([tokens.ids]), np.array([tokens.attention_mask])), strict=True))
        return torch.from_numpy(session.run(None, inputs)[0])

    return _one_by_one(encode)


def _teacher() -> Work:
    import torch

    from benchmarks.small_llama import new_folder, write_text_tower
    from llm2clip.models.towers import open_text_tower

    model, tokenizer = open_text_tower(str(write_text_tower(new_folder(), **TEACHER)), dtype="float32")
    model.eval()
    return _one_by_one(lambda text: torch.nn.functional.normalize(model.encode([text], tokenizer), dim=-1))


def _clip() -> Work:
    import open_clip
    import torch

    model = open_clip.create_model("ViT-B-32").eval()
    tokenizer = open_clip.get_tokenizer("ViT-B-32")

    @torch.inference_mode()
    def encode(text: str) -> Tensor:
        return model.encode_text(tokenizer([text]), normalize=True)  # type: ignore[no-any-return]

    return _one_by_one(encode)


def contests(device: str) -> list[Contest]:
    def contest(
        title: str, ours: SetUp, peers: dict[str, SetUp], at_most: float, tolerance: dict[str, float], note: str
    ) -> Contest:
        contestants = {name: Contestant(set_up) for name, set_up in {"ours": ours, **peers}.items()}
        goals = tuple(Goal(name, MS, at_most) for name in peers)
        return Contest(title, contestants, goals, tolerance, note=note)

    note = (
        "Processor time of a query, from text to vector. The student has 6 layers of width 384 (MiniLM-L6) and a head "
        "of width 512, the teacher 30 layers of width 576, with random weights; CLIP pads to 77 tokens."
    )
    int8 = "torch.onnx, and onnxruntime's quantize_dynamic by channel."
    peers: dict[str, SetUp] = {"the teacher": _teacher, "open_clip ViT-B/32": _clip}
    float32: dict[str, SetUp] = {"in torch, float32": _torch}
    return [
        contest("student in torch", _torch, peers, 0.3, {"lengths": 1e-5}, note),
        contest("student in torch, bfloat16", partial(_torch, "bfloat16"), float32, 1.0, {"embeddings": 0.02}, ""),
        contest("student in ONNX, int8", _int8, float32, 0.5, {"embeddings": 0.1}, int8),
    ]


ROW = Row("R19", f"one query of {TOKENS} tokens to a unit vector", contests)
