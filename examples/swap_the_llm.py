"""Give a model another LLM: a new adapter is trained, image embeddings and an index of them stay as they are.

python examples/swap_the_llm.py --llm Qwen/Qwen2.5-0.5B

Stage 2 with MODEL as the vision tower and LLM as the text tower lets the vision tower learn from the new LLM too.
"""

from __future__ import annotations

import torch
from common import example_parser, parse, pictures
from torch.nn import functional as F
from transformers import AutoProcessor

from llm2clip import LLM2CLIPModel, LLM2CLIPProcessor, clip_loss, from_vision_text_pretrained, open_text_tower

KEPT = (
    *("projection_dim", "visual_projection", "visual_projection_bias", "visual_head", "visual_head_expansion"),
    *("vision_pooling", "vision_layers", "standardize_vision"),
)


def main() -> None:
    parser = example_parser(__doc__)
    parser.add_argument("--llm", default="runs/quickstart/raw", help="the other LLM: Hub id or folder (%(default)s)")
    parser.add_argument("--output-dir", default="runs/other_llm", help="(%(default)s)")
    arguments = parse(parser, models=("model", "llm"))

    old = LLM2CLIPModel.from_pretrained(arguments.model, text_model=False).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    llm, tokenizer = open_text_tower(arguments.llm)
    kept = {name: getattr(old.config, name) for name in KEPT}
    new = from_vision_text_pretrained(old.vision_model, llm, **kept).eval()
    new.visual_projection, new.visual_standardization = old.visual_projection, old.visual_standardization

    data = pictures("train").shuffle(seed=0).select(range(600))
    images = new.encode_image(data["image"][:], processor)
    texts = llm.eval().encode(data["caption"][:], tokenizer)
    optimizer = torch.optim.AdamW([*new.text_adapter.parameters(), new.logit_scale], lr=3e-4, weight_decay=0.1)
    for step in range(101):
        rows = torch.randperm(len(images))[:128]
        adapted = F.normalize(new.get_text_features(llm_embeds=texts[rows]).pooler_output, dim=-1)
        loss = clip_loss(images[rows], adapted, new.logit_scale.exp())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    new.save_pretrained(arguments.output_dir, save_text_model=True)
    LLM2CLIPProcessor(processor.image_processor, tokenizer).save_pretrained(arguments.output_dir)
    print(f"{arguments.output_dir}: the model with {arguments.llm}, for AutoModel and the other examples")


if __name__ == "__main__":
    main()
