from llm2clip.checks.check_data import (
    check_data as check_data,
)
from llm2clip.cli import (
    main as main,
)
from llm2clip.convert.conversion import (
    convert_checkpoint as convert_checkpoint,
)
from llm2clip.data import (
    CaptionSource as CaptionSource,
)
from llm2clip.data import (
    Stage2Collator as Stage2Collator,
)
from llm2clip.data import (
    load_source as load_source,
)
from llm2clip.encoders import (
    embed_captions as embed_captions,
)
from llm2clip.encoders import (
    embed_images as embed_images,
)
from llm2clip.encoders import (
    load_encoder as load_encoder,
)
from llm2clip.evaluation import (
    caption_retrieval_metrics as caption_retrieval_metrics,
)
from llm2clip.evaluation import (
    metric_path as metric_path,
)
from llm2clip.evaluation import (
    retrieval_metrics as retrieval_metrics,
)
from llm2clip.evaluation.benchmark import Benchmark as Benchmark
from llm2clip.evaluation.benchmark import BenchmarkError as BenchmarkError
from llm2clip.evaluation.data import (
    BenchmarkImages as BenchmarkImages,
)
from llm2clip.evaluation.data import (
    CaptionPairData as CaptionPairData,
)
from llm2clip.evaluation.data import (
    DataPart as DataPart,
)
from llm2clip.evaluation.data import (
    RetrievalData as RetrievalData,
)
from llm2clip.evaluation.evaluate import evaluate as evaluate
from llm2clip.evaluation.heat_map import (
    patch_similarity as patch_similarity,
)
from llm2clip.evaluation.report import compare_results as compare_results
from llm2clip.hub.build import (
    build_folder as build_folder,
)
from llm2clip.hub.merge import (
    merge_models as merge_models,
)
from llm2clip.hub.push import (
    push_folder as push_folder,
)
from llm2clip.losses import (
    clip_loss as clip_loss,
)
from llm2clip.losses import (
    hard_negative_info_nce as hard_negative_info_nce,
)
from llm2clip.losses import (
    info_nce as info_nce,
)
from llm2clip.losses import (
    sigmoid_loss as sigmoid_loss,
)
from llm2clip.search.search_index import (
    SearchIndex as SearchIndex,
)
from llm2clip.search.top_k import (
    top_k as top_k,
)
from llm2clip.serving.app import (
    create_app as create_app,
)
from llm2clip.store import (
    EmbeddingCache as EmbeddingCache,
)
from llm2clip.store import (
    PairedCache as PairedCache,
)
from llm2clip.store import (
    StoreManifest as StoreManifest,
)
from llm2clip.store import (
    build_embedding_cache as build_embedding_cache,
)
from llm2clip.store import (
    caption_manifest as caption_manifest,
)
from llm2clip.trainers.closed_form import (
    ClosedFormAlignment as ClosedFormAlignment,
)
from llm2clip.trainers.closed_form import (
    PairSums as PairSums,
)
from llm2clip.trainers.closed_form import (
    closed_form_alignment as closed_form_alignment,
)
from llm2clip.trainers.distill_config import (
    DistillConfig as DistillConfig,
)
from llm2clip.trainers.distill_trainer import (
    DistillTrainer as DistillTrainer,
)
from llm2clip.trainers.mntp_config import (
    MNTPConfig as MNTPConfig,
)
from llm2clip.trainers.mntp_trainer import (
    MNTPTrainer as MNTPTrainer,
)
from llm2clip.trainers.run_distill import (
    attach_query_encoder as attach_query_encoder,
)
from llm2clip.trainers.run_distill import (
    distill_text as distill_text,
)
from llm2clip.trainers.stage1_config import (
    Stage1Config as Stage1Config,
)
from llm2clip.trainers.stage1_trainer import (
    Stage1Trainer as Stage1Trainer,
)
from llm2clip.trainers.stage2_config import (
    Stage2Config as Stage2Config,
)
from llm2clip.trainers.stage2_trainer import (
    Stage2Trainer as Stage2Trainer,
)
from llm2clip.trainers.student import (
    Student as Student,
)
from llm2clip.utils.towers import (
    open_text_tower as open_text_tower,
)
from modeling_llm2clip import (
    EVA02VisionConfig as EVA02VisionConfig,
)
from modeling_llm2clip import (
    EVA02VisionModel as EVA02VisionModel,
)
from modeling_llm2clip import (
    LLM2CLIPConfig as LLM2CLIPConfig,
)
from modeling_llm2clip import (
    LLM2CLIPModel as LLM2CLIPModel,
)
from modeling_llm2clip import (
    LLM2CLIPOutput as LLM2CLIPOutput,
)
from modeling_llm2clip import (
    LLM2CLIPProcessor as LLM2CLIPProcessor,
)
from modeling_llm2clip import (
    LLM2CLIPTextConfig as LLM2CLIPTextConfig,
)
from modeling_llm2clip import (
    LLM2CLIPTextModel as LLM2CLIPTextModel,
)
from modeling_llm2clip import (
    LLM2CLIPVisionModelWithProjection as LLM2CLIPVisionModelWithProjection,
)
from modeling_llm2clip import (
    quantize_embeddings as quantize_embeddings,
)

__version__: str
