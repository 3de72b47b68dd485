"""Fine-tune a model on a folder of captioned pictures of your own, on a CPU, and measure it before and after.

python examples/fine_tune_on_a_folder.py                       # on a sample folder, which it writes first
python examples/fine_tune_on_a_folder.py --data my_pictures    # test/ and train/, each with pictures and metadata.jsonl,
                                                               # whose lines are {"file_name": "1.jpg", "caption": "..."}
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from datasets import load_dataset

from llm2clip_training import cli

CONCEPTS = Path(__file__).parent / "data" / "concepts"
# One artist's drawings for training, another's of the same concepts for the test.
SAMPLE = {"train": "emoji-twitter", "test": "emoji-google"}


def write_sample(folder: Path) -> None:
    for split, source in SAMPLE.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        with open(folder / split / "metadata.jsonl", "w") as metadata:
            for row in load_dataset(str(CONCEPTS), split="test"):
                if row["source"] == source:
                    name = Path(row["key"]).name + ".png"
                    row["image"].save(folder / split / name)
                    metadata.write(json.dumps({"file_name": name, "caption": row["caption"]}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/quickstart/llm2clip", help="Hub id or folder (%(default)s)")
    parser.add_argument("--data", type=Path, help="the folder of pictures; without it a sample is written")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/fine_tuned"), help="(%(default)s)")
    parser.add_argument("--recipe", default="stage2_folder_cpu", help="settings of the training (%(default)s)")
    arguments = parser.parse_args()
    if not Path(arguments.model).is_dir() and arguments.model.count("/") != 1:
        parser.error(f"no model in {arguments.model}: run `make quickstart`, or give --model a folder or Hub id")
    model, output, data = arguments.model, str(arguments.output_dir), arguments.data or arguments.output_dir / "sample"
    if arguments.data is None:
        write_sample(data)

    cache, sources = f"{output}/cache", json.dumps([{"path": str(data), "split": split} for split in SAMPLE])
    train, test = (json.dumps({"path": str(data), "split": split}) for split in SAMPLE)
    steps = [
        ["evaluate", model, "--data", test, "--output", f"{output}/before.json"],
        ["embed", "--text-model-name-or-path", model, "--sources", sources, "--output-dir", cache],
        ["stage2", arguments.recipe, "--model-name-or-path", model, "--sources", f"[{train}]"]
        + ["--embedding-cache", cache, "--output-dir", f"{output}/llm2clip"],
        ["evaluate", f"{output}/llm2clip", "--data", test, "--output", f"{output}/after.json"],
    ]
    for step in steps:
        print(f"\n$ llm2clip {' '.join(step)}", flush=True)
        if cli.main(step):
            return 1
    before, after = (json.loads(Path(output, f"{name}.json").read_text()) for name in ("before", "after"))
    for metric in ("text_to_image_recall@1", "text_to_image_recall@10", "image_to_text_recall@1"):
        print(f"{metric}: {before[metric]:.1%} before, {after[metric]:.1%} after")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
