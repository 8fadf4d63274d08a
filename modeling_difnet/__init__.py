"""DIFNet for Transformers. Importing this package registers its classes with Transformers' Auto classes."""

import transformers
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.pipelines import PIPELINE_REGISTRY

from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

from .configuration_difnet import DifnetConfig
from .ensemble_difnet import DifnetEnsemble
from .faithfulness_difnet import FaithfulnessOutput, faithfulness
from .generation_difnet import original_beam_search, sequence_log_probs
from .grid_backbone_difnet import GridFeatureBackbone, GridFeatureBackboneConfig
from .modeling_difnet import DifnetForConditionalGeneration, DifnetModel, DifnetPreTrainedModel
from .pipeline_difnet import TASK, DifnetImageCaptioningPipeline
from .relevance_difnet import RelevanceOutput, relevance
from .vision_backbone_difnet import VisionBackbone

AutoConfig.register("difnet", DifnetConfig)
# With two classes, `architectures` in config.json decides: a saved captioner loads as a captioner and generates.
AutoModel.register(DifnetConfig, (DifnetModel, DifnetForConditionalGeneration))
AutoModelForImageTextToText.register(DifnetConfig, DifnetForConditionalGeneration)
# Transformers lists its other captioners here as well; not every version has the class.
if (AutoModelForMultimodalLM := getattr(transformers, "AutoModelForMultimodalLM", None)) is not None:
    AutoModelForMultimodalLM.register(DifnetConfig, DifnetForConditionalGeneration)
AutoFeatureExtractor.register(DifnetConfig, DifnetFeatureExtractor)
AutoTokenizer.register(DifnetConfig, DifnetTokenizer)
AutoProcessor.register(DifnetConfig, DifnetProcessor)
AutoConfig.register("difnet_grid_backbone", GridFeatureBackboneConfig)
AutoModel.register(GridFeatureBackboneConfig, GridFeatureBackbone)
if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
    PIPELINE_REGISTRY.register_pipeline(
        TASK, pipeline_class=DifnetImageCaptioningPipeline, pt_model=AutoModelForImageTextToText, type="multimodal"
    )

__all__ = [
    "DifnetConfig",
    "DifnetEnsemble",
    "DifnetFeatureExtractor",
    "DifnetForConditionalGeneration",
    "DifnetImageCaptioningPipeline",
    "DifnetModel",
    "DifnetPreTrainedModel",
    "DifnetProcessor",
    "DifnetTokenizer",
    "FaithfulnessOutput",
    "GridFeatureBackbone",
    "GridFeatureBackboneConfig",
    "RelevanceOutput",
    "VisionBackbone",
    "faithfulness",
    "original_beam_search",
    "relevance",
    "sequence_log_probs",
]
