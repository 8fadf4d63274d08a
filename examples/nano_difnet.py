"""DIFNet in plain PyTorch: the whole model, its training loss and greedy decoding.

Wu et al., "DIFNet: Boosting Visual Information Flow for Image Captioning", CVPR 2022. Read it from top to bottom; the
numbers are the published sizes. `modeling_difnet` is the same network for Transformers, and its weights load here:

    model = NanoDifnet.from_folder("./difnet")  # config.json and model.safetensors
    tokens = model.caption(grid_features, segmentation_features)  # (B, L)
"""

import json
from collections import OrderedDict
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
    encoder_attention_heads: int = 8  # h, in the decoder as well
    head_dim: int = 64  # d_h
    encoder_ffn_dim: int = 2048  # in the decoder as well
    encoder_layers: int = 3
    decoder_layers: int = 3
    fusion_layers: int = 1  # Lf: layers that refine the two flows separately
    fusion_iterations: int = 2  # T: how often each of them is applied
    max_position_embeddings: int = 54
    dropout: float = 0.1
    pad_token_id: int = 1
    bos_token_id: int = 2
    eos_token_id: int = 3


def embedding(c: Config, feature_size: int):  # (B, N, feature_size) -> (B, N, d)
    projection, layer_norm = nn.Linear(feature_size, c.d_model), nn.LayerNorm(c.d_model)
    parts = {"projection": projection, "relu": nn.ReLU(), "dropout": nn.Dropout(c.dropout), "layer_norm": layer_norm}
    return nn.Sequential(OrderedDict(parts))


def feed_forward(c: Config):  # (B, L, d) -> (B, L, d)
    fc1, fc2 = nn.Linear(c.d_model, c.encoder_ffn_dim), nn.Linear(c.encoder_ffn_dim, c.d_model)
    parts = {"fc1": fc1, "relu": nn.ReLU(), "drop1": nn.Dropout(c.dropout), "fc2": fc2, "drop2": nn.Dropout(c.dropout)}
    return nn.Sequential(OrderedDict(parts))


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.dropout, width = c.encoder_attention_heads, nn.Dropout(c.dropout), c.d_model
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, self.heads * c.head_dim) for _ in range(3))
        self.out_proj = nn.Linear(self.heads * c.head_dim, width)

    def forward(self, x, source, is_causal=False):  # (B, L, d) attends to (B, S, d) -> (B, L, d)
        q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, h, L or S, d_h)
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5  # (B, h, L, S)
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        output = self.dropout(scores.softmax(-1)) @ v  # (B, h, L, d_h)
        return self.out_proj(output.transpose(1, 2).flatten(2))


class FlowNorm(nn.Module):
    """One layer norm for each flow, where everything else is shared by both."""

    def __init__(self, d_model: int):
        super().__init__()
        self.grid_layer_norm, self.segmentation_layer_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)

    def forward(self, flows):  # (2B, N, d): the grid flow's images, then the segmentation flow's
        norms = (self.grid_layer_norm, self.segmentation_layer_norm)
        return torch.cat([norm(flow) for norm, flow in zip(norms, flows.chunk(2), strict=True)])


class Layer(nn.Module):
    """Self-attention, in the decoder attention to the image, feed-forward; two residuals and norms for each attention.

    With `FlowNorm` it is the paper's iterative independent layer normalization, for both flows at once.
    """

    def __init__(self, c: Config, norm: type[nn.Module] = nn.LayerNorm, is_decoder: bool = False):
        super().__init__()
        self.self_attn, self.self_attn_layer_norm = Attention(c), nn.LayerNorm(c.d_model)
        self.layer_norm, self.final_layer_norm = norm(c.d_model), norm(c.d_model)
        if is_decoder:
            self.encoder_attn, self.encoder_attn_layer_norm = Attention(c), nn.LayerNorm(c.d_model)
            self.encoder_layer_norm = nn.LayerNorm(c.d_model)
        self.feed_forward, self.dropout = feed_forward(c), nn.Dropout(c.dropout)

    def forward(self, x, image=None):  # (B, L, d), or (2B, N, d) of both flows; (B, N, d) -> as x
        attended = self.self_attn(x, x, is_causal=image is not None)
        x = self.layer_norm(x + self.dropout(self.self_attn_layer_norm(x + self.dropout(attended))))
        if image is not None:
            attended = self.encoder_attn(x, image)
            x = self.encoder_layer_norm(x + self.dropout(self.encoder_attn_layer_norm(x + self.dropout(attended))))
        return self.final_layer_norm(x + self.feed_forward(x))


class Encoder(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.iterations, num_layers = c.fusion_iterations, c.encoder_layers - c.fusion_layers
        self.grid_embedding = embedding(c, c.grid_feature_size)
        self.segmentation_embedding = embedding(c, c.num_segmentation_classes)
        self.flow_layers = nn.ModuleList(Layer(c, FlowNorm) for _ in range(c.fusion_layers))
        self.layers = nn.ModuleList(Layer(c) for _ in range(num_layers))

    def forward(self, grid_features, segmentation_features):  # (B, N, 2048), (B, 133, H, W) with H * W = N
        segmentation = self.segmentation_embedding(segmentation_features.flatten(2).transpose(1, 2))  # (B, N, d)
        flows = torch.cat([self.grid_embedding(grid_features), segmentation])  # (2B, N, d)
        for layer in self.flow_layers:
            for _ in range(self.iterations):
                flows = layer(flows)
        x = fused = sum(flows.chunk(2))  # (B, N, d)
        for layer in self.layers:
            x = layer(x)
        return x + fused  # both flows also reach the decoder directly


class Decoder(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.d_model, c.pad_token_id)
        self.embed_positions = nn.Embedding(c.max_position_embeddings + 1, c.d_model).requires_grad_(False)
        self.layers = nn.ModuleList(Layer(c, is_decoder=True) for _ in range(c.decoder_layers))

    def forward(self, tokens, image):  # (B, L) `<bos> w1 w2 ..`, (B, N, d) -> (B, L, d)
        positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        x = self.embed_tokens(tokens) + self.embed_positions(positions)  # (B, L, d)
        for layer in self.layers:
            x = layer(x, image)
        return x


class NanoDifnet(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.config, self.encoder, self.decoder = c, Encoder(c), Decoder(c)
        self.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=False)

    def forward(self, tokens, image):  # (B, L), (B, N, d) -> logits of the next tokens (B, L, V)
        return self.lm_head(self.decoder(tokens, image))

    def loss(self, grid_features, segmentation_features, captions):  # captions (B, L): `<bos> w1 .. <eos> <pad> ..`
        logits = self(captions[:, :-1], self.encoder(grid_features, segmentation_features))  # (B, L - 1, V)
        return F.cross_entropy(logits.flatten(0, 1), captions[:, 1:].flatten(), ignore_index=self.config.pad_token_id)

    @torch.no_grad()
    def caption(self, grid_features, segmentation_features, max_new_tokens=20):
        image = self.encoder(grid_features, segmentation_features)  # (B, N, d)
        tokens = image.new_full((len(image), 1), self.config.bos_token_id, dtype=torch.long)  # (B, 1)
        for _ in range(max_new_tokens):
            newest = self(tokens, image)[:, -1].argmax(-1, keepdim=True)  # (B, 1)
            ended = (tokens == self.config.eos_token_id).any(1, keepdim=True)
            tokens = torch.cat([tokens, newest.masked_fill(ended, self.config.pad_token_id)], dim=1)
        return tokens

    @classmethod
    def from_folder(cls, folder):
        saved = json.loads(Path(folder, "config.json").read_text())
        model = cls(Config(**{field.name: saved[field.name] for field in fields(Config) if field.name in saved}))
        weights = load_file(Path(folder, "model.safetensors"))
        model.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()})
        return model.eval()
