"""The stages equal the original training code: losses, gradients, optimizer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from llm2clip.data.sampling import EpochDataset, SampleIndex
from llm2clip.losses import hard_negative_info_nce
from llm2clip.trainers.mntp_trainer import masked_next_token_loss
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage1_trainer import Stage1Trainer
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.trainers.stage2_trainer import Stage2Trainer
from modeling_llm2clip import LLM2CLIPModel
from tests.builders import tiny
from tests.golden import FOLDER, Golden, load_golden, optimizer_settings
from tests.original import from_original


def save_decoder(golden: Golden, folder: Path) -> Path:
    config = AutoConfig.from_pretrained(FOLDER / golden.meta["hf_dir"])
    config.architectures = None
    config.save_pretrained(folder)
    save_file(golden.group("state"), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def stage1_inputs(golden: Golden) -> dict[str, dict[str, Tensor]]:
    roles = {"anchor": "q", "positive": "d", "negative": "n"}
    return {
        role: {
            "input_ids": golden[f"in/{name}/input_ids"],
            "attention_mask": golden[f"in/{name}/attention_mask"],
            "pooling_mask": golden[f"in/{name}/embed_mask"],
        }
        for role, name in roles.items()
    }


def test_stage1_loss_and_gradients(tmp_path: Path) -> None:
    golden = load_golden("supervised_step_a")
    decoder = AutoModel.from_pretrained(save_decoder(golden, tmp_path / "llm"), dtype="float32")
    model = tiny.wrapped(decoder)
    args = Stage1Recipe(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", lora_rank=0)
    trainer = Stage1Trainer(model=model, args=args)
    loss, embeds = trainer.compute_loss(model, stage1_inputs(golden), return_outputs=True)
    for role, name in (("anchor", "q"), ("positive", "d"), ("negative", "n")):
        golden.close(embeds[role], f"out/{name}/reps")
    golden.close(loss, "out/loss")
    loss.backward()
    parameters = dict(model.decoder.named_parameters())
    for name in golden.group("grad"):
        golden_close_gradient(golden, parameters[name].grad, name)


def golden_close_gradient(golden: Golden, actual: Tensor | None, name: str) -> None:
    assert actual is not None, name
    golden.close(actual, f"grad/{name}", "grad")


def test_stage1_with_lora(tmp_path: Path) -> None:
    golden = load_golden("supervised_step_a")
    decoder = AutoModel.from_pretrained(save_decoder(golden, tmp_path / "llm"), dtype="float32")
    model = tiny.wrapped(decoder)
    lora = golden.meta["info"]["lora"]
    (tmp_path / "lora").mkdir()
    save_file(golden.group("adapter"), tmp_path / "lora" / "adapter_model.safetensors")
    from peft import LoraConfig

    LoraConfig(r=lora["r"], lora_alpha=lora["lora_alpha"], target_modules=lora["target_modules"]).save_pretrained(
        tmp_path / "lora"
    )
    model.decoder = PeftModel.from_pretrained(model.decoder, tmp_path / "lora")
    inputs = stage1_inputs(golden)
    embeds = {role: model(**batch).pooler_output for role, batch in inputs.items()}
    golden.close(embeds["anchor"], "out/lora/q_reps")
    golden.close(hard_negative_info_nce(*embeds.values(), scale=50.0), "out/lora/loss")
    model.merge_adapter()
    merged = model(**inputs["anchor"]).last_hidden_state
    real = inputs["anchor"]["attention_mask"].bool()
    expected = golden["out/lora/merged_q_last_hidden_state"]
    torch.testing.assert_close(merged[real].detach(), expected[real], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("texts", ["grouped", "lines"])
@pytest.mark.parametrize("masking", ["default", "all_mask"])
def test_masked_next_token_prediction(texts: str, masking: str, tmp_path: Path) -> None:
    golden = load_golden("mntp_a")
    language_model = AutoModelForCausalLM.from_pretrained(save_decoder(golden, tmp_path), dtype="float32")
    model, head = tiny.wrapped(language_model.base_model), language_model.get_output_embeddings()
    states = model(
        golden[f"in/{texts}/{masking}/masked_input_ids"], golden[f"in/{texts}/attention_mask"]
    ).last_hidden_state
    expected = golden[f"out/{texts}/{masking}/logits"]
    real = golden[f"in/{texts}/attention_mask"][: len(expected)].bool()
    torch.testing.assert_close(head(states[: len(expected)])[real].detach(), expected[real], atol=1e-4, rtol=1e-4)
    loss = masked_next_token_loss(states, golden[f"in/{texts}/{masking}/labels"], head)
    golden.close(loss, f"out/{texts}/{masking}/loss")
    if (texts, masking) == ("grouped", "default"):
        loss.backward()
        parameters = dict(language_model.named_parameters())
        for name in golden.group("grad"):
            golden_close_gradient(golden, parameters[name].grad, name)


class GoldenSteps(EpochDataset):
    """The batches of the fixture in order."""

    def __init__(self, golden: Golden) -> None:
        steps = range(len(golden["out/loss"]))
        self.images = torch.cat([golden[f"in/step{step}/pixel_values"] for step in steps])
        self.texts = torch.cat([golden[f"in/step{step}/text_embeddings"] for step in steps])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: SampleIndex) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index.index], "llm_embeds": self.texts[index.index]}


class GoldenTrainer(Stage2Trainer):
    """Trains on the batches of the fixture in order and records losses and learning rates."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.losses: list[float] = []
        self.rates: list[list[float]] = []

    def get_train_dataloader(self) -> DataLoader:
        dataset: Any = self.train_dataset
        rows = [SampleIndex(0, row) for row in range(len(dataset))]
        return DataLoader(dataset, self.args.per_device_train_batch_size, sampler=rows, collate_fn=self.data_collator)

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().compute_loss(model, *args, **kwargs)
        self.losses.append(loss.item())
        self.rates.append(sorted({group["lr"] for group in self.optimizer.param_groups}))
        return loss


def test_six_optimizer_steps_of_stage2(tmp_path: Path) -> None:
    golden = load_golden("train_steps_a")
    original = golden.meta["config"]["args"]
    config, state = from_original(golden.group("state"), golden.meta["config"])
    model = LLM2CLIPModel(config, text_model=False)
    model.load_state_dict(state)
    args = Stage2Recipe(
        output_dir=str(tmp_path),
        embedding_cache="not opened here",
        max_steps=len(golden["out/loss"]),
        per_device_train_batch_size=len(golden["in/step0/pixel_values"]),
        **optimizer_settings(original),
        warmup_steps=original["warmup"],
        max_grad_norm=original["grad_clip_norm"],
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = GoldenTrainer(model=model, args=args, train_dataset=GoldenSteps(golden), data_collator=default_collate)
    trainer.train()
    torch.testing.assert_close(torch.tensor(trainer.losses), golden["out/loss"], atol=2e-4, rtol=1e-4)
    for ours, theirs in zip(trainer.rates, golden.meta["record"]["lrs"], strict=True):
        assert ours == pytest.approx(sorted(set(theirs)), rel=1e-9)
    _, final = from_original(golden.group("final"), golden.meta["config"])
    parameters = dict(model.named_parameters())
    assert parameters.keys() == final.keys()
    for name, expected in final.items():
        torch.testing.assert_close(
            parameters[name].detach(), expected, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
    differences = torch.cat([(parameters[name].detach() - final[name]).abs().flatten() for name in final])
    assert differences.mean() < golden.meta["tolerance"]["params"]["mean_abs"]
