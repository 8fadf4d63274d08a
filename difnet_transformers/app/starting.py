"""Captions while PyTorch, Transformers and the captioners load, which takes seconds.

`DifnetRuntimeModel` (difnet_transformers/runtime) needs neither. Of a checkpoint it runs in NumPy, and gives the
captions that the loaded captioner gives. What it cannot do waits for that one: images, confidences, relevance,
beginnings of captions and searches other than the original's.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..data.feature_records import records_in
from ..runtime.features import make_batch
from ..runtime.model import DifnetRuntimeModel
from .inputs import RequestError
from .startup import captioner_names, without_collections
from .tasks import (
    Captioner,
    CaptionResult,
    CaptionTask,
    check_feature_input,
    classes_of_cells,
    of_user,
    usual_length,
    usual_search,
)

# A thread that imports holds Python's lock for so long, in seconds; NumPy gives it away at every array operation.
SWITCH_INTERVAL = 0.0005


class StartingCaptioner:
    """A captioner without torch, until the one of the same name is loaded.

    Args:
        name: for users.
        model: of the checkpoint, or an export.
        loading: done when the loaded captioners have taken the places of those that start.
        force: as of the loaded captioner.
    """

    def __init__(self, name: str, model: DifnetRuntimeModel, loading: Future[None], force: bool = False) -> None:
        self.name, self.model, self.loading, self.force = name, model, loading, force
        self.records = records_in(model.preprocessing)
        self.default_beams = model.generation_config.num_beams or 1

    @property
    def usual_length(self) -> int:
        """The checkpoint's longest caption, in tokens."""
        return usual_length(self.model.generation_config, self.model.config.max_position_embeddings)

    def waits(self, task: CaptionTask) -> bool:
        """Whether a task is for the loaded captioner, which is there when `loading` is done."""
        has_failed = self.loading.done() and self.loading.exception() is not None
        return not has_failed and not self.takes(task)

    def takes(self, task: CaptionTask) -> bool:
        """Whether a task can be done here."""
        search = task.decoding.search or usual_search(self.model.generation_config)
        return (
            task.given.features is not None
            and search == "original"
            and not (task.prompt.strip() or task.with_confidence or task.with_relevance)
            and _class_names(task.given.segmentation_model) == _class_names(self.records.segmentation_model)
        )

    def prepare(self, task: CaptionTask) -> tuple:
        """The key of tasks that run together, as `ServedCaptioner.batch_key` gives it.

        Raises:
            RequestError: the task cannot be done.
        """
        if not self.takes(task):  # loading has failed
            raise RequestError("the captioner could not be loaded", 503)
        recorded, has_segmentation = self.records.grid_backbone, self.model.config.use_segmentation
        check_feature_input(self.name, task.given, recorded, has_segmentation, self.force)
        return (self.name, task.decoding, task.with_confidence, 0)

    def caption(self, tasks: Sequence[CaptionTask]) -> Sequence[CaptionResult | Exception]:
        """Captions tasks whose `prepare` gave the same key; those that fail alone, each its own error."""
        try:
            return self._caption_together(tasks)
        except Exception as error:
            if len(tasks) == 1:
                return [of_user(error)]
            return [self.caption([task])[0] for task in tasks]

    def _caption_together(self, tasks: Sequence[CaptionTask]) -> list[CaptionResult | Exception]:
        model, decoding = self.model, tasks[0].decoding
        features = [cast(dict, task.given.features) for task in tasks]
        segmentation = [each["segmentation_features"] for each in features] if model.config.use_segmentation else None
        batch: dict[str, Any] = make_batch(
            [each["grid_features"] for each in features], segmentation, model.preprocessing
        )
        sequences: Any = model.generate(**batch, **decoding.arguments(self.default_beams, "original"))
        num_captions = decoding.num_captions
        ends = np.atleast_1d(model.generation_config.eos_token_id)
        results: list[CaptionResult | Exception] = []
        for index in range(len(tasks)):
            rows = sequences[index * num_captions : (index + 1) * num_captions]  # (captions, L)
            is_complete: Any = np.isin(rows[:, 1:], ends).any(axis=1)
            result = CaptionResult(
                self.name,
                model.decoder.decode(rows),
                None,
                is_complete.tolist(),
                (1, int((rows[:, 1:] != model.config.pad_token_id).sum())),
            )
            if "segmentation_features" in batch:
                result.label_map = classes_of_cells(batch["segmentation_features"][index])
            results.append(result)
        return results


def _class_names(record: dict[str, Any] | None) -> list[str] | None:
    names = None if record is None else record.get("class_names")
    return None if names is None else list(names)


def starting_captioners(
    models: Sequence[str], loading: Future[None], force: bool = False
) -> list[StartingCaptioner] | None:
    """Captioners without torch, or `None` where one of them needs it: then all are loaded first.

    Args:
        models: folders or repositories.
        loading: see `StartingCaptioner`.
        force: whether features of other networks than a captioner was trained with are taken.
    """
    captioners = []
    for name, folder in zip(captioner_names(models), models, strict=True):
        if not Path(folder, "config.json").is_file():
            return None
        try:
            model = DifnetRuntimeModel.from_pretrained(folder)
        except (ValueError, OSError, ImportError, RuntimeError):
            return None  # the error of `load_captioners`, if it is one there too, says more
        if model.manifest.format == "numpy" and vars(model.config).get("dtype", "float32") != "float32":
            return None  # PyTorch computes in that type
        captioners.append(StartingCaptioner(name, model, loading, force))
    return captioners


def load_in_their_place(
    captioners: dict[str, Captioner], load: Callable[[], Sequence[Captioner]], loading: Future[None]
) -> None:
    """Loads captioners beside those that answer already, and replaces them.

    Args:
        captioners: of the service, by name.
        load: returns the loaded ones, under the same names.
        loading: gets done, or the error.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        with without_collections():
            loaded = load()
        gc.freeze()  # what is loaded stays until the end; collections need not walk through it
        captioners.update({each.name: each for each in loaded})
    except BaseException as error:
        loading.set_exception(error)
    else:
        loading.set_result(None)
    finally:
        sys.setswitchinterval(interval)
