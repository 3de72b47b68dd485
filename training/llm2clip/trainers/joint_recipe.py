"""What the commands that align an image tower with a text tower open: towers, pairs, embeddings and features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llm2clip.command_line.settings import refuse, setting
from llm2clip.data import ImageBackend, OnError

# Settings that name the towers of a new model.
TOWERS = tuple(f"{tower}_model_{what}" for tower in ("vision", "text") for what in ("name_or_path", "revision"))
# In the folder of a run: the pooled features of a frozen tower.
FEATURES = "vision_features"
# An embedding cache, or two whose rows stand side by side.
Folder = str | tuple[str, ...]


def as_folder(folder: Any) -> Folder | None:
    """Return the folder of an embedding cache, or those of two, as a key."""
    return tuple(folder) if isinstance(folder, list | tuple) else folder


@dataclass
class JointRecipe:
    """Settings of the model and the data of `llm2clip align` and `llm2clip stage2`."""

    vision_model_name_or_path: str = setting("", "Pretrained vision tower: Hub id or folder.", affects_numbers=False)
    text_model_name_or_path: str = setting(
        "", "Frozen text tower, usually from stage 1: Hub id or folder.", affects_numbers=False
    )
    vision_model_revision: str | None = setting(
        None, "Branch, tag or commit of the vision tower's repo; unset: main.", affects_numbers=False
    )
    text_model_revision: str | None = setting(
        None, "Branch, tag or commit of the text tower's repo; unset: main.", affects_numbers=False
    )
    sources: list[dict[str, Any]] = setting(
        [], "Training data: a list of CaptionSource mappings, streams and others together."
    )
    eval_sources: dict[str, Any] = setting(
        {},
        "Image-text retrieval sets to evaluate: a mapping from a name to CaptionSource fields.",
        affects_numbers=False,
    )
    embedding_cache: str | list[str] | None = setting(
        None,
        "Folder of precomputed caption embeddings, made by `llm2clip embed`: a cache, or the sidecars of a streamed "
        "source (its own folder, if they lie beside its shards). Of two caches the rows stand side by side, and the "
        "model takes them (llm_embeds) alone: leave text_model_name_or_path unset. A source may have its own "
        "embedding_cache.",
        affects_numbers=False,
    )
    eval_embedding_cache: str | list[str] | None = setting(
        None,
        "Cache with the captions of eval_sources; unset: embedding_cache, unless that contains sidecars.",
        affects_numbers=False,
    )
    verify_cache: bool = setting(
        True, "Check first that the cache is undamaged and contains every caption.", affects_numbers=False
    )
    attn_implementation: str | None = setting(None, "Attention implementation of the vision tower, such as sdpa.")
    projection_dim: int | None = setting(
        None, "Dimension of the shared embedding space; unset: 1280, or what `align` finds best."
    )
    vision_pooling: Literal["cls", "mean", "cls_mean"] | None = setting(
        None,
        "Features of the vision tower. cls: its own pooled output (class token or attention pooling); mean: the mean "
        "over its patches; cls_mean: both, side by side. Unset: cls.",
    )
    vision_layers: list[int] | None = setting(
        None,
        "Layers of the vision tower, from 1, whose outputs are the features, side by side, each pooled as "
        "vision_pooling says, such as the last four: 9 10 11 12 of a tower of 12. Unset: the last layer.",
    )
    adapter_num_layers: int | None = setting(None, "Number of blocks of the text adapter; unset: 4.")
    feature_cache: str | None = setting(
        None,
        "Folder of the pooled features of a frozen tower, which several runs can share; unset: vision_features in "
        "output_dir.",
        affects_numbers=False,
    )
    feature_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "Precision in which the frozen tower computes them. bfloat16 takes half the time on processors and GPUs that "
        "have it.",
    )
    on_error: OnError = setting(
        "raise",
        "What to do with damaged images, rows without a caption, and captions without stored embedding. A cache that "
        "lacks more than a tenth of the captions is refused in any case (verify_cache), and so is a batch of which "
        "nothing is left.",
    )
    image_backend: ImageBackend = setting(
        "exact",
        "Decoder of images. exact: Pillow, as in inference; fast: torchvision for JPEGs, up to 2 grey levels off.",
    )

    @property
    def caches(self) -> list[Folder | None]:
        """The folder of each source's embeddings, or two of them; empty if there are none."""
        folders = [as_folder(source.get("embedding_cache") or self.embedding_cache) for source in self.sources]
        return folders if any(folders) else []

    @property
    def streams(self) -> bool:
        """Whether the data is read as a stream."""
        return any(source.get("streaming") or source.get("weight") is not None for source in self.sources)

    def validate_data(self) -> None:
        """Raise ValueError if these settings do not fit each other."""
        if self.projection_dim is not None and self.projection_dim < 1:
            raise ValueError(f"projection_dim must be at least 1, but is {self.projection_dim}.")
        if not self.eval_sources or not self.caches:
            refuse(self, ["eval_embedding_cache"], "there are no eval_sources, or no caption embeddings are stored")
