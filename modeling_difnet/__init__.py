"""DIFNet for Transformers. Importing this package registers its classes with Transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from .configuration_difnet import DifnetConfig
from .generation_difnet import original_beam_search, sequence_log_probs
from .modeling_difnet import DifnetForConditionalGeneration, DifnetModel, DifnetPreTrainedModel

AutoConfig.register("difnet", DifnetConfig)
# With two classes, `architectures` in config.json decides: a saved captioner loads as a captioner and generates.
AutoModel.register(DifnetConfig, (DifnetModel, DifnetForConditionalGeneration))
AutoModelForImageTextToText.register(DifnetConfig, DifnetForConditionalGeneration)

__all__ = [
    "DifnetConfig",
    "DifnetForConditionalGeneration",
    "DifnetModel",
    "DifnetPreTrainedModel",
    "original_beam_search",
    "sequence_log_probs",
]
