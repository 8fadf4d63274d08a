"""Rows of captions for images of any origin: the stages of `difnet caption`, with a row for whatever goes wrong.

`ImageCaptioner` is a callable that can be pickled before its networks are loaded, as the actors of Ray Data and the
functions of Spark have to be. The original (mrwu-mac/DIFNet, CVPR 2022) captions features, and begins with files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from modeling_difnet import sequence_log_probs
from modeling_difnet.confidence_difnet import CaptionConfidence, generate_with_confidences
from modeling_difnet.feature_networks_difnet import hash_of_parameters, provenance_of, segmentation_provenance_of
from modeling_difnet.pipeline_difnet import DifnetImageCaptioningPipeline

from ..command_line import LeftOut, describe
from ..data.packed_dataset import encode_segmentation, to_stored
from ..evaluation.image_captions import (
    CaptionItem,
    Loaded,
    Prepared,
    decoding_options,
    load_pipeline,
    prepared_batches,
)
from ..evaluation.runtime_captioner import RuntimeCaptioner
from ..stage_times import StageTimes
from ..vision.image_batches import NUM_THREADS, one_ahead
from .fetching import Fetcher
from .outputs import caption_schema
from .readers import ImageItem
from .rows import FailureWatch, Row, error_row, load_item

CAPTIONING = "captioning"


@dataclass(frozen=True)
class CaptioningConfig:
    """What captions images, and what of the captions is wanted.

    Args:
        model, grid_backbone, layer, image_size, precision, force, segmentation_model, segmentation_size, untrained,
            seed, device, runtime: as for `load_pipeline`.
        num_captions, num_beams, original_beam_search: as for `decoding_options`.
        confidence: whether rows say how sure the captioner is.
        save_features: "float16" or "float32" for rows with the features; `None` for rows without.
        batch_size: images that are captioned together.
        num_threads: that read and decode images beside the networks; 0 for none. By default half of the cores, at
            most 4.
        allow_private_hosts: whether URLs of images may lead to this machine or a private network.
    """

    model: str
    grid_backbone: str | None = None
    layer: int | None = None
    image_size: tuple[int, int] | None = None
    precision: str | None = None
    force: bool = False
    segmentation_model: str | None = None
    segmentation_size: int | None = None
    untrained: bool = False
    seed: int = 0
    device: str | None = None
    runtime: str | None = None
    num_captions: int = 1
    num_beams: int | None = None
    original_beam_search: bool = False
    confidence: bool = False
    save_features: str | None = None
    batch_size: int = 8
    num_threads: int | None = None
    allow_private_hosts: bool = False


class ErrorsByPosition(LeftOut):
    """The errors of items, by their positions, which are their names."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[int, str] = {}

    def add(self, name: object, reason: BaseException | str) -> None:
        assert isinstance(name, int)
        self.errors[name] = " ".join((reason if isinstance(reason, str) else describe(reason)).split())


class ImageCaptioner:
    """Captions images; each has one row, in their order.

    ```python
    >>> from difnet_transformers.bulk import CaptioningConfig, ImageCaptioner

    >>> captioner = ImageCaptioner(CaptioningConfig("./my_captioner"))
    >>> captioner([{"key": "1", "image": open("image.jpg", "rb").read()}])
    [{'key': '1', 'source': None, 'caption': 'a man riding a horse', 'score': -9.1, 'error': None}]
    ```

    Networks are loaded when they are first needed, and are not pickled along.

    Args:
        config: networks and options.
    """

    what = "captions"
    needs_images = True

    def __init__(self, config: CaptioningConfig) -> None:
        self.config = config
        self._pipeline: DifnetImageCaptioningPipeline | None = None
        self._has_captioned = False
        self._empty_row: Row = dict.fromkeys(self.schema.names)

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])  # type: ignore[misc]

    @cached_property
    def schema(self) -> Any:
        """The columns of the rows, a `pyarrow.Schema`."""
        return caption_schema(self.config.num_captions > 1, self.config.confidence, self.config.save_features)

    @property
    def batch_size(self) -> int:
        return self.config.batch_size

    @property
    def device(self) -> torch.device:
        return self.pipeline.device

    @property
    def pipeline(self) -> DifnetImageCaptioningPipeline:
        """The networks.

        Raises:
            ValueError: they cannot be loaded, as by `load_pipeline`.
        """
        if self._pipeline is None:
            config = self.config
            self._pipeline = load_pipeline(
                config.model,
                grid_backbone=config.grid_backbone,
                layer=config.layer,
                image_size=config.image_size,
                precision=config.precision,
                force=config.force,
                needs_images=self.needs_images,
                segmentation_model=config.segmentation_model,
                segmentation_size=config.segmentation_size,
                untrained=config.untrained,
                seed=config.seed,
                device=config.device,
                runtime=config.runtime,
                original=config.original_beam_search,
            )
        return self._pipeline

    def identity(self) -> dict[str, Any]:
        """What decides about the rows, but for the images: hashes of all weights, and the options."""
        pipeline = self.pipeline
        if isinstance(pipeline.model, RuntimeCaptioner):
            manifest = pipeline.model.runtime_model.manifest
            weights = {**manifest.source, "format": manifest.format, "precision": manifest.precision, "name": None}
        else:
            weights = {"parameters_sha256": hash_of_parameters(pipeline.model), "dtype": str(pipeline.model.dtype)}
        settings = pipeline.model.generation_config.to_diff_dict()
        settings.pop("transformers_version", None)
        options = decoding_options(pipeline, self.config.num_captions, self.config.num_beams)
        said: dict[str, Any] = {
            "captioner": weights,
            "vocabulary": digest_of(pipeline.processor.tokenizer.get_vocab()),
            "generation settings": digest_of({**settings, "num_beams": None}),
            "--num-captions": self.config.num_captions,
            "--num-beams": options["num_beams"],
            "--original-beam-search": self.config.original_beam_search,
            "--confidence": self.config.confidence,
            "--save-features": self.config.save_features,
            **self.identity_of_networks(),
        }
        if self.config.confidence and pipeline.calibration is not None:
            said["calibration"] = digest_of(asdict(pipeline.calibration))
        return json.loads(json.dumps(said))

    def identity_of_networks(self) -> dict[str, Any]:
        """What `identity` says of the networks that make the features."""
        pipeline = self.pipeline
        said = {"grid backbone": provenance_of(pipeline.grid_backbone, None)}
        if pipeline.segmenter is not None:
            said["segmentation model"] = segmentation_provenance_of(pipeline.segmenter, None)
        return said

    def __call__(self, images: Iterable[Mapping[str, Any]]) -> list[Row]:
        """Captions a batch of images.

        Args:
            images: each with its "key", "image" (the bytes of a file, or its path or URL), and, if wanted, "source".

        Returns:
            A row for each image, in order.
        """
        items = (ImageItem(str(each["key"]), each.get("source"), each["image"]) for each in images)
        return list(self.rows(items))

    def rows(
        self, items: Iterable[ImageItem], times: StageTimes | None = None, overlap: bool | None = None
    ) -> Iterator[Row]:
        """Captions images as they come, reading and decoding ahead in threads.

        Args:
            items: images.
            times: gets the times of the stages.
            overlap: whether the feature networks work on the next batch while one is captioned; by default on GPUs.

        Raises:
            Exception: what is no image's fault: the first batch cannot be captioned at all, the device fails, or
                `items` raises.
        """
        times = times or StageTimes()
        pipeline, errors, watch = self.pipeline, ErrorsByPosition(), FailureWatch()
        threads = NUM_THREADS if self.config.num_threads is None else self.config.num_threads
        fetcher = Fetcher(self.config.allow_private_hosts, threads, times)
        heads: dict[int, ImageItem] = {}  # of images without a row, without their contents

        def numbered() -> Iterator[CaptionItem]:
            for position, item in enumerate(fetcher.fetched(items)):
                heads[position] = item._replace(content=b"")
                yield CaptionItem(position, None, position, partial(self._load, item))

        def rows_until(stop: int, captions: Mapping[int, Row]) -> Iterator[Row]:
            # A copy: with `overlap` another thread adds to it. Positions are in order.
            for position in [each for each in tuple(heads) if each < stop]:
                error = errors.errors.pop(position, None)
                watch.look(error)
                yield self._row(heads.pop(position), captions.get(position), error)

        batches = prepared_batches(pipeline, numbered(), self.config.batch_size, errors, times, threads)
        if overlap or (overlap is None and pipeline.device.type == "cuda"):
            batches = one_ahead(batches)
        with contextlib.closing(batches), fetcher:
            for prepared in batches:
                with times.stage(CAPTIONING):
                    captions = self._caption_batch(prepared, errors)
                yield from rows_until(prepared[-1][0].image_id + 1, captions)
        yield from rows_until(sys.maxsize, {})

    def _load(self, item: ImageItem) -> Loaded:
        """An image, ready for the networks."""
        pipeline = self.pipeline
        keep = pipeline.model.config.use_segmentation
        networks = (pipeline.grid_backbone, pipeline.segmenter)
        return load_item(item, *networks, keep)

    def _caption_batch(self, prepared: Prepared, errors: ErrorsByPosition) -> dict[int, Row]:
        """Columns of images by their positions; those of a batch that fails are captioned one by one."""
        try:
            found = self._generate([inputs for _, inputs in prepared])
        except Exception as error:
            if len(prepared) == 1:
                errors.add(prepared[0][0].image_id, error)
                return {}
            alone = [self._caption_batch([each], errors) for each in prepared]
            if not any(alone) and not self._has_captioned:
                raise  # not the images are wrong, but what was asked for
            return {position: row for rows in alone for position, row in rows.items()}
        self._has_captioned = True
        return {item.image_id: row for (item, _), row in zip(prepared, found, strict=True)}

    def _generate(self, prepared: list[Mapping[str, torch.Tensor]]) -> list[Row]:
        """The columns of images that are captioned together.

        Args:
            prepared: their inputs, each of batch size 1.
        """
        config, pipeline = self.config, self.pipeline
        options = decoding_options(pipeline, config.num_captions, config.num_beams, config.original_beam_search)
        names = sorted({name for inputs in prepared for name in inputs})
        batch: dict[str, Any] = {name: torch.cat([inputs[name] for inputs in prepared]) for name in names}
        confidences: list[list[CaptionConfidence]] = []
        sequences: Any  # (B, num_captions, L)
        with torch.no_grad():
            inputs = pipeline.ensure_tensor_on_device(**batch)
            if "grid_attention_mask" in inputs and inputs["grid_attention_mask"].all():
                del inputs["grid_attention_mask"]
            if config.confidence:
                sequences, confidences = generate_with_confidences(
                    pipeline.model, pipeline.words, inputs, options, pipeline.calibration
                )
                scores = [[caption.score for caption in captions] for captions in confidences]
            else:
                found = pipeline.model.generate(**inputs, **options, return_dict_in_generate=True)
                sequences = torch.as_tensor(found.sequences).reshape(len(prepared), config.num_captions, -1)
                sums = getattr(found, "sequences_scores", None)
                if sums is None:  # of Transformers' own search, which has them with the logits of all steps alone
                    sums = sequence_log_probs(pipeline.model, sequences, **inputs).sum(-1)
                scores = torch.as_tensor(sums).float().reshape(len(prepared), -1).tolist()
        texts = pipeline.processor.batch_decode(sequences.flatten(0, 1), skip_special_tokens=True)
        rows = []
        for index, of_image in enumerate(scores):
            captions = texts[index * config.num_captions : (index + 1) * config.num_captions]
            row: Row = {"caption": captions[0], "score": of_image[0]}
            if config.num_captions > 1:
                row["beams"] = [
                    {"caption": caption, "score": score} for caption, score in zip(captions, of_image, strict=True)
                ]
            if confidences:
                row |= confidences[index][0].as_dict()
            if config.save_features:
                row |= features_of_row(prepared[index], config.save_features)
            rows.append(row)
        return rows

    def _row(self, item: ImageItem, captions: Row | None, error: str | None) -> Row:
        if captions is None:
            return self._empty_row | error_row(item, error or "no caption")
        return self._empty_row | {"key": item.key, "source": item.source} | captions


def features_of_row(inputs: Mapping[str, torch.Tensor], dtype: str) -> Row:
    """The columns of features, as a packed dataset has them.

    Args:
        inputs: of the captioner, of batch size 1.
        dtype: "float16" or "float32".

    Raises:
        ValueError: float16 is too small for a value.
    """
    grid = inputs["grid_features"][0].float().cpu().numpy()  # (cells, C)
    mask = inputs.get("grid_attention_mask")
    row: Row = {
        "grid_features": to_stored(grid, dtype),
        "grid_cells": len(grid) if mask is None else int(mask.sum()),
    }
    if "segmentation_features" in inputs:
        shares = inputs["segmentation_features"][0].float().cpu().numpy()  # (classes, rows, columns)
        row["segmentation_features"] = encode_segmentation(np.ascontiguousarray(to_stored(shares, dtype)))
    return row


def digest_of(said: Any) -> str:
    """SHA-256 of what can be written as JSON."""
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()
