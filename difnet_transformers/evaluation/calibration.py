"""Fits the calibration of a captioner: from what it says of its words to how often they are right.

A word is right if a reference caption of its image has it, or as a file says (`WordTruth`). Words are fitted by a
logistic regression on their log-probability, entropy and support among the beams, and on how often the word itself was
right; captions by an isotonic regression from the mean confidence of their words to CIDEr-D. What is applied later is
`Calibration` in modeling_difnet/confidence_difnet.py, which needs no scikit-learn.

The original (mrwu-mac/DIFNet, CVPR 2022) has nothing that corresponds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from caption_metrics import score_captions
from modeling_difnet import DifnetForConditionalGeneration, original_beam_search
from modeling_difnet.confidence_difnet import (
    Calibration,
    CaptionConfidence,
    caption_confidences,
    smoothed_rate,
    word_features,
)
from processing_difnet import DifnetProcessor

from ..command_line import requires
from ..data import ReferenceBatches
from ..files import printable, read_json
from ..progress import progress_bar

with requires("calibration"):
    from sklearn.isotonic import IsotonicRegression
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

NUM_FOLDS = 5
NUM_BINS = 10


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

    def __getitem__(self, indices: Sequence[int]) -> JudgedCaptions:
        columns = (self.captions, self.is_right, self.cider_d)
        return JudgedCaptions(*([column[index] for index in indices] for column in columns))

    def labels(self) -> np.ndarray:
        """Of all words, (words,), bool."""
        return np.array([right for of_caption in self.is_right for right in of_caption], bool)

    def confidences(self, calibration: Calibration) -> np.ndarray:
        """Of all words, (words,)."""
        return np.array([each for caption in self.captions for each in calibration.word_confidences(caption.words)])


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
            raise ValueError(f"image {image_id}: the file of right words does not have it")
        true = self.true[image_id]
        return [word not in self.judged or word in true for word in words]


def caption_with_confidences(
    model: DifnetForConditionalGeneration,
    processor: DifnetProcessor,
    dataset: Dataset,
    truth: WordTruth | None = None,
    *,
    num_beams: int = 5,
    max_new_tokens: int = 20,
    batch_size: int = 50,
) -> JudgedCaptions:
    """Captions a split by the original's beam search, and judges every word.

    Args:
        model: in eval mode.
        processor: of the model.
        dataset: one split of a packed dataset.
        truth: which words are right; by default those of the reference captions.
        num_beams, max_new_tokens: of the search.
        batch_size: images at a time.
    """
    tokenizer, mask_padded_cells = processor.tokenizer, processor.feature_extractor.mask_padded_cells
    words_of = tokenizer.convert_ids_to_tokens(list(range(model.config.vocab_size)))
    batches = ReferenceBatches(dataset, batch_size, mask_padded_cells=mask_padded_cells)
    judged = JudgedCaptions([], [], [])
    texts: list[str] = []
    references: list[list[str]] = []
    with progress_bar(total=len(dataset), unit=" images", desc="captioning") as bar:
        for batch in batches:
            image_ids, of_batch = batch.pop("image_ids"), batch.pop("references")
            features = {name: value.to(model.device, model.dtype if value.is_floating_point() else None)
                        for name, value in batch.items()}  # fmt: skip
            with torch.no_grad():
                sequences = model.generate(
                    **features,
                    custom_generate=original_beam_search,
                    num_beams=num_beams,
                    num_return_sequences=num_beams,
                    max_new_tokens=max_new_tokens,
                ).view(len(of_batch), num_beams, -1)  # (B, K, L)
            captions = caption_confidences(model, sequences, words_of, **features)
            for image_id, caption, known in zip(image_ids, captions, of_batch, strict=True):
                words = [word.word for word in caption.words]
                if truth is None:
                    right = set().union(*(tokenizer.tokenize(reference) for reference in known))
                    judged.is_right.append([word in right for word in words])
                else:
                    judged.is_right.append(truth.is_right(int(image_id), words))
            judged.captions.extend(captions)
            texts += processor.post_process_captions(sequences[:, 0])
            references += of_batch
            bar.update(len(of_batch))
    judged.cider_d = [
        float(score) for score in score_captions(texts, references, per_image=True)["per_image"]["cider_d"]
    ]
    return judged


def fit_calibration(judged: JudgedCaptions, num_beams: int, fitted_to: Mapping[str, Any] | None = None) -> Calibration:
    """Fits words and captions.

    Args:
        judged: captions of a split.
        num_beams: of their search.
        fitted_to: what the file says about the split.

    Raises:
        ValueError: all words are right, or none is.
    """
    labels = judged.labels()
    if len(labels) == 0 or labels.all() or not labels.any():
        share = "no word" if not labels.any() else "every word"
        raise ValueError(f"{share} of {len(judged.captions):,} captions is right: there is nothing to fit")
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
    scale[scale == 0] = 1
    regression = LogisticRegression(max_iter=1000).fit((features - mean) / scale, labels)
    calibration = Calibration(
        mean=mean.tolist(),
        scale=scale.tolist(),
        coefficients=regression.coef_[0].tolist(),
        intercept=float(regression.intercept_[0]),
        rates={word: (right, number) for word, (right, number) in sorted(counts.items())},
        rate=rate,
        caption_confidences=[0.0],
        caption_scores=[0.0],
        num_beams=num_beams,
        fitted_to=dict(fitted_to or {}),
    )
    means = mean_confidences(judged, calibration)
    isotonic = IsotonicRegression(out_of_bounds="clip").fit(means, judged.cider_d)
    calibration.caption_confidences = isotonic.X_thresholds_.tolist()
    calibration.caption_scores = isotonic.y_thresholds_.tolist()
    return calibration


def mean_confidences(judged: JudgedCaptions, calibration: Calibration) -> np.ndarray:
    """Mean confidence of the words of each caption, 0 for a caption without words, (captions,)."""
    of_captions = [calibration.word_confidences(caption.words) for caption in judged.captions]
    return np.array([float(np.mean(each)) if each else 0.0 for each in of_captions])


def cross_validated(judged: JudgedCaptions, num_beams: int, seed: int = 0) -> dict[str, float]:
    """`calibration_metrics` of captions that the calibration was not fitted to, in `NUM_FOLDS` folds of images.

    Args:
        judged: captions of a split.
        num_beams: of their search.
        seed: of the folds.
    """
    order = np.random.default_rng(seed).permutation(len(judged.captions))
    confidences, labels, means, scores = [], [], [], []
    for held_out in np.array_split(order, NUM_FOLDS):
        fitted = fit_calibration(judged[np.setdiff1d(order, held_out).tolist()], num_beams)
        others = judged[held_out.tolist()]
        confidences.append(others.confidences(fitted))
        labels.append(others.labels())
        means.append(mean_confidences(others, fitted))
        scores.append(others.cider_d)
    return metrics_of(*map(np.concatenate, (confidences, labels, means, scores)))


def calibration_metrics(judged: JudgedCaptions, calibration: Calibration) -> dict[str, float]:
    """How good a calibration is for captions of another split.

    Returns:
        `num_images`, `num_words`, `wrong_words` (share); of words `auroc` (that a right one has a higher confidence
        than a wrong one) and `expected_calibration_error` in ten bins; of captions `cider_d`, and `cider_d_top_half`,
        that of the half with the higher mean confidence.
    """
    return metrics_of(
        judged.confidences(calibration),
        judged.labels(),
        mean_confidences(judged, calibration),
        np.array(judged.cider_d),
    )


def metrics_of(confidences: np.ndarray, labels: np.ndarray, means: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """See `calibration_metrics`; words (words,) and captions (captions,)."""
    both = labels.any() and not labels.all()
    return {
        "num_images": len(means),
        "num_words": len(labels),
        "wrong_words": float(1 - labels.mean()),
        "auroc": float(roc_auc_score(labels, confidences)) if both else float("nan"),
        "expected_calibration_error": expected_calibration_error(confidences, labels),
        "cider_d": float(scores.mean()),
        "cider_d_top_half": risk_coverage(means, scores, (0.5,))[0],
    }


def expected_calibration_error(confidences: np.ndarray, labels: np.ndarray, num_bins: int = NUM_BINS) -> float:
    """Mean gap of confidence and frequency in bins of equal width, weighted by their words (Guo et al., 2017)."""
    bins = np.minimum((confidences * num_bins).astype(int), num_bins - 1)
    gaps = [(bins == each).sum() * abs(confidences[bins == each].mean() - labels[bins == each].mean())
            for each in np.unique(bins)]  # fmt: skip
    return float(sum(gaps) / len(labels))


def risk_coverage(confidences: np.ndarray, scores: np.ndarray, coverages: Sequence[float]) -> list[float]:
    """Mean score of the captions that one is most confident of, at shares of all captions.

    Args:
        confidences: (captions,).
        scores: (captions,).
        coverages: shares, greater than 0.
    """
    ordered = np.asarray(scores)[np.argsort(-np.asarray(confidences), kind="stable")]
    return [float(ordered[: max(1, round(share * len(ordered)))].mean()) for share in coverages]
