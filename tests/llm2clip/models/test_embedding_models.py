"""Embedding models of sentence-transformers as text towers: equal tokens and embeddings, from their folders."""

from __future__ import annotations

import copy
import json
import shutil
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, constants, snapshot_download
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from llm2clip.hub.sentence_transformers import write_sentence_transformers_files
from llm2clip.models.identity import text_tower_fingerprint
from llm2clip.models.repos import RepoKind, find_file, inspect_repo
from llm2clip.models.towers import describe_text_tower, open_text_tower, save_text_tower
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from tests.builders import embedding_models, tiny
from tests.builders.embedding_models import FAMILIES, TEXTS
from tests.loopback_hub import TOKEN, LoopbackHub


def opened(folder: Path, family: str, **fields: Any) -> tuple[SentenceTransformer, LLM2CLIPTextModel, Any]:
    """Save an embedding model, and open it as a text tower."""
    reference = embedding_models.save(folder, family)
    return reference, *open_text_tower(str(folder), **fields)


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_embeddings_equal_sentence_transformers(family: str, tmp_path: Path) -> None:
    folder = str(tmp_path / family)
    reference, model, tokenizer = opened(tmp_path / family, family)
    model.eval()
    prompt = reference.prompts.get(reference.default_prompt_name) or ""
    for text in TEXTS:
        ids = reference.preprocess([text], prompt=prompt)["input_ids"][0].tolist()
        assert tokenizer(text, truncation=True)["input_ids"] == ids, text
    found = {}
    for side in ("left", "right"):
        tokenizer.padding_side = side
        found[f"encode, {side}"] = model.encode(TEXTS, tokenizer)
        padded = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            found[f"forward, {side}"] = model(**padded).pooler_output
    config, described = describe_text_tower(folder)
    assert described("a dog")["input_ids"] == tokenizer("a dog")["input_ids"]
    save_text_tower(model, tokenizer, tmp_path / "tower")
    saved: Any = AutoModel.from_pretrained(tmp_path / "tower").eval()
    assert saved.fingerprint() == model.fingerprint() == text_tower_fingerprint(folder, None, config)
    found["saved"] = saved.encode(TEXTS, AutoTokenizer.from_pretrained(tmp_path / "tower"))
    write_sentence_transformers_files(tmp_path / "tower")
    written = SentenceTransformer(str(tmp_path / "tower"), trust_remote_code=True, device="cpu")
    found["sentence-transformers"] = written.encode(TEXTS, convert_to_tensor=True)
    expected = reference.encode(TEXTS, convert_to_tensor=True)
    for door, rows in found.items():
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5, msg=lambda text, door=door: f"{door}: {text}")


@pytest.mark.parametrize(
    ("family", "packs"), [("bert", True), ("xlm-roberta", True), ("modernbert", False), ("qwen3", False)]
)
def test_short_texts_share_rows_only_where_that_is_exact(family: str, packs: bool, tmp_path: Path) -> None:
    _, model, tokenizer = opened(tmp_path, family)
    rows: list[int] = []
    model.decoder.register_forward_pre_hook(
        lambda _, __, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    )
    texts = [*TEXTS[:4], "a small dog"]
    found = model.encode(texts, tokenizer)
    assert (sum(rows) < len(texts)) is packs
    alone = torch.cat([model.encode(text, tokenizer) for text in texts])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


def test_given_settings_take_precedence_over_the_files(tmp_path: Path) -> None:
    """As E5 needs it, whose files have prompts but no default one."""
    reference, model, tokenizer = opened(tmp_path, "xlm-roberta", prompt_prefix="query: ", max_text_length=20)
    assert tokenizer("a dog")["input_ids"] == reference.tokenizer("query: a dog")["input_ids"]
    expected = reference.encode(["a dog"], prompt_name="query", convert_to_tensor=True)
    torch.testing.assert_close(model.encode("a dog", tokenizer), expected, atol=1e-5, rtol=1e-5)
    assert model.config.pool_prompt
    assert model.config.max_text_length == tokenizer.model_max_length == 20
    unit, _ = open_text_tower(str(tmp_path), normalize=True, pooling="last_token")
    assert (unit.config.pooling, unit.config.normalize) == ("last_token", True)


def test_texts_are_put_in_lower_case_where_the_files_say_so(tmp_path: Path) -> None:
    embedding_models.save(tmp_path / "text", "xlm-roberta")
    edit(tmp_path / "text" / "sentence_bert_config.json", do_lower_case=True)
    reference = SentenceTransformer(str(tmp_path / "text"), device="cpu")
    model, tokenizer = open_text_tower(str(tmp_path / "text"))
    expected = reference.encode(["The Dog"], convert_to_tensor=True)
    torch.testing.assert_close(model.encode("The Dog", tokenizer), expected, atol=1e-5, rtol=1e-5)
    assert tokenizer("The Dog")["input_ids"] == tokenizer("the dog")["input_ids"]


def test_instructions_are_pooled_with_the_prompt(tmp_path: Path) -> None:
    reference, model, tokenizer = opened(tmp_path, "bert")
    found = model.encode("a dog", tokenizer, instruction="an instruction:")
    expected = reference.encode(["an instruction: a dog"], convert_to_tensor=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_model_reads_the_weights_of_an_embedding_model_by_its_own_config(tmp_path: Path) -> None:
    """As of a model that names the LLM's repository."""
    _, expected, tokenizer = opened(tmp_path / "text", "qwen3")
    fields = {"text": copy.deepcopy(expected.config), "text_model_name_or_path": str(tmp_path / "text")}
    fields["text_model_fingerprint"] = expected.fingerprint()
    tiny.joint_model(**fields).save_pretrained(tmp_path / "joint")
    model = LLM2CLIPModel.from_pretrained(tmp_path / "joint").text_model
    torch.testing.assert_close(model.encode(TEXTS, tokenizer), expected.encode(TEXTS, tokenizer))
    with pytest.raises(ValueError, match=r"does not add the prompt.*llm2clip\.open_text_tower"):
        model.encode(TEXTS, AutoTokenizer.from_pretrained(tmp_path / "text"))
    with pytest.raises(ValueError, match=r"is a plain text model.*llm2clip\.open_text_tower"):
        LLM2CLIPTextModel.from_pretrained(tmp_path / "text")


def test_dense_layers_are_read_by_the_toolbox_alone(tmp_path: Path) -> None:
    _, expected, _ = opened(tmp_path / "text", "gemma3_text")
    with pytest.raises(ValueError, match=r"with Dense layers, not a text tower.*llm2clip\.open_text_tower"):
        LLM2CLIPTextModel.from_pretrained(tmp_path / "text", default_config=expected.config)


@pytest.mark.parametrize("of_tower", [False, True], ids=["plain", "tower"])
def test_an_adapter_keeps_the_dense_layers_of_its_base(of_tower: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    _, tower, tokenizer = opened(tmp_path / "text", "t5")
    base = tmp_path / ("tower" if of_tower else "text")
    tower.save_pretrained(tmp_path / "tower")
    lora = peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)
    tower.decoder = peft.get_peft_model(tower.decoder, lora)
    tower.decoder.peft_config["default"].base_model_name_or_path = str(base)
    tower.save_pretrained(tmp_path / "adapter")
    loaded = AutoModel.from_pretrained(tmp_path / "adapter").eval()
    assert loaded.fingerprint() == tower.fingerprint()
    torch.testing.assert_close(loaded.encode(TEXTS, tokenizer), tower.eval().encode(TEXTS, tokenizer))


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": ["mean", "cls"]}, r"its pooling is mean \+ cls"),
        ("1_Pooling/config.json", {"pooling_mode": "cls", "include_prompt": False}, "pooling without the prompt"),
        ("2_Dense/config.json", {"activation_function": "mine.Swish"}, "has the activation mine.Swish"),
        ("2_Dense/config.json", {"use_residual": True}, "has a residual branch"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "it embeds texts by fill-mask"),
        ("sentence_bert_config.json", {"config_kwargs": {"is_causal": False}}, "config_kwargs sets is_causal"),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"padding": True}}}, "tokenizer arguments"),
        ("config_sentence_transformers.json", {"default_prompt_name": "x"}, "'x' is not one of its prompts"),
    ],
)
def test_what_a_tower_cannot_do_is_refused(file: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    embedding_models.save(tmp_path / "text", "gemma3_text")
    edit(tmp_path / "text" / file, **fields)
    with pytest.raises(ValueError, match=message):
        open_text_tower(str(tmp_path / "text"))


def test_other_modules_are_refused(tmp_path: Path) -> None:
    embedding_models.save(tmp_path / "text", "bert")
    assert inspect_repo(tmp_path / "text").kind is RepoKind.EMBEDDING_MODEL
    modules = tmp_path / "text" / "modules.json"
    modules.write_text(modules.read_text().replace("Normalize", "LayerNorm"))
    with pytest.raises(ValueError, match="its modules are Transformer, Pooling, LayerNorm"):
        open_text_tower(str(tmp_path / "text"))


def test_the_pooling_flags_of_earlier_sentence_transformers_are_read(tmp_path: Path) -> None:
    embedding_models.save(tmp_path / "text", "bert")
    path = tmp_path / "text" / "1_Pooling" / "config.json"
    flags = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    path.write_text(json.dumps({"word_embedding_dimension": embedding_models.WIDTH, **flags}))
    assert open_text_tower(str(tmp_path / "text"))[0].config.pooling == "last_token"


@pytest.fixture
def on_hub(hub: LoopbackHub, tmp_path: Path) -> tuple[str, torch.Tensor]:
    """An embedding model that pools its first token, on the Hub, and its embeddings."""
    reference = embedding_models.save(tmp_path / "bert", "bert", pooling_mode="cls")
    api = HfApi(hub.url, token=TOKEN)
    api.create_repo("tester/bert")
    (tmp_path / "bert" / ".gitattributes").write_text("*.safetensors filter=lfs")
    api.upload_folder(repo_id="tester/bert", folder_path=tmp_path / "bert")
    return "tester/bert", reference.encode(TEXTS, convert_to_tensor=True)


def embed(name: str) -> torch.Tensor:
    model, tokenizer = open_text_tower(name)
    return model.eval().encode(TEXTS, tokenizer)


def test_what_the_hub_cannot_be_asked_for_is_not_taken_as_absent(
    on_hub: tuple[str, torch.Tensor], hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without modules.json, the model would pool the mean of all tokens."""
    name, expected = on_hub
    AutoModel.from_pretrained(name)
    AutoTokenizer.from_pretrained(name)
    message = f"cannot be asked whether {name} has modules.json.*: hf download {name}"
    hub.fail_next("HEAD", r".*/modules\.json", 503, times=20)
    with monkeypatch.context() as hurried:
        hurried.setattr(time, "sleep", lambda seconds: None)  # between the attempts of the client
        with pytest.raises(OSError, match=message):
            embed(name)
    hub.failures.clear()
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(OSError, match=message):
            embed(name)
        with pytest.raises(OSError, match=f"hf download {name} --revision v1"):
            find_file(name, "modules.json", revision="v1")
    torch.testing.assert_close(embed(name), expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    torch.testing.assert_close(embed(name), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("download", ["listed", "earlier version", "in part"])
def test_a_whole_download_says_which_files_there_are(
    download: str, on_hub: tuple[str, torch.Tensor], hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _ = on_hub
    ignored = [".gitattributes", "modules.json"] if download == "in part" else []
    folder = Path(snapshot_download(name, ignore_patterns=ignored))
    if download != "listed":
        shutil.rmtree(folder.parents[1] / "trees")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub._tree_cache, "_IN_MEMORY_TREE_CACHE", {})
    assert find_file(name, "config.json", subfolder="1_Pooling") == str(folder / "1_Pooling" / "config.json")
    if download == "in part":
        for file in ("modules.json", "no.json"):
            with pytest.raises(OSError, match=f"cannot be asked whether {name} has {file}"):
                find_file(name, file)
    else:
        assert find_file(name, "no.json") is None
