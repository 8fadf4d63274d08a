"""Names and sizes that options offer. The paper's sizes are the defaults of `DifnetConfig`."""

from __future__ import annotations

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
