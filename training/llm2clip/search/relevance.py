"""How much better a text fits a result than everyday captions do, and a cut-off by that.

A score says little alone: a model has a usual level of its own, and some images are near to any text. So the scores of
results are compared with those that everyday captions have with the same images.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import numpy as np

from llm2clip.encoders import Encoder
from llm2clip.search.ranking import Ranked
from llm2clip.search.results import SearchResult
from llm2clip.store import Store, StoreError, StoreManifest, build_store
from llm2clip.store.store import caption_keys

logger = logging.getLogger(__name__)

CAPTIONS = Path(__file__).with_name("background_captions.txt")
# Results whose scores with the everyday captions are compared with; a search reads at least so many.
COMPARED = 10
# By how many standard deviations a relevant score exceeds the mean of the everyday captions; it was chosen on the
# bundled drawings, and commit 4c6e2ef0 has the figures in docs/search.md.
LEAST = 3.0


def background_rows(encoder: Encoder, folder: Path | None) -> np.ndarray:
    """Embed the everyday captions: unit rows, float32 `(captions, width)`.

    Args:
        folder: The folder of the index, beside which they are stored, since an LLM takes minutes for them on a CPU;
            None embeds them anew.
    """
    captions = CAPTIONS.read_text(encoding="utf-8").splitlines()
    if folder is None:
        return encoder.encode_text(captions, show_progress_bar=True).numpy()
    keys, fingerprint, folder = caption_keys(captions), encoder.text_fingerprint(), folder.resolve()
    identity = {"fingerprint": fingerprint, "model_dtype": encoder.dtype}
    place = folder.with_name(f"{folder.name}_background") / f"{fingerprint}-{encoder.dtype}"
    manifest = StoreManifest(
        kind="background", encoder=encoder.name, identity=identity, width=encoder.width, dtype="float32"
    )
    with contextlib.suppress(OSError, StoreError):
        known = Store.open(place)
        if known.manifest.difference(manifest) is None and (known.find(keys) >= 0).all():
            return known.read(known.find(keys)).numpy()
    try:
        made: Store = build_store(
            place,
            keys,
            manifest,
            lambda rows: encoder.encode_text_parts([captions[row] for row in rows]),
            title="Everyday captions",
        )
    except OSError as error:
        logger.warning("the everyday captions are not stored, and embedded again by the next search: %s", error)
        return background_rows(encoder, None)
    return made.read(made.find(keys)).numpy()


def keep_relevant(ranked: Ranked, background: np.ndarray) -> list[SearchResult]:
    """Leave out the results that do not fit a query clearly better than everyday captions do.

    All get their `relevance`: by how many standard deviations the score exceeds the mean of those that the everyday
    captions have with the first `COMPARED` results.

    Args:
        background: Unit rows `(captions, width)`.
    """
    scores = ranked.embeds[:COMPARED] @ background.T.astype(np.float64)
    for result in ranked.results:
        result.relevance = float((result.score - scores.mean()) / max(scores.std(), 1e-12))
    return [result for result in ranked.results if result.relevance is not None and result.relevance >= LEAST]
