"""Fine-tune a model on a folder of captioned pictures of your own, on a CPU, and measure it before and after.

python examples/fine_tune_on_a_folder.py --data my_pictures  # without --data: on a sample folder that it writes first
my_pictures/ has train/ and test/, each with pictures and metadata.jsonl: {"file_name": "1.jpg", "caption": "a cat"}
"""

from __future__ import annotations

import json
import shlex
import tempfile
from pathlib import Path

from common import example_parser, parse, pictures

from llm2clip import main as llm2clip

# One artist's drawings for training, another's of the same concepts for the test.
SAMPLE = {"emoji-twitter": "train", "emoji-google": "test"}


def write_sample(destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent) as scratch:
        for row in pictures("test").filter(lambda source: source in SAMPLE, input_columns="source"):
            picture = Path(scratch, "sample") / SAMPLE[row["source"]] / f"{Path(row['key']).name}.png"
            picture.parent.mkdir(exist_ok=True, parents=True)
            row["image"].save(picture)
            with open(picture.parent / "metadata.jsonl", "a") as metadata:
                metadata.write(json.dumps({"file_name": picture.name, "caption": row["caption"]}) + "\n")
        Path(scratch, "sample").rename(destination)


def main() -> None:
    parser = example_parser(__doc__)
    parser.add_argument("--data", help="the folder of pictures; without it a sample is written")
    parser.add_argument("--output-dir", default="runs/fine_tuned", help="(%(default)s)")
    parser.add_argument("--batch-size", default=64, type=int, help="at most the number of pictures (%(default)s)")
    arguments = parse(parser)
    model, output = arguments.model, arguments.output_dir
    data, tuned, cache = arguments.data or f"{output}/sample", f"{output}/llm2clip", f"{output}/cache"
    if Path(tuned, "config.json").exists():
        parser.error(f"{tuned} is there already: give another --output-dir, or delete it")
    if not (arguments.data or Path(data).is_dir()):
        write_sample(Path(data))
    train, test = (json.dumps({"path": data, "split": split}) for split in ("train", "test"))
    embed = ["--text-model-name-or-path", model, "--sources", f"[{train}, {test}]", "--output-dir", cache]
    stage2 = ["--model-name-or-path", model, "--sources", f"[{train}]", "--embedding-cache", cache]
    stage2 += ["--output-dir", tuned, "--per-device-train-batch-size", str(arguments.batch_size)]
    test = ["--benchmark", test, "--output", f"{output}/results"]
    training = [["embed", *embed], ["stage2", "stage2_folder_cpu", *stage2]]
    for command in (["evaluate", model, *test], *training, ["evaluate", tuned, *test]):
        print(f"\n$ llm2clip {shlex.join(command)}", flush=True)
        if code := llm2clip(command):
            raise SystemExit(code)


if __name__ == "__main__":
    main()
