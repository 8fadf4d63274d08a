"""CLIPScore as a reward: how well a caption fits its image, by a model that embeds texts and images in one space.

Hessel et al., EMNLP 2021: 2.5 times the cosine of the two embeddings, 0 where it is negative, without references. The
original (mrwu-mac/DIFNet, CVPR 2022) rewards CIDEr-D alone. Any model of Transformers with `get_text_features` and
`get_image_features` serves: CLIP, SigLIP, ALIGN .. from a folder or the Hub.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, AutoProcessor

from modeling_difnet.images_difnet import open_image
from modeling_difnet.weights_difnet import LOADING

from ..command_line import reason_of
from ..files import atomic_write, printable

SCALE = 2.5  # of Hessel et al., so that scores of CLIP ViT-B/32 lie between 0 and 1
PROMPT = "A photo depicts "  # of Hessel et al.


class ClipScore:
    """CLIPScore of captions; the embedding of an image is computed when it is first needed, and kept.

    Args:
        model: with `get_text_features` and `get_image_features`.
        processor: of the model, for texts and images.
        image_paths: files by image id, for callers that give the column `image_id`; others give `image_path`.
        cache: folder that keeps the embeddings of `image_paths`, for a run that resumes.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        image_paths: Mapping[int, Path] | None = None,
        cache: Path | None = None,
    ):
        self.model: Any = model.eval().requires_grad_(False)
        self.processor, self.image_paths = processor, image_paths
        self.rows = {image_id: row for row, image_id in enumerate(sorted(image_paths or ()))}
        self.table: np.ndarray | None = None
        if cache is not None and self.rows:
            width = self.embed_texts(["a"]).shape[1]
            self.table = open_table(cache, fingerprint(model, image_paths or {}), len(self.rows), width)
        self.embeddings: dict[object, torch.Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        image_paths: Mapping[int, Path] | None,
        cache: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> ClipScore:
        """The reward with a model of a folder or of the Hub.

        Raises:
            ValueError: it cannot be loaded, or has no embeddings of texts and images.
        """
        try:
            with LOADING:
                model, report = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
            processor = AutoProcessor.from_pretrained(name)
        except Exception as error:
            raise ValueError(
                f"the reward clip_score: {printable(name, 300)} is no model that Transformers can load: "
                f"{printable(reason_of(error), 300)}"
            ) from error
        if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
            raise ValueError(
                f"the reward clip_score: {printable(name, 300)} is a {type(model).__name__}, which embeds no texts "
                "and images in one space, as CLIP and SigLIP do"
            )
        if report["missing_keys"]:
            raise ValueError(
                f"the reward clip_score: {printable(name, 300)} lacks weights, the first is "
                f"{min(report['missing_keys'])}: this is not the complete file of this model"
            )
        return cls(model.to(device), processor, image_paths, cache)

    def __call__(
        self,
        captions: Sequence[str],
        references: Any = None,
        image_id: Sequence[int] | None = None,
        image_path: Sequence[str | Path] | None = None,
    ) -> list[float]:
        keys: Sequence[Any] | None = image_path if image_path is not None else image_id
        if keys is None:
            raise ValueError("clip_score needs the images: give the column image_id, or image_path")
        of_images = torch.stack([self.image_embedding(key) for key in keys])  # (captions, D)
        of_texts = self.embed_texts([PROMPT + caption for caption in captions])  # (captions, D)
        return (SCALE * (of_images * of_texts).sum(-1).clamp(min=0)).tolist()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings (texts, D) of length 1, on the CPU."""
        config = self.model.config
        # SigLIP was trained on texts of full length; CLIP takes no notice of what follows a text's end.
        padding = "max_length" if "siglip" in config.model_type else True
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        inputs = self.processor(
            text=list(texts), padding=padding, truncation=True, max_length=longest, return_tensors="pt"
        )
        return unit_length(self.model.get_text_features(**inputs.to(self.device)))

    @torch.no_grad()
    def image_embedding(self, key: Any) -> torch.Tensor:
        """The embedding (D,) of an image, given by its id or its path.

        Images are embedded one at a time: in a batch their last bits would depend on the others, and a resumed run
        has others.
        """
        if key not in self.embeddings:
            row = None if self.table is None else self.rows.get(key)
            if self.table is not None and row is not None and np.isfinite(self.table[row]).all():
                self.embeddings[key] = torch.from_numpy(self.table[row].copy())
                return self.embeddings[key]
            path = key if self.image_paths is None else self.image_paths.get(key)
            if path is None:
                raise ValueError(f"clip_score has no file of image {printable(key)}")
            inputs = self.processor(images=open_image(path), return_tensors="pt")
            self.embeddings[key] = unit_length(self.model.get_image_features(**inputs.to(self.device)))[0]
            if self.table is not None and row is not None:
                self.table[row] = self.embeddings[key].numpy()
        return self.embeddings[key]

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device


def unit_length(output: Any) -> torch.Tensor:
    """What a model's `get_.._features` returns as vectors of length 1, (B, D), on the CPU."""
    features = output if isinstance(output, torch.Tensor) else output.pooler_output
    return nn.functional.normalize(features.float(), dim=-1).cpu()


def fingerprint(model: nn.Module, image_paths: Mapping[int, Path]) -> str:
    """Of the weights of a model and of the files that it embeds."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps(sorted((image_id, str(path)) for image_id, path in image_paths.items())).encode())
    return digest.hexdigest()


def open_table(folder: Path, name: str, rows: int, width: int) -> np.ndarray:
    """A table (rows, width) in a file, which begins with NaN everywhere: what is not computed yet.

    A row that a killed run was writing has a NaN left, and is computed again.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / f"clip_score_{name[:16]}.npy"
    if not path.exists():
        empty = io.BytesIO()
        np.save(empty, np.full((rows, width), np.nan, dtype=np.float32), allow_pickle=False)
        atomic_write(path, empty.getvalue())
    try:
        table = np.lib.format.open_memmap(path, mode="r+")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{printable(path, 300)} is damaged; delete it, and embeddings are computed again") from error
    if table.shape != (rows, width) or table.dtype != np.float32:
        raise ValueError(f"{printable(path, 300)} is damaged; delete it, and embeddings are computed again")
    return table
