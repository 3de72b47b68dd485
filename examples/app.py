"""A browser demo: search, zero-shot classification, heat maps, and two checkpoints side by side.

    python examples/app.py                                            # the quickstart's model
    python examples/app.py --compare runs/quickstart/stage2-raw       # beside the one that learned from the raw LLM
    python examples/app.py --model FOLDER_OR_HUB_ID --data MY_IMAGES  # another model, other images
    python examples/app.py --index runs/index/concepts                # an index that is already there

It is the command `llm2clip demo` (`--help` shows all settings); `llm2clip/demo/` is what it is made of.
"""

import sys

from llm2clip import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
