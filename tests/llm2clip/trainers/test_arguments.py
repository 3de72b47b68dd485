"""What a Hugging Face Trainer takes besides its settings works in every stage, or is refused; nothing is unasked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import ModelOutput

from llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, Stage1Config, Stage1Trainer, Stage2Config, Stage2Trainer
from llm2clip.encoders.images import ImageList
from llm2clip.evaluation.data import RetrievalData
from tests.builders import tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.rows import TRAINERS, MapRows, image_rows, logged, settings, stage2
from tests.llm2clip.trainers.stages import joint_model

EVALUATED = {"eval_strategy": "steps", "eval_steps": 3}


def trainer_of(inputs: Inputs, folder: Path, changes: dict[str, Any] | None = None, **arguments: Any) -> Stage2Trainer:
    """A Trainer of stage 2 on plain rows, with other arguments than its settings."""
    name, rows = joint_model(inputs, folder / "model"), MapRows(image_rows(tiny.HIDDEN))
    if not {"model", "model_init"} & set(arguments):
        arguments["model"] = LLM2CLIPModel.from_pretrained(name, text_model=False)
    if "eval_strategy" in (changes or {}):
        arguments["eval_dataset"] = rows
    return Stage2Trainer(args=Stage2Config(**settings(folder, **(changes or {}))), train_dataset=rows, **arguments)


@pytest.mark.parametrize("stage", TRAINERS)
def test_training_alone_writes_nothing(stage: str, inputs: Inputs, tmp_path: Path) -> None:
    trainer = TRAINERS[stage](inputs, tmp_path)
    trainer.train()
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {".lock"}
    trainer.save_model()
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in written
    assert not written & {"README.md", "training_curves.png", "settings.json", "training_args.bin"}
    trainer.create_model_card(finetuned_from="x", tasks="y")  # as the scripts of transformers end
    assert (tmp_path / "out" / "README.md").is_file()


OUTPUTS = {
    "stage1": {"anchor", "positive", "negative", "logit_scale"},
    "stage2": {"image_embeds", "text_embeds", "logit_scale"},
    "mntp": {"last_hidden_state"},
}


@pytest.mark.parametrize("stage", OUTPUTS)
def test_a_function_computes_the_loss(stage: str, inputs: Inputs, tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def constant(outputs: ModelOutput, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        assert isinstance(outputs, ModelOutput)
        seen.append({name for name, value in outputs.items() if value is not None and getattr(outputs, name) is value})
        return 3.0 + 0 * sum(value.sum() for value in outputs.values() if value is not None)

    trainer = TRAINERS[stage](inputs, tmp_path, gradient_accumulation_steps=2)
    trainer.compute_loss_func = constant
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([3.0] * 3)
    assert seen[0] == OUTPUTS[stage]


def test_an_own_optimizer_gets_the_groups_of_the_paper(inputs: Inputs, tmp_path: Path) -> None:
    trainer = trainer_of(inputs, tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"momentum": 0.5}))
    trainer.train()
    optimizer: Any = trainer.optimizer
    assert isinstance(optimizer.optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}
    assert {"vision/layer0/decay", "text/decay"} <= {group["name"] for group in optimizer.param_groups}


class StandIn(torch.optim.AdamW):
    """An optimizer of a library that is not installed, with what the Trainer passes to it."""

    def __init__(self, params: Any, **options: Any) -> None:
        self.options = options
        super().__init__(params, options["lr"])


class EmbeddingsIn32Bits:
    """What bitsandbytes is told of embeddings."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, str, dict[str, Any]]] = []

    def register_module_override(self, *override: Any) -> None:
        self.told.append(override)


@pytest.fixture
def optimizers(monkeypatch: pytest.MonkeyPatch) -> EmbeddingsIn32Bits:
    """Stand-ins for the libraries of optimizers."""
    names = ("GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit", "APOLLOAdamW", "AdamW", "Lion", "RMSprop")
    kinds = {name: type(name, (StandIn,), {"__module__": "bitsandbytes.optim"}) for name in names}
    manager = EmbeddingsIn32Bits()
    kinds["GlobalOptimManager"] = SimpleNamespace(get_instance=lambda: manager)
    modules = {name: SimpleNamespace(**kinds) for name in ("galore_torch", "apollo_torch", "bitsandbytes.optim")}
    modules["bitsandbytes"] = SimpleNamespace(optim=modules["bitsandbytes.optim"])
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("galore_torch", "apollo_torch", "bitsandbytes"):
        monkeypatch.setattr(f"transformers.trainer_optimizer.is_{name}_available", lambda: True)
    return manager


@pytest.mark.parametrize("optim", ["galore_adamw", "apollo_adamw"])
@pytest.mark.usefixtures("optimizers")
def test_low_rank_optimizers_project_their_targets_at_the_rates_of_the_paper(
    optim: str, inputs: Inputs, tmp_path: Path
) -> None:
    low = {"optim": optim, "optim_target_modules": [r".*blocks.*\.w1"], "optim_args": "rank=2"}
    plain, trainer = trainer_of(inputs, tmp_path / "plain"), trainer_of(inputs, tmp_path / "low", low)
    expected = {x: group for group in plain.create_optimizer().param_groups for x in group["param_names"]}
    trainer.train()
    groups = cast(Any, trainer.optimizer).param_groups
    assert sorted(name for group in groups for name in group["param_names"]) == sorted(expected)
    for group in groups:
        for name in group["param_names"]:
            assert group["initial_lr"] == expected[name]["lr"]
            assert group["weight_decay"] == expected[name]["weight_decay"]
            assert group.get("rank") == (2 if name.endswith("w1.weight") else None)


def test_8_bit_optimizers_keep_the_states_of_embeddings_in_32_bits(
    inputs: Inputs, optimizers: EmbeddingsIn32Bits, tmp_path: Path
) -> None:
    model = tiny.joint_model(vision=tiny.other_vision_config("clip_vision_model"))
    trainer = trainer_of(inputs, tmp_path, {"optim": "adamw_bnb_8bit"}, model=model)
    optimizer = cast(Any, trainer.create_optimizer())
    assert optimizer.options["optim_bits"] == 8
    assert {"vision/layer0/decay", "text/decay"} <= {group["name"] for group in optimizer.param_groups}
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    assert embeddings
    assert optimizers.told == [(module, "weight", {"optim_bits": 32}) for module in embeddings]


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_without_groups_are_refused(optim: str, inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"optim is {optim}, which updates weights at one rate"):
        Stage2Config(**settings(tmp_path, optim=optim))
    trainer = trainer_of(inputs, tmp_path, optimizer_cls_and_kwargs=(lambda: torch.optim.SGD, {}))
    with pytest.raises(ValueError, match="would make parameter groups of its own"):
        trainer.create_optimizer()


def test_the_batch_is_lowered_until_it_fits(inputs: Inputs, tmp_path: Path, monkeypatch: Any) -> None:
    sizes: list[int] = []
    step = Stage2Trainer.training_step

    def limited(self: Stage2Trainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(len(inputs["llm_embeds"]))
        if sizes[-1] > 4:
            raise RuntimeError("CUDA out of memory.")
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Stage2Trainer, "training_step", limited)
    stage2(inputs, tmp_path, auto_find_batch_size=True, per_device_train_batch_size=6).train()
    assert sizes[0] == 6
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-4] > 4 >= sizes[-3] == sizes[-1]


def test_a_search_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a model: a run trains one, without model_init"):
        trainer_of(inputs, tmp_path, model_init=tiny.joint_model)
    with pytest.raises(ValueError, match="Stage2Trainer needs a model: a run trains one"):
        trainer_of(inputs, tmp_path, model=None)


class Rates(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.seen.append(max(group["lr"] for group in optimizer.param_groups))


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_new_settings_of_the_optimizer_take_effect_in_a_resumed_run(
    schedule: str, inputs: Inputs, tmp_path: Path
) -> None:
    def train(checkpoint: str | None = None, **changes: Any) -> tuple[list[float], Any]:
        rates = Rates()
        fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "lr_scheduler_type": schedule, **changes}
        trainer = trainer_of(inputs, tmp_path, fields, callbacks=[rates])
        trainer.train(resume_from_checkpoint=checkpoint)
        return rates.seen, trainer.optimizer

    whole, _ = train()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"learning_rate: 0.001 -> 0.01"):
        train(checkpoint, learning_rate=1e-2)
    changed, optimizer = train(checkpoint, learning_rate=1e-2, weight_decay=0.5, adam_beta1=0.5, resume_anyway=True)
    assert changed == pytest.approx([10 * rate for rate in whole[2:]])
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.5}
    assert {group["betas"][0] for group in optimizer.param_groups} == {0.5}
    assert json.loads((tmp_path / "out" / "checkpoint-6" / "settings.json").read_text())["learning_rate"] == 1e-2
    with pytest.raises(ValueError, match="goes on with the optimizer of"):
        train(checkpoint, optim="sgd", resume_anyway=True)
    with pytest.raises(ValueError, match="do not take effect in a resumed run with a ReduceLROnPlateau"):
        train(checkpoint, resume_anyway=True, **{**EVALUATED, "lr_scheduler_type": "reduce_lr_on_plateau"})


def test_several_gpus_without_a_launcher_are_one(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    devices = TrainingArguments._setup_devices.func

    def four(self: TrainingArguments) -> torch.device:
        device = devices(self)
        self._n_gpu = 4
        return device

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(four))
    args = Stage2Config(output_dir=str(tmp_path), use_cpu=True)
    assert args.n_gpu == 1
    assert args.train_batch_size == args.per_device_train_batch_size
    assert "training on 1 of 4 GPUs; start `torchrun --nproc_per_node 4" in caplog.text


@pytest.mark.parametrize("bf16", [False, True])
def test_retrieval_sets_are_measured_in_the_precision_of_training(
    bf16: bool, inputs: Inputs, tmp_path: Path, monkeypatch: Any
) -> None:
    found: list[bool] = []
    measure = lambda *_: found.append(torch.is_autocast_enabled("cpu")) or {"recall@1": 1.0}  # noqa: E731
    monkeypatch.setattr(Stage2Trainer, "measure", measure)
    own = {"own": RetrievalData.from_captions(ImageList([]), [])}
    assert trainer_of(inputs, tmp_path, {"bf16": bf16}, retrieval=own).evaluate()["eval_own_recall@1"] == 1.0
    assert found == [bf16]


def test_an_adapter_of_the_callers_own_is_trained_as_it_is(inputs: Inputs, tmp_path: Path) -> None:
    def with_adapter() -> LLM2CLIPTextModel:
        model = LLM2CLIPTextModel.from_pretrained(inputs.text)
        model.decoder = get_peft_model(model.decoder, LoraConfig(r=3, target_modules=["q_proj"]))
        return model

    model = with_adapter()
    Stage1Trainer(model=model, args=Stage1Config(**settings(tmp_path)))
    assert model.decoder.peft_config["default"].r == 3
    with pytest.raises(ValueError, match="lora_rank is 5, but the model has an adapter with 3"):
        Stage1Trainer(model=with_adapter(), args=Stage1Config(**settings(tmp_path), lora_rank=5))
    other: Any = get_peft_model(LLM2CLIPTextModel.from_pretrained(inputs.text), LoraConfig(target_modules=["q_proj"]))
    for lost in (other, other.get_base_model()):
        with pytest.raises(ValueError, match="an adapter of your own has to be on its decoder"):
            Stage1Trainer(model=lost, args=Stage1Config(**settings(tmp_path)))


def test_what_a_beginner_mixes_up_is_one_clear_error(inputs: Inputs, tmp_path: Path) -> None:
    made, text = stage2(inputs, tmp_path), LLM2CLIPTextModel.from_pretrained(inputs.text)
    other = LLM2CLIPModel.from_pretrained(tmp_path / "model", text_model=False)
    other.config.text_model_fingerprint = "0" * 32
    good = {"model": made.model, "args": Stage2Config(**settings(tmp_path)), "train_dataset": made.train_dataset}
    stores = {"cache": made.cache, "processing_class": made.processing_class}
    splits = datasets.DatasetDict({"a": datasets.Dataset.from_dict({})})
    cases: dict[str, dict[str, Any]] = {
        "needs args of type Stage2Config, not Stage1Config": {"args": Stage1Config(**settings(tmp_path))},
        "model is a LLM2CLIPTextModel, but stage 2 trains": {"model": text},
        "was made by .* but the text encoder in use": {"model": other, **stores},
        "open it with EmbeddingCache.open": {"cache": inputs.cache},
        "train_dataset has the splits a; give one": {"train_dataset": splits},
        "rows are eval_dataset": {"retrieval": {"a": [1]}},
    }
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=message):
            Stage2Trainer(**{**good, **changes})
    with pytest.raises(ValueError, match="stage 1 needs processing_class"):
        Stage1Trainer(text, Stage1Config(**settings(tmp_path)), None, [])
