"""Tiny random captioners of the kinds that self-critical training knows, each with a tokenizer and a few inputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration
from processing_difnet import DifnetTokenizer

WORDS = ["a", "the", "red", "blue", "dog", "cat", "bus", "runs"]
REFERENCES = [["a red dog runs", "the dog"], ["a blue cat", "the cat runs"], ["the bus"]]
NUM_ROWS = 8
VISION = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


class Captioner(NamedTuple):
    """A model, its tokenizer, and rows with what it reads and the references."""

    model: Any
    tokenizer: Any
    rows: list[dict[str, Any]]


def word_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    """Of whole words, with the special tokens first, in their order."""
    vocabulary = {word: number for number, word in enumerate([*dict.fromkeys(special_tokens.values()), *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=special_tokens["unk_token"]))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def rows_of(**inputs: Any) -> list[dict[str, Any]]:
    """Rows with these inputs, given for all of them, and with references."""
    return [
        {**{name: values[row] for name, values in inputs.items()}, "references": REFERENCES[row % 3]}
        for row in range(NUM_ROWS)
    ]


def images() -> list[dict[str, Any]]:
    return rows_of(pixel_values=torch.rand(NUM_ROWS, 3, 8, 8))


def make_difnet() -> Captioner:
    torch.manual_seed(0)
    tokenizer = DifnetTokenizer(vocab=["<unk>", "<pad>", "<bos>", "<eos>", *WORDS])
    config = DifnetConfig(
        vocab_size=len(tokenizer),
        grid_feature_size=6,
        num_segmentation_classes=5,
        d_model=16,
        encoder_layers=2,
        fusion_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        head_dim=8,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=12,
    )
    features = {
        "grid_features": torch.rand(NUM_ROWS, 4, 6),
        "segmentation_features": torch.rand(NUM_ROWS, 5, 2, 2),
    }
    return Captioner(DifnetForConditionalGeneration(config), tokenizer, rows_of(**features))


def make_vit_gpt2() -> Captioner:
    """As nlpconnect/vit-gpt2-image-captioning: one token begins, ends and pads a caption."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(bos_token="<end>", eos_token="<end>", pad_token="<end>", unk_token="<unk>")
    end = tokenizer.eos_token_id
    decoder = GPT2Config(
        vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=end, eos_token_id=end
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(**VISION, intermediate_size=32), decoder
    )
    config.decoder_start_token_id = config.pad_token_id = config.eos_token_id = end
    model = VisionEncoderDecoderModel(config)
    model.generation_config.pad_token_id = end
    return Captioner(model, tokenizer, images())


def make_blip() -> Captioner:
    torch.manual_seed(0)
    tokenizer = word_tokenizer(pad_token="[PAD]", bos_token="[DEC]", sep_token="[SEP]", unk_token="[UNK]")
    text = {
        **TEXT,
        "vocab_size": len(tokenizer),
        "encoder_hidden_size": 16,
        "projection_dim": 16,
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    config = BlipConfig(text_config=text, vision_config={**VISION, "intermediate_size": 32, "projection_dim": 16})
    return Captioner(BlipForConditionalGeneration(config), tokenizer, images())


def make_git() -> Captioner:
    torch.manual_seed(0)
    tokenizer = word_tokenizer(pad_token="[PAD]", bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]")
    config = GitConfig(
        vision_config={**VISION, "intermediate_size": 32},
        **TEXT,
        vocab_size=len(tokenizer),
        max_position_embeddings=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Captioner(GitForCausalLM(config), tokenizer, images())


def make_t5() -> Captioner:
    """Reads texts of different lengths."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    texts = [tokenizer(" ".join(WORDS[: 2 + row % 4])) for row in range(NUM_ROWS)]
    inputs = {name: [text[name] for text in texts] for name in ("input_ids", "attention_mask")}
    return Captioner(T5ForConditionalGeneration(config), tokenizer, rows_of(**inputs))


CAPTIONERS: dict[str, Callable[[], Captioner]] = {
    "difnet": make_difnet,
    "vit-gpt2": make_vit_gpt2,
    "blip": make_blip,
    "git": make_git,
    "t5": make_t5,
}
