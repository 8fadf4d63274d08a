"""Rewards, baselines and regularisers of self-critical training: each against a small computation of its own."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import SCRIPT, arguments, config, make_data, read_log, reset_accelerator, run, same_weights

from caption_metrics import CiderReward, JavaMissing, check_java
from difnet_transformers.checkpoints import load_captioner
from difnet_transformers.cli import train
from difnet_transformers.training import (
    DifnetSelfCriticalTrainer,
    Progress,
    RewardFailed,
    SequenceLogProbs,
    TrainingConfig,
    TrainingFailed,
    TrainingStopped,
    WeightedRewards,
    decode_for_scst,
    kl_to_reference,
    load_reward,
    load_rewards,
    parse_rewards,
    score_sequences,
    scst_advantages,
    scst_baseline,
    self_critical_loss,
)
from difnet_transformers.training.advantages import BASELINES
from difnet_transformers.training.config import CHOICES, REWARDS
from difnet_transformers.training.regularization import mean_of_tokens
from difnet_transformers.training.reward_functions import SpiderReward, ends_badly, repeated_share
from difnet_transformers.training.rewards import watch_reward
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration
from processing_difnet import DifnetTokenizer

CORPUS = [
    ["a red dog on the grass", "a dog runs on grass"],
    ["two men sit on a bench", "men on a bench"],
    ["a cat with a hat", "the cat wears a hat"],
]
CAPTIONS = ["a red dog on the", "two men on a bench on a bench", "a cat with a hat"]


def sentence_bleu_4(caption: str, references: list[str]) -> float:
    """BLEU-4 of one sentence, with n-grams in dictionaries and the constants of pycocoevalcap."""
    words = caption.split()
    product = 1.0
    for n in range(1, 5):
        grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        most: Counter = Counter()
        for reference in references:
            theirs = reference.split()
            most |= Counter(tuple(theirs[i : i + n]) for i in range(len(theirs) - n + 1))
        matched = sum((grams & most).values())
        product *= (matched + 1e-15) / (max(0, len(words) - n + 1) + 1e-9)
    closest = min((abs(len(reference.split()) - len(words)), len(reference.split())) for reference in references)[1]
    ratio = (len(words) + 1e-15) / (closest + 1e-9)
    return product**0.25 * (math.exp(1 - 1 / ratio) if ratio < 1 else 1)


def sentence_rouge_l(caption: str, references: list[str]) -> float:
    """ROUGE-L of one sentence, with the usual table of the longest common subsequence."""

    def common(first: list[str], second: list[str]) -> int:
        table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
        for i, word in enumerate(first):
            for j, other in enumerate(second):
                table[i + 1, j + 1] = table[i, j] + 1 if word == other else max(table[i, j + 1], table[i + 1, j])
        return table[-1, -1]

    words = caption.split()
    precision = max(common(words, reference.split()) / len(words) for reference in references)
    recall = max(common(words, reference.split()) / len(reference.split()) for reference in references)
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if precision and recall else 0.0


class TestRewards:
    @pytest.mark.parametrize("document", ["caption", "image"])
    @pytest.mark.parametrize("count_eos", [False, True])
    def test_cider_d(self, document, count_eos):
        name = "cider_d" + ("_image" if document == "image" else "") + ("_eos" if count_eos else "")
        reward = load_reward(name, training_captions=lambda: CORPUS)
        expected = CiderReward.from_captions(CORPUS, document, count_eos)
        finished = [False, True, True]
        given = reward(CAPTIONS, CORPUS, finished=finished)
        assert given == expected.reward(CAPTIONS, CORPUS, finished=finished).tolist()
        assert isinstance(given, list)
        assert reward.description == expected.signature
        assert (given != reward(CAPTIONS, CORPUS)) == count_eos, "without `finished` all captions came to their end"

    def test_training_captions_are_read_when_the_first_caption_is_rewarded(self):
        reads = []
        reward = load_reward("cider_d", training_captions=lambda: reads.append(1) or CORPUS)
        assert reads == []
        reward(CAPTIONS, CORPUS)
        reward(CAPTIONS, CORPUS)
        assert reads == [1]

    def test_bleu_4_is_that_of_sentences_and_not_smoothed(self):
        expected = [sentence_bleu_4(*pair) for pair in zip(CAPTIONS, CORPUS, strict=True)]
        assert load_reward("bleu_4")(CAPTIONS, CORPUS) == pytest.approx(expected, rel=1e-9)
        assert load_reward("bleu_4")(["a dog"], [["a dog"]])[0] < 1e-3
        assert load_reward("bleu_1")(["a dog"], [["a dog"]])[0] == pytest.approx(1, abs=1e-6)

    def test_rouge_l(self):
        expected = [sentence_rouge_l(*pair) for pair in zip(CAPTIONS, CORPUS, strict=True)]
        assert load_reward("rouge_l")(CAPTIONS, CORPUS) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize(
        ("caption", "repeated"),
        [
            ("a dog and a cat", 0),
            ("a dog dog runs", 1),
            ("a a a dog", 2),
            ("a dog and a dog", 1),  # the pair `a dog`
            ("two men on a bench on a bench", 2),  # `on a`, `a bench`; `bench on` came once
            ("dog", 0),
            ("", 0),
        ],
    )
    def test_repeats(self, caption, repeated):
        words = caption.split()
        assert repeated_share(words) == repeated / max(1, len(words))
        assert load_reward("repeats")([caption], [["a dog"]]) == [-repeated / max(1, len(words))]

    def test_bad_endings_and_unfinished_captions(self):
        assert load_reward("bad_endings")(CAPTIONS, CORPUS) == [-1, 0, 0]
        assert [-float(ends_badly(caption)) for caption in CAPTIONS] == [-1, 0, 0]
        assert load_reward("unfinished")(CAPTIONS, CORPUS, finished=[True, False, True]) == [0, -1, 0]
        assert load_reward("unfinished")(CAPTIONS, CORPUS) == [0, 0, 0]

    def test_every_name_is_known(self):
        for name in set(REWARDS) - {"meteor", "spice", "spider"}:  # these depend on Java
            assert callable(load_reward(name, training_captions=lambda: CORPUS)), name
        with pytest.raises(ValueError, match=r"there is no reward blue_4: choose from cider_d, .*clip_score:MODEL"):
            load_reward("blue_4")
        with pytest.raises(ValueError, match="the reward cider_d needs training captions"):
            load_reward("cider_d")

    def test_what_needs_java_says_so_in_one_line(self, monkeypatch):
        monkeypatch.setenv("PATH", "")
        for name in ("meteor", "spice", "spider"):
            with pytest.raises(ValueError, match=rf"the reward {name}: METEOR and SPICE need Java") as error:
                load_reward(name, training_captions=lambda: CORPUS)
            assert "\n" not in str(error.value)

    @pytest.mark.slow
    def test_meteor_is_that_of_the_metric_whatever_was_asked_before(self):
        try:
            check_java(with_meteor=True, with_spice=False)
        except JavaMissing as missing:
            pytest.skip(str(missing))
        from caption_metrics import meteor

        reward = load_reward("meteor")
        expected = meteor(CAPTIONS, CORPUS).per_image
        assert reward(CAPTIONS, CORPUS) == pytest.approx(expected, abs=1e-9)
        assert reward(CAPTIONS[::-1], CORPUS[::-1]) == pytest.approx(expected[::-1], abs=1e-9)
        reward.meteor.close()

    def test_spider_is_the_mean_of_cider_d_and_spice(self):
        """With numbers in the place of SPICE, which takes Java and 385 MB."""
        cider_d = load_reward("cider_d", training_captions=lambda: CORPUS)
        spider = SpiderReward(cider_d, spice=lambda captions, references: [0.5, 0.0, 0.1])
        expected = [(cider + spice) / 2 for cider, spice in zip(cider_d(CAPTIONS, CORPUS), (0.5, 0, 0.1), strict=True)]
        assert spider(CAPTIONS, CORPUS) == pytest.approx(expected)


def number_of_words(captions, references):
    """A reward of one's own; `load_reward` finds it as `test_rewards:number_of_words`."""
    return [len(caption.split()) for caption in captions]


def half_if_cut_off(captions, references, finished):
    return [1.0 if ended else 0.5 for ended in finished]


def every_column(captions, references, **columns):
    return np.array([sum(map(float, values)) for values in zip(*columns.values(), strict=True)], dtype=np.float32)


def needs_another_column(captions, references, *, brightness):
    return brightness


class TestOwnFunctions:
    def test_they_are_loaded_by_name(self):
        reward = load_reward("test_rewards:number_of_words")
        assert reward(CAPTIONS, CORPUS) == [5, 8, 5]

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("test_rewards:nothing", r"test_rewards:nothing cannot be loaded \(.*nothing"),
            ("no_such_module:reward", r"no_such_module:reward cannot be loaded \(.*no_such_module"),
            ("test_rewards:CAPTIONS", r"test_rewards:CAPTIONS is no function"),
        ],
    )
    def test_those_that_cannot_be_loaded(self, name, said):
        with pytest.raises(ValueError, match=f"the reward {said}"):
            load_reward(name)

    def test_a_module_that_exits(self, tmp_path, monkeypatch):
        (tmp_path / "exits_at_once.py").write_text("raise SystemExit(0)")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ValueError, match=r"the reward exits_at_once:f cannot be loaded \(SystemExit"):
            load_reward("exits_at_once:f")

    def test_they_get_the_columns_that_they_name(self):
        columns = {"finished": [True, False, True], "image_id": [7, 8, 9]}
        for function, expected in (
            (number_of_words, [5, 8, 5]),
            (half_if_cut_off, [1, 0.5, 1]),
            (every_column, [8, 8, 10]),
        ):
            rewards = WeightedRewards({"own": function})
            rewards.check_columns(columns)
            assert rewards(CAPTIONS, CORPUS, **columns).total.tolist() == expected

    def test_one_that_needs_another_column_is_refused_before_the_training(self):
        with pytest.raises(
            ValueError, match=r"reward own cannot be called: .*brightness.*by name .*finished, image_id"
        ):
            WeightedRewards({"own": needs_another_column}).check_columns(["finished", "image_id"])


class TestWeights:
    def test_a_weighted_sum_and_each_ones_values(self):
        weights = parse_rewards(["cider_d", "bleu_4=0.5", "bad_endings=2"])
        assert weights == {"cider_d": 1, "bleu_4": 0.5, "bad_endings": 2}
        rewards = load_rewards(weights, training_captions=lambda: CORPUS)
        total, values = rewards(CAPTIONS, CORPUS, finished=[True] * 3)
        assert list(values) == list(weights)
        for name in weights:
            alone = load_reward(name, training_captions=lambda: CORPUS)(CAPTIONS, CORPUS)
            assert values[name].tolist() == alone
        expected = sum(weight * values[name] for name, weight in weights.items())
        assert total.dtype == torch.float32
        np.testing.assert_allclose(total, expected, rtol=1e-6)
        assert (
            rewards.description
            == f"`{CiderReward.from_captions(CORPUS).signature}` + 0.5 x `bleu_4` + 2 x `bad_endings`"
        )

    def test_one_reward_of_weight_1_is_itself_bit_for_bit(self):
        cider_d = CiderReward.from_captions(CORPUS)
        total, _ = load_rewards({"cider_d": 1.0}, training_captions=lambda: CORPUS)(CAPTIONS, CORPUS)
        assert total.tolist() == cider_d.reward(CAPTIONS, CORPUS).astype(np.float32).tolist()

    def test_a_reward_cannot_change_what_others_see(self):
        def empties(captions, references):
            number = len(captions)
            captions.clear()
            references.clear()
            return [0.0] * number

        rewards = WeightedRewards({"hostile": empties, "words": number_of_words})
        captions, references = list(CAPTIONS), list(CORPUS)
        assert rewards(captions, references).total.tolist() == [5, 8, 5]
        assert (captions, references) == (CAPTIONS, CORPUS)

    def test_captions_of_images_are_scored_in_their_order(self):
        tokenizer = DifnetTokenizer(vocab=["<unk>", "<pad>", "<bos>", "<eos>", "a", "red", "dog", "cat"])
        sequences = torch.tensor([[[2, 4, 5, 6, 3, 1], [2, 4, 7, 3, 1, 1]], [[2, 6, 3, 1, 1, 1], [2, 4, 4, 4, 4, 4]]])
        seen = []

        def spy(captions, references, **columns):
            seen.append((captions, references, columns))
            return [float(number) for number in range(4)]

        scored = score_sequences(WeightedRewards({"spy": spy}), tokenizer, sequences, CORPUS[:2], image_id=[7, 9])
        captions = ["a red dog", "a cat", "dog", "a a a a a"]
        columns = {"finished": [True, True, True, False], "image_id": [7, 7, 9, 9]}
        assert seen == [(captions, [CORPUS[0], CORPUS[0], CORPUS[1], CORPUS[1]], columns)]
        assert scored.captions == captions
        assert scored.rewards.tolist() == scored.values["spy"].tolist() == [[0, 1], [2, 3]]


def raises(captions, references):
    raise KeyError("no\nsuch word")


def exits(captions, references):
    sys.exit(0)


BROKEN = {
    "raises": (raises, "the reward raises failed: KeyError: 'no"),
    "exits": (exits, "the reward exits failed: SystemExit"),
    "none": (lambda captions, references: None, "returned a NoneType for 3 captions"),
    "one number": (lambda captions, references: 0.5, "returned a float for 3 captions"),
    "too few": (lambda captions, references: [0.5], "returned 1 values for 3 captions"),
    "a table": (lambda captions, references: np.zeros((3, 2)), "returned a ndarray for 3 captions"),
    "a generator": (lambda captions, references: (1.0 for _ in captions), "returned a generator for 3 captions"),
    "words": (lambda captions, references: ["1.0"] * 3, "returned a str, which is no number"),
    "None within": (lambda captions, references: [1.0, None, 1.0], "returned a NoneType, which is no number"),
    "nan": (lambda captions, references: [0.0, math.nan, 0.0], "returned nan for the caption two men"),
    "inf": (lambda captions, references: [0.0, 0.0, -math.inf], "returned -inf for the caption a cat"),
    "more than float32": (lambda captions, references: [1e39, 0, 0], r"returned 1e\+39 for the caption a red"),
    "with a graph": (
        lambda captions, references: torch.zeros(3, requires_grad=True),
        "failed: RuntimeError: Can't call",
    ),
}


class TestBrokenRewards:
    @pytest.mark.parametrize("name", BROKEN)
    def test_one_line_names_the_reward(self, name):
        function, said = BROKEN[name]
        label = name if name in ("raises", "exits") else "broken"
        rewards = WeightedRewards({"words": number_of_words, label: function})
        with pytest.raises(RewardFailed, match=said) as error:
            rewards(CAPTIONS, CORPUS)
        assert label in str(error.value)
        assert "\n" not in str(error.value)
        assert isinstance(error.value, TrainingFailed)
        assert isinstance(error.value, ValueError)

    @pytest.mark.parametrize(
        "values",
        [np.ones(3, dtype=np.float16), torch.ones(3), (1, True, np.float64(1))],
        ids=["array", "tensor", "tuple"],
    )
    def test_what_is_a_list_of_numbers(self, values):
        assert (
            WeightedRewards({"own": lambda captions, references: values})(CAPTIONS, CORPUS).total.tolist() == [1] * 3
        )

    def test_penalties_alone_do_not_count_as_a_collapse(self):
        progress = Progress("scst")
        for _ in range(300):
            watch_reward(progress, -0.5)
        assert progress.reward_average == progress.reward_peak == 0


class TestBaselines:
    REWARDS = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])

    def test_leave_one_out_is_that_of_trl(self):
        """RLOO of TRL 0.x to 1.x: `(sum - reward) / (k - 1)` over the other completions of a prompt."""
        k = 3
        grouped = self.REWARDS.reshape(-1, k)
        baseline = (grouped.sum(1, keepdim=True) - grouped) / (k - 1)
        assert torch.equal(scst_advantages(self.REWARDS, "leave_one_out"), grouped - baseline)
        # Which is the mean's advantage, longer by k / (k - 1).
        expected = scst_advantages(self.REWARDS, "mean") * k / (k - 1)
        torch.testing.assert_close(scst_advantages(self.REWARDS, "leave_one_out"), expected)

    def test_the_loss_of_leave_one_out_is_that_of_trl_over_the_longest_length(self):
        """RLOO of TRL takes a caption as one action: `-(advantage * sum of log-probabilities)`, and the mean."""
        log_probs = -torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True)
        advantages = scst_advantages(self.REWARDS.double(), "leave_one_out")
        expected = -(advantages.flatten() * log_probs.flatten(0, 1).sum(-1)).mean()
        loss = self_critical_loss(log_probs, advantages, max_new_tokens=20, num_captions=6)
        torch.testing.assert_close(20 * loss, expected, rtol=1e-12, atol=0)

    def test_group_is_that_of_grpo(self):
        expected = (self.REWARDS - self.REWARDS.mean(1, keepdim=True)) / (self.REWARDS.std(1, keepdim=True) + 1e-4)
        torch.testing.assert_close(scst_advantages(self.REWARDS, "group"), expected)
        assert torch.equal(scst_advantages(torch.ones(2, 3), "group"), torch.zeros(2, 3))

    def test_greedy_is_that_of_rennie(self):
        greedy = torch.tensor([2.0, 1.0])
        assert scst_advantages(self.REWARDS, "greedy", greedy).tolist() == [[-1, 0, 4], [-1, -1, 2]]
        assert scst_advantages(self.REWARDS[:, :1], "greedy", greedy).tolist() == [[-1], [-1]]
        with pytest.raises(ValueError, match='"greedy" needs `greedy_rewards`'):
            scst_advantages(self.REWARDS, "greedy")

    def test_the_names_of_samples_mean_what_they_meant(self):
        assert torch.equal(scst_advantages(self.REWARDS), scst_advantages(self.REWARDS, "beam"))
        assert torch.equal(scst_advantages(self.REWARDS, "mean"), scst_advantages(self.REWARDS, "beam"))
        assert torch.equal(scst_advantages(self.REWARDS, "leave_one_out"), scst_advantages(self.REWARDS, "sample"))

    def test_the_baseline_of_a_group_is_its_mean(self):
        assert scst_baseline(self.REWARDS, "group").tolist() == [[3, 3, 3], [1, 1, 1]]

    def test_what_cannot_be(self):
        assert list(BASELINES) == CHOICES["scst_baseline"]
        with pytest.raises(ValueError, match="baseline 'best': choose from mean, leave_one_out, greedy, group"):
            scst_advantages(self.REWARDS, "best")
        with pytest.raises(ValueError, match="at least two captions"):
            scst_advantages(self.REWARDS[:, :1], "leave_one_out")


@pytest.fixture(scope="module")
def tiny_model() -> DifnetForConditionalGeneration:
    torch.manual_seed(0)
    config = DifnetConfig(vocab_size=12, grid_feature_size=4, use_segmentation=False, d_model=16, encoder_layers=2)
    return DifnetForConditionalGeneration(config).double().eval()


@pytest.fixture(scope="module")
def tiny_features() -> dict[str, torch.Tensor]:
    return {"grid_features": torch.rand(2, 4, 4, dtype=torch.float64)}


class TestRegularisers:
    def test_the_divergence_is_that_of_trl(self):
        log_probs, reference = torch.rand(2, 2, 3, 4).neg()
        expected = torch.exp(reference - log_probs) - (reference - log_probs) - 1
        torch.testing.assert_close(kl_to_reference(log_probs, reference), expected, rtol=1e-4, atol=1e-7)
        assert (kl_to_reference(log_probs, reference) >= 0).all()

    def test_equal_models_have_none_and_no_gradient(self, tiny_model, tiny_features):
        sequences = decode_for_scst(tiny_model, tiny_features, "beam", 3, 5)
        log_probs = SequenceLogProbs(tiny_model)(sequences, **tiny_features)
        kl = kl_to_reference(log_probs, log_probs.detach())
        assert torch.equal(kl, torch.zeros_like(kl))
        (gradient,) = torch.autograd.grad(kl.sum(), log_probs)
        assert torch.equal(gradient, torch.zeros_like(gradient))

    def test_its_gradient(self):
        log_probs = -torch.rand(2, 3, 4, dtype=torch.float64)
        reference = -torch.rand(2, 3, 4, dtype=torch.float64)
        log_probs.requires_grad_()
        assert torch.autograd.gradcheck(lambda given: kl_to_reference(given, reference), (log_probs,))
        (gradient,) = torch.autograd.grad(kl_to_reference(log_probs, reference).sum(), log_probs)
        torch.testing.assert_close(gradient, 1 - torch.exp(reference - log_probs.detach()))

    def test_its_mean_over_samples_is_the_kullback_leibler_divergence(self):
        torch.manual_seed(0)
        own, reference = torch.randn(2, 7, dtype=torch.float64).log_softmax(-1)
        expected = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=own), torch.distributions.Categorical(logits=reference)
        )
        estimates = kl_to_reference(own, reference)  # of each word
        torch.testing.assert_close((own.exp() * estimates).sum(), expected)

    def test_entropy_is_that_of_the_distributions(self, tiny_model, tiny_features):
        sequences = decode_for_scst(tiny_model, tiny_features, "beam", 3, 5)
        log_probs, entropies = SequenceLogProbs(tiny_model)(sequences, with_entropy=True, **tiny_features)
        assert torch.equal(log_probs, SequenceLogProbs(tiny_model)(sequences, **tiny_features))
        repeated = {name: value.repeat_interleave(3, 0) for name, value in tiny_features.items()}
        logits = tiny_model(**repeated, decoder_input_ids=sequences.flatten(0, 1)[:, :-1]).logits
        expected = torch.distributions.Categorical(logits=logits).entropy().view(2, 3, -1)
        is_token = sequences[..., 1:] != tiny_model.config.pad_token_id
        torch.testing.assert_close(entropies, expected * is_token)

    def test_a_mean_over_tokens_is_divided_as_the_loss_is(self):
        values = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]])
        assert mean_of_tokens(values, 20, 2).item() == pytest.approx(6 / 40)

    def test_greedy_captions_are_the_likeliest_words(self, tiny_model, tiny_features):
        sequences = decode_for_scst(tiny_model, tiny_features, "greedy", 1, 5)  # (2, 1, L)
        assert sequences.shape[:2] == (2, 1)
        logits = tiny_model(**tiny_features, decoder_input_ids=sequences[:, 0, :-1]).logits
        is_token = sequences[:, 0, 1:] != tiny_model.config.pad_token_id
        assert torch.equal(logits.argmax(-1)[is_token], sequences[:, 0, 1:][is_token])

    def test_samples_of_a_temperature_and_of_the_likeliest_words(self, tiny_model, tiny_features):
        greedy = decode_for_scst(tiny_model, tiny_features, "greedy", 1, 5)
        for settings in ({"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}):
            drawn = decode_for_scst(tiny_model, tiny_features, "sample", 4, 5, **settings)
            length = min(greedy.shape[-1], drawn.shape[-1])
            assert (drawn[..., :length] == greedy[..., :length]).all(), settings


class TestOptions:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--rewards", "blue"], "--rewards blue: choose from cider_d, .*, clip_score:MODEL and package.module:"),
            (["--rewards", "cider_d=high"], "--rewards cider_d=high: write NAME=WEIGHT"),
            (["--rewards", "cider_d=0"], "--rewards cider_d=0: a weight is a number other than 0"),
            (["--rewards", "cider_d=nan"], "--rewards cider_d=nan: a weight is a number other than 0"),
            (["--rewards", "cider_d", "cider_d=2"], "--rewards cider_d=2: cider_d comes twice"),
            (["--rewards", "rouge_l", "--eos-in-reward"], "--eos-in-reward goes with --rewards cider_d"),
            (["--rewards", "cider_d", "cider_d_eos", "--eos-in-reward"], "cider_d_eos, which --rewards has too"),
            (["--rewards", "clip_score:m"], "clip_score:MODEL needs --reward-images FOLDER"),
            (["--reward-images", "f"], "--reward-images goes with --rewards clip_score:MODEL"),
            (["--scst-temperature", "0.5"], "--scst-temperature goes with --scst-samples sample"),
            (["--scst-top-k", "5"], "--scst-top-k goes with --scst-samples sample"),
            (["--scst-top-p", "0.9"], "--scst-top-p goes with --scst-samples sample"),
            (["--scst-top-p", "1.5"], "--scst-top-p must be greater than 0 and at most 1"),
            (["--scst-temperature", "inf"], "--scst-temperature must be a number greater than 0"),
            (["--scst-top-k", "-1"], "--scst-top-k must be 0 or a number above it"),
            (["--scst-kl-weight", "-1"], "--scst-kl-weight must be 0 or a number above it"),
            (["--scst-entropy-weight", "nan"], "--scst-entropy-weight must be 0 or a number above it"),
            (["--scst-num-captions", "1"], "--scst-num-captions must be at least 2"),
        ],
    )
    def test_what_makes_no_sense(self, words, said, capsys):
        with pytest.raises(SystemExit) as ended:
            train.main(["--dataset", "d", "--output", "o", *words])
        assert ended.value.code == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1
        assert re.search(said, error[0]), error

    def test_defaults_are_the_originals(self):
        args = TrainingConfig(dataset="d", output="o")
        assert args.reward_weights() == {"cider_d": 1}
        assert args.baseline() == "mean"
        assert TrainingConfig(dataset="d", output="o", scst_samples="sample").baseline() == "leave_one_out"
        assert (
            TrainingConfig(dataset="d", output="o", scst_samples="sample", scst_baseline="mean").baseline() == "mean"
        )
        assert TrainingConfig(dataset="d", output="o", eos_in_reward=True).reward_weights() == {"cider_d_eos": 1}
        assert (
            TrainingConfig(dataset="d", output="o", scst_baseline="greedy", scst_num_captions=1).baseline() == "greedy"
        )
        assert parse_rewards(["clip_score:a/b=2", "my.module:f=-1"]) == {"clip_score:a/b": 2, "my.module:f": -1}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def xe_model(data, tmp_path_factory) -> Path:
    """A checkpoint of one epoch of cross-entropy."""
    output = tmp_path_factory.mktemp("xe") / "run"
    assert run(*arguments(data, output, "--stage", "xe", xe_epochs=1)) == 0
    return output / "best"


def scst(data: Path, model: Path, output: Path, *words: str, **changes) -> list[str]:
    return arguments(data, output, "--stage", "scst", *words, config=None, model=model, save_every=2, **changes)


CALLS = {"number": 0}


def fails_at_the_third_batch(captions, references):
    CALLS["number"] += 1
    return [math.nan if CALLS["number"] == 3 else 1.0 for _ in captions]


MIX = ["--rewards", "cider_d", "bad_endings=0.5", "repeats=0.5", "--scst-kl-weight", "0.1"]
MIX += ["--scst-entropy-weight", "0.01"]


class TestTraining:
    def test_the_default_reward_by_name_gives_the_same_weights(self, data, xe_model, tmp_path):
        assert run(*scst(data, xe_model, tmp_path / "default", "--eos-in-reward")) == 0
        assert run(*scst(data, xe_model, tmp_path / "named", "--rewards", "cider_d_eos")) == 0
        assert same_weights(tmp_path / "default" / "last", tmp_path / "named" / "last")
        for name in ("default", "named"):
            assert "STANDARD_wInit" in (tmp_path / name / "last" / "README.md").read_text()

    def test_what_is_logged_and_recorded(self, data, xe_model, tmp_path):
        assert run(*scst(data, xe_model, tmp_path / "run", *MIX)) == 0
        for line in read_log(tmp_path / "run", "train"):
            total = line["reward_cider_d"] + 0.5 * line["reward_bad_endings"] + 0.5 * line["reward_repeats"]
            assert line["reward"] == pytest.approx(total, abs=1e-5)
            assert line["reward_bad_endings"] == pytest.approx(-line["bad_endings"])
            assert line["kl"] > 0
            assert 0 < line["entropy"] < math.log(100)
        card = (tmp_path / "run" / "last" / "README.md").read_text()
        assert "+ 0.5 x `bad_endings` + 0.5 x `repeats`" in card
        assert "scst kl weight 0.1" in card
        options = json.loads((tmp_path / "run" / "last" / "training_state" / "progress.json").read_text())["options"]
        assert options["rewards"] == ["cider_d", "bad_endings=0.5", "repeats=0.5"]
        assert "- bad_endings=0.5" in (tmp_path / "run" / "recipe.yaml").read_text()

    @pytest.mark.parametrize(
        "words",
        [
            ["--scst-samples", "sample", "--scst-baseline", "greedy", "--scst-num-captions", "1"],
            ["--scst-samples", "sample", "--scst-baseline", "group", "--scst-temperature", "0.8", "--scst-top-k", "9"],
            ["--scst-baseline", "leave_one_out", "--rewards", "rouge_l", "test_rewards:number_of_words=-0.01"],
        ],
        ids=["greedy", "group", "leave one out"],
    )
    def test_baselines_and_rewards_of_ones_own(self, words, data, xe_model, tmp_path):
        assert run(*scst(data, xe_model, tmp_path / "run", *words)) == 0
        assert all(np.isfinite(line["loss"]) for line in read_log(tmp_path / "run"))
        card = (tmp_path / "run" / "last" / "README.md").read_text()
        assert f"baseline `{words[words.index('--scst-baseline') + 1]}`" in card

    def test_a_stopped_run_with_other_rewards_and_divergence_resumes_bit_for_bit(self, data, xe_model, tmp_path):
        words = [*MIX, "--ema-decay", "0.8"]
        assert run(*scst(data, xe_model, tmp_path / "whole", *words)) == 0
        cut = scst(data, xe_model, tmp_path / "cut", *words)

        class StoppedTrainer(DifnetSelfCriticalTrainer):
            def should_stop(self) -> bool:
                return self.progress.step == 3

        reset_accelerator()
        with pytest.raises(TrainingStopped):
            StoppedTrainer(args=config(*cut, "--cpu")).train()
        # Elsewhere, so that the weights that SCST starts from have to come along; and from there once more.
        moved = scst(data, xe_model, tmp_path / "moved", *words)
        assert run(*moved, "--resume", str(tmp_path / "cut" / "last")) == 0
        for name in ("last", "best"):
            assert same_weights(tmp_path / "moved" / name, tmp_path / "whole" / name), name
        assert (tmp_path / "moved" / "best_xe" / "model.safetensors").exists()

    def test_after_both_stages_the_divergence_is_that_from_the_best_xe_weights(self, data, tmp_path):
        words = ["--scst-kl-weight", "0.1"]
        assert run(*arguments(data, tmp_path / "whole", *words, xe_epochs=1)) == 0

        class StoppedTrainer(DifnetSelfCriticalTrainer):
            def should_stop(self) -> bool:
                return self.progress.stage == "scst" and self.progress.step == 2

        reset_accelerator()
        with pytest.raises(TrainingStopped):
            StoppedTrainer(args=config(*arguments(data, tmp_path / "cut", *words, xe_epochs=1), "--cpu")).train()
        assert run(*arguments(data, tmp_path / "cut", *words, xe_epochs=1), "--resume", "last") == 0
        assert same_weights(tmp_path / "cut" / "last", tmp_path / "whole" / "last")

    def test_reference_weights_that_are_gone_or_others_are_refused(self, data, xe_model, tmp_path, capsys):
        output = tmp_path / "run"

        class StoppedTrainer(DifnetSelfCriticalTrainer):
            def should_stop(self) -> bool:
                return self.progress.step == 2

        words = scst(data, xe_model, output, "--scst-kl-weight", "0.1")
        reset_accelerator()
        with pytest.raises(TrainingStopped):
            StoppedTrainer(args=config(*words, "--cpu")).train()
        reference = output / "best_xe"
        reference.rename(tmp_path / "kept")
        assert run(*words, "--resume", "last") == 2
        assert f"{reference} is missing: --scst-kl-weight" in capsys.readouterr().err.splitlines()[-1]
        # A whole checkpoint, but of another moment.
        (output / "last").rename(reference)
        shutil.copytree(reference, output / "last")
        assert run(*words, "--resume", "last") == 2
        assert f"{reference} is not what SCST started from in this run" in capsys.readouterr().err.splitlines()[-1]

    def test_other_rewards_are_noticed_when_a_run_is_resumed(self, data, xe_model, tmp_path, capsys):
        assert run(*scst(data, xe_model, tmp_path / "run", "--rewards", "rouge_l", scst_epochs=1)) == 0
        for changed in (["--rewards", "rouge_l", "repeats"], [], ["--rewards", "rouge_l", "--scst-baseline", "group"]):
            assert run(*scst(data, xe_model, tmp_path / "run", *changed), "--resume", "last") == 2
            error = capsys.readouterr().err.splitlines()[-1]
            named = "--scst-baseline group" if "--scst-baseline" in changed else "--rewards rouge_l"
            assert named in error, error

    def test_a_broken_reward_ends_the_run_and_the_last_checkpoint_is_good(self, data, xe_model, tmp_path, capsys):
        CALLS["number"] = 0
        words = scst(data, xe_model, tmp_path / "run", "--rewards", "test_rewards:fails_at_the_third_batch")
        assert run(*words) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: error")]
        assert len(errors) == 1
        assert "the reward test_rewards:fails_at_the_third_batch returned nan for the caption" in errors[0]
        assert "last is from before and good" in errors[0]
        # It was saved after two steps; with the reward mended the run ends as one that never failed.
        assert run(*words, "--resume", "last") == 0
        CALLS["number"] = 10
        assert run(*scst(data, xe_model, tmp_path / "whole", *words[words.index("--rewards") :][:2])) == 0
        assert same_weights(tmp_path / "run" / "last", tmp_path / "whole" / "last")

    @pytest.mark.slow
    def test_a_reward_that_is_broken_in_one_process_ends_all_with_one_line(self, data, xe_model, tmp_path):
        (tmp_path / "broken_reward.py").write_text(
            "import os\n\ndef reward(captions, references):\n"
            "    return [float('nan') if os.environ['RANK'] == '1' else 1.0 for _ in captions]\n"
        )
        words = scst(data, xe_model, tmp_path / "run", "--rewards", "broken_reward:reward", scst_batch_size=5)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(SCRIPT), *words]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
        environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
        errors = [line for line in done.stderr.splitlines() if "train.py: error: " in line]
        assert len(errors) == 1, done.stderr[-3000:]
        assert "the reward broken_reward:reward returned nan for the caption" in errors[0]
        assert done.returncode != 0
        load_captioner(tmp_path / "run" / "last")

    def test_rewards_that_cannot_be_loaded_are_refused_before_the_run(self, data, tmp_path, capsys):
        for name, said in (
            ("no_such_module:reward", "no_such_module:reward cannot be loaded"),
            ("test_rewards:needs_another_column", "cannot be called: "),
        ):
            assert run(*arguments(data, tmp_path / "run", "--rewards", name)) == 2
            assert said in capsys.readouterr().err
            assert not (tmp_path / "run" / "recipe.yaml").exists()
