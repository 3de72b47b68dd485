"""Fine-tune a model on a folder of captioned pictures of your own, on a CPU, and measure it before and after.

python examples/fine_tune_on_a_folder.py                     # on a sample folder, which it writes first
python examples/fine_tune_on_a_folder.py --data my_pictures  # train/ and test/, each with pictures and metadata.jsonl:
                                                             # {"file_name": "1.jpg", "caption": "a red squirrel"} ...
"""

from __future__ import annotations

import json
from pathlib import Path

from common import example_parser, parse, pictures

from llm2clip_training import cli

# The sample: one artist's drawings for training, another's of the same concepts for the test.
SAMPLE = {"train": "emoji-twitter", "test": "emoji-google"}


def write_sample(folder: Path) -> None:
    for row in pictures("test"):
        for split in (split for split, source in SAMPLE.items() if source == row["source"]):
            (folder / split).mkdir(parents=True, exist_ok=True)
            name = Path(row["key"]).name + ".png"
            row["image"].save(folder / split / name)
            with open(folder / split / "metadata.jsonl", "a") as metadata:
                metadata.write(json.dumps({"file_name": name, "caption": row["caption"]}) + "\n")


def main() -> None:
    parser = example_parser(__doc__)
    parser.add_argument("--data", help="the folder of pictures; without it a sample is written")
    parser.add_argument("--output-dir", default="runs/fine_tuned", help="(%(default)s)")
    arguments = parse(parser)
    model, output = arguments.model, arguments.output_dir
    data = arguments.data or f"{output}/sample"
    if arguments.data is None and not Path(data).is_dir():
        write_sample(Path(data))

    tuned, cache = f"{output}/llm2clip", f"{output}/cache"
    train, test = f"{{path: {data}, split: train}}", f"{{path: {data}, split: test}}"
    embed = ["--text-model-name-or-path", model, "--sources", f"[{train}, {test}]", "--output-dir", cache]
    stage2 = ["--model-name-or-path", model, "--sources", f"[{train}]", "--embedding-cache", cache]
    stage2 += ["--output-dir", tuned, "--frozen-states-dir", f"{output}/vision_states"]
    commands = {"before": ["evaluate", model, "--data", test], "embed": ["embed", *embed]}
    commands |= {"stage2": ["stage2", "stage2_folder_cpu", *stage2], "after": ["evaluate", tuned, "--data", test]}
    for command in commands.values():
        print(f"\n$ llm2clip {' '.join(command)}", flush=True)
        if cli.main(command):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
