"""What a Hugging Face Trainer takes besides its settings works in every stage, and nothing is written unasked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizerFast,
    CLIPProcessor,
    EarlyStoppingCallback,
    TrainerCallback,
    TrainingArguments,
)

from llm2clip import (
    LLM2CLIPModel,
    LLM2CLIPProcessor,
    LLM2CLIPTextModel,
    Stage1Trainer,
    Stage2Config,
    Stage2Trainer,
)
from llm2clip.data import Stage2Collator
from llm2clip.encoders.batches import ImageList
from llm2clip.evaluation.data import RetrievalData
from llm2clip.trainers import run_stage1
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.utils.files import read_json
from llm2clip.utils.settings import build_config
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.test_every_setting import mntp, settings, stage1, stage2
from tests.llm2clip.trainers.test_plain_datasets import MapRows, image_rows, joint_model, losses


def trainer_of(inputs: Inputs, folder: Path, changes: dict[str, Any] | None = None, **arguments: Any) -> Stage2Trainer:
    """A Trainer of stage 2 on plain rows."""
    name = joint_model(inputs, folder / "model")
    if "model_init" not in arguments:
        arguments["model"] = LLM2CLIPModel.from_pretrained(name, text_model=False)
    rows = MapRows(image_rows(LLM2CLIPModel.config_class.from_pretrained(name).text_config.hidden_size))
    if "eval_strategy" in (changes or {}):
        arguments["eval_dataset"] = rows
    return Stage2Trainer(args=Stage2Config(**settings(folder, **(changes or {}))), train_dataset=rows, **arguments)


@pytest.mark.parametrize("make", [stage1, stage2, mntp])
def test_training_alone_writes_nothing(make: Any, inputs: Inputs, tmp_path: Path) -> None:
    trainer = make(inputs, tmp_path)
    trainer.train()
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {".lock"}
    trainer.save_model()
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in written
    assert not written & {"README.md", "training_curves.png", "settings.json", "training_args.bin"}


@pytest.mark.parametrize("make", [stage1, stage2, mntp])
def test_a_function_computes_the_loss(make: Any, inputs: Inputs, tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def constant(outputs: dict[str, Tensor], labels: Any, num_items_in_batch: Any = None) -> Tensor:
        seen.append({name for name, value in outputs.items() if value is not None})
        return 3.0 + 0 * sum(value.sum() for value in outputs.values() if value is not None)

    trainer = make(inputs, tmp_path, logging_steps=1, gradient_accumulation_steps=2)
    trainer.compute_loss_func = constant
    trainer.train()
    assert losses(trainer) == pytest.approx([3.0] * 3)
    expected = {
        stage1: {"anchor", "positive", "negative", "logit_scale"},
        stage2: {"image_embeds", "text_embeds", "logit_scale"},
        mntp: {"last_hidden_state"},
    }
    assert seen[0] == expected[make]


@pytest.mark.parametrize("make", [stage1, stage2])
def test_an_own_loss_is_one_method(make: Any, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[Any] = []

    def loss(self: Any, embeds: Any, logit_scale: Tensor, logit_bias: Any, ids: Any) -> Tensor:
        shapes.append([tuple(value.shape) for value in embeds.values()])
        return sum(value.square().mean() for value in embeds.values()) / logit_scale

    monkeypatch.setattr(Stage1Trainer if make is stage1 else Stage2Trainer, "contrastive_loss", loss)
    trainer = make(inputs, tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert len(shapes) == 3
    assert any(not value.equal(before[name]) for name, value in trainer.model.state_dict().items())


def test_an_own_optimizer_gets_the_groups_of_the_paper(inputs: Inputs, tmp_path: Path) -> None:
    trainer = trainer_of(inputs, tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"momentum": 0.5}))
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)  # type: ignore[union-attr]
    groups = trainer.optimizer.param_groups  # type: ignore[union-attr]
    assert {group["momentum"] for group in groups} == {0.5}
    assert {"vision/layer0/decay", "text/decay"} <= {group["name"] for group in groups}


def test_the_batch_is_lowered_until_it_fits(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of data sets of this package, which make their own batches."""
    sizes: list[int] = []
    step = Stage2Trainer.training_step

    def limited(self: Stage2Trainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(len(inputs["llm_embeds"]))
        if sizes[-1] > 4:
            raise RuntimeError("CUDA out of memory.")
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Stage2Trainer, "training_step", limited)
    stage2(inputs, tmp_path, auto_find_batch_size=True, per_device_train_batch_size=16).train()
    assert sizes[0] == 16
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-4] > 4 >= sizes[-3] == sizes[-1]


def test_every_model_of_a_search_is_prepared(inputs: Inputs, tmp_path: Path) -> None:
    name = joint_model(inputs, tmp_path / "own")
    made: list[LLM2CLIPModel] = []

    def model() -> LLM2CLIPModel:
        made.append(LLM2CLIPModel.from_pretrained(name))
        return made[-1]

    changes = {"freeze_vision_layers": 1, "feature_dropout": 0.25, "eval_strategy": "steps", "eval_steps": 3}
    trainer = trainer_of(inputs, tmp_path, changes, model_init=model)
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-3)},
        lambda metrics: metrics["eval_loss"],
        n_trials=2,
    )
    assert best.hyperparameters["learning_rate"] > 0  # type: ignore[union-attr]
    assert len(made) == 3
    for one in made[1:]:
        assert one.config.feature_dropout == 0.25
        assert not any(weight.requires_grad for weight in one.text_model.parameters())
        assert not any(weight.requires_grad for weight in one.vision_model.blocks[0].parameters())
        assert all(weight.requires_grad for weight in one.vision_model.blocks[1].parameters())


def test_callbacks_are_restored_from_a_checkpoint(inputs: Inputs, tmp_path: Path) -> None:
    shared = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "logging_steps": 1, "eval_strategy": "steps"}
    shared |= {"eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    shared |= {"restore_callback_states_from_checkpoint": True}

    def train(checkpoint: str | None) -> list[float]:
        stop = EarlyStoppingCallback(early_stopping_patience=50)
        trainer = trainer_of(inputs, tmp_path, shared, callbacks=[stop])
        trainer.train(resume_from_checkpoint=checkpoint)
        return losses(trainer)

    whole = train(None)
    assert train(str(tmp_path / "out" / "checkpoint-4")) == pytest.approx(whole, abs=1e-5)


class Rates(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.seen.append(max(group["lr"] for group in optimizer.param_groups))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
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
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 3}
    with pytest.raises(ValueError, match="do not take effect in a resumed run with a ReduceLROnPlateau"):
        train(checkpoint, resume_anyway=True, **plateau)


def test_a_moved_llm_and_other_grace_seconds_are_the_same_run(inputs: Inputs, tmp_path: Path) -> None:
    llm = tiny.save_llm(tmp_path / "llm")
    fields = {**tiny.stage1_fields(tmp_path / "run", llm), "max_steps": 4, "save_steps": 2}
    run_stage1.run(build_config(Stage1Recipe, fields))
    expected = LLM2CLIPTextModel.from_pretrained(tmp_path / "run").state_dict()
    (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").unlink()
    (tmp_path / "llm").rename(tmp_path / "moved")
    moved = {**fields, "model_name_or_path": str(tmp_path / "moved"), "grace_seconds": 12.0}
    run_stage1.run(build_config(Stage1Recipe, moved), resume=True)
    found = LLM2CLIPTextModel.from_pretrained(tmp_path / "run").state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0)


def test_an_image_processor_gets_the_tokenizer_of_the_llm(inputs: Inputs, tmp_path: Path) -> None:
    clip = CLIPProcessor(AutoImageProcessor.from_pretrained(inputs.vision), AutoTokenizer.from_pretrained(inputs.text))
    for given in (clip, clip.image_processor):
        trainer = trainer_of(inputs, tmp_path, processing_class=given)
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        processor = AutoProcessor.from_pretrained(tmp_path / "saved")
        assert isinstance(processor, LLM2CLIPProcessor)
        expected = AutoTokenizer.from_pretrained(inputs.text)("a dog")["input_ids"]
        assert processor(text=["a dog"])["input_ids"][0] == expected


def test_the_model_gets_the_tokens_that_it_knows(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog"]))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    assert "token_type_ids" in tokenizer("a dog")
    batch = Stage2Collator(processor=tokenizer)([{"pixel_values": torch.zeros(3, 28, 28), "caption": "a dog"}])
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "skipped"}


def test_several_gpus_without_a_launcher_are_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
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


def test_a_checkpoint_says_what_it_was_trained_on(inputs: Inputs, tmp_path: Path) -> None:
    trainer = stage2(inputs, tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    assert read_json(tmp_path / "out" / "checkpoint-3" / "run_state.json")["inputs"].keys() == {
        "rows of the training data",
        "content of the training data",
        "text encoder",
        "image processor",
    }


def test_an_online_llm_keeps_no_graph(inputs: Inputs, tmp_path: Path) -> None:
    """With activation checkpointing, transformers asks for gradients of every model's inputs, the frozen LLM's too."""
    name = joint_model(inputs, tmp_path / "model")
    model, processor = LLM2CLIPModel.from_pretrained(name), AutoProcessor.from_pretrained(name)
    with_gradient: list[bool] = []
    model.text_model.register_forward_hook(lambda *args: with_gradient.append(torch.is_grad_enabled()))
    rows = MapRows([{"pixel_values": torch.randn(3, 28, 28), "caption": f"thing {n}"} for n in range(16)])
    args = Stage2Config(**settings(tmp_path, activation_checkpointing=True))
    Stage2Trainer(model, args, train_dataset=rows, processing_class=processor).train()
    assert with_gradient == [False] * 3


@pytest.mark.parametrize("bf16", [False, True])
def test_retrieval_sets_are_measured_in_the_precision_of_training(
    bf16: bool, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found: list[bool] = []
    monkeypatch.setattr(
        Stage2Trainer, "measure", lambda *_: found.append(torch.is_autocast_enabled("cpu")) or {"recall@1": 1.0}
    )
    trainer = trainer_of(
        inputs, tmp_path, {"bf16": bf16}, retrieval={"own": RetrievalData.from_captions(ImageList([]), [])}
    )
    with caplog.at_level("INFO"):
        assert trainer.evaluate()["eval_own_recall@1"] == 1.0
    assert found == [bf16]
    assert ("Measuring retrieval sets in bf16" in caplog.text) == bf16


class Halved(Stage2Trainer):
    """A subclass with an argument of its own."""

    def __init__(self, *args: Any, factor: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factor = factor

    def contrastive_loss(self, *args: Any) -> Tensor:
        return self.factor * super().contrastive_loss(*args)


def test_a_warm_start_in_python_is_that_of_the_class_and_can_be_stopped(inputs: Inputs, tmp_path: Path) -> None:
    def make() -> Stage2Trainer:
        made = stage2(inputs, tmp_path, warm_start={"max_steps": 4, "save_strategy": "steps", "save_steps": 2})
        options = {"processing_class": made.processing_class, "cache": made.cache, "callbacks": [seen]}
        return Halved(made.model, made.args, None, made.train_dataset, factor=0.5, **options)  # type: ignore[arg-type]

    seen = Rates()
    step = Stage2Trainer.training_step
    with pytest.MonkeyPatch.context() as patch:

        def interrupted(self: Stage2Trainer, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        patch.setattr(Stage2Trainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make().train()
    assert (tmp_path / "out" / "warm_start" / "checkpoint-2").is_dir()
    seen.seen.clear()
    make().train()
    assert len(seen.seen) == 2 + 3, "the rest of the first part, and the run"
    make().train()
    assert len(seen.seen) == 2 + 3 + 3, "the first part is finished"


def test_a_stream_is_resumed_twice(inputs: Inputs, tmp_path: Path) -> None:
    """Its settings in a checkpoint are those that were given, whatever the Trainer skips itself."""
    from tests.llm2clip.trainers.test_stage2_captions import embedded, source, write_tars
    from tests.llm2clip.trainers.test_stream_resume import run

    tars = write_tars(tmp_path / "tars")
    embedded(inputs, Path(), source(tars), output_dir="")
    changes: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    run(tmp_path / "run", inputs, tars, max_steps=3, **changes)
    for _ in range(2):
        (tmp_path / "run" / "checkpoint-3" / "trainer_state.json").unlink()
        run(tmp_path / "run", inputs, tars, resume=True, max_steps=3, **changes)


def test_saving_again_replaces_the_list_of_files(inputs: Inputs, tmp_path: Path) -> None:
    trainer = stage1(inputs, tmp_path)
    trainer.fit()
    (tmp_path / "out" / ".llm2clip.json").write_text("{}")
    trainer.save_model()
    assert not (tmp_path / "out" / ".llm2clip.json").exists()


def test_rows_to_evaluate_have_the_columns_of_those_to_train_on(inputs: Inputs, tmp_path: Path) -> None:
    made = stage2(inputs, tmp_path)
    rows = datasets.load_dataset("parquet", data_files=f"{tiny.CONCEPTS}/train.parquet", split="train[:8]")
    renamed = rows.rename_columns({"image": "photo", "caption": "title"})
    args = Stage2Config(**settings(tmp_path, image_column="photo", caption_column="title"))
    options: dict[str, Any] = {"processing_class": made.processing_class, "cache": made.cache}
    trainer = Stage2Trainer(made.model, args, None, renamed, renamed, **options)
    assert trainer.evaluate()["eval_num_images"] == 8


def test_masks_of_short_rows_may_all_miss(inputs: Inputs, tmp_path: Path) -> None:
    trainer = mntp(inputs, tmp_path, mlm_probability=1e-9, logging_steps=1)
    trainer.train()
    assert losses(trainer) == [0.0] * 3
