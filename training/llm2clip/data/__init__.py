"""Sources, data sets, samplers and collators of captioned images and text pairs."""

from llm2clip.data.captioned_images import CaptionImageDataset
from llm2clip.data.captions import caption_batches, distinct_captions
from llm2clip.data.pair_batches import PairBatchSampler
from llm2clip.data.pair_collator import PairCollator
from llm2clip.data.pairs import PairDataset, PairSource
from llm2clip.data.rows import OnError, SkippedSample, caption_id
from llm2clip.data.sampling import SampleIndex, SampleIndexBatchSampler
from llm2clip.data.sources import CaptionSource, load_source
from llm2clip.data.stage2_collator import Stage2Collator
from llm2clip.data.streams import StreamingCaptionImageDataset
from llm2clip.data.transforms import EvalTransform, ImageBackend, TrainTransform
from modeling_llm2clip.image_decoding_llm2clip import DEFAULT_MAX_PIXELS, DamagedImageError, SampleError, decode_image
