"""Command-line options and bundled pictures that all examples use."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import set_seed

DATA = Path(__file__).parent / "data" / "concepts"


def example_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option `--model`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/quickstart/llm2clip", help="Hub id or folder (%(default)s)")
    return parser


def parse(
    parser: argparse.ArgumentParser, models: tuple[str, ...] = ("model",), words: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse the options, check that the models exist, and seed the random number generators."""
    set_seed(0)
    arguments = parser.parse_args(words)
    for name in models:
        value = getattr(arguments, name)
        if not Path(value).is_dir() and value.count("/") != 1:
            parser.error(
                f"no model in {value}: run `make quickstart`, or give --{name.replace('_', '-')} a folder or Hub id"
            )
    return arguments


def pictures(split: str) -> Dataset:
    """Load the bundled captioned drawings (see data/README.md)."""
    return load_dataset(str(DATA), split=split)
