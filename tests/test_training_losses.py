"""Losses and rewards: the numbers of the original implementation, and what the functions promise."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, GoldenCase, golden_case, reference_weights
from training_runs import (
    make_data,
)

from caption_metrics import CiderReward
from convert_checkpoint import key_pairs
from difnet_transformers.data import CaptionPairBatches, ImageCaptionBatches, load_packed_split
from difnet_transformers.training import (
    Progress,
    SequenceLogProbs,
    TrainingFailed,
    caption_rewards,
    cross_entropy_loss,
    decode_for_scst,
    make_optimizer,
    scst_advantages,
    self_critical_loss,
    xe_sequences,
)
from difnet_transformers.training.rewards import ends_badly, watch_reward
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration
from processing_difnet import DifnetTokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


class TestLossesOfTheOriginal:
    """Golden numbers, reproduced by the functions that the trainers call."""

    def test_the_training_curve(self):
        case = golden_case("difnet_small")
        curve = json.loads((GOLDEN / case.name / "training_curve.json").read_text())
        batches = [reference_weights.reference_inputs(**each) for each in curve["batches"]]
        model = case.model().double()
        scorer = SequenceLogProbs(model)
        settings = curve["optimizer"]
        optimizer = make_optimizer(model, settings["betas"], settings["lr"])
        losses = []
        for step in range(curve["steps"]):
            inputs = batches[step % 3]
            labels = inputs["captions"][:, 1:]
            features = {name: value.double() for name, value in case.features(inputs).items()}
            batch = {**features, "labels": labels.masked_fill(labels == 1, -100)}
            sequences, features = xe_sequences(batch, model.config)
            loss = cross_entropy_loss(scorer(sequences, **features), int((batch["labels"] != -100).sum()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses == pytest.approx(curve["losses_float64"], rel=1e-6)
        state = model.state_dict()
        for original_key, key in key_pairs(model.config).items():
            assert state[key].norm().item() == pytest.approx(curve["final_norms_float64"][original_key], rel=1e-6), key

    def test_scst_loss_and_gradients(self, golden: GoldenCase):
        model = golden.model().double()  # in eval mode, so without dropout
        features = {name: value.double() for name, value in golden.features().items()}
        rewards = reference_weights.reference_rewards(**golden.meta["rewards"]).double()
        if not model.config.use_segmentation:
            features = {"grid_features": features["grid_features"]}
        sequences = decode_for_scst(model, features, "beam", rewards.shape[1], 20)
        log_probs = SequenceLogProbs(model)(sequences, **features)
        loss = self_critical_loss(log_probs, scst_advantages(rewards, "beam"), 20, rewards.numel())
        assert loss.item() == pytest.approx(golden.meta["scst_loss_float64"], rel=1e-9)
        loss.backward()
        parameters = dict(model.named_parameters())
        pairs = key_pairs(model.config)
        for key, expected in json.loads((GOLDEN / golden.name / "grads.json").read_text())["scst"].items():
            if expected is None or key in golden.meta["gradients_mathematically_zero"]:
                continue
            assert parameters[pairs[key]].grad.norm().item() == pytest.approx(expected["norm"], rel=1e-9), key

    def test_images_with_all_captions_give_the_loss_of_their_pairs(self, data):
        images = load_packed_split(data / "packed", "train")
        images = images.map(lambda row: {"captions": row["captions"][: 1 + row["image_id"] % 3]})
        tokenizer = DifnetTokenizer.from_captions([caption for each in images["captions"] for caption in each])
        torch.manual_seed(0)
        config = DifnetConfig(
            vocab_size=len(tokenizer), grid_feature_size=6, num_segmentation_classes=5, encoder_layers=2, d_model=16
        )
        scorer = SequenceLogProbs(DifnetForConditionalGeneration(config).double().eval())
        losses = []
        for form, size in ((CaptionPairBatches, 1000), (ImageCaptionBatches, len(images))):
            (batch,) = form(images, tokenizer, size, shuffle=False, drop_last=False)
            sequences, features = xe_sequences(batch, config)
            loss = cross_entropy_loss(scorer(sequences, **features), (batch["labels"] != -100).sum())
            losses.append(loss.item())
        assert sequences.shape[:2] == (40, 3)
        assert losses[1] == pytest.approx(losses[0], rel=1e-12)

    def test_the_loss_is_that_of_the_models_forward(self, data):
        images = load_packed_split(data / "packed", "train")
        tokenizer = DifnetTokenizer.from_captions([caption for each in images["captions"] for caption in each])
        config = DifnetConfig(
            vocab_size=len(tokenizer), grid_feature_size=6, num_segmentation_classes=5, encoder_layers=2, d_model=16
        )
        model = DifnetForConditionalGeneration(config).double().eval()
        batch = next(iter(CaptionPairBatches(images, tokenizer, 10)))
        sequences, features = xe_sequences(batch, config)
        loss = cross_entropy_loss(SequenceLogProbs(model)(sequences, **features), (batch["labels"] != -100).sum())
        assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-12)


class TestSelfCritical:
    def test_baselines(self):
        rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
        assert scst_advantages(rewards, "beam").tolist() == [[-2, -1, 3], [-1, -1, 2]]
        assert scst_advantages(rewards, "sample").tolist() == [[-3, -1.5, 4.5], [-1.5, -1.5, 3]]

    def test_rewards_are_cider_d_of_the_decoded_words(self):
        tokenizer = DifnetTokenizer(vocab=["<unk>", "<pad>", "<bos>", "<eos>", "a", "red", "dog", "cat"])
        references = [["A red dog.", "a dog"], ["a cat"]]
        cider = CiderReward.from_captions(references)
        sequences = torch.tensor([[[2, 4, 5, 6, 3, 1], [2, 4, 7, 3, 1, 1]], [[2, 4, 7, 3, 1, 1], [2, 4, 4, 4, 4, 4]]])
        rewards, captions = caption_rewards(cider, tokenizer, sequences, references)
        assert captions == ["a red dog", "a cat", "a cat", "a a a a a"]
        expected = cider.reward(captions, [references[0], references[0], references[1], references[1]])
        np.testing.assert_allclose(rewards.flatten(), expected, rtol=1e-6)

    def test_an_unfinished_caption_has_no_end_to_be_rewarded(self):
        tokenizer = DifnetTokenizer(vocab=["<unk>", "<pad>", "<bos>", "<eos>", "a", "red", "dog", "cat"])
        references = [["a red dog", "a red dog"], ["a cat"]]
        sequences = torch.tensor([[[2, 4, 5, 6, 3]], [[2, 4, 5, 6, 6]]])
        for count_eos in (False, True):
            cider = CiderReward.from_captions(references, count_eos=count_eos)
            finished, unfinished = cider.reward(["a red dog"] * 2, references[:1] * 2, finished=[True, False])
            assert (finished > unfinished) == count_eos
            rewards, _ = caption_rewards(cider, tokenizer, sequences, references[:1] * 2)
            expected = cider.reward(["a red dog", "a red dog dog"], references[:1] * 2, finished=[True, False])
            np.testing.assert_allclose(rewards.flatten(), expected, rtol=1e-6)

    def test_samples_are_drawn_from_the_models_distribution(self):
        """Without top-k, top-p or temperature: frequencies of the first word against its probabilities."""
        torch.manual_seed(0)
        config = DifnetConfig(vocab_size=70, grid_feature_size=4, use_segmentation=False, d_model=16)
        model = DifnetForConditionalGeneration(config).eval()
        features = {"grid_features": torch.rand(1, 4, 4)}
        sequences = decode_for_scst(model, features, "sample", 4000, 1)
        with torch.no_grad():
            logits = model(**features, decoder_input_ids=torch.tensor([[2]])).logits[0, 0]
        frequencies = torch.bincount(sequences[0, :, 1], minlength=70) / 4000
        probabilities = logits.softmax(-1)
        assert (frequencies > 0).sum() > 55, "Transformers' top_k=50 is off"
        standard_errors = (probabilities * (1 - probabilities) / 4000).sqrt()
        assert ((frequencies - probabilities).abs() < 5 * standard_errors + 1e-9).all()

    @pytest.mark.parametrize(
        ("caption", "expected"),
        [("a man with a dog", False), ("a man with a", True), ("a dog ..", True), ("", True), ("a 747", False)],
    )
    def test_bad_endings(self, caption, expected):
        assert ends_badly(caption) == expected

    def test_a_collapsed_reward_stops_the_run(self):
        progress = Progress("scst")
        for _ in range(150):
            watch_reward(progress, 1.0)
        for _ in range(68):  # 0.99 ** 69 is below a half
            watch_reward(progress, 0.0)
        with pytest.raises(
            TrainingFailed, match=r"reward has collapsed: 0\.500 .* after 1\.000 .*--scst-learning-rate"
        ):
            watch_reward(progress, 0.0)
        noisy = Progress("scst")
        rng = np.random.default_rng(0)
        for _ in range(1000):
            watch_reward(noisy, rng.uniform(0, 2))
