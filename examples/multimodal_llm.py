"""A multimodal LLM: a projector learns to hand the patches of a frozen vision tower to a frozen LLM, from questions.

python examples/multimodal_llm.py --train questions/train.parquet --test questions/test.parquet

Each file has the columns image, question and answer, and a column kind if the score of each kind is wanted. The model
has the parts of a LLaVA: tower, projector and LLM. It is an Aya Vision of transformers, whose projector also joins
neighbouring patches: with `--pool 2`, 2 x 2 of them are a token, and the LLM reads a quarter of the tokens.
`--resume` goes on from the last checkpoint. `AutoModelForImageTextToText` and `AutoProcessor` open the output folder;
if the tower is an EVA02, after `import modeling_llm2clip`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import example_parser, parse
from datasets import Dataset, load_dataset
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    LlavaProcessor,
    Trainer,
    TrainingArguments,
    set_seed,
)

from llm2clip import LLM2CLIPConfig, LLM2CLIPVisionModelWithProjection

PROMPT = "<image>{}\nAnswer:"


def build(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Join a tower and an LLM by a projector, the only part that is new and the only one that will train."""
    is_ours = isinstance(AutoConfig.from_pretrained(arguments.model), LLM2CLIPConfig)
    opener = LLM2CLIPVisionModelWithProjection if is_ours else AutoModel
    opened = opener.from_pretrained(arguments.model, dtype=torch.float32)
    tower = getattr(opened, "vision_model", opened)
    tower.config.patch_dropout = 0.0  # an EVA02 may leave out patches in training
    image_processor = AutoImageProcessor.from_pretrained(arguments.image_processor or arguments.model, backend="pil")
    llm = AutoModelForCausalLM.from_pretrained(arguments.llm, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.llm, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    llm.resize_token_embeddings(max(len(tokenizer), llm.config.vocab_size), mean_resizing=False)
    blank = image_processor(images=Image.new("RGB", (32, 32)), return_tensors="pt")["pixel_values"]
    side = blank.shape[-1] // tower.config.patch_size
    others = tower(blank).last_hidden_state.shape[1] - side**2
    if side % arguments.pool or others not in (0, 1):
        raise ValueError(f"--pool has to divide {side} patches a side, and {others} other tokens can be one at most.")
    llm.config.logit_scale = 1.0  # of Aya's own LLM, by which an Aya Vision multiplies the logits of any other one too
    config = AyaVisionConfig(
        vision_config=tower.config,
        text_config=llm.config,
        downsample_factor=arguments.pool,
        vision_feature_select_strategy="default" if others else "full",
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=llm.config.tie_word_embeddings,
    )
    model = AyaVisionForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model, model.lm_head = tower, llm.base_model, llm.lm_head
    model.requires_grad_(False).model.multi_modal_projector.requires_grad_(True)
    patch = tower.config.patch_size * arguments.pool
    return model, LlavaProcessor(image_processor, tokenizer, patch, vision_feature_select_strategy="full")


def collate(processor: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch whose loss is on the answers alone."""
    answers = [f" {row['answer']}{processor.tokenizer.eos_token}" for row in rows]
    texts = [PROMPT.format(row["question"]) + answer for row, answer in zip(rows, answers, strict=True)]
    # Padded on the left, so that all answers end where the rows end.
    batch = processor(images=[row["image"] for row in rows], text=texts, padding=True, return_tensors="pt")
    lengths = [len(ids) for ids in processor.tokenizer(answers, add_special_tokens=False)["input_ids"]]
    kept = max(lengths) + 1
    labels = batch["input_ids"][:, -kept:].clone()
    for row, length in enumerate(lengths):
        labels[row, : kept - length] = -100
    # No logits where there are no labels. With a number, torch would copy the frozen lm_head for every row.
    return {**batch, "labels": labels, "logits_to_keep": torch.arange(-kept, 0)}


class ProjectorTrainer(Trainer):
    """A Trainer that reads its checkpoints by `from_pretrained`: in files, weights of this model have other names."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        self.model.load_state_dict(saved.state_dict())


@torch.inference_mode()
def answer(model: Any, processor: Any, rows: Dataset, batch_size: int) -> list[str]:
    """Answer questions, each time by the most probable token."""
    answers: list[str] = []
    for batch in rows.iter(batch_size):
        prompts = [PROMPT.format(question) for question in batch["question"]]
        inputs = processor(images=batch["image"], text=prompts, padding=True, return_tensors="pt").to(model.device)
        made = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(made, skip_special_tokens=True)]
    return answers


def main(words: Sequence[str] | None = None) -> None:
    parser = example_parser(__doc__)
    parser.add_argument("--llm", default="runs/quickstart/weights/smollm2-135m-instruct", help="(%(default)s)")
    parser.add_argument("--image-processor", help="folder or Hub id, for pictures of another size than the model's")
    parser.add_argument("--train", default="questions/train.parquet", help="(%(default)s)")
    parser.add_argument("--test", default="questions/test.parquet", help="(%(default)s)")
    parser.add_argument("--output-dir", default="runs/multimodal_llm", help="(%(default)s)")
    parser.add_argument("--pool", type=int, default=2, help="patches a side that become a token (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--save-steps", type=int, default=100, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--resume", action="store_true", help="go on from the last saved step")
    arguments = parse(parser, models=("model", "llm"), words=words)
    data = load_dataset("parquet", data_files={"train": arguments.train, "test": arguments.test})
    set_seed(arguments.seed)
    model, processor = build(arguments)
    settings = TrainingArguments(
        output_dir=arguments.output_dir,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=arguments.steps // 20,
        bf16=arguments.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=arguments.seed,
        save_steps=arguments.save_steps,
        save_total_limit=2,
        logging_steps=10,
        remove_unused_columns=False,
        report_to="none",
    )
    collator = partial(collate, processor)
    trainer = ProjectorTrainer(model, settings, collator, data["train"], processing_class=processor)
    trainer.train(resume_from_checkpoint=arguments.resume)
    trainer.save_model()
    model.requires_grad_(True)  # torch would copy a frozen lm_head for every row
    with trainer.autocast_smart_context_manager():
        answers = answer(model.eval(), processor, data["test"], 4 * arguments.batch_size)
    right: dict[str, list[bool]] = {}
    for row, given in zip(data["test"].remove_columns("image"), answers, strict=True):
        right.setdefault(row.get("kind", "all"), []).append(given == row["answer"])
    scores = {kind: sum(found) / len(found) for kind, found in right.items()}
    for name, content in (("answers", answers), ("scores", scores)):
        Path(arguments.output_dir, f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for kind, score in scores.items():
        print(f"{kind}: {100 * score:.1f}% right")


if __name__ == "__main__":
    main()
