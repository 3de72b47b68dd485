"""A query encoder for image vectors that exist: `llm2clip align --keep-images`, and the functions under it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import CONFIG_NAME

from llm2clip.command_line.processes import on_main_process, process_state
from llm2clip.command_line.progress import ProgressBar
from llm2clip.command_line.settings import require
from llm2clip.encoders.encoder import Encoder
from llm2clip.encoders.load import load_encoder
from llm2clip.encoders.mapped_text import MAP, MappedTextEncoder
from llm2clip.encoders.query_encoder import SPACE_FILE
from llm2clip.files.atomic import atomic_path, write_json, write_text
from llm2clip.files.manifests import write_manifest
from llm2clip.hub.cards.card import CARD as CARD_FILE
from llm2clip.models.places import is_repo
from llm2clip.store.store import caption_keys
from llm2clip.trainers.align_recipe import AlignRecipe
from llm2clip.trainers.closed_form import BLOCK, PairSums, cross_validated_ridge
from llm2clip.trainers.image_vectors import ImageVectors, read_pairs
from llm2clip.trainers.kept_space import RIDGES
from modeling_llm2clip.modeling_llm2clip_utils import absolute_path

logger = logging.getLogger(__name__)

FOLDS = 5
CARD = """---
library_name: llm2clip
base_model: {text}
---

# Queries for stored image vectors

The text encoder {text}, and a linear map of its rows to the image vectors of {images}, which stay as they are.
The map was fitted by ridge regression to {count:,} {kind}, with ridge {ridge:g}{chosen}.

```python
from llm2clip import load_encoder

queries = load_encoder("FOLDER").encode_text(["a red bus"])
```

Image vectors of another model are in another space: `llm2clip search INDEX --query-encoder FOLDER` refuses them.
"""


@dataclass
class QueryMap:
    """The map of texts to stored image vectors.

    Attributes:
        weight: `(width, text width)`, of text rows of unit length.
        bias: `(width,)`.
        ridge: The regularisation, as a share of the mean variance of the text rows.
        pairs: Number of pairs that it was fitted to.
    """

    weight: Tensor
    bias: Tensor
    ridge: float
    pairs: int


def fit_query_map(
    texts: Sequence[str],
    embed: Callable[[Sequence[str]], Tensor],
    targets: Callable[[int, int], Tensor],
    ridge: float | None = None,
) -> QueryMap:
    """Fit a map from the rows of texts to image vectors that are kept: ridge regression, in one pass.

    With text rows `x` and targets `y`, both of unit length, and their means, the map is
    `(Cxx + ridge * mean(diag Cxx) I)^-1 Cxy`; a query is the unit vector of `x W + b`. Only sums are held, which
    processes that a launcher started share. A text counts as often as it occurs.

    Args:
        texts: The texts.
        embed: Makes rows `(texts, text width)` of texts.
        targets: Reads the vectors `(stop - start, width)` of the texts from a start to a stop: of their images, or
            those of the texts in the space of the images.
        ridge: None: the choice of `RIDGES` by [`cross_validated_ridge`] in five folds, in which a text is in one fold.

    Raises:
        ValueError: There are too few texts, or values that are not finite.
    """
    state = process_state()
    first, last = (len(texts) * part // state.num_processes for part in (state.process_index, state.process_index + 1))
    if len(texts) < max(2, state.num_processes):
        raise ValueError(f"there are {len(texts)} texts; give at least a hundred.")
    folds: list[PairSums] = []
    with ProgressBar("Fitting", last - first, "text") as bar:
        for start in range(first, last, BLOCK):
            stop = min(start + BLOCK, last)
            distinct, numbers = np.unique(np.array(texts[start:stop], object), return_inverse=True)
            rows = F.normalize(embed(distinct.tolist()).float(), dim=-1)[torch.from_numpy(numbers)]
            vectors = F.normalize(targets(start, stop).float(), dim=-1)
            folds = folds or [PairSums.empty(vectors.shape[1], rows.shape[1]) for _ in range(FOLDS)]
            fold_of = torch.from_numpy(caption_keys(distinct)[numbers, 0] % FOLDS)
            for number, fold in enumerate(folds):
                chosen = fold_of == number
                fold.add(vectors[chosen], rows[chosen])
            bar.update(stop - start)
    folds = [fold.over_processes() for fold in folds]
    total = sum(folds[1:], folds[0])
    if ridge is None:
        whole = [fold for fold in folds if fold.weight.item() > 0]
        if len(whole) < 2:
            raise ValueError("the texts are too few to choose the ridge by them; give more, or --ridge.")
        ridge = cross_validated_ridge(whole, RIDGES)
    ((weight, bias),) = total.regressions([ridge])
    return QueryMap(weight.T.float().contiguous(), bias.float(), ridge, len(texts))


def keep_images(
    images: str | Path,
    text: Encoder,
    pairs: tuple[Sequence[str], Sequence[str]] | None = None,
    *,
    ridge: float | None = None,
) -> MappedTextEncoder:
    """Fit a query encoder to stored image vectors and captions of some of them; no image is read.

    Args:
        images: See [`ImageVectors.open`].
        text: The text encoder.
        pairs: Keys of images and their captions; by default those that are stored beside the vectors.
        ridge: See [`fit_query_map`].

    Raises:
        FileNotFoundError: There are no such vectors.
        ValueError: There are no captions, or none whose key is there.
    """
    vectors = ImageVectors.open(images)
    return _encoder(vectors, text, _fit_pairs(vectors, text, pairs, ridge))


def _fit_pairs(
    vectors: ImageVectors, text: Encoder, pairs: tuple[Sequence[str], Sequence[str]] | None, ridge: float | None
) -> QueryMap:
    pairs = pairs or vectors.captions
    if pairs is None or not pairs[0]:
        raise ValueError(f"there are no captions beside {vectors.name}; give pairs, or texts.")
    numbers = vectors.find(pairs[0])
    texts = [caption for caption, number in zip(pairs[1], numbers, strict=True) if number >= 0]
    if len(texts) < len(numbers):
        logger.warning(
            "%d of %d pairs have a key that %s lacks.", len(numbers) - len(texts), len(numbers), vectors.name
        )
    numbers = numbers[numbers >= 0]
    return fit_query_map(texts, text.encode_text, lambda start, stop: vectors.rows.read(numbers[start:stop]), ridge)


def _encoder(vectors: ImageVectors, text: Encoder, found: QueryMap) -> MappedTextEncoder:
    return MappedTextEncoder(vectors.name, text, found.weight, found.bias, vectors.image_fingerprint)


def run(config: AlignRecipe) -> dict[str, Any]:
    """Fit and save; return the ridge and the number of pairs."""
    require(config, [])
    folder = Path(config.output_dir)
    on_main_process(lambda: _refuse_model(folder))
    vectors = ImageVectors.open(str(config.keep_images))
    pairs = None if config.pairs is None else read_pairs(config.pairs)
    texts = None if config.texts is None else _lines(Path(config.texts))
    text = load_encoder(str(config.text_model), config.text_model_revision, needs=["text"])
    if texts is None:
        found, kind = _fit_pairs(vectors, text, pairs, config.ridge), "pairs of a caption and an image vector"
    else:
        old = load_encoder(str(config.old_text_model), needs=["text"])
        if old.width != vectors.width:
            raise ValueError(
                f"old_text_model {old.name} embeds as {old.width} values, but the image vectors of {vectors.name} "
                f"have {vectors.width}; give the model that made them."
            )
        found = fit_query_map(texts, text.encode_text, lambda a, b: old.encode_text(texts[a:b]), config.ridge)
        kind = f"texts as {old.name} embeds them, without any image"
    on_main_process(lambda: _save(folder, config, vectors, text, found, kind))
    return {"ridge": found.ridge, "pairs": found.pairs}


def _refuse_model(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MAP).exists() or (folder / CONFIG_NAME).exists():
        raise FileExistsError(f"{folder} already contains a model; choose another output_dir, or delete this one.")


def _save(folder: Path, config: AlignRecipe, vectors: ImageVectors, text: Encoder, found: QueryMap, kind: str) -> None:
    name = str(config.text_model)
    place, _, function = name.rpartition(":")
    name = absolute_path(name) if is_repo(name) else f"{Path(place).absolute()}:{function}" if ".py:" in name else name
    chosen = "" if config.ridge is not None else ", which five-fold cross-validation chose"
    record = {
        "text_model": name,
        "text_model_revision": config.text_model_revision,
        "text_fingerprint": text.text_fingerprint(),
        "image_fingerprint": vectors.image_fingerprint,
    }
    write_json(folder / SPACE_FILE, record)
    facts = {"text": Path(name).name if Path(name).exists() else name, "images": Path(vectors.name).name}
    card = CARD.format(**facts, count=found.pairs, kind=kind, ridge=found.ridge, chosen=chosen)
    write_text(folder / CARD_FILE, card)
    with atomic_path(folder / MAP) as path:  # last: without it, the folder is no query encoder
        save_file({"linear.weight": found.weight, "linear.bias": found.bias}, path)
    write_manifest(folder, "align", [SPACE_FILE, CARD_FILE, MAP])


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}, with a text on each line.")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
