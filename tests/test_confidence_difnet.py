"""Confidences of words and captions: a slow plain form, every way to ask for them, and what is carried along."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_features, random_model
from test_evaluate_captions import VOCABULARY, save_captioner

from modeling_difnet import (
    DifnetEnsemble,
    DifnetForConditionalGeneration,
    DifnetImageCaptioningPipeline,
    original_beam_search,
)
from modeling_difnet.calibration_difnet import CALIBRATION_NAME, Calibration, weights_fingerprint
from modeling_difnet.confidence_difnet import (
    CaptionConfidence,
    WordConfidence,
    caption_confidences,
    generate_with_confidences,
    read_calibration,
)
from processing_difnet import DifnetProcessor

WORDS = [f"w{index}" for index in range(50)]
SEARCH = {"custom_generate": original_beam_search, "num_beams": 4, "max_new_tokens": 7}
FEATURES_OF_A_WORD = ("log_prob", "entropy", "support")


@pytest.fixture
def model(tiny_config) -> DifnetForConditionalGeneration:
    model = random_model(tiny_config)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # else all words are equally probable
    return model


@pytest.fixture
def features(tiny_config) -> dict[str, torch.Tensor]:
    return random_features(tiny_config, batch_size=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_captioner(tmp_path_factory.mktemp("captioner"))


def make_calibration(num_beams: int = 4, **changes) -> Calibration:
    """Of a word "w7" that is often wrong, and of all others."""
    values = {
        "mean": [-0.5, -1.0, 0.7, 0.8, -0.1],
        "scale": [0.5, 0.8, 0.4, 0.2, 0.3],
        "coefficients": [0.6, -0.1, -0.3, 0.9, 0.4],
        "intercept": 1.2,
        "rates": {"w7": [1, 9]},
        "rate": 0.8,
        "caption_confidences": [0.2, 0.6, 0.9],
        "caption_scores": [0.1, 0.5, 1.1],
        "num_beams": num_beams,
    }
    return Calibration(**{**values, **changes})


def plain(model, sequences: torch.Tensor, features: dict, image: int) -> dict:
    """The first caption's numbers, one caption and one word at a time."""
    own = {name: value[image : image + 1] for name, value in features.items()}
    table = []
    for caption in sequences[image].tolist():
        ids = caption[: caption.index(3) + 1] if 3 in caption else [index for index in caption if index != 1]
        found = []
        for position in range(1, len(ids)):
            read = torch.tensor([ids[:position]])
            log_probs = model(**own, decoder_input_ids=read).logits[0, -1].double().log_softmax(-1)
            found.append((ids[position], log_probs[ids[position]].item(), -(log_probs.exp() * log_probs).sum().item()))
        table.append(found)
    scores = [sum(log_prob for _, log_prob, _ in found) for found in table]
    weights = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
    words = []
    for token, log_prob, entropy in table[0]:
        if token != 3:
            having = [
                weight for weight, found in zip(weights, table, strict=True) if token in [each[0] for each in found]
            ]
            words.append({"word": WORDS[token], "log_prob": log_prob, "entropy": entropy, "support": sum(having)})
    return {
        "score": scores[0],
        "mean_log_prob": scores[0] / len(table[0]),
        **({"margin": scores[0] - max(scores[1:])} if len(scores) > 1 else {}),
        "agreement": sum(word["support"] for word in words) / len(words),
        "words": words,
    }


def check_equal(found: dict, expected: dict, tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    assert [word["word"] for word in found["words"]] == [word["word"] for word in expected["words"]]
    for name in found.keys() - {"words"}:
        assert found[name] == pytest.approx(expected[name], abs=tolerance), name
    for one, other in zip(found["words"], expected["words"], strict=True):
        assert one.keys() == other.keys()
        for name in FEATURES_OF_A_WORD:
            assert one[name] == pytest.approx(other[name], abs=tolerance), (one["word"], name)


class TestNumbers:
    @pytest.mark.parametrize("num_beams", [1, 4])
    @pytest.mark.parametrize("is_masked", [False, True])
    def test_they_equal_a_plain_form(self, model, features, num_beams, is_masked):
        if is_masked:
            mask = torch.ones(features["grid_features"].shape[:2], dtype=torch.long)
            mask[1, 5:] = 0
            features = {**features, "grid_attention_mask": mask}
        search = {**SEARCH, "num_beams": num_beams}
        sequences, found = generate_with_confidences(model, WORDS, features, search)
        beams = model.generate(**features, **search, num_return_sequences=num_beams).unflatten(0, (-1, num_beams))
        assert torch.equal(sequences[:, 0], beams[:, 0])
        assert torch.equal(sequences[:, 0], model.generate(**features, **search)[:, : beams.shape[-1]])
        for image in range(3):
            check_equal(found[image][0].as_dict(), plain(model, beams, features, image))
        again = caption_confidences(model, beams, WORDS, **features)
        for caption, (other,) in zip(again, found, strict=True):
            check_equal(caption.as_dict(), other.as_dict())

    def test_captions_of_different_lengths(self, model, features):
        sequences = torch.full((3, 2, 6), 1)
        for row, words in enumerate([[7, 8, 9, 10], [7], [11, 8], [9, 9, 8], [12, 5, 6], [12]]):
            caption = torch.tensor([2, *words, 3])
            sequences[row // 2, row % 2, : len(caption)] = caption
        found = caption_confidences(model, sequences, WORDS, **features)
        assert [len(caption.words) for caption in found] == [4, 2, 3]
        for image, caption in enumerate(found):
            check_equal(caption.as_dict(), plain(model, sequences, features, image))

    @pytest.mark.parametrize("how", ["original", "transformers"])
    def test_the_score_is_that_of_the_search(self, model, features, how):
        search = dict(SEARCH) if how == "original" else {"num_beams": 4, "max_new_tokens": 7, "length_penalty": 0.0}
        output = model.generate(**features, **search, return_dict_in_generate=True, output_scores=True)
        _, found = generate_with_confidences(model, WORDS, features, search)
        scores = [of_image[0].score for of_image in found]
        assert scores == pytest.approx(output.sequences_scores.tolist(), abs=2e-5)

    def test_several_captions_of_an_image(self, model, features):
        sequences, found = generate_with_confidences(model, WORDS, features, {**SEARCH, "num_return_sequences": 3})
        assert sequences.shape[:2] == (3, 3)
        for of_image in found:
            first, second, third = of_image
            assert first.margin == pytest.approx(first.score - second.score)
            assert second.margin == pytest.approx(second.score - first.score)
            assert third.margin < 0

    def test_an_empty_caption_has_no_words(self, model, features):
        sequences = torch.tensor([[[2, 3, 1], [2, 7, 3]]] * 3)
        for caption in caption_confidences(model, sequences, WORDS, make_calibration(num_beams=2), **features):
            assert caption.words == []
            assert caption.mean_log_prob == caption.score
            assert 0 < caption.agreement < 1
            assert (caption.confidence, caption.expected_cider_d) == (0, 0.1)

    def test_a_prompt_is_not_counted(self, model, features):
        prompts = {"decoder_input_ids": torch.tensor([[2, 7, 8], [2, 9, 9], [1, 2, 5]])}
        output = model.generate(**features, **prompts, **SEARCH, return_dict_in_generate=True, output_scores=True)
        sequences, found = generate_with_confidences(model, WORDS, {**features, **prompts}, SEARCH)
        assert torch.equal(sequences[:, 0], output.sequences)
        for row, (caption,) in enumerate(found):
            ids = [index for index in output.sequences[row, 3:].tolist() if index not in (1, 3)]
            assert [word.word for word in caption.words] == [WORDS[index] for index in ids]
            assert caption.score == pytest.approx(output.sequences_scores[row].item(), abs=2e-5)
        without_start = {"decoder_input_ids": torch.tensor([[7, 8]] * 3)}
        with_start = {"decoder_input_ids": torch.tensor([[2, 7, 8]] * 3)}
        search = {"num_beams": 4, "max_new_tokens": 5}
        one, other = (
            generate_with_confidences(model, WORDS, {**features, **each}, search)[1]
            for each in (without_start, with_start)
        )
        assert one == other

    def test_bfloat16(self, tiny_config, features):
        half = random_model(tiny_config).bfloat16()
        shown = {name: value.bfloat16() for name, value in features.items()}
        beams = half.generate(**shown, **SEARCH, num_return_sequences=4).unflatten(0, (-1, 4))
        found = caption_confidences(half, beams, WORDS, **shown)
        exact = caption_confidences(
            half.float(), beams, WORDS, **{name: value.float() for name, value in shown.items()}
        )
        for one, other in zip(found, exact, strict=True):
            assert one.mean_log_prob == pytest.approx(other.mean_log_prob, abs=0.1)

    def test_an_ensemble(self, model, tiny_config, features):
        ensemble = DifnetEnsemble([model, random_model(tiny_config, seed=1)])
        beams = ensemble.generate(**features, **SEARCH, num_return_sequences=4).unflatten(0, (-1, 4))
        found = caption_confidences(ensemble, beams, WORDS, **features)
        log_probs = ensemble.sequence_log_probs(beams, **features)
        assert [each.score for each in found] == pytest.approx(log_probs[:, 0].sum(-1).tolist(), abs=2e-5)
        for image, caption in enumerate(found):
            check_equal(caption.as_dict(), plain(ensemble, beams, features, image))

    def test_samples_have_no_calibrated_confidences(self, model, features):
        torch.manual_seed(0)
        options = {"do_sample": True, "num_beams": 1, "num_return_sequences": 4, "max_new_tokens": 5}
        _, found = generate_with_confidences(model, WORDS, features, options, make_calibration())
        assert [len(of_image) for of_image in found] == [4, 4, 4]
        assert all(caption.confidence is None for of_image in found for caption in of_image)


class TestCalibration:
    def test_a_word_by_hand(self):
        calibration = make_calibration()
        word = WordConfidence("w7", log_prob=math.log(0.5), entropy=0.9, support=0.6)
        rate = (1 + 2 * 0.8) / (9 + 2)
        read = np.array([math.log(0.5), math.log(0.5), 0.9, 0.6, math.log(rate / (1 - rate))])
        logit = ((read - calibration.mean) / calibration.scale) @ np.array(calibration.coefficients) + 1.2
        assert calibration.word_confidences([word]) == pytest.approx([1 / (1 + math.exp(-logit))])

    def test_certain_words_and_unknown_ones_have_finite_confidences(self):
        words = [WordConfidence("new", 0.0, 0.0, 1.0), WordConfidence("w7", -1e4, 9.0, 0.0)]
        first, second = make_calibration(intercept=900.0).word_confidences(words)
        assert first == 1
        assert 0 <= second <= 1

    def test_a_caption_is_the_mean_of_its_words(self):
        words = [WordConfidence("a", -0.1, 0.2, 1.0), WordConfidence("w7", -2.0, 1.9, 0.4)]
        caption = CaptionConfidence(words, -2.5, -0.8, 0.3, 0.7)
        calibration = make_calibration()
        calibration.add_to(caption)
        assert caption.confidence == pytest.approx(np.mean([word.confidence for word in words]))
        assert caption.expected_cider_d == pytest.approx(
            np.interp(caption.confidence, [0.2, 0.6, 0.9], [0.1, 0.5, 1.1])
        )
        assert list(caption.as_dict()) == [
            *("score", "mean_log_prob", "margin", "agreement", "confidence", "expected_cider_d", "words")
        ]

    def test_it_is_written_and_read_again(self, tmp_path):
        assert read_calibration(tmp_path) is None
        calibration = make_calibration(weights_sha256="ab", fitted_to={"split": "validation"})
        (tmp_path / CALIBRATION_NAME).write_text(calibration.to_json())
        assert read_calibration(tmp_path) == calibration

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"{", "Expecting property name"),
            (b"[1]", "no JSON object"),
            (b"\xff\xfe", "utf-8"),
            (b"[" * 100_000, "recursion"),
            ({"version": 7}, "version 7, not 1"),
            ({"surprise": 1}, "unexpected keyword argument 'surprise'"),
            ({"rate": None}, "rate: a number between 0 and 1"),
            ({"rate": 1.5}, "rate: a number between 0 and 1"),
            ({"mean": [1, 2]}, "mean: 5 numbers"),
            ({"scale": [1, 1, 1, 1, 0]}, "scale: a number is not positive"),
            ({"coefficients": ["1", "2", "3", "4", "5"]}, "coefficients: 5 numbers"),
            ({"intercept": float("nan")}, "intercept: a number"),
            ({"rates": {"dog": [3, 2]}}, "rates: for each word"),
            ({"caption_scores": [1, 0.5, 0.2]}, "rising numbers"),
            ({"caption_scores": [1]}, "as many"),
            ({"num_beams": "five"}, "num_beams: a whole number"),
        ],
        ids=str,
    )
    def test_a_damaged_file_is_one_line_that_names_it(self, tmp_path, content, said):
        path = tmp_path / CALIBRATION_NAME
        if isinstance(content, dict):
            content = json.dumps({**json.loads(make_calibration().to_json()), **content}).encode()
        path.write_bytes(content)
        with pytest.raises(ValueError, match="fit it again with difnet calibrate, or delete it") as raised:
            read_calibration(tmp_path)
        text = str(raised.value)
        assert text.startswith(f"{path}: no calibration of this version (")
        assert said in text
        assert "\n" not in text
        assert len(text) < 400

    def test_other_numbers_of_beams_have_no_confidences(self, model, features, recwarn):
        _, found = generate_with_confidences(model, WORDS, features, SEARCH, make_calibration(num_beams=5))
        assert all(caption.confidence is None for (caption,) in found)
        _, found = generate_with_confidences(model, WORDS, features, SEARCH, make_calibration())
        assert all(0 < caption.confidence < 1 for (caption,) in found)


class TestCheckpoints:
    """`calibration.json` goes along with the weights that it was fitted to."""

    @pytest.fixture
    def calibrated(self, checkpoint, tmp_path) -> DifnetForConditionalGeneration:
        model = DifnetForConditionalGeneration.from_pretrained(checkpoint)
        folder = tmp_path / "calibrated"
        model.save_pretrained(folder)
        calibration = make_calibration(weights_sha256=weights_fingerprint(model.state_dict()))
        (folder / CALIBRATION_NAME).write_text(calibration.to_json())
        return DifnetForConditionalGeneration.from_pretrained(folder)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_with_save_pretrained(self, calibrated, tmp_path, dtype):
        calibrated.to(dtype).save_pretrained(tmp_path / "copy")
        again = DifnetForConditionalGeneration.from_pretrained(tmp_path / "copy")
        assert again.dtype == dtype
        again.save_pretrained(tmp_path / "copy_of_copy")
        expected = Path(calibrated.name_or_path, CALIBRATION_NAME).read_bytes()
        assert (tmp_path / "copy_of_copy" / CALIBRATION_NAME).read_bytes() == expected

    def test_not_after_training(self, calibrated, tmp_path):
        calibrated.lm_head.weight.data[5] *= 1.1
        calibrated.save_pretrained(tmp_path / "trained")
        assert not (tmp_path / "trained" / CALIBRATION_NAME).exists()
        calibrated.save_pretrained(calibrated.name_or_path)  # in place: what lies there is not of these weights
        assert not Path(calibrated.name_or_path, CALIBRATION_NAME).exists()

    def test_a_damaged_one_does_not_hinder_saving(self, calibrated, tmp_path):
        Path(calibrated.name_or_path, CALIBRATION_NAME).write_text("{")
        calibrated.save_pretrained(tmp_path / "copy")
        assert not (tmp_path / "copy" / CALIBRATION_NAME).exists()


class TestPipeline:
    @pytest.fixture
    def images(self) -> list[dict[str, np.ndarray]]:
        random = np.random.default_rng(0)
        return [
            {"grid_features": random.normal(size=(cells, 6)), "segmentation_features": random.random((5, 2, 2))}
            for cells in (4, 3, 4)
        ]

    def load(self, checkpoint: Path) -> DifnetImageCaptioningPipeline:
        return DifnetImageCaptioningPipeline(
            model=DifnetForConditionalGeneration.from_pretrained(checkpoint),
            processor=DifnetProcessor.from_pretrained(checkpoint),
        )

    def test_keys(self, checkpoint, images):
        captioner = self.load(checkpoint)
        (answer,) = captioner(images[0], return_confidence=True, num_beams=5)
        assert list(answer) == ["generated_text", "score", "mean_log_prob", "margin", "agreement", "words"]
        assert {tuple(word) for word in answer["words"]} == {("word", *FEATURES_OF_A_WORD)}
        assert captioner(images[0], num_beams=5) == [{"generated_text": answer["generated_text"]}]
        assert {word["word"] for word in answer["words"]} <= set(VOCABULARY)
        (greedy,) = captioner(images[0], return_confidence=True, num_beams=1)
        assert "margin" not in greedy
        assert greedy["agreement"] == pytest.approx(1)

    def test_batches_give_the_same(self, checkpoint, images):
        captioner = self.load(checkpoint)
        options = {"return_confidence": True, "num_beams": 3, "num_return_sequences": 2}
        one_by_one = [captioner(image, **options) for image in images]
        for batch_size in (1, 2, 3):
            found = captioner(images, batch_size=batch_size, **options)
            assert [len(answer) for answer in found] == [2, 2, 2]
            for answer, expected in zip(found, one_by_one, strict=True):
                for one, other in zip(answer, expected, strict=True):
                    assert one["generated_text"] == other["generated_text"]
                    check_equal(*({k: v for k, v in each.items() if k != "generated_text"} for each in (one, other)))

    def test_the_calibration_of_its_folder(self, checkpoint, images, tmp_path):
        self.load(checkpoint).save_pretrained(tmp_path / "saved")
        weights = DifnetForConditionalGeneration.from_pretrained(tmp_path / "saved").state_dict()
        calibration = make_calibration(num_beams=5, weights_sha256=weights_fingerprint(weights))
        (tmp_path / "saved" / CALIBRATION_NAME).write_text(calibration.to_json())
        captioner = self.load(tmp_path / "saved")
        (answer,) = captioner(images[0], return_confidence=True, num_beams=5)
        assert answer["confidence"] == pytest.approx(np.mean([word["confidence"] for word in answer["words"]]))
        assert 0.1 <= answer["expected_cider_d"] <= 1.1
        captioner.save_pretrained(tmp_path / "again")
        assert read_calibration(tmp_path / "again") == calibration
