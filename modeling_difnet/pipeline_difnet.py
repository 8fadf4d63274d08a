"""From images to captions: a Transformers pipeline of the two feature networks and the captioner.

The task is `"image-captioning"`; importing `modeling_difnet` registers it, and a checkpoint names it in its
`config.json`, so that `pipeline("image-captioning", model=.., trust_remote_code=True)` works without the project. The
original (mrwu-mac/DIFNet, CVPR 2022) has nothing like it: it captions feature files that somebody else made.

    image --> open_image --> RGB --> grid backbone (49, C) --------------+
                              |                                          +--> DIFNet --> caption
                              +----> segmenter (classes, 7, 7) ----------+

The two networks are in `feature_networks_difnet.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import Pipeline

from .calibration_difnet import Calibration, calibration_of
from .confidence_difnet import generate_with_confidences
from .feature_networks_difnet import (
    ANNOTATION_SOURCES,
    PRECISIONS,
    UNTRAINED_WARNING,
    GridBackbone,
    Segmenter,
    check_same_backbone,
    check_same_segmentation,
    has_native_bf16,
    hash_of_parameters,
    is_loadable,
    load_grid_backbone,
    load_segmenter,
    provenance_of,
    recorded_class_names,
    resolve_precision,
    segmentation_provenance_of,
    with_classes,
)
from .images_difnet import Image, one_line, open_image
from .segmentation_difnet import CLASS_NAMES
from .segmentation_models_difnet import MODEL_CLASSES, SegmentationModel
from .vision_backbone_difnet import as_pair

TASK = "image-captioning"


class DifnetImageCaptioningPipeline(Pipeline):
    """Captions of images, or of features that were made before.

    ```python
    >>> import modeling_difnet  # registers the task
    >>> from transformers import pipeline

    >>> captioner = pipeline(
    ...     "image-captioning",
    ...     model="./difnet",
    ...     grid_backbone="x101",
    ...     segmentation_model="facebook/mask2former-swin-large-coco-panoptic",
    ... )
    >>> captioner("image.jpg")
    [{'generated_text': 'a man riding a horse on the beach'}]
    >>> captioner = pipeline("image-captioning", model="mine")  # whose checkpoint names both networks
    ```

    Args:
        grid_backbone: folder, repository or function (see `load_grid_backbone`), or the loaded network. Without it
            the one that the checkpoint names is loaded with the first image; if it names none, only features can be
            captioned.
        grid_backbone_options: further arguments of `load_grid_backbone`: `layer`, `image_size`, `precision`,
            `revision`. The grid's size is the captioner's.
        segmentation_model: folder or repository (see `load_segmenter`), or the loaded model. Without it the one that
            the checkpoint names is loaded with the first image. Its classes are matched by name to the captioner's.
            Not for the paper's baseline, which has no segmentation flow.
        segmentation_options: further arguments of `load_segmenter`: `score_threshold`, by default the recorded one,
            and `revision`.
        force: takes networks that are not those that the checkpoint names; never other classes than the captioner's.
        untrained: for checks without weights, see `load_grid_backbone`: a network that is not named is a small one
            with random weights, drawn from `seed`.
        allow_private_hosts: whether URLs of images may lead to this machine or a private network.
        return_confidence: whether each caption comes with how sure the captioner is of it; here or in the call.
        num_beams, num_return_sequences, ...: of `generate`; here or in the call. `custom_generate` works too.

    Called with an image (path, URL, bytes, Pillow image), with `{"grid_features": (49, 2048),
    "segmentation_features": (133, 7, 7)}`, or with a list or generator of these (`batch_size=` of them are captioned
    together). One image gives a list of `{"generated_text": caption}`, as long as `num_return_sequences`.

    With `return_confidence=True` a caption also has:

    - `score`: sum of the log-probabilities of its words and `<eos>`; `mean_log_prob`: the same by token;
    - `margin`: how far its score is above the best of the image's other beams; none of a single beam;
    - `agreement`: 0 to 1, which share of the beams has its words, in the mean;
    - `words`: a list of `{"word", "log_prob", "entropy", "support"}` without prompt and `<eos>`: log-probability,
      entropy of the distribution in nats, share of the beams that have the word;
    - of a checkpoint with a `calibration.json` (`difnet calibrate`) and as many beams as that was fitted to:
      `confidence` of each word, the probability that it is right, `confidence` of the caption, the mean of these, and
      `expected_cider_d`, the CIDEr-D of such captions.

    ```python
    >>> captioner("image.jpg", return_confidence=True)
    [{'generated_text': 'a man riding a horse on the beach', 'score': -3.1, 'mean_log_prob': -0.34, 'margin': 0.4,
      'agreement': 0.92, 'confidence': 0.95, 'expected_cider_d': 1.3, 'words': [{'word': 'a', ..}, ..]}]
    ```

    Raises:
        UnreadableImage: an image cannot be opened.
        ValueError: a network that is needed was neither given nor recorded, is another one than was recorded, or its
            features do not fit the captioner.
    """

    _load_processor = True  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]

    model: Any
    processor: Any

    def __init__(
        self,
        *args: Any,
        grid_backbone: str | GridBackbone | None = None,
        segmentation_model: str | Segmenter | None = None,
        grid_backbone_options: Mapping[str, Any] | None = None,
        segmentation_options: Mapping[str, Any] | None = None,
        force: bool = False,
        untrained: bool = False,
        seed: int = 0,
        allow_private_hosts: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.grid_backbone_options = dict(grid_backbone_options or {})
        self.segmentation_options = {
            key: value for key, value in (segmentation_options or {}).items() if value is not None
        }
        self.allow_private_hosts = allow_private_hosts
        extractor = self.processor.feature_extractor
        if isinstance(grid_backbone, str) or (untrained and grid_backbone is None):
            options = {"grid_size": extractor.grid_size, **self.grid_backbone_options}
            grid_backbone = load_grid_backbone(grid_backbone, self.device, untrained, seed, **options)
        if grid_backbone is not None and not (force or untrained):
            check_same_backbone(self.recorded_backbone, grid_backbone)
        if self.model.config.use_segmentation:
            if isinstance(segmentation_model, str) or (untrained and segmentation_model is None):
                segmentation_model = self._load_segmenter(
                    segmentation_model, self.segmentation_options, untrained=untrained, seed=seed
                )
            if segmentation_model is not None:
                segmentation_model = with_classes(segmentation_model, self.class_names)
                if not (force or untrained):
                    check_same_segmentation(self.recorded_segmentation, segmentation_model)
        elif segmentation_model is not None:
            raise ValueError(
                "this captioner has no segmentation flow (use_segmentation=False): drop segmentation_model"
            )
        self.grid_backbone, self.segmenter = grid_backbone, segmentation_model
        self._check_sizes()

    # The networks that the checkpoint names

    @property
    def recorded_backbone(self) -> dict[str, Any]:
        """What made the grid features that the captioner was trained on; empty where its checkpoint does not say."""
        return getattr(self.processor.feature_extractor, "grid_backbone", None) or {}

    @property
    def recorded_segmentation(self) -> dict[str, Any]:
        """What made the segmentation features; empty where the checkpoint does not say."""
        return getattr(self.processor.feature_extractor, "segmentation_model", None) or {}

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes of the segmentation features, see `recorded_class_names`."""
        return recorded_class_names(self.processor.feature_extractor)

    def load_recorded_networks(self) -> None:
        """Loads the networks that the captioner was trained with, but for those that were given.

        Raises:
            ValueError: a network has no record, or none that it can be loaded by, or is another one by now.
        """
        missing = [text for text in (self._missing_backbone(), self._missing_segmenter()) if text]
        if missing:
            raise ValueError("; ".join(missing))
        self.load_recorded_backbone()
        self.load_recorded_segmenter()

    def load_recorded_backbone(self) -> None:
        """Loads the grid backbone that the captioner was trained with, unless one was given.

        Raises:
            ValueError: the checkpoint does not name it, names code, or the network is another one by now.
        """
        if self.grid_backbone is not None:
            return
        missing = self._missing_backbone()
        if missing:
            raise ValueError(missing)
        said = self.recorded_backbone
        name = said["name"]
        kinds = {"layer": int, "image_size": list, "precision": str, "revision": str}
        options = {key: said[key] for key, kind in kinds.items() if isinstance(said.get(key), kind)}
        if options.get("precision") not in PRECISIONS:  # of another runtime, which the user may give
            options.pop("precision", None)
        options |= {key: value for key, value in self.grid_backbone_options.items() if value is not None}
        try:
            backbone = load_grid_backbone(
                name, self.device, grid_size=self.processor.feature_extractor.grid_size, **options
            )
        except (OSError, ValueError) as error:
            raise ValueError(_cannot_be_loaded(name, "grid_backbone", error)) from error
        check_same_backbone(said, backbone)
        self.grid_backbone = backbone
        self._check_sizes()

    def load_recorded_segmenter(self) -> None:
        """Loads the segmentation model that the captioner was trained with, unless one was given or none is needed.

        Raises:
            ValueError: the checkpoint does not name it, or the model is another one by now.
        """
        if self.segmenter is not None or not self.model.config.use_segmentation:
            return
        missing = self._missing_segmenter()
        if missing:
            raise ValueError(missing)
        said = self.recorded_segmentation
        kinds = {"revision": str, "precision": str, "image_size": int}
        options = {key: said[key] for key, kind in kinds.items() if isinstance(said.get(key), kind)}
        if options.get("precision") not in PRECISIONS:
            options.pop("precision", None)
        try:
            segmenter = self._load_segmenter(said["name"], {**options, **self.segmentation_options})
        except (OSError, ValueError) as error:
            raise ValueError(_cannot_be_loaded(said["name"], "segmentation_model", error)) from error
        check_same_segmentation(said, segmenter)
        self.segmenter = segmenter
        self._check_sizes()

    def _load_segmenter(
        self, name: str | None, options: Mapping[str, Any], *, untrained: bool = False, seed: int = 0
    ) -> Segmenter:
        """A segmentation model with the captioner's grid, classes and, unless `options` say another, threshold."""
        grid_size = self.processor.feature_extractor.grid_size
        segmenter = load_segmenter(
            name, self.device, untrained, seed, grid_size, class_names=self.class_names, **options
        )
        threshold: Any = self.recorded_segmentation.get("score_threshold")
        if isinstance(segmenter, SegmentationModel) and isinstance(threshold, (int, float)):
            # Other kinds of models, which `force` may bring, have no use for it.
            segmenter.score_threshold = options.get("score_threshold", threshold)
        return segmenter

    def _missing_backbone(self) -> str | None:
        """What must be given because no grid backbone was, and none can be loaded; `None` where nothing is missing."""
        said = self.recorded_backbone
        if self.grid_backbone is not None or is_loadable(said):
            return None
        name = said.get("name")
        if said.get("substitute"):
            return _takes_substitute(said, "grid_backbone")
        if isinstance(name, str):
            return f"this captioner was trained with {name}, which is code: name it, `grid_backbone={name}`"
        return "an image needs `grid_backbone=` (X-101 or another vision model)"

    def _missing_segmenter(self) -> str | None:
        """As `_missing_backbone`, of the segmentation model."""
        said = self.recorded_segmentation
        if self.segmenter is not None or not self.model.config.use_segmentation or is_loadable(said):
            return None
        if said.get("substitute"):
            return _takes_substitute(said, "segmentation_model")
        fitting = _fitting_models(self.class_names, self.processor.feature_extractor.num_segmentation_classes)
        source = said.get("source")
        if source is not None and source not in MODEL_CLASSES:
            return (
                f"this captioner was trained on {ANNOTATION_SOURCES.get(source, one_line(source))}, not on a model's "
                f"segmentation: give `segmentation_model=` (--segmentation-model), {fitting}"
            )
        return f"an image needs `segmentation_model=` (--segmentation-model), {fitting}"

    def _check_sizes(self) -> None:
        """Raises `ValueError` where the networks give features of other sizes than the captioner's."""
        extractor = self.processor.feature_extractor
        fits = []
        if self.grid_backbone is not None:
            config = self.grid_backbone.config
            fits.append(("grid_feature_size", config.grid_feature_size, extractor.grid_feature_size))
            fits.append(("grid_size", as_pair(config.grid_size), as_pair(extractor.grid_size)))
        if self.segmenter is not None:
            fits.append(("grid_size", as_pair(self.segmenter.grid_size), as_pair(extractor.grid_size)))
            classes = len(self.segmenter.class_names)
            fits.append(("num_segmentation_classes", classes, extractor.num_segmentation_classes))
        for name, given, wanted in fits:
            if given != wanted:
                if isinstance(given, tuple):
                    given, wanted = (" x ".join(map(str, each)) for each in (given, wanted))
                raise ValueError(f"the captioner wants features with {name}={wanted}, these networks give {given}")

    # From an image to captions

    def _sanitize_parameters(self, **forward_parameters: Any) -> tuple[dict, dict, dict]:
        return {}, forward_parameters, {}

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> dict[str, Any]:
        if isinstance(input_, Mapping):
            features = input_
        else:
            features = self.features_of(open_image(input_, allow_private_hosts=self.allow_private_hosts))
        # Images of one batch are put together later, and some may need the mask.
        return self.processor(**features, return_grid_attention_mask=True, return_tensors="pt")

    def features_of(self, image: Image.Image) -> dict[str, Any]:
        """Both features of an RGB image, as the processor takes them."""
        self.load_recorded_networks()
        assert self.grid_backbone is not None
        features: dict[str, Any] = {"grid_features": self.grid_backbone.grid_features(image)}
        if self.model.config.use_segmentation:
            assert self.segmenter is not None
            features["segmentation_features"] = self.segmenter(image)
        return features

    @cached_property
    def words(self) -> list[str]:
        """The word of each token id."""
        return self.processor.tokenizer.convert_ids_to_tokens(list(range(self.model.config.vocab_size)))

    @cached_property
    def calibration(self) -> Calibration | None:
        """The checkpoint's calibration, see `calibration_of`."""
        return calibration_of(self.model)

    def _forward(self, input_tensors: dict[str, Any], return_confidence: bool = False, **generate_kwargs: Any) -> Any:
        model_inputs = dict(input_tensors)
        if "grid_attention_mask" in model_inputs and model_inputs["grid_attention_mask"].all():
            del model_inputs["grid_attention_mask"]
        if return_confidence:
            sequences, confidences = generate_with_confidences(
                self.model, self.words, model_inputs, generate_kwargs, self.calibration
            )
            return {"sequences": sequences, "confidences": confidences}
        sequences = self.model.generate(**model_inputs, **generate_kwargs)
        # One row for each image: the base class takes batches apart along the first dimension.
        num_images = len(model_inputs["grid_features"])
        return {"sequences": sequences.reshape(num_images, -1, sequences.shape[-1])}  # (B, num_return_sequences, L)

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> list[dict[str, Any]]:
        captions = self.processor.batch_decode(model_outputs["sequences"][0], skip_special_tokens=True)
        confidences = model_outputs.get("confidences")
        if confidences is None:
            return [{"generated_text": caption} for caption in captions]
        if isinstance(confidences[0], list):  # of a batch of one, which the base class does not take apart
            confidences = confidences[0]
        return [
            {"generated_text": caption, **confidence.as_dict()}
            for caption, confidence in zip(captions, confidences, strict=True)
        ]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves the captioner and its processor; the feature networks have folders of their own."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


def _takes_substitute(said: Mapping[str, Any], option: str) -> str:
    return (
        f"this captioner was trained with {said.get('name')}: give `{option}=` (--{option.replace('_', '-')}), "
        f"{said['substitute']}"
    )


def _cannot_be_loaded(name: str, option: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    return f"this captioner was trained with {name}, which cannot be loaded; give `{option}=` ({reason})"


def _fitting_models(class_names: Sequence[str] | None, num_classes: int) -> str:
    """Which models fit a captioner, in words."""
    if class_names is None:
        return f"a segmentation model of Transformers with {num_classes} classes"
    if tuple(class_names) == CLASS_NAMES:
        return "a COCO panoptic model of Transformers, such as facebook/mask2former-swin-large-coco-panoptic"
    first = one_line(", ".join(class_names[:3]))
    return f"a segmentation model or object detector of Transformers with the same {num_classes} classes ({first}, ..)"


__all__ = [
    "ANNOTATION_SOURCES",
    "PRECISIONS",
    "TASK",
    "UNTRAINED_WARNING",
    "DifnetImageCaptioningPipeline",
    "GridBackbone",
    "Segmenter",
    "check_same_backbone",
    "check_same_segmentation",
    "has_native_bf16",
    "hash_of_parameters",
    "is_loadable",
    "load_grid_backbone",
    "load_segmenter",
    "provenance_of",
    "recorded_class_names",
    "resolve_precision",
    "segmentation_provenance_of",
]
