"""Settings of the command `llm2clip align`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from llm2clip.command_line.settings import check_choices, refuse, require, setting
from llm2clip.trainers.joint_recipe import JointRecipe


@dataclass
class AlignRecipe(JointRecipe):
    """Settings of an alignment in closed form: two frozen towers, their pairs, and what is solved for."""

    output_dir: str = setting("", "Folder of the model.", affects_numbers=False)
    heads: Literal["linear", "residual"] = setting(
        "linear",
        "linear: the linear maps alone; residual: small heads on top of them, for a stage 2 that trains these and "
        "leaves the maps.",
    )
    keep_space_of: str | None = setting(
        None,
        "Model with this vision tower, such as its CLIP, whose space is kept: images are embedded as by that model, "
        "and the map of texts meets its text embeddings of the captions (ProCLIP, stage I). No image is read. Unset: "
        "both sides get maps into a new space.",
    )
    keep_images: str | None = setting(
        None,
        "Image vectors that are kept: an index, a Store, .npy with keys, a folder of clip-retrieval, or parquet with "
        "the columns key and vector. The result is a query encoder for them; no image is read.",
    )
    text_model: str | None = setting(None, "With keep_images: the text encoder, any that `llm2clip evaluate` takes.")
    pairs: str | None = setting(
        None,
        "With keep_images: table (.parquet, .csv, .jsonl) with the columns key and caption; unset: the captions that "
        "are stored beside the vectors.",
    )
    texts: str | None = setting(
        None, "With keep_images and old_text_model, in place of pairs: file with a text on each line."
    )
    old_text_model: str | None = setting(None, "The model that made the image vectors, which embeds the texts.")
    ridge: float | None = setting(
        None,
        "Regularisation, as a share of the mean variance. Unset: the best on eval_sources, or 0.3 without them; "
        "projection_dim likewise, or 256. With keep_images: by five-fold cross-validation.",
    )
    seed: int = setting(42, "Seed of residual heads.")
    per_device_eval_batch_size: int = setting(64, "Images that the vision tower takes at once.", affects_numbers=False)
    dataloader_num_workers: int = setting(0, "Processes that read images.", affects_numbers=False)

    def __post_init__(self) -> None:
        check_choices(self)
        if self.keep_images is not None:
            self._check_kept_images()
        else:
            names = ["text_model", "pairs", "texts", "old_text_model"]
            refuse(self, names, "it is for image vectors that are kept (keep_images)")
        self.validate_data()
        if self.ridge is not None and not 0 <= self.ridge < math.inf:
            raise ValueError(f"ridge must be at least 0, but is {self.ridge}.")
        if self.heads == "linear":
            refuse(self, ["adapter_num_layers"], "heads: linear has no blocks")
        if self.keep_space_of is not None:
            names = ["heads", "projection_dim", "vision_pooling", "vision_layers", "feature_cache", "feature_dtype"]
            refuse(self, names, f"images are embedded as by {self.keep_space_of}")

    def _check_kept_images(self) -> None:
        used = {"output_dir", "keep_images", "text_model", "text_model_revision", "pairs", "texts", "old_text_model"}
        others = [field.name for field in fields(self) if field.name not in {*used, "ridge"}]
        refuse(self, others, f"the image vectors of {self.keep_images} are kept")
        if not self.text_model:
            raise ValueError("keep_images needs text_model: the encoder of the new queries.")
        if (self.texts is None) != (self.old_text_model is None):
            raise ValueError("texts and old_text_model go together: that model embeds the texts.")
        if self.texts is not None:
            refuse(self, ["pairs"], "texts are given")

    def validate_sources(self) -> None:
        """Raise ValueError unless there are pairs that can be read once, with stored embeddings."""
        require(self, ["sources"])
        if None in self.caches or not self.caches:
            raise ValueError("align reads stored embeddings: give embedding_cache (from `llm2clip embed`).")
        if self.streams:
            raise ValueError("align reads each pair once, in tables: no source can be a stream or have a weight.")
