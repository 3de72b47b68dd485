"""What somebody would type, and which of the bundled test pictures are right for it: judged once, and committed."""

from __future__ import annotations

import json
from typing import Any

from llm2clip.quickstart.data import BUNDLED
from llm2clip.quickstart.image_steps import FinalModel
from llm2clip.search.top_k import top_k

FILE = "typed_queries.json"
SHOWN = 5


def search_typed(final: FinalModel) -> dict[str, Any]:
    """Search the test pictures with the queries of the file, whose right pictures are named by their captions.

    Returns:
        The number of `queries`; those whose `first` picture is right, and those with a right one `found` among the
        first `shown`; and of each query the rows that it finds, and whether they are right, as `results`.
    """
    asked = json.loads((BUNDLED / FILE).read_text(encoding="utf-8"))
    embeds = final.model.encode_text([one["query"] for one in asked], final.processor)
    results = []
    for one, found in zip(asked, top_k(embeds, final.image_embeds, SHOWN)[1].tolist(), strict=True):
        rows = [final.rows[image] for image in found]
        right = [bool(set(final.retrieval.captions_of(row)) & set(one["captions"])) for row in rows]
        results.append({"query": one["query"], "rows": rows, "right": right})
    return {
        "queries": len(results),
        "first": sum(one["right"][0] for one in results),
        "found": sum(any(one["right"]) for one in results),
        "shown": SHOWN,
        "results": results,
    }
