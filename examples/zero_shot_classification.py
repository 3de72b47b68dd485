"""Zero-shot classification: which of some labels describes a picture, with no training on any of them.

python examples/zero_shot_classification.py
python examples/zero_shot_classification.py --images cat.jpg dog.jpg --labels "a cat" "a dog" "a cat beside a dog"
"""

from __future__ import annotations

from common import example_parser, parse, pictures
from PIL import Image
from transformers import pipeline

# Rows of the test split: concepts that the quickstart's training never named.
ROWS = (19, 54, 67, 213, 326)
LABELS = ["a leaf", "a crocodile", "a penguin", "a train on a single rail", "a teddy bear", "a cup of tea"]


def main() -> None:
    parser = example_parser(__doc__)
    parser.add_argument("--images", nargs="+", help="image files; without them some bundled pictures")
    parser.add_argument("--labels", nargs="+", default=LABELS, help="any texts; a short sentence works best")
    arguments = parse(parser)

    if arguments.images:
        images = {name: Image.open(name) for name in arguments.images}
    else:
        rows = pictures("test").select(ROWS)
        images = {f"picture of: {row['caption']}": row["image"] for row in rows}

    classifier = pipeline("zero-shot-image-classification", arguments.model, trust_remote_code=True)
    for name, picture in images.items():
        # The labels go to the model as they are; the pipeline's own default is "This is a photo of {}."
        answers = classifier(picture, candidate_labels=arguments.labels, hypothesis_template="{}")
        print(f"\n{name}")
        for answer in answers[:3]:
            print(f"  {answer['score']:6.1%}  {answer['label']}")


if __name__ == "__main__":
    main()
