"""Captions, pairs and images: sources, data sets, batches and the embedding cache."""

from .cache_builder import build_embedding_cache
from .captions import CaptionImageDataset, StreamingCaptionImageDataset, caption_batches, distinct_captions
from .collators import SkipLog, VisionAlignmentCollator
from .embedding_cache import (
    CacheDamagedError,
    CacheError,
    CacheIncompleteError,
    CacheManifest,
    CacheMismatchError,
    EmbeddingCache,
    MissingCaptionError,
)
from .images import DEFAULT_MAX_PIXELS, EvalTransform, TrainTransform, decode_image
from .pair_batches import PairBatchSampler
from .pair_collator import PairCollator
from .pairs import PairDataset, PairSource
from .records import CaptionError, DamagedImageError, SampleError, SkippedSample, caption_id, clean_caption
from .sampling import SampleIndex, SampleIndexBatchSampler
from .sources import CaptionSource, SourceError, load_source

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "CacheDamagedError",
    "CacheError",
    "CacheIncompleteError",
    "CacheManifest",
    "CacheMismatchError",
    "CaptionError",
    "CaptionImageDataset",
    "CaptionSource",
    "DamagedImageError",
    "EmbeddingCache",
    "EvalTransform",
    "MissingCaptionError",
    "PairBatchSampler",
    "PairCollator",
    "PairDataset",
    "PairSource",
    "SampleError",
    "SampleIndex",
    "SampleIndexBatchSampler",
    "SkipLog",
    "SkippedSample",
    "SourceError",
    "StreamingCaptionImageDataset",
    "TrainTransform",
    "VisionAlignmentCollator",
    "build_embedding_cache",
    "caption_batches",
    "caption_id",
    "clean_caption",
    "decode_image",
    "distinct_captions",
    "load_source",
]
