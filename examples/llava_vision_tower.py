"""The vision tower in a LLaVA of transformers: its projector learns to let a frozen LLM name what the tower sees.

python examples/llava_vision_tower.py --llm HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import torch
from common import example_parser, parse, pictures
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, LlavaConfig
from transformers import AutoModelForImageTextToText as AutoLlava

from llm2clip import LLM2CLIPVisionModelWithProjection


def main() -> None:
    parser = example_parser(__doc__)
    parser.add_argument("--llm", default="runs/quickstart/weights/smollm2-135m-instruct", help="(%(default)s)")
    arguments = parse(parser, models=("model", "llm"))
    tower = LLM2CLIPVisionModelWithProjection.from_pretrained(arguments.model).vision_model
    image_processor = AutoImageProcessor.from_pretrained(arguments.model, backend="pil")
    llm = AutoModelForCausalLM.from_pretrained(arguments.llm, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.llm)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    llm.resize_token_embeddings(max(len(tokenizer), llm.config.vocab_size), mean_resizing=False)
    config = LlavaConfig(vision_config=tower.config, text_config=llm.config, vision_feature_layer=-1)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    llava = AutoLlava.from_config(config).eval()
    llava.model.vision_tower, llava.model.language_model, llava.lm_head = tower, llm.model, llm.lm_head
    llava.requires_grad_(False).model.multi_modal_projector.requires_grad_(True)

    data = pictures("test").select(range(18, 90, 3))
    pixels = image_processor(images=data["image"][:], return_tensors="pt")["pixel_values"]
    patches = llava.model.get_image_features(pixels[:1]).pooler_output[0].shape[0]
    prompt = "<image>" * patches + "a drawing of:"
    prompts = [f"{prompt} {caption}{tokenizer.eos_token}" for caption in data["caption"]]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    unlearned = (batch["input_ids"] == config.image_token_id) | (batch["attention_mask"] == 0)
    labels = batch["input_ids"].masked_fill(unlearned, -100)
    optimizer = torch.optim.AdamW(llava.model.multi_modal_projector.parameters(), lr=1e-3)
    for step in range(20):
        rows = torch.randperm(len(data))[:8]
        inputs = {name: values[rows] for name, values in batch.items()}
        loss = llava(**inputs, pixel_values=pixels[rows], labels=labels[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")
    start = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    answers = llava.generate(**start, pixel_values=pixels[:1], max_new_tokens=8)
    print(f"{data['caption'][0]}: the LLM reads{tokenizer.decode(answers[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
