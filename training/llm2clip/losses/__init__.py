"""Contrastive losses of both stages, for one process or many.

Each loss compares the rows of this rank with the columns of all ranks: rows stay local, columns are gathered with
gradient. A rank returns its share of the global loss times the number of ranks, so that the mean of losses and
gradients over ranks, which `DistributedDataParallel` computes, equals those of a single process on the whole batch.
This is exact even if ranks have different numbers of rows. Every rank must call `backward`, with the same loss scale.

The losses compute the logits in tiles of rows; only small logits matrices are ever kept in memory as a whole.
"""

from llm2clip.losses.contrastive import clip_loss, hard_negative_info_nce, info_nce
from llm2clip.losses.sigmoid import sigmoid_loss
from llm2clip.losses.tiles import DEFAULT_TILE_SIZE
