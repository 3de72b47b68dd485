"""Give a model another vision tower: a new projection is trained, caption embeddings stay as they are.

python examples/swap_the_vision_tower.py --vision-model facebook/dinov2-small

CLIP, SigLIP 2, DINOv2, EVA02 and others fit. Stage 2 with MODEL as the text tower trains the new tower as well.
"""

from __future__ import annotations

import torch
from common import example_parser, parse, pictures
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoProcessor

from llm2clip import LLM2CLIPModel, LLM2CLIPProcessor, clip_loss, from_vision_text_pretrained

TOWER = "runs/quickstart/weights/vit-small-14-11-layers"
KEPT = ("projection_dim", "adapter_num_layers", "adapter_expansion", "adapter_normalize", "center_text")


def main() -> None:
    parser = example_parser(__doc__)
    parser.add_argument("--vision-model", default=TOWER, help="the other tower: Hub id or folder (%(default)s)")
    parser.add_argument("--output-dir", default="runs/other_vision_tower", help="(%(default)s)")
    arguments = parse(parser, models=("model", "vision_model"))

    old = LLM2CLIPModel.from_pretrained(arguments.model).eval()
    tokenizer = AutoProcessor.from_pretrained(arguments.model).tokenizer
    processor = LLM2CLIPProcessor(AutoImageProcessor.from_pretrained(arguments.vision_model), tokenizer)
    kept = {name: getattr(old.config, name) for name in KEPT}
    new = from_vision_text_pretrained(arguments.vision_model, old.text_model, **kept).eval()
    new.text_adapter, new.logit_scale = old.text_adapter, old.logit_scale

    data = pictures("train").shuffle(seed=0).select(range(600))
    texts = new.encode_text(data["caption"][:], processor)
    pixels = processor(images=data["image"][:], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        pooled = torch.cat([new.get_vision_features(batch) for batch in pixels.split(32)])
    optimizer = torch.optim.AdamW(new.visual_projection.parameters(), lr=3e-3, weight_decay=0.1)
    for step in range(101):
        rows = torch.randperm(len(pooled))[:128]
        projected = F.normalize(new.get_image_features(vision_features=pooled[rows]).pooler_output, dim=-1)
        loss = clip_loss(projected, texts[rows], new.logit_scale.detach().exp())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    new.save_pretrained(arguments.output_dir, save_text_model=True)
    processor.save_pretrained(arguments.output_dir)
    print(f"{arguments.output_dir}: the model with {arguments.vision_model}, for AutoModel and the other examples")


if __name__ == "__main__":
    main()
