"""Ensembles: the mean of the members' probabilities at each step, in every way of decoding."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import random_captions, random_features, random_model

from modeling_difnet import DifnetConfig, DifnetEnsemble, DifnetForConditionalGeneration, original_beam_search
from processing_difnet import DifnetTokenizer

MODES = {
    "greedy": {"num_beams": 1},
    "sampling": {"num_beams": 1, "do_sample": True, "top_k": 0},
    "beams": {"num_beams": 4},
    "several of each": {"num_beams": 4, "num_return_sequences": 3},
    "original": {"num_beams": 4, "num_return_sequences": 4, "custom_generate": original_beam_search},
}


def member(config: DifnetConfig, seed: int, **changes) -> DifnetForConditionalGeneration:
    model = random_model(dataclasses.replace(config, **changes), seed)
    model.lm_head.weight.data *= 4  # captions that differ and that end
    return model


def members_of_all_kinds(config: DifnetConfig) -> list[DifnetForConditionalGeneration]:
    """Of differing width, depth and fusion, in float64, the baseline among them."""
    members = [
        member(config, 0),
        member(config, 1, d_model=20, decoder_layers=3, head_dim=6, encoder_layers=4, fusion_layers=2),
        member(config, 2, use_segmentation=False, decoder_layers=1, decoder_attention_heads=3),
        member(config, 3, fusion_iterations=3, decoder_ffn_dim=20, max_position_embeddings=25),
    ]
    return [each.double() for each in members]


def double(features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in features.items()}


# The reference: one image at a time, all words from the start at each step, no cache


def next_log_probs(
    members: list[DifnetForConditionalGeneration], image_features: dict, tokens: list[int]
) -> torch.Tensor:
    probabilities = [
        each(**image_features, decoder_input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].softmax(-1)
        for each in members
    ]
    return (sum(probabilities) / len(members)).log()


def plain_search(members: list[DifnetForConditionalGeneration], image_features: dict, num_beams: int, num_steps: int):
    """The original's search; a list of (score, tokens), the best first."""
    eos = members[0].config.eos_token_id
    hypotheses = [(0.0, [members[0].config.bos_token_id])]
    for _ in range(num_steps):
        candidates = []
        for score, tokens in hypotheses:
            if tokens[-1] == eos:
                candidates.append((score, tokens))
                continue
            log_probs = next_log_probs(members, image_features, tokens).tolist()
            candidates += [(score + log_prob, [*tokens, token]) for token, log_prob in enumerate(log_probs)]
        hypotheses = sorted(candidates, key=lambda candidate: -candidate[0])[:num_beams]
    return hypotheses


def words(sequence: torch.Tensor, config: DifnetConfig) -> list[int]:
    """The tokens up to `<eos>`."""
    tokens = sequence.tolist()
    return tokens[: tokens.index(config.eos_token_id) + 1] if config.eos_token_id in tokens else tokens


class TestProbabilities:
    @torch.no_grad()
    def test_are_the_mean_of_the_members(self, tiny_config):
        members = members_of_all_kinds(tiny_config)
        features = double(random_features(tiny_config, batch_size=3))
        features["grid_attention_mask"] = torch.ones(3, 12, dtype=torch.long)
        features["grid_attention_mask"][1, 7:] = 0
        captions = random_captions(tiny_config, num_captions=6)  # two of each image
        found = DifnetEnsemble(members)(**features, decoder_input_ids=captions).logits.exp()
        expected = sum(each(**features, decoder_input_ids=captions).logits.softmax(-1) for each in members) / 4
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(found.sum(-1), torch.ones(6, 6, dtype=torch.double))

    @torch.no_grad()
    def test_of_given_captions(self, tiny_config):
        members = members_of_all_kinds(tiny_config)
        ensemble, features = DifnetEnsemble(members), double(random_features(tiny_config, batch_size=2))
        sequences = random_captions(tiny_config, num_captions=6, length=7).view(2, 3, 7)
        sequences[0, 1, 4:] = tiny_config.pad_token_id
        found = ensemble.sequence_log_probs(sequences, **features)
        logits = ensemble(**features, decoder_input_ids=sequences.flatten(0, 1)[:, :-1]).logits
        targets = sequences.flatten(0, 1)[:, 1:].unsqueeze(-1)
        expected = logits.gather(-1, targets).squeeze(-1).masked_fill(targets.squeeze(-1) == 1, 0).view(2, 3, 6)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        encoded = ensemble.sequence_log_probs(sequences, encoder_outputs=ensemble.get_encoder()(**features))
        torch.testing.assert_close(encoded, found, rtol=1e-12, atol=1e-12)

    @torch.no_grad()
    def test_loss_is_the_mean_over_the_labels(self, tiny_config):
        ensemble = DifnetEnsemble(members_of_all_kinds(tiny_config))
        features, captions = double(random_features(tiny_config)), random_captions(tiny_config)
        labels = captions[:, 1:].clone()
        labels[1, 3:] = -100
        log_probs = ensemble(**features, decoder_input_ids=captions[:, :-1]).logits
        expected = -sum(log_probs[i, t, labels[i, t]] for i in range(2) for t in range(5) if labels[i, t] >= 0) / 8
        torch.testing.assert_close(ensemble(**features, labels=labels).loss, expected)
        shared = ensemble(**features, labels=labels, num_items_in_batch=torch.tensor(16)).loss
        torch.testing.assert_close(shared, expected * 8 / 16)

    def test_gradients_reach_every_member(self, tiny_config):
        members = members_of_all_kinds(tiny_config)
        features, captions = double(random_features(tiny_config)), random_captions(tiny_config)
        DifnetEnsemble(members).sequence_log_probs(captions, **features).sum().backward()
        assert all(each.lm_head.weight.grad.abs().sum() > 0 for each in members)


class TestDecoding:
    @pytest.mark.parametrize("seed", range(3))
    @torch.no_grad()
    def test_original_search_equals_the_plain_one(self, tiny_config, seed):
        config = dataclasses.replace(tiny_config, vocab_size=14)
        members = members_of_all_kinds(config)
        features = double(random_features(config, batch_size=3, seed=seed))
        output = DifnetEnsemble(members).generate(
            **features, **MODES["original"], max_new_tokens=10, return_dict_in_generate=True
        )
        for i in range(3):
            image_features = {name: tensor[i : i + 1] for name, tensor in features.items()}
            for k, (score, tokens) in enumerate(plain_search(members, image_features, num_beams=4, num_steps=10)):
                assert words(output.sequences[4 * i + k], config) == tokens
                assert output.sequences_scores[4 * i + k].item() == pytest.approx(score, abs=1e-9)

    @torch.no_grad()
    def test_greedy_search_equals_the_plain_one(self, tiny_config):
        members = members_of_all_kinds(tiny_config)
        features = double(random_features(tiny_config, batch_size=3))
        sequences = DifnetEnsemble(members).generate(**features, num_beams=1, max_new_tokens=10)
        for i in range(3):
            image_features = {name: tensor[i : i + 1] for name, tensor in features.items()}
            ((_, tokens),) = plain_search(members, image_features, num_beams=1, num_steps=10)
            assert words(sequences[i], tiny_config) == tokens

    @pytest.mark.parametrize("mode", ["beams", "several of each"])
    @torch.no_grad()
    def test_scores_of_beam_search_are_log_probabilities(self, tiny_config, mode):
        ensemble = DifnetEnsemble(members_of_all_kinds(tiny_config))
        features = double(random_features(tiny_config, batch_size=3))
        settings = {
            "length_penalty": 0.0,
            "early_stopping": "never",
            "return_dict_in_generate": True,
            "output_scores": True,
        }
        output = ensemble.generate(**features, **MODES[mode], **settings, max_new_tokens=8)
        expected = ensemble.sequence_log_probs(output.sequences, **features).sum(-1)
        torch.testing.assert_close(output.sequences_scores.double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "original"])
    @torch.no_grad()
    def test_caches_do_not_change_captions(self, tiny_config, mode):
        """Without a cache, with the growing one and with the fixed-size one, whose layers have the members' sizes."""
        ensemble = DifnetEnsemble(members_of_all_kinds(tiny_config))
        features = double(random_features(tiny_config))
        captions = []
        for cache in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
            torch.manual_seed(0)
            captions.append(ensemble.generate(**features, **MODES[mode], **cache, max_new_tokens=8))
        assert torch.equal(captions[0], captions[1])
        assert torch.equal(captions[0], captions[2])

    @pytest.mark.parametrize("copies", [1, 2, 3])
    @pytest.mark.parametrize("mode", MODES)
    @torch.no_grad()
    def test_one_model_however_often_is_that_model(self, tiny_config, mode, copies):
        model, features = member(tiny_config, 5).double(), double(random_features(tiny_config, batch_size=3))
        found = []
        for each in (model, DifnetEnsemble([model] * copies)):
            torch.manual_seed(0)
            found.append(
                each.generate(
                    **features, **MODES[mode], max_new_tokens=8, return_dict_in_generate=True, output_scores=True
                )
            )
        assert torch.equal(found[0].sequences, found[1].sequences)
        if mode not in ("greedy", "sampling"):
            torch.testing.assert_close(found[0].sequences_scores, found[1].sequences_scores)

    @torch.no_grad()
    def test_members_alone_caption_as_before(self, tiny_config):
        members = members_of_all_kinds(tiny_config)
        features = double(random_features(tiny_config))
        before = [each.generate(**features, num_beams=3, max_new_tokens=8) for each in members]
        DifnetEnsemble(members).generate(**features, num_beams=3, max_new_tokens=8)
        for each, expected in zip(members, before, strict=True):
            assert torch.equal(each.generate(**features, num_beams=3, max_new_tokens=8), expected)

    @torch.no_grad()
    def test_baselines_alone_need_no_segmentation(self, tiny_config):
        ensemble = DifnetEnsemble([member(tiny_config, seed, use_segmentation=False) for seed in range(2)])
        assert not ensemble.config.use_segmentation
        features = random_features(ensemble.config)
        assert ensemble.generate(**features, num_beams=2, max_new_tokens=4).shape[0] == 2

    @torch.no_grad()
    def test_an_encoded_image_needs_no_features(self, tiny_config):
        ensemble = DifnetEnsemble(members_of_all_kinds(tiny_config))
        features = double(random_features(tiny_config))
        for search in (MODES["greedy"], MODES["beams"], MODES["original"]):
            encoded = ensemble.generate(encoder_outputs=ensemble.get_encoder()(**features), **search, max_new_tokens=6)
            assert torch.equal(encoded, ensemble.generate(**features, **search, max_new_tokens=6))

    @torch.no_grad()
    def test_continuing_from_a_returned_cache(self, tiny_config):
        ensemble = DifnetEnsemble(members_of_all_kinds(tiny_config))
        features, captions = double(random_features(tiny_config)), random_captions(tiny_config, length=7)
        whole = ensemble(**features, decoder_input_ids=captions)
        first = ensemble(**features, decoder_input_ids=captions[:, :4])
        rest = ensemble(**features, decoder_input_ids=captions[:, 4:], past_key_values=first.past_key_values)
        torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), whole.logits)
        assert len(whole.past_key_values) == sum(member.config.decoder_layers for member in ensemble.members)

    @torch.no_grad()
    def test_the_shortest_position_table_is_the_limit(self, tiny_config):
        ensemble = DifnetEnsemble([member(tiny_config, 0), member(tiny_config, 1, max_position_embeddings=9)])
        features = random_features(tiny_config)
        assert ensemble.generate(**features, eos_token_id=None, max_new_tokens=9).shape == (2, 10)
        with pytest.raises(ValueError, match="position table of this model ends at 9"):
            ensemble.generate(**features, max_new_tokens=10)


class TestModel:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @torch.no_grad()
    def test_half_precision(self, tiny_config, dtype):
        ensemble = DifnetEnsemble([member(tiny_config, seed) for seed in range(2)]).to(dtype)
        assert ensemble.dtype == dtype
        features = {name: tensor.to(dtype) for name, tensor in random_features(tiny_config).items()}
        captions = random_captions(tiny_config)
        found = ensemble(**features, decoder_input_ids=captions).logits.exp()
        assert found.dtype == torch.float32
        expected = sum(
            each(**features, decoder_input_ids=captions).logits.float().softmax(-1) for each in ensemble.members
        )
        torch.testing.assert_close(found, expected / 2)
        for search in MODES.values():
            assert ensemble.generate(**features, **search, max_new_tokens=6).shape[1] <= 7

    def test_moves_take_the_members_along(self, tiny_config):
        ensemble = DifnetEnsemble([member(tiny_config, seed) for seed in range(2)]).to("meta")
        assert {parameter.device.type for parameter in ensemble.parameters()} == {"meta"}
        assert ensemble.device.type == "meta"

    @torch.no_grad()
    def test_attention_is_set_for_all(self, tiny_config):
        ensemble = DifnetEnsemble(members_of_all_kinds(tiny_config))
        features = double(random_features(tiny_config))
        expected = ensemble.generate(**features, **MODES["original"], max_new_tokens=6)
        ensemble.set_attn_implementation("eager")
        assert {each.config._attn_implementation for each in ensemble.members} == {"eager"}
        assert torch.equal(ensemble.generate(**features, **MODES["original"], max_new_tokens=6), expected)

    def test_training_mode_is_that_of_the_members(self, tiny_config):
        ensemble = DifnetEnsemble([member(tiny_config, 0)])
        assert not ensemble.training
        assert ensemble.train().members[0].training

    def test_weights_are_not_those_of_the_ensemble_to_save(self, tiny_config, tmp_path):
        with pytest.raises(ValueError, match="call `save_pretrained` on each of its `members`"):
            DifnetEnsemble([member(tiny_config, 0)]).save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
    def test_what_it_does_not_have_is_refused(self, tiny_config, name):
        ensemble, features = DifnetEnsemble([member(tiny_config, 0)]), random_features(tiny_config)
        with pytest.raises(ValueError, match=f"has no {name.removeprefix('output_')}"):
            ensemble(**features, decoder_input_ids=random_captions(tiny_config), **{name: True})


class TestMembersThatDoNotFit:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vocab_size": 51}, "`vocab_size` is 50 in member 0 and 51 in member 1"),
            ({"eos_token_id": 4}, "`eos_token_id` is 3 in member 0 and 4 in member 1"),
            ({"unk_token_id": None}, "`unk_token_id` is 0 in member 0 and None in member 1"),
            ({"grid_feature_size": 20}, "`grid_feature_size` is 24 in member 0 and 20 in member 1"),
            ({"num_segmentation_classes": 9}, "`num_segmentation_classes` is 7 in member 0 and 9 in member 1"),
        ],
    )
    def test_configurations(self, tiny_config, changes, message):
        with pytest.raises(ValueError, match=message):
            DifnetEnsemble([member(tiny_config, 0), member(tiny_config, 1, **changes)])

    def test_a_baselines_number_of_classes_does_not_matter(self, tiny_config):
        baseline = member(tiny_config, 1, use_segmentation=False, num_segmentation_classes=133)
        assert DifnetEnsemble([baseline, member(tiny_config, 0)]).config.num_segmentation_classes == 7

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda model: model.double(), r"`dtype` is torch.float32 in member 0 and torch.float64 in member 1"),
            (lambda model: model.to("meta"), r"`device` is cpu in member 0 and meta in member 1"),
            (lambda model: model.set_attn_implementation("eager") or model, "`attn_implementation` is sdpa .* eager"),
            (lambda model: model.model, "Member 1 is a DifnetModel"),
        ],
    )
    def test_models(self, tiny_config, change, message):
        with pytest.raises(ValueError, match=message):
            DifnetEnsemble([member(tiny_config, 0), change(member(tiny_config, 1))])

    def test_none_at_all(self):
        with pytest.raises(ValueError, match="at least one member"):
            DifnetEnsemble([])


class TestFolders:
    @pytest.fixture
    def folders(self, tiny_config, tmp_path) -> list[Path]:
        folders = []
        for seed, changes in enumerate(({}, {"d_model": 20}, {"use_segmentation": False})):
            folder = tmp_path / f"seed{seed}"
            member(tiny_config, seed, **changes).save_pretrained(folder)
            words = ["<unk>", "<pad>", "<bos>", "<eos>", *(f"word{number}" for number in range(46))]
            DifnetTokenizer(vocab=words).save_pretrained(folder)
            folders.append(folder)
        return folders

    @torch.no_grad()
    def test_an_ensemble_of_folders(self, folders, tiny_config):
        ensemble = DifnetEnsemble.from_pretrained(folders, dtype=torch.float64)
        assert not ensemble.training
        assert ensemble.dtype == torch.float64
        models = [DifnetForConditionalGeneration.from_pretrained(folder).double() for folder in folders]
        features = double(random_features(tiny_config))
        expected = DifnetEnsemble(models).generate(**features, num_beams=3, max_new_tokens=6)
        assert torch.equal(ensemble.generate(**features, num_beams=3, max_new_tokens=6), expected)

    def test_settings_are_those_of_the_first(self, folders):
        model = DifnetForConditionalGeneration.from_pretrained(folders[1])
        model.generation_config.update(num_beams=3, max_new_tokens=7)
        model.save_pretrained(folders[1])
        ensemble = DifnetEnsemble.from_pretrained([folders[1], folders[0]])
        assert (ensemble.generation_config.num_beams, ensemble.generation_config.max_new_tokens) == (3, 7)

    def test_another_word(self, folders):
        vocabulary = json.loads((folders[2] / "vocab.json").read_text())
        vocabulary[9] = "dog"
        (folders[2] / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(vocabulary)}))
        with pytest.raises(ValueError, match=r"seed0 and .*seed2 .*: the id 9 is 'word5' in the one and 'dog' in the"):
            DifnetEnsemble.from_pretrained(folders)

    def test_a_longer_vocabulary(self, folders):
        vocabulary = json.loads((folders[1] / "vocab.json").read_text())
        (folders[1] / "vocab.json").write_text(json.dumps([*vocabulary, "dog"]))
        with pytest.raises(ValueError, match="50 and 51 tokens; the id 50, 'dog', is in one of them alone"):
            DifnetEnsemble.from_pretrained(folders)

    def test_a_folder_without_vocabulary_is_not_compared(self, folders):
        (folders[1] / "vocab.json").unlink()
        assert len(DifnetEnsemble.from_pretrained(folders).members) == 3

    @pytest.mark.parametrize("names", ["seed0", Path("seed0"), []])
    def test_a_list_is_asked_for(self, names):
        with pytest.raises(ValueError, match="takes a list of one or more folders"):
            DifnetEnsemble.from_pretrained(names)
