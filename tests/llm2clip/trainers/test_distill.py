"""Distillation of a query encoder: the student, its folder, its pair, the comparison with the teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2Model

from llm2clip import (
    DistillConfig,
    DistillTrainer,
    Student,
    attach_query_encoder,
    build_folder,
    distill_text,
    load_encoder,
)
from llm2clip.data import CaptionSource
from llm2clip.evaluation.data import RetrievalData
from llm2clip.evaluation.metrics import retrieval_metrics
from llm2clip.hub.upload_files import model_files
from llm2clip.trainers import teacher as teacher_module
from llm2clip.trainers.distill_data import DistillQueries
from llm2clip.trainers.student import _cut
from llm2clip.verification.kinds import verify_folder
from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.query_encoder_llm2clip import FOLDER, SPACE_FILE, QueryEncoder
from tests import stranger
from tests.builders import embedding_models, small_runs, tiny
from tests.llm2clip.trainers.stages import assert_equal, losses
from tests.loopback_hub import TOKEN, LoopbackHub
from tests.processes import run_ranks

TEXTS = [*embedding_models.TEXTS[:4], "two children near a river in a park", "ein roter Bus"]
CLOSE = {"atol": 1e-5, "rtol": 0}
STUDENTS = ["bert", "xlm-roberta", "t5", "layers:1", "static", "static:bert"]
REMOTE = """
import json, sys
from transformers import AutoModel
found = []
for folder in sys.argv[2:]:
    model = AutoModel.from_pretrained(folder, text_model=False, trust_remote_code=True)
    found.append(model.encode_text(json.loads(sys.argv[1]), encoder="query").tolist())
print(json.dumps(found))
"""


def fields(**changes: Any) -> dict[str, Any]:
    shared = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 8, "logging_steps": 1, "seed": 7}
    return {**shared, "report_to": "none", "use_cpu": True, **changes}


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny text encoders by family."""
    folder: Path = tmp_path_factory.mktemp("students")
    for family in ("bert", "xlm-roberta", "t5"):
        embedding_models.save(folder / family, family)
    return folder


@pytest.fixture
def model(saved_model: Path, tmp_path: Path) -> Path:
    """A model of the test's own, with its LLM."""
    return Path(shutil.copytree(saved_model, tmp_path / "model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with a text a line, of which one repeats and one is empty."""
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    lines = [f"a {color} {thing}" for color in ("red", "small", "green") for thing in ("bus", "dog", "park", "river")]
    path.write_text("\n".join([*lines, lines[0], "", *TEXTS]) + "\n", encoding="utf-8")
    return str(path)


def named(student: str, encoders: Path) -> str:
    kind, _, name = student.rpartition(":")
    return f"{kind}{':' * bool(kind)}{encoders / name}" if name in ("bert", "xlm-roberta", "t5") else student


@pytest.fixture(scope="module")
def taught(saved_model: Path, encoders: Path, texts: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each student, with it and with the model that has it."""
    folders = {student: tmp_path_factory.mktemp("taught") for student in STUDENTS}
    for student, folder in folders.items():
        model = shutil.copytree(saved_model, folder / "model")
        distill_text(str(model), named(student, encoders), [texts], folder / "student", **fields(into=str(model)))
    return folders


@pytest.fixture(scope="module")
def remote(taught: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each student answers to someone without this package."""
    models = [folder / "model" for folder in taught.values()]
    found = stranger.answer(REMOTE, json.dumps(TEXTS), *models, home=tmp_path_factory.mktemp("home"))
    return dict(zip(taught, found, strict=True))


@pytest.mark.parametrize("student", STUDENTS)
def test_a_student_is_at_every_door_of_its_model(
    student: str, taught: dict[str, Path], remote: dict[str, Any]
) -> None:
    """test_student.py has the other programs that load its folder."""
    model = taught[student] / "model"
    expected = QueryEncoder.from_pretrained(taught[student] / "student").encode(TEXTS)
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(len(TEXTS)), **CLOSE)
    loaded = LLM2CLIPModel.from_pretrained(model, text_model=False)
    torch.testing.assert_close(loaded.encode_text(TEXTS, encoder="query"), expected, **CLOSE)
    torch.testing.assert_close(loaded.encode_text(TEXTS[0], encoder="query"), expected[:1], **CLOSE)
    encoder = load_encoder(str(model), text_encoder="query")
    torch.testing.assert_close(encoder.encode_text(TEXTS), expected, **CLOSE)
    image = tiny.IMAGES[:1]
    assert encoder.encode_image(image).equal(load_encoder(str(model)).encode_image(image))
    torch.testing.assert_close(torch.tensor(remote[student]), expected, **CLOSE)


def test_a_student_answers_as_its_teacher(encoders: Path, model: Path, texts: str, tmp_path: Path) -> None:
    settings = fields(max_steps=150, learning_rate=3e-3, save_strategy="no")
    distill_text(str(model), str(encoders / "bert"), [texts], tmp_path / "student", **settings)
    wanted = load_encoder(str(model)).encode_text(TEXTS)
    found = QueryEncoder.from_pretrained(tmp_path / "student").encode(TEXTS)
    assert (wanted @ found.T).argmax(dim=1).tolist() == list(range(len(TEXTS)))
    assert (wanted * found).sum(dim=1).min() > 0.9


def test_a_resumed_run_and_another_student_need_no_teacher(
    encoders: Path, model: Path, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"path": small_runs.CONCEPTS, "split": "validation", "max_samples": 20, "caption_columns": ["caption"]}
    settings = fields(eval_sources={"validation": source}, max_steps=2, save_steps=1)
    given = (str(model), str(encoders / "bert"), [texts])
    metrics = distill_text(*given, tmp_path / "run", **settings)
    shutil.copytree(tmp_path / "run", tmp_path / "unbroken")
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").unlink()  # as if killed while it saved
    monkeypatch.setattr(teacher_module, "load_encoder", lambda *args: pytest.fail("the teacher is loaded"))
    shutil.rmtree(model)
    resumed = distill_text(*given, tmp_path / "run", resume=True, **settings)
    assert_equal(tmp_path / "unbroken", tmp_path / "run", atol=1e-6)
    compared = {name: value for name, value in metrics.items() if name.startswith("eval_")}
    assert {name: resumed[name] for name in compared} == pytest.approx(compared, abs=1e-6)
    settings["teacher_rows"] = str(tmp_path / "unbroken" / "teacher")
    distill_text(str(model), str(encoders / "t5"), [texts], tmp_path / "another", **settings)


def test_a_cut_text_model_has_its_first_and_last_layers() -> None:
    kinds = [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full", "sliding", "full")]
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 20, "num_hidden_layers": 7}
    backbone = Qwen2Model(Qwen2Config(**sizes, use_sliding_window=True, layer_types=kinds))
    layers = list(backbone.layers)
    _cut(backbone, "layers:4")
    assert [layers.index(layer) for layer in backbone.layers] == [0, 1, 2, 6]
    assert [layer.self_attn.layer_idx for layer in backbone.layers] == [0, 1, 2, 3]
    assert backbone.config.layer_types == [kinds[place] for place in (0, 1, 2, 6)]
    assert backbone(input_ids=torch.arange(6)[None]).last_hidden_state.isfinite().all()


def test_rows_of_another_teacher_are_refused(encoders: Path, model: Path, texts: str, tmp_path: Path) -> None:
    settings = fields(teacher_rows=str(tmp_path / "rows"), max_steps=1, save_strategy="no")
    given = (str(model), str(encoders / "bert"), [texts])
    distill_text(*given, tmp_path / "first", **settings)
    tiny.save(model)
    with pytest.raises(ValueError, match=r"was made by .* with fingerprint"):
        distill_text(*given, tmp_path / "second", **settings)


@pytest.mark.slow
def test_two_processes_equal_one(encoders: Path, model: Path, texts: str, tmp_path: Path) -> None:
    student = Path(shutil.copytree(encoders / "bert", tmp_path / "bert"))
    config = json.loads((student / "config.json").read_text())
    # What dropout leaves out is drawn by each process.
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (student / "config.json").write_text(json.dumps(config))
    common = ["--student", str(student), "--sources", f"[{{path: {texts}}}]"]
    common += ["--max-steps", "4", "--logging-steps", "1", "--report-to", "none", "--use-cpu", "true", "--seed", "7"]
    for processes in (1, 2):
        output = str(tmp_path / str(processes))
        own = ["--output-dir", output, "--per-device-train-batch-size", str(8 // processes), "--save-strategy", "no"]
        run_ranks(["-m", "llm2clip", "distill-text", str(model), *common, *own], processes)
    one, two = (losses(tmp_path / run) for run in "12")
    assert len(one) == 4
    assert two == pytest.approx(one, abs=1e-5)
    # Not the weights: those without a gradient of their own follow rounding.
    one, two = (QueryEncoder.from_pretrained(tmp_path / run).encode(TEXTS) for run in "12")
    torch.testing.assert_close(two, one, atol=1e-4, rtol=0)


def test_a_student_of_another_model_is_refused(encoders: Path, model: Path, texts: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    student, other = tmp_path / "student", tmp_path / "other"
    tiny.save(other)
    distill_text(str(model), str(encoders / "bert"), [texts], student, **fields(max_steps=1))
    with pytest.raises(ValueError, match=r"was taught the space .* their vectors cannot be compared"):
        attach_query_encoder(student, other)
    with pytest.raises(ValueError, match="was taught the space"):
        distill_text(str(model), str(encoders / "bert"), [texts], tmp_path / "next", **fields(into=str(other)))
    with pytest.raises(ValueError, match="has no query_encoder/"):
        load_encoder(str(other), text_encoder="query")
    attach_query_encoder(student, model)
    attach_query_encoder(student, model)  # in place of the first
    shutil.copytree(model / FOLDER, other / FOLDER)
    with pytest.raises(ValueError, match=r"was taught the space .* of another model"):
        load_encoder(str(other), text_encoder="query")
    with pytest.raises(ValueError, match=r"was taught the space .* of another model"):
        LLM2CLIPModel.from_pretrained(other, text_model=False).encode_text("a dog", encoder="query")
    with pytest.raises(ValueError, match=f"has no {SPACE_FILE}"):
        attach_query_encoder(encoders / "bert", model)


def test_prefixes_follow_those_of_the_teacher(encoders: Path, tmp_path: Path) -> None:
    """In a Trainer on rows of any data set, without a teacher."""
    rows = F.normalize(torch.randn(len(TEXTS), 12, generator=torch.Generator().manual_seed(0)), dim=1)
    table = [{"text": text, "embedding": row.tolist()} for text, row in zip(TEXTS, rows, strict=True)]
    student = Student.create(str(encoders / "bert"), 12, lambda: pytest.fail("it needs no teacher"))
    settings = fields(per_device_train_batch_size=6, max_steps=2)
    args = DistillConfig(str(tmp_path), matryoshka_dims=[3, 8], **settings)
    trainer = DistillTrainer(student, args, train_dataset=table, eval_dataset=table)
    loss, embeds = trainer.compute_loss(student.eval(), trainer.data_collator(table), return_outputs=True)
    distances = [(1 - F.cosine_similarity(embeds["student"][:, :dim], rows[:, :dim])).mean() for dim in (3, 8, 12)]
    torch.testing.assert_close(loss, torch.stack(distances).mean())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    args.matryoshka_dims = [12]
    with pytest.raises(ValueError, match="matryoshka_dims has 12, but a prefix of 12 values has 1 to 11"):
        DistillTrainer(student, args, train_dataset=table)
    with pytest.raises(ValueError, match=r"model is a Linear; this stage trains a Student"):
        DistillTrainer(torch.nn.Linear(2, 2), args, train_dataset=table)


def test_a_built_model_has_its_query_encoder(encoders: Path, model: Path, texts: str, tmp_path: Path) -> None:
    student = tmp_path / "student"
    distill_text(str(model), str(encoders / "bert"), [texts], student, **fields(max_steps=1, into=str(model)))
    build_folder(model, tmp_path / "built")
    expected = QueryEncoder.from_pretrained(student).encode(TEXTS)
    found = load_encoder(str(tmp_path / "built"), text_encoder="query").encode_text(TEXTS)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert f"{FOLDER}/2_Dense/model.safetensors" in model_files(tmp_path / "built").uploaded
    for folder in (tmp_path / "built", model / FOLDER, student):
        assert not verify_folder(folder).faults
    with pytest.raises(ValueError, match="was built with a query encoder"):
        attach_query_encoder(student, tmp_path / "built")


def test_a_student_is_pushed(encoders: Path, model: Path, texts: str, tmp_path: Path, hub: LoopbackHub) -> None:
    pushing = {"push_to_hub": True, "hub_model_id": "tester/student", "hub_strategy": "end", "hub_token": TOKEN}
    distill_text(str(model), str(encoders / "bert"), [texts], tmp_path / "student", **fields(**pushing))
    names = set(hub.repo("tester/student").files())
    assert {"2_Dense/model.safetensors", "1_Pooling/config.json", "modules.json", "README.md", SPACE_FILE} <= names
    assert not [name for name in names if name.startswith(("teacher", "checkpoint"))]
    found = QueryEncoder.from_pretrained("tester/student").encode(TEXTS)
    torch.testing.assert_close(found, QueryEncoder.from_pretrained(tmp_path / "student").encode(TEXTS), **CLOSE)


def test_frozen_embeddings_stay(encoders: Path, model: Path, texts: str, tmp_path: Path) -> None:
    given = (str(model), str(encoders / "bert"), [texts])
    distill_text(*given, tmp_path / "student", **fields(freeze_embeddings=True, save_strategy="no"))
    before = Student.create(str(encoders / "bert"), 24, lambda: pytest.fail("it needs no teacher")).state_dict()
    after = Student.from_pretrained(tmp_path / "student").state_dict()
    changed = {name for name in after if not after[name].equal(before[name])}
    assert "backbone.embeddings.word_embeddings.weight" not in changed
    assert "backbone.encoder.layer.0.attention.self.query.weight" in changed


def test_the_fitted_head_is_the_best_linear_map(encoders: Path) -> None:
    """Rows that are a linear map of the states are found again."""
    student = Student.create(str(encoders / "bert"), 7, lambda: pytest.fail("it needs no teacher")).eval()
    many = [f"{text} {word}" for text in TEXTS for word in ("dog", "bus", "river", "park", "children", "red", "two")]
    torch.nn.init.normal_(student.dense.weight)
    rows = student.encode(many)
    student.dense.weight.data.zero_()
    student.fit_head(many, rows)
    assert (student.encode(many) * rows).sum(dim=1).mean() > 0.98


def test_a_student_is_compared_with_its_teacher_by_retrieval() -> None:
    generator = torch.Generator().manual_seed(0)
    images, teacher, student = (F.normalize(torch.randn(12, 4, generator=generator), dim=1) for _ in range(3))
    teacher, student = F.normalize(images + 0.3 * teacher, dim=1), F.normalize(images + 0.9 * student, dim=1)
    pairs = torch.arange(12)[:, None].expand(-1, 2)
    queries = DistillQueries([f"text {row}" for row in range(12)], pairs, images, teacher)
    lengths = torch.tensor([3] * 6 + [6] * 5 + [200])
    found = queries.compare(student, lengths)
    for suffix, rows in (("", student), ("_of_teacher", teacher)):
        direct = retrieval_metrics(images, rows, pairs)
        for k in (1, 5, 10):
            name = f"text_to_image_recall@{k}"
            assert found[f"{name}{suffix}"] == pytest.approx(direct[name])
    name = "text_to_image_recall@1"
    assert found[f"{name}_ratio"] == pytest.approx(found[name] / found[f"{name}_of_teacher"])
    assert [found[f"num_texts_of_{part}_tokens"] for part in ("1-4", "5-8", "129-")] == [6, 5, 1]
    assert found["cosine"] == pytest.approx(float((student * teacher).sum(dim=1).mean()))
    same = queries.compare(teacher, lengths)
    assert {value for key, value in same.items() if "ratio" in key} == {1.0}


def test_the_card_has_the_table_of_each_caption_column(
    encoders: Path, model: Path, texts: str, tmp_path: Path
) -> None:
    columns = ["caption", "caption_de"]
    source = {"path": small_runs.CONCEPTS, "split": "validation", "max_samples": 20, "caption_columns": columns}
    settings = fields(eval_sources={"concepts": source}, save_strategy="no", max_steps=1)
    metrics = distill_text(str(model), str(encoders / "bert"), [texts], tmp_path / "student", **settings)
    card = (tmp_path / "student" / "README.md").read_text(encoding="utf-8")
    assert "library_name: sentence-transformers" in card
    for column in columns:
        found = metrics[f"eval_concepts_{column}_text_to_image_recall@10_ratio"]
        (line,) = [line for line in card.splitlines() if line.startswith(f"| concepts_{column} ")]
        assert f"| {100 * found:.0f} |" in line
    taught = RetrievalData.from_source(CaptionSource.from_dict({**source, "caption_columns": ["caption_de"]}))
    assert metrics["eval_concepts_caption_de_num_texts"] == len(taught.texts)
    assert "of_teacher" not in card.split("---")[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "layers:9"}, "student is layers:9, but the teacher's text model has 2 layers: layers:1 to 2"),
        ({"student": "layers:all"}, "student is layers:all"),
        ({"student": ""}, "DistillRecipe needs student"),
        ({"per_device_train_batch_size": 100}, "fewer rows than one batch of 100"),
        ({"into": "nowhere"}, "there is no folder nowhere"),
        ({"freeze_embeddings": True}, "leaves a static student nothing to learn"),
        ({"student_revision": "v2"}, "student static is made of the teacher; leave the revision v2 of it out"),
        ({"max_text_length": 10**6}, "the length 1000000 is given, but the student static reads"),
    ],
)
def test_settings_that_do_not_fit(
    changes: dict[str, Any], message: str, model: Path, texts: str, tmp_path: Path
) -> None:
    given = {"student": "static", **fields(), **changes}
    with pytest.raises(ValueError, match=message):
        distill_text(str(model), given.pop("student"), [texts], tmp_path / "out", **given)
