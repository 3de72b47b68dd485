"""Find pictures with a long caption, and what a text encoder that stops after 77 tokens (CLIP's) would have found.

python examples/long_caption_retrieval.py
python examples/long_caption_retrieval.py --caption "$(cat description.txt)" --top 3
"""

from __future__ import annotations

from common import example_parser, parse, pictures
from transformers import AutoModel, AutoProcessor

CAPTION = (
    "A small drawing in flat and friendly colours, of the kind that people put into messages to their friends when "
    "they have no time to write a sentence or do not find the right words. It was made for a phone, so that it stays "
    "clear at a very small size, and the outlines are soft and round, with only a few details, as in a book for very "
    "young children. What it shows is a penguin, a black and white bird with an orange beak and orange feet."
)


def main() -> None:
    parser = example_parser(__doc__)
    parser.add_argument("--caption", default=CAPTION, help="a text of any length")
    parser.add_argument("--top", type=int, default=5, help="how many pictures are shown")
    arguments = parse(parser)

    model = AutoModel.from_pretrained(arguments.model, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True)
    data = pictures("test").filter(lambda source: source == "emoji-google", input_columns="source")
    names, images = data["caption"][:], model.encode_image(data["image"][:], processor)

    tokens = processor.tokenizer(arguments.caption, add_special_tokens=False)["input_ids"]
    cut = processor.tokenizer.decode(tokens[:77])
    for title, caption in {f"all {len(tokens)} tokens": arguments.caption, "the first 77": cut}.items():
        scores = (images @ model.encode_text(caption, processor)[0]).topk(arguments.top)
        print(f"\n{title}, ending in “...{caption[-60:]}”")
        for score, row in zip(scores.values.tolist(), scores.indices.tolist(), strict=True):
            print(f"  {score:.3f}  {names[row]}")


if __name__ == "__main__":
    main()
