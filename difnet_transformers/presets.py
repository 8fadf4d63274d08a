"""Names, sizes and recipes that options offer. The paper's are the defaults of `DifnetConfig` and `TrainingConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# The original's variants of the network, each a package of its own there (`models/`).
MODES = ("base", "base_lrp", "difnet", "difnet_lrp")

# The paper's sizes are for 113,000 images. With a few hundred this network learns as much, in minutes on a CPU.
SMALL_NETWORK = {
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "head_dim": 32,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
}


@dataclass(frozen=True)
class Preset:
    """A network and its recipe for a number of training images.

    Args:
        max_images: the largest number of training images; `None` for any.
        network: fields of `DifnetConfig`; others have the paper's values.
        training: options of `difnet train`, a tuple for one that takes several values; others have the paper's.
        min_word_count: how often the captions must have a word of the vocabulary.
    """

    max_images: int | None
    network: Mapping[str, object]
    training: Mapping[str, object]
    min_word_count: int

    def described(self) -> tuple[str, str, str]:
        """Number of images, network and recipe in words."""
        images = "more" if self.max_images is None else f"up to {self.max_images:,}"
        sizes = self.network
        network = (
            f"d_model {sizes['d_model']}, {sizes['encoder_layers']} + {sizes['decoder_layers']} layers, "
            f"{sizes['encoder_attention_heads']} heads of {sizes['head_dim']}, ffn {sizes['encoder_ffn_dim']}, "
            f"dropout {sizes.get('dropout', 0.1)}"
            if sizes
            else "the paper's"
        )
        recipe = " ".join(map(str, option_words(self.training)))
        return images, network, recipe or "the paper's"

    def reason(self, num_images: int) -> str:
        """One line that says what is chosen and why.

        Args:
            num_images: number of training images.
        """
        images, network, recipe = self.described()
        row = "for any number" if self.max_images is None else f"for {images}"
        return (
            f"{num_images:,} training images, so the network and recipe {row}: {network}; {recipe}; words that occur "
            f"{self.min_word_count} times or more (options after -- replace each)"
        )


def option_words(options: Mapping[str, object]) -> list[object]:
    """The words of a command line for options with their values."""
    words: list[object] = []
    for name, value in options.items():
        words += [name, *(value if isinstance(value, list | tuple) else [value])]
    return words


# docs/own_images.md shows this table, and a test compares the two.
PRESETS = (
    # A few hundred images, in minutes on a CPU.
    Preset(
        max_images=1_000,
        network=SMALL_NETWORK,
        training={
            "--xe-batches": "images",
            "--xe-batch-size": 4,
            "--xe-schedule": "constant",
            "--xe-learning-rate": 1e-3,
            "--xe-epochs": 40,
            "--xe-patience": 10,
            "--scst-epochs": 30,
            "--scst-patience": 10,
            "--scst-learning-rate": 2e-4,
            "--log-every": 20,
        },
        min_word_count=1,
    ),
    # Flickr8k: 6,000.
    Preset(
        max_images=20_000,
        network={
            "d_model": 384,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 6,
            "decoder_attention_heads": 6,
            "head_dim": 64,
            "encoder_ffn_dim": 1536,
            "decoder_ffn_dim": 1536,
            "dropout": 0.2,
            "attention_dropout": 0.2,
        },
        training={
            "--xe-batches": "images",
            "--xe-batch-size": 20,
            "--xe-schedule": "cosine",
            "--warmup-steps": 300,
            "--xe-learning-rate": 5e-4,
            "--xe-epochs": 8,
            "--label-smoothing": 0.1,
            "--weight-decay": 0.05,
            "--scst-epochs": 3,
            "--scst-batch-size": 20,
            "--scst-learning-rate": 1e-4,
            "--scst-schedule": "linear",
            "--scst-warmup-steps": 50,
            "--scst-dropout": 0.0,
            "--rewards": ("cider_d", "bleu_4"),
            "--mixed-precision": "auto",
        },
        min_word_count=3,
    ),
    # Flickr30k: 29,000.
    Preset(
        max_images=100_000,
        network={
            "d_model": 384,
            "encoder_layers": 3,
            "decoder_layers": 3,
            "encoder_attention_heads": 6,
            "decoder_attention_heads": 6,
            "head_dim": 64,
            "encoder_ffn_dim": 1536,
            "decoder_ffn_dim": 1536,
        },
        training={
            "--xe-batches": "images",
            "--xe-batch-size": 20,
            "--xe-schedule": "cosine",
            "--warmup-steps": 1000,
            "--xe-learning-rate": 4e-4,
            "--xe-epochs": 12,
            "--scst-epochs": 3,
            "--scst-batch-size": 20,
            "--scst-learning-rate": 2e-5,
            "--mixed-precision": "auto",
        },
        min_word_count=5,
    ),
    # COCO: 113,000, the paper's.
    Preset(max_images=None, network={}, training={}, min_word_count=5),
)


def preset_for(num_images: int) -> Preset:
    """The preset for a number of training images."""
    return next(preset for preset in PRESETS if preset.max_images is None or num_images <= preset.max_images)
