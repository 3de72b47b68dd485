"""Contrastive losses of both stages, for one process or many.

Every loss compares the rows of this rank with the columns of all ranks (rows stay local, columns are gathered with
gradient). A rank returns its share of the global loss times the number of ranks, so the mean over ranks of the losses
and of the gradients, which is what `DistributedDataParallel` takes, equals one process on the whole batch. That stays
exact when ranks hold different numbers of rows. Every rank has to call `backward`, with the same factor.

No rows x columns matrix ever exists as a whole, but for small ones: the losses walk over it in tiles of rows.
"""

from llm2clip.losses.contrastive import clip_loss, hard_negative_info_nce, info_nce
from llm2clip.losses.sigmoid import sigmoid_loss
from llm2clip.losses.tiles import DEFAULT_TILE_SIZE

__all__ = ["DEFAULT_TILE_SIZE", "clip_loss", "hard_negative_info_nce", "info_nce", "sigmoid_loss"]
