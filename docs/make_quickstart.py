"""Write the result of a quickstart into docs/results, its table into docs/quickstart.md, three rows into README.md.

python docs/make_quickstart.py [RUN]    RUN is a finished `runs/quickstart` of a checkout, whose commit is noted;
                                       without it, only the tables are written.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs" / "results" / "quickstart.json"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "quickstart.md"
TABLE = re.compile(
    r"(?<=<!-- quickstart: made by docs/make_quickstart\.py -->\n).*?(?=<!-- /quickstart -->)", re.DOTALL
)
KEPT = ("text_encoders", "best_text_encoder", "caption_retrieval", "image_retrieval", "seconds", "machine", "protocol")
SETTINGS = ("profile", "seed", "llm", "vision_model", "embedding_model", "stage1", "stage2")


def reduced(results: dict[str, Any], commit: str) -> dict[str, Any]:
    """Return what is committed of a `results.json`, and the commit that made it."""
    typed = {name: value for name, value in results["typed_queries"].items() if name != "results"}
    settings = {name: results["settings"][name] for name in SETTINGS}
    settings |= {name: Path(settings[name]).name for name in ("llm", "vision_model", "embedding_model")}
    return {
        "command": "make quickstart",
        "commit": commit,
        "settings": settings,
        **{name: results[name] for name in KEPT},
        "typed": typed,
    }


def recalls(metrics: dict[str, Any], prefix: str = "") -> str:
    """Format R@1, 5 and 10 in percent."""
    return " / ".join(f"{100 * metrics[f'{prefix}recall@{k}']:.1f}" for k in (1, 5, 10))


def table(results: dict[str, Any]) -> str:
    """Return the table, and a line that says where it is from."""
    lines = [
        "| text encoder | word → definition | text → image | image → text |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row, metrics in results["image_retrieval"].items():
        captions = results["caption_retrieval"].get(row)
        cells = [recalls(captions["lemma_to_gloss"]) if captions else ""]
        cells += [recalls(metrics, f"{way}_") for way in ("text_to_image", "image_to_text")]
        title = row.strip() if captions else f"... {row.strip().partition(',')[0]}"
        lines.append(f"| {title} | {' | '.join(cells)} |")
    typed, machine = results["typed"], results["machine"]
    lines += [
        "",
        f"R@1 / 5 / 10 in %, `make quickstart`, commit {results['commit']}, seed {results['settings']['seed']}, "
        f"{machine['threads']} threads of {machine['processor']}. Of {typed['queries']} everyday queries, the best "
        f"model's first picture is right for {typed['first']}, and one of its first "
        f"{typed['shown']} for {typed['found']}.",
    ]
    return "\n".join(lines) + "\n"


def summary(results: dict[str, Any]) -> str:
    """Return R@10 of each text encoder, in English."""
    rows = results["image_retrieval"]
    lines = ["| text encoder | text → image, R@10 |", "| --- | ---: |"]
    lines += [f"| {name} | {100 * rows[name]['text_to_image_recall@10']:.1f} |" for name in results["text_encoders"]]
    return "\n".join(lines) + "\n"


def pages(results: dict[str, Any]) -> dict[Path, str]:
    """Return the pages with their tables, by their path."""
    found = {}
    for path, text in ((README, summary(results)), (PAGE, table(results))):
        page = path.read_text(encoding="utf-8")
        place = TABLE.search(page)
        assert place, f"{path} has no place for its table"
        found[path] = page[: place.start()] + text + page[place.end() :]
    return found


def main() -> None:
    """Write the files."""
    if len(sys.argv) > 1:
        results = json.loads((Path(sys.argv[1]) / "results.json").read_text(encoding="utf-8"))
        if results["seconds"] is None:
            sys.exit(f"{sys.argv[1]} was continued: give a run that did all of its steps at once.")
        git = ["git", "-C", sys.argv[1], "rev-parse", "--short=8", "HEAD"]
        commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
        RESULT.write_text(json.dumps(reduced(results, commit), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    results = json.loads(RESULT.read_text(encoding="utf-8"))
    for path, page in pages(results).items():
        path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
