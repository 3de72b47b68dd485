"""Captions, pairs and images: sources, data sets, batches and the embedding cache."""

from .cache_builder import build_embedding_cache
from .captions import CaptionImageDataset, StreamingCaptionImageDataset, caption_batches, distinct_captions
from .collators import PixelBatch, SkipLog, VisionAlignmentCollator, stack_pixels
from .embedding_cache import (
    CacheDamagedError,
    CacheError,
    CacheIncompleteError,
    CacheManifest,
    CacheMismatchError,
    EmbeddingCache,
    MissingCaptionError,
)
from .images import (
    DEFAULT_MAX_PIXELS,
    IMAGE_BACKENDS,
    EvalTransform,
    ImageBackend,
    TrainTransform,
    decode_image,
    decode_tensor,
)
from .pair_batches import PairBatchSampler
from .pair_collator import PairCollator
from .pairs import PairDataset, PairSource
from .records import CaptionError, DamagedImageError, SampleError, SkippedSample, caption_id, clean_caption
from .revisions import data_revision
from .sampling import SampleIndex, SampleIndexBatchSampler
from .sources import CaptionSource, SourceError, load_source

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "IMAGE_BACKENDS",
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
    "ImageBackend",
    "MissingCaptionError",
    "PairBatchSampler",
    "PairCollator",
    "PairDataset",
    "PairSource",
    "PixelBatch",
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
    "data_revision",
    "decode_image",
    "decode_tensor",
    "distinct_captions",
    "load_source",
    "stack_pixels",
]
