"""The Space's entry: the demo of one model."""

import sys

from llm2clip.cli import main

MODEL = "{model}"

sys.exit(main(["demo", "--model", MODEL]))
