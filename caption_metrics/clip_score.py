"""CLIPScore and RefCLIPScore (Hessel et al., EMNLP 2021), by any model of Transformers that embeds texts and images.

CLIPScore is 2.5 times the cosine of caption and image, RefCLIPScore the harmonic mean of CLIPScore and the largest
cosine of the caption with a reference; cosines below 0 count as 0. Corresponds to clipscore.py of jmhessel/clipscore,
which runs OpenAI's ViT-B/32 in half precision on a GPU. Here it is any CLIP or SigLIP, in float32. torch, Transformers
and Pillow are imported when a model is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .captions import Score

if TYPE_CHECKING:
    import torch
    from PIL import Image

SCALE = 2.5
PROMPT = "A photo depicts "
# Pillow opens other formats with programs of their own, such as Ghostscript.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")

ImageSource = Any  # a path, or an image of Pillow


def open_image(source: str | os.PathLike | Image.Image) -> Image.Image:
    """An image of Pillow in RGB, upright. Raises ValueError, naming the file, if it cannot be opened."""
    from PIL import Image, ImageOps

    if isinstance(source, Image.Image):
        return ImageOps.exif_transpose(source).convert("RGB")
    try:
        with Image.open(source, formats=IMAGE_FORMATS) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # decoders raise whatever comes up
        raise ValueError(f"{os.fspath(source)}: an image that cannot be opened ({error})") from error


class ClipScore:
    """CLIPScore of captions.

    model: with `get_text_features` and `get_image_features`, in eval mode.
    processor: of the model, for texts and images.
    open_image: makes RGB images of Pillow of what `score` gets as images.
    batch_size: texts or images at a time.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        open_image: Callable[[ImageSource], Image.Image] = open_image,
        batch_size: int = 64,
    ):
        self.model, self.processor, self.open_image, self.batch_size = model, processor, open_image, batch_size

    @classmethod
    def from_pretrained(cls, name: str, device: str = "cpu", **options: Any) -> ClipScore:
        """The metric with a model of a folder or of the Hub, such as "openai/clip-vit-base-patch32".

        options: `open_image`, `batch_size`.

        Raises ImportError if a package is missing, ValueError if the model cannot be loaded or is of another kind.
        """
        try:
            import PIL  # noqa: F401
            import torch
            from transformers import AutoModel, AutoProcessor
        except ImportError as error:
            raise ImportError(
                f"CLIPScore needs torch, Transformers and Pillow: pip install torch transformers pillow ({error})"
            ) from error
        try:
            model, report = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
            processor = AutoProcessor.from_pretrained(name)
        except Exception as error:
            said = " ".join(str(error).split())
            raise ValueError(f"CLIPScore: {name} is no model that Transformers can load: {said:.300}") from error
        if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
            raise ValueError(
                f"CLIPScore: {name} is a {type(model).__name__}, which embeds no texts and images in one space, as "
                "CLIP and SigLIP do"
            )
        if report["missing_keys"]:
            raise ValueError(
                f"CLIPScore: {name} lacks weights, the first is {min(report['missing_keys'])}: this is not the "
                "complete file of this model"
            )
        return cls(model.to(device).eval(), processor, **options)

    def score(self, captions: Sequence[str], images: Sequence[ImageSource]) -> Score:
        """CLIPScore (0 to 2.5) of a caption for each image, a path or an image of Pillow.

        Raises ValueError if there are no captions, or not as many as images, or an image cannot be opened.
        """
        _check(captions, images)
        return _score(SCALE * _cosines(self._embed_texts(captions), self._embed_images(images)))

    def scores(
        self, captions: Sequence[str], images: Sequence[ImageSource], references: Sequence[Sequence[str]]
    ) -> tuple[Score, Score]:
        """CLIPScore, and RefCLIPScore with the reference captions of each image. Errors as of `score`."""
        _check(captions, images)
        if len(references) != len(captions) or not all(len(group) for group in references):
            raise ValueError("references must hold a list with at least one caption for each image")
        embedded = self._embed_texts(captions)
        clip_scores = SCALE * _cosines(embedded, self._embed_images(images))
        owners = np.repeat(np.arange(len(captions)), [len(group) for group in references])
        of_references = self._embed_texts([caption for group in references for caption in group])
        nearest = np.zeros(len(captions))
        np.maximum.at(nearest, owners, _cosines(embedded[owners], of_references))
        total = clip_scores + nearest
        harmonic = np.divide(2 * clip_scores * nearest, total, out=np.zeros(len(total)), where=total > 0)
        return _score(clip_scores), _score(harmonic)

    def _embed_texts(self, captions: Sequence[str]) -> np.ndarray:
        """Vectors of length 1, (captions, D) float64. Each text is embedded once."""
        texts = {PROMPT + caption: None for caption in captions}
        rows = {text: row for row, text in enumerate(texts)}
        config = self.model.config
        # SigLIP was trained on texts of full length; CLIP takes no notice of what follows a text's end.
        padding = "max_length" if "siglip" in config.model_type else True
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)

        def embed(part: list[str]) -> Any:
            inputs = self.processor(
                text=part, padding=padding, truncation=True, max_length=longest, return_tensors="pt"
            )
            return self.model.get_text_features(**inputs.to(self._device))

        return self._in_batches(embed, list(texts))[[rows[PROMPT + caption] for caption in captions]]

    def _embed_images(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Vectors of length 1, (images, D) float64."""

        def embed(part: Sequence[ImageSource]) -> Any:
            inputs = self.processor(images=[self.open_image(image) for image in part], return_tensors="pt")
            return self.model.get_image_features(**inputs.to(self._device))

        return self._in_batches(embed, images)

    def _in_batches(self, embed: Callable[[Any], Any], items: Sequence[Any]) -> np.ndarray:
        import torch

        parts = []
        with torch.no_grad():
            for first in range(0, len(items), self.batch_size):
                output = embed(items[first : first + self.batch_size])
                features = output if isinstance(output, torch.Tensor) else output.pooler_output
                parts.append(features.double().cpu().numpy())
        vectors = np.concatenate(parts)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _check(captions: Sequence[str], images: Sequence[ImageSource]) -> None:
    if isinstance(captions, str) or not len(captions):
        raise ValueError("captions must be a list with at least one caption")
    if len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions and {len(images)} images: give one image for each caption")


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosines of rows of length 1, 0 where they are negative."""
    return np.maximum(0.0, (one * other).sum(axis=1))


def _score(per_image: np.ndarray) -> Score:
    return Score(float(per_image.mean()), per_image)
