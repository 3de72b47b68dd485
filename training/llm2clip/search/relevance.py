"""How much better a text fits a result than everyday captions do, and a cut-off by that.

Scores of different queries cannot be compared: a long one scores low even where it is right, and some images score high
with anything. So each result is compared with the scores that everyday captions have with the same image.
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
# By how many standard deviations a relevant score exceeds the mean of the everyday captions; docs/search.md has what
# was measured.
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
    place = folder.with_name(f"{folder.name}_background") / fingerprint
    manifest = StoreManifest(
        kind="background", encoder=encoder.name, identity=identity, width=encoder.width, dtype="float32"
    )
    with contextlib.suppress(OSError, StoreError):
        known = Store.open(place)
        if known.manifest.difference(manifest) is None and (known.find(keys) >= 0).all():
            return known.read(known.find(keys)).numpy()
    try:
        made = build_store(
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

    Those that stay get their `relevance`.

    Args:
        background: Unit rows `(captions, width)`.
    """
    scores = ranked.embeds @ background.T.astype(np.float64)
    means, deviations = scores.mean(axis=1), scores.std(axis=1).clip(min=1e-12)
    kept = []
    for result, mean, deviation in zip(ranked.results, means, deviations, strict=True):
        result.relevance = float((result.score - mean) / deviation)
        if result.relevance >= LEAST:
            kept.append(result)
    return kept
