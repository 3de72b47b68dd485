"""Find pictures with a long caption, and what a text encoder that stops after 77 tokens (CLIP's) would have found.

python examples/long_caption_retrieval.py
python examples/long_caption_retrieval.py --caption "$(cat description.txt)" --top 3
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModel, AutoProcessor

DATA = Path(__file__).parent / "data" / "concepts"
CAPTION = (
    "It had rained all morning, and we had nearly given up the idea of going to the zoo, when the sun came out and my "
    "daughter, who had been looking forward to this day for weeks, ran to the door with her yellow boots on. We took "
    "the tram, bought two tickets and an ice cream, and walked past the lions, who slept, to the one place that she "
    "wanted to see. There, on a rock beside the cold water, stood the animal of her dreams: a penguin, a black and "
    "white bird with an orange beak, which cannot fly but swims like a fish."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/quickstart/llm2clip", help="Hub id or folder (%(default)s)")
    parser.add_argument("--caption", default=CAPTION, help="a text of any length")
    parser.add_argument("--top", type=int, default=5, help="how many pictures are shown")
    arguments = parser.parse_args()
    if not Path(arguments.model).is_dir() and arguments.model.count("/") != 1:
        parser.error(f"no model in {arguments.model}: run `make quickstart`, or give --model a folder or Hub id")

    model = AutoModel.from_pretrained(arguments.model, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True)
    data = load_dataset(str(DATA), split="test").filter(
        lambda source: source == "emoji-google", input_columns="source"
    )
    names, pictures = data["caption"][:], model.encode_image(data["image"][:], processor)

    tokens = processor.tokenizer(arguments.caption, add_special_tokens=False)["input_ids"]
    cut = processor.tokenizer.decode(tokens[:77])
    for title, caption in {f"all {len(tokens)} tokens": arguments.caption, "the first 77": cut}.items():
        scores = (pictures @ model.encode_text(caption, processor)[0]).topk(arguments.top)
        print(f"\n{title}, ending in “...{caption[-60:]}”")
        for score, row in zip(scores.values.tolist(), scores.indices.tolist(), strict=True):
            print(f"  {score:.3f}  {names[row]}")


if __name__ == "__main__":
    main()
