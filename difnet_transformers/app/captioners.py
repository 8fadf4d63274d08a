"""A captioner as the server holds it: batches of images or features to captions, confidences, relevance, classes.

The steps are those of `difnet caption` (evaluation/image_captions.py) and `difnet explain` (reports/relevance.py).
What differs: requests come one by one, may fail one by one, and want more than the text of the best caption.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from modeling_difnet import original_beam_search
from modeling_difnet.confidence_difnet import end_ids
from modeling_difnet.pipeline_difnet import DifnetImageCaptioningPipeline
from modeling_difnet.segmentation_difnet import pool_channel_map

from ..command_line import reason_of
from ..data.feature_records import difference_of_classes, order_of_classes, recorded_classes
from ..files import printable
from ..reports.relevance import explain_captions
from ..vision.image_batches import grid_features_of, load_image
from .inputs import CaptionInput, RequestError
from .tasks import (
    MAX_PROMPT_CHARACTERS,
    CaptionResult,
    CaptionTask,
    check_feature_input,
    classes_of_cells,
    of_user,
    usual_length,
    usual_search,
)


class ServedCaptioner:
    """A captioner under a name.

    Args:
        name: for users.
        captioner: the pipeline.
        force: whether features of other networks than the captioner's are taken.
    """

    def __init__(self, name: str, captioner: DifnetImageCaptioningPipeline, force: bool = False) -> None:
        self.name, self.captioner, self.force = name, captioner, force
        self.default_beams = captioner.model.generation_config.num_beams or 1
        self.lock = threading.Lock()

    @property
    def has_relevance(self) -> bool:
        """Exported captioners keep no attention weights, and networks in 8 bits no weights to propagate through."""
        model = self.captioner.model
        return hasattr(model, "lm_head") and not getattr(model, "is_quantized", False)

    @property
    def longest_caption(self) -> int:
        """Tokens that a caption may have at most, `<eos>` among them."""
        return self.captioner.model.config.max_position_embeddings

    @property
    def takes_images(self) -> bool:
        """Whether it has the networks that it needs for images; loads them where it can."""
        try:
            self.load_networks()
        except RequestError:
            return False
        return True

    @property
    def usual_search(self) -> str:
        """The search that captions are decoded by unless another is asked for, a key of `SEARCHES`."""
        return usual_search(self.captioner.model.generation_config)

    @property
    def usual_length(self) -> int:
        """The checkpoint's longest caption, in tokens."""
        return usual_length(self.captioner.model.generation_config, self.longest_caption)

    def load_networks(self) -> None:
        """Loads the networks that the captioner needs for images, unless they are there.

        Raises:
            RequestError: they cannot be loaded, so that only features can be captioned.
        """
        with self.lock:
            try:
                self.captioner.load_recorded_networks()
            except (ValueError, OSError, ImportError) as error:
                raise RequestError(
                    f"{self.name} takes no images here, only features ({reason_of(error)}); start difnet app with "
                    "--grid-backbone and --segmentation-model"
                ) from None

    def batch_key(self, task: CaptionTask) -> tuple:
        """Tasks with equal keys run together. Prompts of one length do: others would have to be padded."""
        return (self.name, task.decoding, task.with_confidence, self._num_prompt_tokens(task.prompt))

    def _num_prompt_tokens(self, prompt: str) -> int:
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise RequestError(f"the prompt is longer than {MAX_PROMPT_CHARACTERS:,} characters")
        tokenizer = self.captioner.processor.tokenizer
        words = tokenizer.tokenize(prompt.strip())
        unknown = [word for word in words if tokenizer.convert_tokens_to_ids(word) == tokenizer.unk_token_id]
        if unknown:
            raise RequestError(f"{self.name} does not know the word {printable(repr(unknown[0]))} of the prompt")
        if len(words) + 1 >= self.longest_caption:
            raise RequestError(f"the prompt has {len(words)} words; captions end at {self.longest_caption - 1}")
        return len(words)

    def prepare(self, task: CaptionTask) -> tuple:
        """What can be done before a task's turn, beside the model; returns `batch_key`.

        Raises:
            RequestError: the task cannot be done.
        """
        key = self.batch_key(task)
        given = task.given
        if given.features is not None:
            use_segmentation = self.captioner.model.config.use_segmentation
            check_feature_input(self.name, given, self.captioner.recorded_backbone, use_segmentation, self.force)
            return key
        self.load_networks()
        backbone = self.captioner.grid_backbone
        place = ("loaded", id(backbone))
        if place not in given.computed and ("grid", id(backbone)) not in given.computed:
            # The segmentation of a captioner beside this one may need the image itself.
            given.computed[place] = load_image(cast(Any, given.image), backbone)
        return key

    # In the thread of the model

    def caption(self, tasks: Sequence[CaptionTask]) -> list[CaptionResult | Exception]:
        """Captions tasks whose `prepare` gave the same key; those that fail alone, each its own error."""
        inputs = self._inputs_of(tasks)
        results: list[CaptionResult | Exception | None] = [
            each if isinstance(each, Exception) else None for each in inputs
        ]
        places = [place for place, each in enumerate(inputs) if not isinstance(each, Exception)]
        captioned = self._caption_inputs([tasks[place] for place in places], [inputs[place] for place in places])
        for place, result in zip(places, captioned, strict=True):
            results[place] = result
        return cast(list, results)

    def _inputs_of(self, tasks: Sequence[CaptionTask]) -> list[Any]:
        """The captioner's inputs for each task, or the error in their place. Images run through the grid backbone
        together."""
        backbone = self.captioner.grid_backbone
        missing = [
            task.given
            for task in tasks
            if task.given.features is None and ("grid", id(backbone)) not in task.given.computed
        ]
        if missing:
            loaded = [given.computed.pop(("loaded", id(backbone))) for given in missing]
            for given, grid in zip(missing, grid_features_of(cast(Any, backbone), loaded), strict=True):
                given.computed["grid", id(backbone)] = grid
        inputs: list[Any] = []
        for task in tasks:
            try:
                prompt = {"prompt": task.prompt} if task.prompt.strip() else {}
                inputs.append(self.captioner.preprocess({**self._features_of(task.given), **prompt}))
            except Exception as error:
                inputs.append(of_user(error))
        return inputs

    def _features_of(self, given: CaptionInput) -> dict[str, Any]:
        has_segmentation = self.captioner.model.config.use_segmentation
        if given.features is not None:
            features = dict(given.features)
            if not has_segmentation:
                features.pop("segmentation_features", None)
            else:
                features["segmentation_features"] = self._in_own_order(given)
            return features
        grid = given.computed["grid", id(self.captioner.grid_backbone)]
        if isinstance(grid, Exception):
            raise grid
        if not has_segmentation:
            return {"grid_features": grid}
        segmenter = self.captioner.segmenter
        assert segmenter is not None
        if (place := ("label_map", id(segmenter))) not in given.computed:
            given.computed[place] = segmenter.label_map(cast(Any, given.image))
        shares = pool_channel_map(given.computed[place], segmenter.grid_size, len(segmenter.class_names))
        return {"grid_features": grid, "segmentation_features": shares}

    def _in_own_order(self, given: CaptionInput) -> Any:
        """Segmentation features with the captioner's classes in its order, where they say which they have."""
        assert given.features is not None
        shares = given.features["segmentation_features"]
        expected, found = self.captioner.class_names, recorded_classes(given.segmentation_model)
        if expected is None or found is None:
            return shares
        if (difference := difference_of_classes(expected, found)) is not None:
            raise RequestError(f"other segmentation classes than those of {self.name}: {difference}")
        order = order_of_classes(expected, found)
        return shares if order is None else shares[list(order)]

    def _caption_inputs(self, tasks: Sequence[CaptionTask], inputs: Sequence[Any]) -> list[CaptionResult | Exception]:
        if not tasks:
            return []
        try:
            results = self._caption_together(tasks, inputs)
        except Exception as error:
            if len(tasks) == 1:
                return [of_user(error)]
            return [self._caption_inputs([task], [each])[0] for task, each in zip(tasks, inputs, strict=True)]
        for task, each, result in zip(tasks, inputs, results, strict=True):
            result.label_map, result.class_names = self._label_map(task.given, each), self.captioner.class_names
        return list(results)

    def _caption_together(self, tasks: Sequence[CaptionTask], inputs: Sequence[Any]) -> list[CaptionResult]:
        batch = {name: torch.cat([each[name] for each in inputs]) for name in inputs[0]}
        decoding, with_confidence = tasks[0].decoding, tasks[0].with_confidence
        arguments = decoding.arguments(self.default_beams, self.usual_search)
        search = decoding.search or self.usual_search
        if search == "original":
            arguments["custom_generate"] = original_beam_search
        outputs = self.captioner.forward(batch, return_confidence=with_confidence, **arguments)
        sequences = outputs["sequences"]  # (B, captions, L)
        prompt_length = batch["decoder_input_ids"].shape[1] if "decoder_input_ids" in batch else 1
        pad_token_id = self.captioner.model.config.pad_token_id
        results = []
        for index in range(len(tasks)):
            confidences = outputs["confidences"][index] if with_confidence else None
            order = list(range(sequences.shape[1]))
            if confidences is not None and search == "sample":
                order.sort(key=lambda row: -confidences[row].score)
            rows = sequences[index][order]
            tokens = rows[:, prompt_length:]
            results.append(
                CaptionResult(
                    self.name,
                    self.captioner.processor.batch_decode(rows, skip_special_tokens=True),
                    confidences and [confidences[row] for row in order],
                    torch.isin(tokens, tokens.new_tensor(sorted(end_ids(self.captioner.model)))).any(1).tolist(),
                    (prompt_length, int((tokens != pad_token_id).sum())),
                    is_sampled=search == "sample",
                )
            )
            if tasks[index].with_relevance:
                own = {name: each for name, each in inputs[index].items() if not name.startswith("decoder_")}
                self._explain(results[-1], tasks[index].given, own, cast(torch.LongTensor, rows[:1]))
        return results

    def _explain(self, result: CaptionResult, given: CaptionInput, inputs: Any, sequences: torch.LongTensor) -> None:
        """Adds the relevance of the best caption's words, or why there is none."""
        if not self.has_relevance:
            result.remark = "This captioner runs without attention weights, so its words cannot be explained."
            return
        extractor = self.captioner.processor.feature_extractor
        features = {name: each.to(self.captioner.device) for name, each in inputs.items()}
        if "grid_attention_mask" in features and features["grid_attention_mask"].all():
            del features["grid_attention_mask"]
        try:
            (result.explained,), _ = explain_captions(
                cast(Any, self.captioner.model),
                self.captioner.processor.tokenizer,
                features,
                cast(torch.LongTensor, sequences.to(self.captioner.device)),
                [given.name],
                [given.image],
                class_names=self.captioner.class_names,
                grid_shape=extractor.grid_shape,
            )
        except ValueError as error:  # an empty caption
            result.remark = f"Its words cannot be explained: {reason_of(error)}"

    def _label_map(self, given: CaptionInput, inputs: Any) -> np.ndarray | None:
        """The class of each pixel, or of each cell of features; see `CaptionResult`."""
        if "segmentation_features" not in inputs:
            return None
        shares = inputs["segmentation_features"][0].cpu().numpy()  # (classes, rows, columns)
        labels = given.computed.get(("label_map", id(self.captioner.segmenter)))
        if given.features is not None or labels is None:
            return classes_of_cells(shares)
        labels = labels.astype(np.int64)
        return np.where((labels >= 0) & (labels < len(shares)), labels, -1)


def share_networks(captioners: Sequence[DifnetImageCaptioningPipeline]) -> None:
    """Lets captioners with equal feature networks hold the same objects, so that an image runs through them once."""
    from modeling_difnet.pipeline_difnet import provenance_of, segmentation_provenance_of

    seen: dict[str, Any] = {}
    for captioner in captioners:
        if (backbone := captioner.grid_backbone) is not None:
            said = {**provenance_of(backbone, None), "grid_size": backbone.config.grid_size}
            captioner.grid_backbone = seen.setdefault(f"grid {sorted(said.items())}", backbone)
        if (segmenter := captioner.segmenter) is not None:
            said = {**segmentation_provenance_of(segmenter, None), "grid_size": segmenter.grid_size}
            captioner.segmenter = seen.setdefault(f"segmentation {sorted(said.items())}", segmenter)
