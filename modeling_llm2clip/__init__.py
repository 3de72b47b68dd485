"""LLM2CLIP models, registered with transformers' Auto classes when this package is imported.

A Hub repository ships these modules as its remote code, so they import nothing but torch, transformers and what those
require.
"""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor

from .configuration_llm2clip import EVA02VisionConfig as EVA02VisionConfig
from .configuration_llm2clip import LLM2CLIPConfig as LLM2CLIPConfig
from .configuration_llm2clip import LLM2CLIPTextConfig as LLM2CLIPTextConfig
from .image_decoding_llm2clip import with_pillow as with_pillow
from .modeling_eva02 import EVA02VisionModel as EVA02VisionModel
from .modeling_llm2clip import LLM2CLIPModel as LLM2CLIPModel
from .modeling_llm2clip import LLM2CLIPOutput as LLM2CLIPOutput
from .modeling_llm2clip_text import LLM2CLIPTextModel as LLM2CLIPTextModel
from .modeling_llm2clip_vision import LLM2CLIPVisionModelWithProjection as LLM2CLIPVisionModelWithProjection
from .processing_llm2clip import LLM2CLIPProcessor as LLM2CLIPProcessor

__version__ = "0.1.0"

_model: Any
for _model in (EVA02VisionModel, LLM2CLIPTextModel, LLM2CLIPModel):
    _config: Any = _model.config_class
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    _config.register_for_auto_class()
    # So that save_pretrained always saves the code with the weights.
    _model.register_for_auto_class("AutoModel")
LLM2CLIPVisionModelWithProjection.register_for_auto_class("AutoModel")
AutoModelForZeroShotImageClassification.register(LLM2CLIPConfig, LLM2CLIPModel, exist_ok=True)
AutoProcessor.register(LLM2CLIPConfig, LLM2CLIPProcessor, exist_ok=True)
LLM2CLIPProcessor.register_for_auto_class()
