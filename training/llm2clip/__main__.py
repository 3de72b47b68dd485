"""Run the `llm2clip` command as `python -m llm2clip`, also under `torchrun` and `accelerate launch`."""

import sys

from llm2clip.cli import main

sys.exit(main())
