"""The folder of a student in other programs: equal vectors in all that are installed, here or below `peers`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file

from benchmarks.environments import FOLDER as PEERS
from benchmarks.student_inputs import export_graph
from llm2clip import Student, load_encoder
from llm2clip.encoders.query_encoder import QueryEncoder
from llm2clip.files.manifests import QUERY_ENCODER
from llm2clip.models.identity import space_identity
from modeling_llm2clip import LLM2CLIPModel
from tests import stranger
from tests.builders import embedding_models

TEXTS = [*embedding_models.TEXTS, *embedding_models.OTHER_LANGUAGES]
WIDTH = 24
STUDENTS = ["bert", "xlm-roberta", "layers:1", "static:bert"]
# What each program does with a folder.
PROGRAMS = {
    "sentence_transformers": """
from sentence_transformers import SentenceTransformer
def encode(folder):
    return SentenceTransformer(folder, device="cpu").encode(texts)
""",
    "lancedb": """
from lancedb.embeddings import get_registry
def encode(folder):
    function = get_registry().get("sentence-transformers").create(name=folder)
    assert function.ndims() == len(function.compute_query_embeddings("a dog")[0])
    return function.compute_source_embeddings(texts)
""",
    "txtai": """
from txtai import Embeddings
def encode(folder):
    return Embeddings(path=folder, method="sentence-transformers", gpu=False).batchtransform(texts)
""",
    "infinity_emb": """
import asyncio, os
os.environ["DO_NOT_TRACK"] = "1"
from infinity_emb import AsyncEmbeddingEngine, EngineArgs
async def embed(folder):
    options = dict(engine="torch", device="cpu", bettertransformer=False, model_warmup=False)
    engine = AsyncEmbeddingEngine.from_args(EngineArgs(model_name_or_path=folder, **options))
    async with engine:
        return (await engine.embed(texts))[0]
def encode(folder):
    return asyncio.run(embed(folder))
""",
    "optimum": """
from sentence_transformers import SentenceTransformer
def encode(folder):
    return SentenceTransformer(folder, device="cpu", backend="onnx", model_kwargs={"export": True}).encode(texts)
""",
    "onnxruntime": """
import onnxruntime
from tokenizers import Tokenizer
def encode(folder):
    session = onnxruntime.InferenceSession(folder + "/onnx/model.onnx", providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
    rows = []
    for text in texts:
        found = tokenizer.encode(text)
        inputs = {"input_ids": np.array([found.ids]), "attention_mask": np.array([found.attention_mask])}
        rows.append(session.run(None, inputs)[0][0])
    return rows
""",
    "fastembed": """
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType
def encode(folder):
    TextEmbedding.add_custom_model(
        model=folder, pooling=PoolingType.DISABLED, normalization=False, sources=ModelSource(url="none"), dim=24,
        output_name="sentence_embedding",
    )
    return list(TextEmbedding(folder, specific_model_path=folder, threads=1).embed(texts))
""",
}
# Those that read the graph in onnx/.
ON_GRAPHS = ("onnxruntime", "fastembed")
FRAME = """
import json, sys
from importlib.metadata import version
import numpy as np
texts, programs = map(json.loads, sys.argv[1:3])
def attempt(encode, folder):
    try:
        return np.asarray(encode(folder)).tolist()
    except Exception as error:
        return repr(error)
rows = {}
for name, program in programs.items():
    names = {"texts": texts, "np": np}
    exec(program, names)
    rows[name] = [attempt(names["encode"], folder) for folder in sys.argv[3:]]
assert not {"modeling_llm2clip", "llm2clip"} & set(sys.modules)
versions = [version(name) for name in ("transformers", "sentence-transformers")]
print()
print(json.dumps([rows, versions]))
"""


@pytest.fixture(scope="module")
def students(saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Students without training, one of them with a graph in `onnx/`."""
    encoders, folder = tmp_path_factory.mktemp("encoders"), tmp_path_factory.mktemp("students")
    for family in ("bert", "xlm-roberta"):
        embedding_models.save(encoders / family, family)
    for name in STUDENTS:
        kind, _, family = name.rpartition(":")
        spec = name if kind == "layers" else f"{kind}{':' * bool(kind)}{encoders / family}"
        student = Student.create(spec, WIDTH, lambda: load_encoder(str(saved_model)), space="a space")
        student.save_pretrained(folder / name)
    export_graph(folder / "bert")
    return {name: folder / name for name in STUDENTS}


def environments(module: str) -> list[Path]:
    """Interpreters that have a module: this one, and those of benchmarks and of people below `peers`."""
    own = [Path(sys.executable)] if find_spec(module) else []
    found = PEERS.glob(f"*/lib/python*/site-packages/{module}")
    return own + sorted(path.parents[3] / "bin" / "python" for path in found)


def is_loaded(folder: Path, program: str, transformers: str, sentence_transformers: str) -> bool:
    """Whether a program loads a student, as docs/distill.md says."""
    if program in ON_GRAPHS:
        return (folder / "onnx").exists()
    if folder.name.startswith("static"):
        return program not in ("infinity_emb", "optimum") and Version(sentence_transformers) >= Version("3.2")
    return not folder.name.startswith("layers") or Version(transformers) >= Version("5")


@pytest.fixture(scope="module")
def answers(students: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Any]:
    """Ask an interpreter once for what all of its programs make of the students, and for its versions."""

    @cache
    def ask(python: Path) -> Any:
        programs = {name: code for name, code in PROGRAMS.items() if python in environments(name)}
        arguments = [json.dumps(TEXTS), json.dumps(programs), *students.values()]
        is_own = python == Path(sys.executable)
        return stranger.answer(
            FRAME, *arguments, home=tmp_path_factory.mktemp("home"), is_forked=is_own, python=python
        )

    return ask


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_that_is_installed_gives_equal_vectors(
    program: str, students: dict[str, Path], answers: Callable[[Path], Any]
) -> None:
    if not (pythons := environments(program)):
        pytest.skip(f"{program} is not installed, neither here nor in an environment in {PEERS}")
    compared = 0
    for python in pythons:
        found, versions = answers(python)
        for folder, rows in zip(students.values(), found[program], strict=True):
            if is_loaded(folder, program, *versions):
                expected = QueryEncoder.from_pretrained(folder).encode(TEXTS)
                assert not isinstance(rows, str), f"{python}, {folder.name}: {rows}"
                message = f"{python}, {folder.name}"
                torch.testing.assert_close(torch.tensor(rows), expected, atol=1e-3, rtol=0, msg=message)
                compared += 1
    assert compared


@pytest.mark.parametrize("name", ["bert", "xlm-roberta"])
def test_the_folder_has_what_text_embeddings_inference_reads(name: str, students: dict[str, Path]) -> None:
    """Every field that its code, which is Rust and not run here, takes without a default."""
    folder = students[name]
    files = ("config.json", "1_Pooling/config.json", "2_Dense/config.json", "tokenizer.json", "modules.json")
    config, pooling, dense, tokens, modules = (json.loads((folder / file).read_text("utf-8")) for file in files)
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes += ("max_position_embeddings", "type_vocab_size", "pad_token_id")
    assert {type(config[field]) for field in sizes} == {int}
    shares = ("hidden_dropout_prob", "initializer_range", "layer_norm_eps")
    assert {type(config[field]) for field in shares} == {float}
    assert (config["model_type"], config["hidden_act"]) == (name, "gelu")
    assert config["architectures"] in (["BertModel"], ["XLMRobertaModel"])
    kinds = {"cls_token": False, "mean_tokens": True, "max_tokens": False, "mean_sqrt_len_tokens": False}
    assert {f"pooling_mode_{kind}": value for kind, value in kinds.items()}.items() <= pooling.items()
    # Positions of XLM-RoBERTa begin after that of padding.
    room = config["max_position_embeddings"] - (config["pad_token_id"] + 1 if name == "xlm-roberta" else 0)
    assert 0 < json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"] <= room
    assert (dense["activation_function"], dense["bias"]) == ("torch.nn.modules.linear.Identity", False)
    (weight,) = load_file(folder / "2_Dense" / "model.safetensors").items()
    assert (weight[0], [*weight[1].shape]) == ("linear.weight", [dense["out_features"], dense["in_features"]])
    assert "embeddings.word_embeddings.weight" in load_file(folder / "model.safetensors")
    parts = [module["type"].removeprefix("sentence_transformers.models.") for module in modules]
    assert parts == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert (tokens["truncation"]["max_length"], tokens["padding"]) == (embedding_models.LIMIT, None)


@pytest.mark.parametrize("changed", ["vision_model", "text_adapter"])
def test_what_stays_valid_when_a_part_of_the_model_is_trained_on(
    changed: str, saved_model: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    model = LLM2CLIPModel.from_pretrained(saved_model)
    student = Student.from_pretrained(students["bert"])
    student.space = space_identity(model)
    later = Path(shutil.copytree(saved_model, tmp_path / "later"))
    with torch.no_grad():
        for weight in getattr(model, changed).parameters():
            weight.add_(0.1)
    model.save_pretrained(later)
    student.save_pretrained(later / QUERY_ENCODER)
    before, after = (load_encoder(str(folder)) for folder in (saved_model, later))
    is_vision = changed == "vision_model"
    # Rows of images, and the images of an index.
    assert (before.image_fingerprint() == after.image_fingerprint()) is not is_vision
    # Rows of texts, and the captions of an index.
    assert (before.text_fingerprint() == after.text_fingerprint()) is is_vision
    # Stored rows of the LLM, from which both stages start.
    assert before.model.text_model.fingerprint() == after.model.text_model.fingerprint()
    if is_vision:
        load_encoder(str(later), text_encoder="query")
    else:
        with pytest.raises(ValueError, match="was taught the space"):
            load_encoder(str(later), text_encoder="query")


def test_a_limit_of_the_text_encoder_that_other_programs_would_read_is_left_out(tmp_path: Path) -> None:
    embedding_models.save(tmp_path / "bert", "bert")
    path = tmp_path / "bert" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_length": 7}))
    student = Student.create(str(tmp_path / "bert"), WIDTH, lambda: pytest.fail("it needs no teacher"), max_length=20)
    student.save_pretrained(tmp_path / "student")
    saved = json.loads((tmp_path / "student" / "tokenizer_config.json").read_text())
    assert (saved["model_max_length"], saved.get("max_length", 20)) == (20, 20)


def test_a_batch_is_trained_on_in_as_few_parts_as_its_tokens_allow(students: dict[str, Path]) -> None:
    """And in any parts gives the states of the whole batch, in its order."""
    student, parts = Student.from_pretrained(students["bert"]).eval(), []
    student.backbone.register_forward_pre_hook(
        lambda _, given, named: parts.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    lengths = torch.tensor([4, 9, 2] * 20)
    ids, mask = torch.randint(5, 50, (60, 9)), (torch.arange(9) < lengths[:, None]).long()
    with torch.inference_mode():
        expected = QueryEncoder.pooled_states(student, ids, mask)
        parts.clear()
        found = student.pooled_states(ids, mask)
    torch.testing.assert_close(found, expected)
    # At most 512 tokens on a CPU.
    assert parts == [(56, 9), (4, 2)]
