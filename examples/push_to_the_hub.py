"""Publish a model: a self-contained folder, loaded by a process without this package, then one commit on the Hub.

Log in with `hf auth login` first.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import example_parser, parse

from llm2clip import build_folder, push_folder


def main() -> None:
    parser = example_parser(__doc__)
    parser.add_argument("--repo-id", help="where it goes: OWNER/NAME")
    parser.add_argument("--license", default="apache-2.0", help="licence of the weights (%(default)s)")
    parser.add_argument("--private", action="store_true", help="make a new repo private")
    arguments = parse(parser)
    if arguments.repo_id is None:
        parser.error("say where it goes: --repo-id OWNER/NAME")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / arguments.repo_id.split("/")[-1]
        built = build_folder(arguments.model, folder, license=arguments.license)
        print(f"built {folder.name}: {built['megabytes']} MB; a new process's outputs differ by {built['difference']}")
        # It has just been loaded in a process without this package.
        pushed = push_folder(folder, arguments.repo_id, private=arguments.private, validate=False)
        print(f"pushed: {pushed['repo']}")


if __name__ == "__main__":
    main()
