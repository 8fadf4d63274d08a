"""Configuration of DIFNet (Wu et al., "DIFNet: Boosting Visual Information Flow for Image Captioning", CVPR 2022).

The original implementation has none: its sizes are default arguments scattered over `models/`, and its four variants
are four packages. Here one configuration describes all of them: `use_segmentation=False` is the paper's baseline
(modes `base`, `base_lrp`), `use_segmentation=True` is DIFNet (modes `difnet`, `difnet_lrp`).
"""

import functools
from collections.abc import Callable

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

# Far above any network of this kind. A damaged file may ask for what no machine can build, which shows after minutes.
LARGEST = {
    "vocab_size": 10_000_000,
    "grid_feature_size": 1_000_000,
    "num_segmentation_classes": 1_000_000,
    "d_model": 100_000,
    "encoder_layers": 1000,
    "decoder_layers": 1000,
    "encoder_attention_heads": 1000,
    "decoder_attention_heads": 1000,
    "head_dim": 100_000,
    "encoder_ffn_dim": 1_000_000,
    "decoder_ffn_dim": 1_000_000,
    "max_position_embeddings": 1_000_000,
}


def raises_value_error(method: Callable) -> Callable:
    """`method`, with the validation errors of huggingface_hub, which are no `ValueError`, as one of a single line."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except StrictDataclassError as error:
            text = " ".join(str(error.__cause__ or error).split()).removeprefix("DifnetConfig: ")
            if len(text) > 300:  # it quotes the whole value
                text = f"{text[:200]} .. {text[-50:]}"
            raise ValueError(f"DifnetConfig: {text}") from error

    return wrapped


def integer_text(number: int) -> str:
    """A number for a message; one of very many digits, which Python refuses to print, as its size."""
    return str(number) if abs(number) < 10**20 else f"a number of {number.bit_length()} bits"


def custom_pipelines() -> dict:
    """The entry of `config.json` that names the pipeline; a new one each time, because `pipeline` writes into it."""
    implementation = "pipeline_difnet.DifnetImageCaptioningPipeline"
    return {"image-captioning": {"impl": implementation, "pt": ["AutoModelForImageTextToText"], "type": "multimodal"}}


@strict
class DifnetConfig(PreTrainedConfig):
    r"""Sizes and special tokens of a DIFNet captioner. The defaults are those of the published checkpoint.

    Args:
        vocab_size (`int`, defaults to 10201): number of tokens, special ones included.
        grid_feature_size (`int`, defaults to 2048): width of the feature of one grid cell.
        num_segmentation_classes (`int`, defaults to 133): classes of the panoptic segmentation map.
        use_segmentation (`bool`, defaults to `True`): `False` is the paper's baseline, with the grid flow alone.
        d_model (`int`, defaults to 512): width of the network.
        encoder_layers, decoder_layers (`int`, default to 3): number of layers.
        encoder_attention_heads, decoder_attention_heads (`int`, default to 8): number of attention heads.
        head_dim (`int`, defaults to 64): width of one head; heads times width need not be `d_model`.
        encoder_ffn_dim, decoder_ffn_dim (`int`, default to 2048): width of the feed-forward layers.
        fusion_layers (`int`, defaults to 1): the paper's Lf, the number of layers that refine the two flows separately
            (with shared weights and independent layer norms) before they are added. Smaller than `encoder_layers`.
        fusion_iterations (`int`, defaults to 2): the paper's T, how often each of these layers is applied.
        max_position_embeddings (`int`, defaults to 54): longest sequence that the decoder takes, `<bos>` included.
        dropout, attention_dropout (`float`, default to 0.1): dropout on activations and on attention weights.
        layer_norm_eps (`float`, defaults to 1e-5): epsilon of all layer norms.
        unk_token_id, pad_token_id, bos_token_id, eos_token_id (`int`, default to 0, 1, 2, 3): special tokens.
        decoder_start_token_id (`int`, defaults to 2): token that captions begin with, `<bos>`.
        use_cache (`bool`, defaults to `True`): whether the decoder returns keys and values for the next step.
        tie_word_embeddings (`bool`, defaults to `False`): whether the output projection is the embedding matrix.

    Raises:
        ValueError: a value is of another type, a size is not positive or beyond any network, `fusion_layers` does not
            leave a layer for the fused stream, or a special token lies outside the vocabulary.

    ```python
    >>> from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration

    >>> model = DifnetForConditionalGeneration(DifnetConfig(vocab_size=1000))
    ```
    """

    model_type = "difnet"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }

    vocab_size: int = 10201
    grid_feature_size: int = 2048
    num_segmentation_classes: int = 133
    use_segmentation: bool = True
    d_model: int = 512
    encoder_layers: int = 3
    decoder_layers: int = 3
    encoder_attention_heads: int = 8
    decoder_attention_heads: int = 8
    head_dim: int = 64
    encoder_ffn_dim: int = 2048
    decoder_ffn_dim: int = 2048
    fusion_layers: int = 1
    fusion_iterations: int = 2
    max_position_embeddings: int = 54
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    layer_norm_eps: float = 1e-5
    unk_token_id: int | None = 0
    pad_token_id: int = 1
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 3
    decoder_start_token_id: int = 2
    is_encoder_decoder: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        # In a program that has imported the package, the task is registered. Named here as well, it would make
        # `pipeline` ask for `trust_remote_code` where no code of the checkpoint runs.
        kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        if __name__.startswith("transformers_modules."):
            self.custom_pipelines = custom_pipelines()
        # `@strict` calls these as well, whenever a configuration is saved, but wraps what they raise in an exception
        # that is no ValueError.
        self.validate_architecture()
        self.validate_token_ids()
        # A checkpoint carries its code. Saving a model or a processor registers the class that is saved; the classes
        # that are not saved under their own name are registered here.
        if getattr(self, "auto_map", None) is None:
            self.auto_map = {
                "AutoConfig": "configuration_difnet.DifnetConfig",
                "AutoModelForImageTextToText": "modeling_difnet.DifnetForConditionalGeneration",
                "AutoModelForMultimodalLM": "modeling_difnet.DifnetForConditionalGeneration",
            }

    def to_dict(self) -> dict:
        """With the pipeline that the checkpoint carries, so that `pipeline(.., trust_remote_code=True)` finds it."""
        return {**super().to_dict(), "custom_pipelines": custom_pipelines()}

    def validate_architecture(self):
        """Raises ValueError for sizes with which there is no network."""
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if not 1 <= value <= largest:
                raise ValueError(
                    f"DifnetConfig: `{name}` must be at least 1 and at most {largest:,}, got {integer_text(value)}."
                )
        if self.d_model % 2:
            raise ValueError(f"DifnetConfig: `d_model` must be even (sine and cosine pairs), got {self.d_model}.")
        if not 0 < self.layer_norm_eps < 1:
            raise ValueError(f"DifnetConfig: `layer_norm_eps` must be in (0, 1), got {self.layer_norm_eps}.")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"DifnetConfig: `{name}` must be in [0, 1), got {getattr(self, name)}.")
        if self.use_segmentation:
            if not 1 <= self.fusion_layers < self.encoder_layers:
                raise ValueError(
                    f"DifnetConfig: `fusion_layers` ({integer_text(self.fusion_layers)}) must be at least 1 and "
                    f"smaller than `encoder_layers` ({self.encoder_layers}): the layers after the fusion read the sum "
                    "of the two flows. Lower `fusion_layers`, raise `encoder_layers`, or set `use_segmentation=False`."
                )
            if not 1 <= self.fusion_iterations <= 1000:
                raise ValueError(
                    "DifnetConfig: `fusion_iterations` must be at least 1 and at most 1000, got "
                    f"{integer_text(self.fusion_iterations)}."
                )

    def validate_token_ids(self):
        """Raises ValueError for special tokens outside the vocabulary; Transformers' own check only warns."""
        for name in ("unk_token_id", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            value = getattr(self, name)
            for token_id in value if isinstance(value, list) else [value]:
                if token_id is not None and not 0 <= token_id < self.vocab_size:
                    raise ValueError(
                        f"DifnetConfig: `{name}` is {integer_text(token_id)}, but the vocabulary has the ids 0 to "
                        f"{self.vocab_size - 1} (`vocab_size={self.vocab_size}`)."
                    )


# After `@strict`, which puts its own methods into the class.
DifnetConfig.__setattr__ = raises_value_error(DifnetConfig.__setattr__)
DifnetConfig.validate = raises_value_error(DifnetConfig.validate)
DifnetConfig.register_for_auto_class()

__all__ = ["DifnetConfig"]
