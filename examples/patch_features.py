"""The vision tower's patch features: the states of every layer, and a picture of the last one's main directions.

python examples/patch_features.py
python examples/patch_features.py --image photo.jpg --layer -2 --output photo_patches.png
"""

from __future__ import annotations

import torch
from common import example_parser, parse, pictures
from PIL import Image
from transformers import AutoImageProcessor

from llm2clip import LLM2CLIPVisionModelWithProjection


def main() -> None:
    parser = example_parser(__doc__)
    parser.add_argument("--image", help="an image file; without it a bundled picture")
    parser.add_argument("--layer", type=int, default=-1, help="whose states are drawn (%(default)s)")
    parser.add_argument("--output", default="patch_features.png", help="the picture (%(default)s)")
    arguments = parse(parser)

    # The vision half alone: neither the adapter nor the LLM is read.
    model = LLM2CLIPVisionModelWithProjection.from_pretrained(arguments.model).eval()
    processor = AutoImageProcessor.from_pretrained(arguments.model, backend="pil")
    image = Image.open(arguments.image) if arguments.image else pictures("test")["image"][213]
    pixels = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(pixel_values=pixels, output_hidden_states=True)
    print(f"pixels {tuple(pixels.shape)}; image embedding {tuple(output.pooler_output.shape)}")
    for layer, states in enumerate(output.hidden_states):
        print(f"hidden_states[{layer}] {tuple(states.shape)}, mean length of a token {states.norm(dim=-1).mean():.2f}")

    # Patches are the last tokens of a row; before them may stand a class token and registers.
    height, width = (size // model.config.vision_config.patch_size for size in pixels.shape[-2:])
    patches = output.hidden_states[arguments.layer][0, -height * width :]
    directions = torch.pca_lowrank(patches, q=3)[2]
    colours = (patches - patches.mean(dim=0)) @ directions
    colours = (colours - colours.amin(dim=0)) / (colours.amax(dim=0) - colours.amin(dim=0))
    size = (336, 336)
    picture = Image.new("RGB", (2 * size[0], size[1]))
    picture.paste(image.convert("RGB").resize(size), (0, 0))
    grid = Image.fromarray((255 * colours).byte().view(height, width, 3).numpy())
    picture.paste(grid.resize(size, Image.Resampling.NEAREST), (size[0], 0))
    picture.save(arguments.output)
    print(f"{arguments.output}: the image, and its {height} x {width} patches coloured by their main directions")


if __name__ == "__main__":
    main()
