"""`python -m llm2clip` is the `llm2clip` command."""

import sys

from llm2clip.cli import main

sys.exit(main())
