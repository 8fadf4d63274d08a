"""Scores of a split: captions every image with a model or an ensemble, scores the captions, writes both.

Corresponds to `evaluate_metrics` in `train.py` of the original (mrwu-mac/DIFNet, CVPR 2022). What differs: ensembles,
and the captions are kept. The captioning itself, over several processes, is `caption_split` in training/validation.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset

from caption_metrics import ExtraMetrics, JavaMissing, check_java
from modeling_difnet import DifnetEnsemble, DifnetForConditionalGeneration
from modeling_difnet.calibration_difnet import Calibration, calibration_of
from modeling_difnet.confidence_difnet import CaptionConfidence
from processing_difnet import DifnetProcessor

from ..allocation import keep_freed_memory
from ..checkpoints import checkpoint_folder, load_ensemble
from ..command_line import LeftOut
from ..data.feature_records import (
    FeatureRecords,
    difference_of_backbones,
    records_of_checkpoint,
    records_of_dataset,
)
from ..data.parquet import hub_name
from ..files import atomic_write, folder_lock, make_folder, printable
from ..model_card import update_results
from ..runtime.choice import AUTO, TORCH, Choice
from ..training.data_checks import check_data, open_split
from ..training.initial_model import compare_classes, reorder_classes
from ..training.processes import all_or_none
from ..training.validation import CaptionedImage, caption_split, score_split
from ..vision.networks import print_line
from .extra_scores import ExtraInputs, json_number
from .runtime_captioner import STAGE, RuntimeCaptioner, is_exported, load_exported

Captioner = DifnetForConditionalGeneration | DifnetEnsemble | RuntimeCaptioner


def evaluate_split(
    accelerator: Accelerator,
    models: Sequence[str],
    dataset: Path,
    output: Path,
    *,
    split: str = "test",
    dataset_name: str | None = None,
    decoding: str = "original",
    num_beams: int = 5,
    max_new_tokens: int = 20,
    batch_size: int = 50,
    dtype: str = "float32",
    runtime: str | None = None,
    with_confidence: bool = False,
    with_meteor: bool = False,
    with_spice: bool = False,
    extra: ExtraInputs | None = None,
    update_card: bool = False,
    force: bool = False,
    strict: bool = False,
    program: str = "evaluate_captions.py",
) -> int:
    """Captions and scores a split; every process calls it.

    Writes `captions_SPLIT_results.json` and `scores_SPLIT.json`, and prints the scores. All that can be wrong is
    checked before the first image is captioned.

    Args:
        accelerator: of the processes.
        models: folder or repository of a checkpoint, or of several for their ensemble; or one folder of
            `difnet export`.
        dataset: folder of the packed dataset, or its name on the Hub.
        output: folder for the two files.
        split: of the dataset.
        dataset_name: in the report and the model card; by default that of the folder.
        decoding: "original", the original's beam search, or "transformers", `generate` with the checkpoint's settings.
        num_beams: of the beam search; 1 is greedy.
        max_new_tokens: of a caption.
        batch_size: images of one process at a time.
        dtype: of weights and features: "float32", "bfloat16" or "float16".
        runtime: of a single model, see `load_exported`.
        with_confidence: whether the rows of the results say how sure the model is of a caption.
        with_meteor: whether METEOR is computed too.
        with_spice: whether SPICE and SPIDEr are computed too.
        extra: inputs of further metrics.
        update_card: whether the scores go into the README.md of the only model.
        force: whether features of other networks or classes than a model was trained with are taken.
        strict: whether an image that was left out gives the exit code 2.
        program: in the message of a locked folder.

    Returns:
        The exit code; 0 on all but the main process.

    Raises:
        ValueError: an option, a model or the dataset is wrong, or no image can be captioned.
    """
    dataset_name = dataset_name or hub_name(dataset) or dataset.resolve().name

    def load() -> tuple[Dataset, Captioner, DifnetProcessor, ExtraMetrics, Calibration | None]:
        try:
            check_java(with_meteor, with_spice)
        except JavaMissing as error:
            raise ValueError(str(error)) from error
        if update_card and not Path(models[0], "README.md").is_file():
            raise ValueError(f"--update-card: {models[0]} is no folder with a README.md, the model card")
        images = open_split(dataset, split)
        say = print_line if accelerator.is_main_process else str  # one process is enough
        exported = load_exported_model(models, runtime, decoding, dtype, accelerator.device, say)
        model: Any
        model, processor = exported or load_ensemble(models, getattr(torch, dtype))
        # Before the weights are put in the dataset's order of classes, which the calibration does not know.
        calibration = calibration_of(model) if with_confidence else None
        records = records_of_dataset(dataset)
        members: Any = model.members if isinstance(model, DifnetEnsemble) else [model]
        for name, member in zip(models, members, strict=True):
            match_features(member, name, records, dataset, force)
        check_data(model.config, images, dataset, max_new_tokens)
        metrics = ExtraMetrics()
        if extra is not None and accelerator.is_main_process:
            rows = images.select_columns(["image_id", "file_name"]).with_format(None).to_list()
            metrics = extra.load({str(row["image_id"]): row["file_name"] for row in rows}, str(accelerator.device))
        return images, model, processor, metrics, calibration

    keep_freed_memory()
    images, model, processor, metrics, calibration = all_or_none(accelerator, load)
    with ExitStack() as held:

        def lock_output() -> None:
            if accelerator.is_main_process:
                make_folder(output)
                held.enter_context(folder_lock(output, program))

        all_or_none(accelerator, lock_output)
        generation = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
        left_out = LeftOut()
        if with_confidence and accelerator.is_main_process and calibration is None:
            reason = "an ensemble has none" if isinstance(model, DifnetEnsemble) else "difnet calibrate fits one"
            print(f"confidences: log-probabilities, margin and agreement alone, without a calibration ({reason})")
        start = time.perf_counter()
        captioned = caption_split(
            model.to(accelerator.device),
            processor.tokenizer,
            images,
            accelerator,
            batch_size=batch_size,
            mask_padded_cells=processor.feature_extractor.mask_padded_cells,
            original_decoding=decoding == "original",
            generation_options=generation,
            description=split,
            left_out=left_out,
            with_confidence=with_confidence,
            calibration=calibration,
        )
        report = {
            "model": list(models),
            "dataset": dataset_name,
            "split": split,
            "images": len(captioned),
            "left_out": sorted(set(images["image_id"]) - {image.image_id for image in captioned}),
            "decoding": decoding,
            **generation,
            "dtype": dtype,
            "seconds": round(time.perf_counter() - start, 3),
            "batch_size": batch_size,
            "num_processes": accelerator.num_processes,
            "device": accelerator.device.type,
        }
        if isinstance(model, RuntimeCaptioner):
            manifest = model.runtime_model.manifest
            report |= {"device": "cpu", "runtime": manifest.format, "precision": manifest.precision}

        def finish() -> int:
            if not accelerator.is_main_process:
                return 0
            exit_code = left_out.report(len(captioned), strict)
            scores = write_results(
                output, captioned, report, with_meteor=with_meteor, with_spice=with_spice, metrics=metrics
            )
            if update_card:
                update_results(
                    models[0], scores, dataset=dataset_name, split=split, decoding=decoding, num_beams=num_beams
                )
                print(f"results in {printable(models[0], 300)}/README.md")
            return exit_code

        return all_or_none(accelerator, finish)


def load_exported_model(
    models: Sequence[str],
    runtime: str | None,
    decoding: str,
    dtype: str,
    device: torch.device,
    say: Callable[[str], object],
) -> tuple[RuntimeCaptioner, DifnetProcessor] | None:
    """The captioner in another runtime, if there is one, and its processor; arguments are those of `evaluate_split`,
    and `device` and `say` those of `load_exported`.

    Raises:
        ValueError: it is to do what only PyTorch does: an ensemble, another decoding, another type of numbers.
    """
    exported = [name for name in models if is_exported(name)]
    if not exported and runtime in (None, TORCH):
        return None
    is_open = runtime == AUTO and not exported
    problem = None
    if len(models) > 1:
        problem = "ensembles are made of checkpoints, in PyTorch"
    elif decoding != "original":
        problem = "it decodes by the original's beam search alone; leave --decoding out"
    elif dtype != "float32" and not (is_open and dtype == "bfloat16"):
        problem = "leave --dtype out; difnet export --precision chooses its precision"
    if problem is None:
        precision = "bf16" if dtype == "bfloat16" else None
        return load_exported(models[0], runtime, precision=precision, device=device, say=say)
    if is_open:
        say(Choice(TORCH, None, "which alone has ensembles, other decodings and float16").line(STAGE))
        return None
    subject = f"{printable(exported[0], 300)} is an exported captioner" if exported else f"--runtime {runtime}"
    raise ValueError(f"{subject}: {problem}")


def match_features(
    model: DifnetForConditionalGeneration,
    name: str,
    records: FeatureRecords,
    dataset: Path,
    force: bool = False,
) -> None:
    """Holds the features of a dataset against those that a model was trained on.

    Segmentation classes in another order are matched by name: the model's weights are put in that of the dataset. What
    is not recorded is not compared.

    Args:
        model: the network.
        name: of its checkpoint.
        records: of the dataset.
        dataset: its folder, for messages.
        force: whether a difference is taken all the same.

    Raises:
        ValueError: another grid backbone made the features, or they have other segmentation classes.
    """
    known = records_of_checkpoint(checkpoint_folder(name))
    backbones = difference_of_backbones(known.grid_backbone, records.grid_backbone)
    classes, order = compare_classes(model.config, known, records)
    for difference in (backbones, classes and f"other segmentation classes: {classes}"):
        if difference and not force:
            raise ValueError(
                f"{printable(dataset, 300)} does not fit {printable(name, 300)}, which was trained with others: "
                f"{difference}; --force evaluates all the same"
            )
    if order is not None and isinstance(model, RuntimeCaptioner):
        raise ValueError(
            f"{printable(dataset, 300)} has the segmentation classes of {printable(name, 300)} in another order, and "
            "an exported captioner cannot be put in order: evaluate its checkpoint"
        )
    if order is not None:
        reorder_classes(model, order)


def write_results(
    output: Path,
    captioned: Sequence[CaptionedImage],
    report: dict[str, Any],
    *,
    with_meteor: bool = False,
    with_spice: bool = False,
    metrics: ExtraMetrics | None = None,
) -> dict[str, float]:
    """Scores captions, writes both files of a split and prints the scores.

    Args:
        output: folder for the files.
        captioned: images of the split.
        report: how the captions were made; `split` names the files, `seconds` gives images per second.
        with_meteor: whether METEOR is computed too.
        with_spice: whether SPICE and SPIDEr are computed too.
        metrics: further metrics.

    Returns:
        The scores by the names of `caption_metrics.score_captions` and of `caption_metrics.ExtraMetrics`.
    """
    captions_file = output / f"captions_{report['split']}_results.json"
    scores_file = output / f"scores_{report['split']}.json"
    _write_json(captions_file, [results_row(image) for image in captioned])
    report = report | confidence_report([image.confidence for image in captioned if image.confidence is not None])
    scores = score_split(captioned, with_meteor, with_spice)
    if metrics is not None:
        found = metrics.score(
            [str(image.image_id) for image in captioned],
            [image.caption for image in captioned],
            [image.references for image in captioned],
        )
        scores |= {name: json_number(value) for name, value in found.corpus.items()}
        if found.chair is not None:
            report = report | {"objects": found.chair.report()}
    seconds = max(report["seconds"], 0.001)
    rate = len(captioned) / seconds
    _write_json(scores_file, report | {"scores": scores, "images_per_second": round(rate, 2)})
    width = max(8, *map(len, scores))
    for name, score in scores.items():
        print(f"{name:<{width}} {'-' if score is None else f'{score:8.4f}':>8}")
    print(f"{len(captioned):,} images in {seconds:.1f} s, {rate:.1f} images/s")
    print(f"captions in {printable(captions_file, 300)}, scores in {printable(scores_file, 300)}")
    return scores


def results_row(image: CaptionedImage) -> dict[str, Any]:
    """The row of an image in COCO's results format, with the numbers of its confidence but for those of its words."""
    row: dict[str, Any] = {"image_id": image.image_id, "caption": image.caption}
    if image.confidence is not None:
        row |= {name: value for name, value in image.confidence.as_dict().items() if name != "words"}
    return row


def confidence_report(confidences: Sequence[CaptionConfidence]) -> dict[str, Any]:
    """Means of a split: log-probability by token, agreement of the beams and, of a calibrated model, confidence."""
    if not confidences:
        return {}
    means = {}
    for name in ("mean_log_prob", "agreement", "confidence", "expected_cider_d"):
        values = [getattr(each, name) for each in confidences if getattr(each, name) is not None]
        if values:
            means[name] = sum(values) / len(values)
    return {"mean_confidence": means}


def _write_json(path: Path, content: Any) -> None:
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
