"""Publish a model: build a self-contained folder and upload it to the Hub in one commit.

Log in with `hf auth login` first.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import example_parser, parse

from llm2clip import build_folder, push_folder


def main() -> None:
    parser = example_parser(__doc__)
    parser.add_argument("--repo-id", help="Hub repo to upload to: OWNER/NAME")
    parser.add_argument("--license", help="license of the weights (default: that of the models that it was made from)")
    parser.add_argument("--private", action="store_true", help="create the repo as private")
    arguments = parse(parser)
    if arguments.repo_id is None:
        parser.error("give the repo to upload to: --repo-id OWNER/NAME")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / arguments.repo_id.split("/")[-1]
        built = build_folder(arguments.model, folder, license=arguments.license)
        print(
            f"built {folder.name}: {built['megabytes']} MB; outputs in a new process differ by {built['difference']}"
        )
        # The build has loaded the folder in a process without this package.
        pushed = push_folder(folder, arguments.repo_id, private=arguments.private, check=False)
        print(f"pushed: {pushed['repo']}")


if __name__ == "__main__":
    main()
