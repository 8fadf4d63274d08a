"""DIFNet in one file of plain PyTorch: both visual flows, the fusion, the captions' loss and greedy decoding.

Wu et al., "DIFNet: Boosting Visual Information Flow for Image Captioning", CVPR 2022. Read it from top to bottom;
the equations are the paper's and the numbers in comments are the published sizes. `modeling_difnet` is the same
network for Transformers, with caches, masks and beams; its weights load here:

    model = NanoDifnet.from_folder("./difnet")  # config.json and model.safetensors
    tokens = model.caption(grid_features, segmentation_features)  # (B, L)
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


@dataclass
class Config:
    vocab_size: int = 10201  # V
    grid_feature_size: int = 2048
    num_segmentation_classes: int = 133
    d_model: int = 512  # d
    encoder_attention_heads: int = 8  # as many in the decoder; h below
    head_dim: int = 64  # d_h
    encoder_ffn_dim: int = 2048
    decoder_ffn_dim: int = 2048
    encoder_layers: int = 3
    decoder_layers: int = 3
    fusion_layers: int = 1  # Lf: layers that refine the two flows separately
    fusion_iterations: int = 2  # T: how often each of them is applied
    max_position_embeddings: int = 54
    dropout: float = 0.1
    pad_token_id: int = 1
    bos_token_id: int = 2
    eos_token_id: int = 3


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d_h)) v over h heads, then the inner one of two residual-and-norm stages."""

    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.dropout = c.encoder_attention_heads, nn.Dropout(c.dropout)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.d_model, self.heads * c.head_dim) for _ in range(3))
        self.out_proj = nn.Linear(self.heads * c.head_dim, c.d_model)

    def forward(self, x, source, is_causal=False):  # (B, L, d), (B, S, d)
        def split(states):  # (B, L, h * d_h) -> (B, h, L, d_h)
            return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.q_proj(x)), split(self.k_proj(source)), split(self.v_proj(source))
        weights = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5  # (B, h, L, S)
        if is_causal:
            future = torch.ones(weights.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            weights = weights.masked_fill(future, float("-inf"))
        output = self.dropout(weights.softmax(-1)) @ v  # (B, h, L, d_h)
        return self.dropout(self.out_proj(output.transpose(1, 2).flatten(2)))  # (B, L, d)


class FeedForward(nn.Module):
    def __init__(self, c: Config, ffn_dim: int):
        super().__init__()
        self.fc1, self.fc2, self.dropout = (
            nn.Linear(c.d_model, ffn_dim),
            nn.Linear(ffn_dim, c.d_model),
            nn.Dropout(c.dropout),
        )

    def forward(self, x):
        return self.dropout(self.fc2(self.dropout(self.fc1(x).relu())))


class FlowNorm(nn.Module):
    """Independent layer normalisation (section 3.3): one norm for each flow, everything else is shared."""

    def __init__(self, d_model: int):
        super().__init__()
        self.grid_layer_norm, self.segmentation_layer_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)

    def forward(self, flows):  # (2, B, N, d)
        return torch.stack([self.grid_layer_norm(flows[0]), self.segmentation_layer_norm(flows[1])])


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, post-norm. With `FlowNorm` it takes both flows, stacked in front: IILN."""

    def __init__(self, c: Config, norm: type[nn.Module]):
        super().__init__()
        self.self_attn, self.self_attn_layer_norm = Attention(c), nn.LayerNorm(c.d_model)
        self.layer_norm, self.final_layer_norm = norm(c.d_model), norm(c.d_model)
        self.feed_forward, self.dropout = FeedForward(c, c.encoder_ffn_dim), nn.Dropout(c.dropout)

    def forward(self, x):  # (B, N, d) or (2, B, N, d)
        flat = x.flatten(0, -3)  # the flows attend to themselves only: they are just more images
        attended = self.self_attn_layer_norm(flat + self.self_attn(flat, flat)).view_as(x)
        x = self.layer_norm(x + self.dropout(attended))
        return self.final_layer_norm(x + self.feed_forward(x))


class DecoderLayer(nn.Module):
    """Causal self-attention over the words, cross-attention to the image, feed-forward."""

    def __init__(self, c: Config):
        super().__init__()
        self.self_attn, self.self_attn_layer_norm = Attention(c), nn.LayerNorm(c.d_model)
        self.encoder_attn, self.encoder_attn_layer_norm = Attention(c), nn.LayerNorm(c.d_model)
        self.layer_norm, self.encoder_layer_norm = nn.LayerNorm(c.d_model), nn.LayerNorm(c.d_model)
        self.feed_forward, self.final_layer_norm = FeedForward(c, c.decoder_ffn_dim), nn.LayerNorm(c.d_model)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x, image):  # (B, L, d), (B, N, d)
        attended = self.self_attn_layer_norm(x + self.self_attn(x, x, is_causal=True))
        x = self.layer_norm(x + self.dropout(attended))
        attended = self.encoder_attn_layer_norm(x + self.encoder_attn(x, image))
        x = self.encoder_layer_norm(x + self.dropout(attended))
        return self.final_layer_norm(x + self.feed_forward(x))


class FlowEmbedding(nn.Module):
    def __init__(self, c: Config, feature_size: int):
        super().__init__()
        self.projection, self.layer_norm = nn.Linear(feature_size, c.d_model), nn.LayerNorm(c.d_model)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, features):  # (B, N, features) -> (B, N, d)
        return self.layer_norm(self.dropout(self.projection(features).relu()))


class NanoDifnet(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.encoder = nn.ModuleDict(
            {
                "grid_embedding": FlowEmbedding(c, c.grid_feature_size),
                "segmentation_embedding": FlowEmbedding(c, c.num_segmentation_classes),
                "flow_layers": nn.ModuleList([EncoderLayer(c, FlowNorm) for _ in range(c.fusion_layers)]),
                "layers": nn.ModuleList(
                    [EncoderLayer(c, nn.LayerNorm) for _ in range(c.encoder_layers - c.fusion_layers)]
                ),
            }
        )
        self.decoder = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(c.vocab_size, c.d_model, c.pad_token_id),
                "embed_positions": nn.Embedding(c.max_position_embeddings + 1, c.d_model),  # frozen; words from 1
                "layers": nn.ModuleList([DecoderLayer(c) for _ in range(c.decoder_layers)]),
            }
        )
        self.decoder["embed_positions"].weight.requires_grad_(False)
        self.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=False)

    def encode(self, grid_features, segmentation_features):  # (B, N, 2048), (B, 133, H, W) with H * W = N
        segmentation_features = segmentation_features.flatten(2).transpose(1, 2)  # (B, N, 133)
        grid = self.encoder["grid_embedding"](grid_features)  # (B, N, d)
        segmentation = self.encoder["segmentation_embedding"](segmentation_features)  # (B, N, d)
        flows = torch.stack([grid, segmentation])  # (2, B, N, d)
        for layer in self.encoder["flow_layers"]:
            for _ in range(self.config.fusion_iterations):
                flows = layer(flows)
        x = fused = flows.sum(0)  # (B, N, d)
        for layer in self.encoder["layers"]:
            x = layer(x)
        return x + fused  # the residual fusion: both flows reach the decoder directly as well

    def decode(self, tokens, image):  # (B, L) `<bos> w1 w2 ..`, (B, N, d) -> logits (B, L, V)
        positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        x = self.decoder["embed_tokens"](tokens) + self.decoder["embed_positions"](positions)  # (B, L, d)
        for layer in self.decoder["layers"]:
            x = layer(x, image)
        return self.lm_head(x)

    def loss(self, grid_features, segmentation_features, captions):  # captions (B, L): `<bos> w1 .. <eos> <pad> ..`
        logits = self.decode(captions[:, :-1], self.encode(grid_features, segmentation_features))
        return F.cross_entropy(logits.flatten(0, 1), captions[:, 1:].flatten(), ignore_index=self.config.pad_token_id)

    @torch.no_grad()
    def caption(self, grid_features, segmentation_features, max_new_tokens=20):
        image = self.encode(grid_features, segmentation_features)
        tokens = image.new_full((len(image), 1), self.config.bos_token_id, dtype=torch.long)  # (B, 1)
        for _ in range(max_new_tokens):
            following = self.decode(tokens, image)[:, -1].argmax(-1)  # (B,)
            ended = (tokens == self.config.eos_token_id).any(1)
            tokens = torch.cat([tokens, following.where(~ended, self.config.pad_token_id)[:, None]], dim=1)
        return tokens

    @classmethod
    def from_folder(cls, folder):
        saved = json.loads(Path(folder, "config.json").read_text())
        model = cls(Config(**{field.name: saved[field.name] for field in fields(Config) if field.name in saved}))
        weights = load_file(Path(folder, "model.safetensors"))
        model.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()})
        return model.eval()
