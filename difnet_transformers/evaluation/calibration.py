"""Fits the calibration of a captioner: from what it says of its words to how often they are right.

A word is right if a reference caption of its image has it, or as a file says (`WordTruth`). Words are fitted by a
logistic regression on their log-probability, entropy and support among the beams, and on how often the word itself was
right; captions by an isotonic regression from the mean confidence of their words to CIDEr-D. What is applied later is
`Calibration` in modeling_difnet/calibration_difnet.py, which needs no scikit-learn.

The original (mrwu-mac/DIFNet, CVPR 2022) has nothing that corresponds.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from caption_metrics import score_captions
from modeling_difnet import DifnetForConditionalGeneration, original_beam_search
from modeling_difnet.calibration_difnet import (
    CALIBRATION_NAME,
    Calibration,
    smoothed_rate,
    weights_fingerprint,
    word_features,
)
from modeling_difnet.confidence_difnet import CaptionConfidence, generate_with_confidences
from processing_difnet import DifnetProcessor

from ..allocation import keep_freed_memory
from ..checkpoints import check_device, load_captioner
from ..command_line import requires
from ..files import atomic_write, printable, read_json
from ..progress import progress_bar

with requires("calibration"):
    from datasets import Dataset
    from sklearn.isotonic import IsotonicRegression
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    from ..data import ReferenceBatches
    from ..data.feature_records import records_of_dataset
    from ..training.data_checks import check_data, open_split
    from .evaluate import match_features
    from .runtime_captioner import is_exported

NUM_FOLDS = 5
NUM_BINS = 10
TRAINING_SPLIT = "train"  # of packed datasets
MIN_IMAGES = 2 * NUM_FOLDS


@dataclass
class JudgedCaptions:
    """Captions of a split, and what is known of them.

    Args:
        captions: with what the model says of them.
        is_right: of each caption's words.
        cider_d: of each caption.
    """

    captions: list[CaptionConfidence]
    is_right: list[list[bool]]
    cider_d: list[float]

    def rows(self, indices: Sequence[int]) -> JudgedCaptions:
        return JudgedCaptions(
            [self.captions[index] for index in indices],
            [self.is_right[index] for index in indices],
            [self.cider_d[index] for index in indices],
        )

    def labels(self) -> np.ndarray:
        """Of all words, (words,), bool."""
        return np.array([right for of_caption in self.is_right for right in of_caption], bool)

    def confidences(self, calibration: Calibration) -> np.ndarray:
        """Of all words, (words,)."""
        return np.array([each for caption in self.captions for each in calibration.word_confidences(caption.words)])

    def caption_confidences(self, calibration: Calibration) -> np.ndarray:
        """Of all captions, (captions,)."""
        return np.array([calibration.caption_confidence(caption.words) for caption in self.captions])


@dataclass
class WordTruth:
    """Which words are right of an image, where that is known better than from reference captions.

    Args:
        judged: the words that can be wrong; all others are right.
        true: by image id, those of them that are right.
    """

    judged: Collection[str]
    true: Mapping[int, Collection[str]]

    @classmethod
    def read(cls, path: Path) -> WordTruth:
        """From a JSON file, `{"judged": ["dog", ..], "true": {"42": ["dog"], ..}}`.

        Raises:
            ValueError: it is no such file.
        """
        content = read_json(path)
        try:
            if not isinstance(content, dict):
                raise TypeError("an object is expected")
            if not isinstance(content["judged"], list) or not all(
                isinstance(words, list) for words in content["true"].values()
            ):
                raise TypeError("lists of words are expected")
            judged = frozenset(map(str, content["judged"]))
            true = {int(image_id): frozenset(map(str, words)) for image_id, words in content["true"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f'{printable(path)}: expected {{"judged": [words], "true": {{"image id": [words]}}}} '
                f"({printable(str(error), 100)})"
            ) from None
        return cls(judged, true)

    def is_right(self, image_id: int, words: Sequence[str]) -> list[bool]:
        """Whether each word of a caption is right.

        Raises:
            ValueError: nothing is known of the image.
        """
        if image_id not in self.true:
            raise ValueError(f"image {image_id}: the file of right words does not have it; add it under true")
        true = self.true[image_id]
        return [word not in self.judged or word in true for word in words]


# Captions with their truth


def judge_captions(
    model: DifnetForConditionalGeneration,
    processor: DifnetProcessor,
    dataset: Dataset,
    truth: WordTruth | None = None,
    *,
    num_beams: int = 5,
    max_new_tokens: int = 20,
    batch_size: int = 50,
    description: str = "captioning",
) -> JudgedCaptions:
    """Captions a split by the original's beam search, and judges every word.

    Args:
        model: in eval mode.
        processor: of the model.
        dataset: one split of a packed dataset.
        truth: which words are right; by default those of the reference captions.
        num_beams, max_new_tokens: of the search.
        batch_size: images at a time.
        description: of the progress bar.

    Raises:
        ValueError: an image cannot be read, or `truth` does not know it.
    """
    tokenizer, mask_padded_cells = processor.tokenizer, processor.feature_extractor.mask_padded_cells
    words_of = tokenizer.convert_ids_to_tokens(list(range(model.config.vocab_size)))
    options = {"custom_generate": original_beam_search, "num_beams": num_beams, "max_new_tokens": max_new_tokens}
    if truth is not None:  # before the first image is captioned
        for image_id in dataset["image_id"]:
            truth.is_right(int(image_id), [])
    judged = JudgedCaptions([], [], [])
    texts: list[str] = []
    references: list[list[str]] = []
    with progress_bar(total=len(dataset), unit=" images", desc=description) as bar:
        for batch in ReferenceBatches(dataset, batch_size, mask_padded_cells=mask_padded_cells):
            image_ids, of_batch = batch.pop("image_ids"), batch.pop("references")
            features = {
                name: value.to(model.device, model.dtype if value.is_floating_point() else None)
                for name, value in batch.items()
            }
            sequences, found = generate_with_confidences(model, words_of, features, options)
            for image_id, (caption,), known in zip(image_ids, found, of_batch, strict=True):
                words = [word.word for word in caption.words]
                if truth is None:
                    right = {word for reference in known for word in tokenizer.tokenize(reference)}
                    judged.is_right.append([word in right for word in words])
                else:
                    judged.is_right.append(truth.is_right(int(image_id), words))
                judged.captions.append(caption)
            texts += processor.post_process_captions(sequences[:, 0])
            references += of_batch
            bar.update(len(of_batch))
    scores = score_captions(texts, references, per_image=True)["per_image"]["cider_d"]
    judged.cider_d = [float(score) for score in scores]
    return judged


# Fitting


def fit_calibration(judged: JudgedCaptions, num_beams: int) -> Calibration:
    """Fits words and captions.

    Args:
        judged: captions of a split.
        num_beams: of their search.

    Raises:
        ValueError: all words are right, or none is.
    """
    labels = judged.labels()
    if len(labels) == 0 or labels.all() or not labels.any():
        share = "every" if len(labels) and labels.all() else "no"
        raise ValueError(f"{share} word of {len(judged.captions):,} captions is right: there is nothing to fit")
    words = [word for caption in judged.captions for word in caption.words]
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for word, right in zip(words, labels, strict=True):
        counts[word.word][0] += int(right)
        counts[word.word][1] += 1
    rate = float(labels.mean())
    # The rate of a word without this occurrence of it: the word's own label must not predict itself.
    rates = [
        smoothed_rate(counts[word.word][0] - int(right), counts[word.word][1] - 1, rate)
        for word, right in zip(words, labels, strict=True)
    ]
    features = word_features(words, rates)  # (words, features)
    mean, scale = features.mean(0), features.std(0)
    scale[scale < 1e-6] = 1  # a constant, but for rounding
    regression = LogisticRegression(max_iter=1000).fit((features - mean) / scale, labels)
    calibration = Calibration(
        mean=mean.tolist(),
        scale=scale.tolist(),
        coefficients=regression.coef_[0].tolist(),
        intercept=float(regression.intercept_[0]),
        rates={word: counts[word] for word in sorted(counts)},
        rate=rate,
        caption_confidences=[0.0],
        caption_scores=[0.0],
        num_beams=num_beams,
    )
    confidences = judged.caption_confidences(calibration)
    isotonic = IsotonicRegression(out_of_bounds="clip").fit(confidences, judged.cider_d)
    calibration.caption_confidences = isotonic.X_thresholds_.tolist()
    calibration.caption_scores = isotonic.y_thresholds_.tolist()
    return calibration


def cross_validate(judged: JudgedCaptions, num_beams: int, seed: int = 0) -> dict[str, float | None]:
    """`calibration_metrics` of captions that the calibration was not fitted to, in `NUM_FOLDS` folds of images.

    Args:
        judged: captions of a split.
        num_beams: of their search.
        seed: of the folds.

    Raises:
        ValueError: as `fit_calibration`, of a fold.
    """
    order = np.random.default_rng(seed).permutation(len(judged.captions))
    parts = []
    for held_out in np.array_split(order, NUM_FOLDS):
        fitted = fit_calibration(judged.rows(np.setdiff1d(order, held_out).tolist()), num_beams)
        others = judged.rows(held_out.tolist())
        parts.append((others.confidences(fitted), others.labels(), others.caption_confidences(fitted), others.cider_d))
    return metrics_of(*(np.concatenate(column) for column in zip(*parts, strict=True)))


# Metrics


def calibration_metrics(judged: JudgedCaptions, calibration: Calibration) -> dict[str, float | None]:
    """How good a calibration is for captions of another split, see `metrics_of`."""
    return metrics_of(
        judged.confidences(calibration),
        judged.labels(),
        judged.caption_confidences(calibration),
        np.array(judged.cider_d),
    )


def metrics_of(
    confidences: np.ndarray, labels: np.ndarray, of_captions: np.ndarray, scores: np.ndarray
) -> dict[str, float | None]:
    """Quality of confidences.

    Args:
        confidences: of words, (words,).
        labels: whether they are right, (words,).
        of_captions: confidences of captions, (captions,).
        scores: CIDEr-D of captions, (captions,).

    Returns:
        `num_images`, `num_words`, `wrong_words` (share); of words `auroc` (probability that a right one has a higher
        confidence than a wrong one; `None` where all are alike) and `expected_calibration_error` in ten bins; of
        captions `cider_d`, and `cider_d_top_half`, that of the half with the higher confidences.
    """
    has_both = labels.any() and not labels.all()
    return {
        "num_images": len(of_captions),
        "num_words": len(labels),
        "wrong_words": float(1 - labels.mean()),
        "auroc": float(roc_auc_score(labels, confidences)) if has_both else None,
        "expected_calibration_error": expected_calibration_error(confidences, labels),
        "cider_d": float(scores.mean()),
        "cider_d_top_half": risk_coverage(of_captions, scores, (0.5,))[0],
    }


def expected_calibration_error(confidences: np.ndarray, labels: np.ndarray, num_bins: int = NUM_BINS) -> float:
    """Mean gap of confidence and frequency in bins of equal width, weighted by their words (Guo et al., 2017)."""
    bins = np.minimum((confidences * num_bins).astype(int), num_bins - 1)
    gaps = [
        (bins == each).sum() * abs(confidences[bins == each].mean() - labels[bins == each].mean())
        for each in np.unique(bins)
    ]
    return float(sum(gaps) / len(labels))


def risk_coverage(confidences: np.ndarray, scores: np.ndarray, coverages: Sequence[float]) -> list[float]:
    """Mean score of the items with the highest confidences, at shares of all items.

    Args:
        confidences: (items,).
        scores: (items,).
        coverages: shares, greater than 0.
    """
    ordered = np.asarray(scores)[np.argsort(-np.asarray(confidences), kind="stable")]
    return [float(ordered[: max(1, round(share * len(ordered)))].mean()) for share in coverages]


# `difnet calibrate`


def calibrate_checkpoint(
    name: str,
    dataset: Path,
    *,
    split: str = "validation",
    test_split: str | None = None,
    words: Path | None = None,
    num_beams: int = 5,
    max_new_tokens: int = 20,
    batch_size: int = 50,
    device: str | None = None,
    force: bool = False,
    report_file: Path | None = None,
) -> dict[str, Any]:
    """Fits the calibration of a checkpoint, writes it into its folder and prints how good it is.

    Args:
        name: folder of the checkpoint.
        dataset: packed dataset.
        split: that is fitted to; images that the model was not trained on.
        test_split: that the calibration is measured on, if any.
        words: JSON file of right words, see `WordTruth`; by default those of the reference captions.
        num_beams, max_new_tokens: of the original's beam search.
        batch_size: images at a time.
        device: such as "cuda:1"; by default a GPU where there is one.
        force: whether features of other networks or classes than the model was trained with are taken.
        report_file: gets what is returned as JSON.

    Returns:
        What was fitted to, "cross_validated" and, with `test_split`, "test": see `metrics_of`.

    Raises:
        ValueError: the checkpoint is no folder, the dataset does not fit it, or there is nothing to fit.
    """
    folder = Path(name)
    if is_exported(name):
        raise ValueError(f"{printable(name, 300)} is exported: calibrate its checkpoint, then export that")
    if not folder.is_dir():
        raise ValueError(
            f"{printable(name, 300)}: no such folder, and a calibration is written into one; "
            "hf download NAME --local-dir FOLDER copies a repository of the Hub"
        )
    check_device(device)
    keep_freed_memory()
    truth = None if words is None else WordTruth.read(words)
    splits = {each: open_split(dataset, each) for each in dict.fromkeys([split, test_split]) if each is not None}
    if len(splits[split]) < MIN_IMAGES:
        raise ValueError(
            f"{printable(dataset, 300)}: {split} has {len(splits[split])} images, fewer than {MIN_IMAGES}"
        )
    if split == TRAINING_SPLIT:
        print(
            f"warning: a model is surer of images that it was trained on; if {printable(name, 300)} was trained on "
            f"{TRAINING_SPLIT} of this dataset, its confidences will be too high",
            file=sys.stderr,
        )
    model, processor = load_captioner(name)
    fingerprint = weights_fingerprint(model.state_dict())
    model = model.float().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    match_features(model, name, records_of_dataset(dataset), dataset, force)
    for images in splits.values():
        check_data(model.config, images, dataset, max_new_tokens)
    judged = {
        each: judge_captions(
            model,
            processor,
            images,
            truth,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            description=each,
        )
        for each, images in splits.items()
    }
    calibration = fit_calibration(judged[split], num_beams)
    calibration.weights_sha256 = fingerprint
    report: dict[str, Any] = {
        "dataset": dataset.resolve().name,
        "split": split,
        "truth": "reference captions" if words is None else words.name,
        "num_beams": num_beams,
        "max_new_tokens": max_new_tokens,
        "cross_validated": cross_validate(judged[split], num_beams),
    }
    calibration.fitted_to = dict(report)
    if test_split is not None:
        report |= {"test_split": test_split, "test": calibration_metrics(judged[test_split], calibration)}
    atomic_write(folder / CALIBRATION_NAME, calibration.to_json())
    if report_file is not None:
        atomic_write(report_file, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print_metrics(report)
    print(f"calibration in {printable(os.fspath(folder / CALIBRATION_NAME), 300)}")
    return report


def print_metrics(report: Mapping[str, Any]) -> None:
    """Prints the metrics of `calibrate_checkpoint`, a line for each split."""
    lines = {f"{report['split']}, {NUM_FOLDS}-fold": report["cross_validated"]}
    if "test" in report:
        lines[report["test_split"]] = report["test"]
    width = max(map(len, lines))
    print(f"{'':{width}}  images   words  wrong   AUROC    ECE  CIDEr-D  surest half")
    for name, metrics in lines.items():
        auroc = "-" if metrics["auroc"] is None else f"{metrics['auroc']:.3f}"
        print(
            f"{name:{width}}  {metrics['num_images']:6,}  {metrics['num_words']:6,}  {metrics['wrong_words']:5.1%}  "
            f"{auroc:>6}  {metrics['expected_calibration_error']:5.3f}  {metrics['cider_d']:7.3f}  "
            f"{metrics['cider_d_top_half']:11.3f}"
        )
