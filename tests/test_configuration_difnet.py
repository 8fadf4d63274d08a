"""DifnetConfig: defaults of the published checkpoint, a faithful round trip, and refusal of what makes no network."""

import dataclasses
import json
from pathlib import Path

import pytest

from modeling_difnet import DifnetConfig


def test_defaults_are_the_published_checkpoint() -> None:
    config = DifnetConfig()
    assert (config.vocab_size, config.grid_feature_size, config.num_segmentation_classes) == (10201, 2048, 133)
    assert (config.d_model, config.encoder_layers, config.decoder_layers, config.head_dim) == (512, 3, 3, 64)
    assert (config.use_segmentation, config.fusion_layers, config.fusion_iterations) == (True, 1, 2)
    assert (config.unk_token_id, config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2, 3)
    assert config.decoder_start_token_id == config.bos_token_id
    assert config.is_encoder_decoder


def test_names_of_transformers_read_and_write_ours(tiny_config: DifnetConfig) -> None:
    assert tiny_config.hidden_size == tiny_config.d_model
    assert tiny_config.num_attention_heads == tiny_config.encoder_attention_heads
    assert tiny_config.num_hidden_layers == tiny_config.encoder_layers
    tiny_config.hidden_size = 64
    assert tiny_config.d_model == 64
    assert DifnetConfig(hidden_size=64).d_model == 64


@pytest.mark.parametrize("use_segmentation", [True, False])
def test_save_and_load_keep_every_value(tiny_config: DifnetConfig, tmp_path: Path, use_segmentation: bool) -> None:
    config = dataclasses.replace(tiny_config, use_segmentation=use_segmentation, dropout=0.25, eos_token_id=[3, 4])
    config.save_pretrained(tmp_path)
    loaded = DifnetConfig.from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "transformers_version": None} == {**config.to_dict(), "transformers_version": None}
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "difnet"
    assert written["auto_map"]["AutoConfig"] == "configuration_difnet.DifnetConfig"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion_layers": 3}, r"`fusion_layers` \(3\) must be at least 1 and smaller than `encoder_layers` \(3\)"),
        ({"fusion_layers": 0}, "`fusion_layers`"),
        ({"fusion_iterations": 0}, "`fusion_iterations` must be at least 1"),
        ({"decoder_layers": 0}, "`decoder_layers` must be at least 1"),
        ({"vocab_size": -1}, "`vocab_size` must be at least 1"),
        ({"head_dim": 0}, "`head_dim` must be at least 1"),
        ({"max_position_embeddings": 0}, "`max_position_embeddings` must be at least 1"),
        ({"d_model": 33}, "`d_model` must be even"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\)"),
        ({"attention_dropout": -0.1}, "`attention_dropout`"),
        ({"pad_token_id": 50}, "`pad_token_id` is 50, but the vocabulary has the ids 0 to 49"),
        ({"eos_token_id": [3, 99]}, "`eos_token_id` is 99"),
        ({"bos_token_id": -1}, "`bos_token_id` is -1"),
    ],
)
def test_sizes_of_no_network_are_a_value_error(tiny_config: DifnetConfig, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny_config, **changes)


def test_the_baseline_has_no_fusion_to_get_wrong(tiny_config: DifnetConfig) -> None:
    assert dataclasses.replace(tiny_config, use_segmentation=False, encoder_layers=1).encoder_layers == 1


def test_a_mistake_made_later_is_found_when_saving(tiny_config: DifnetConfig, tmp_path: Path) -> None:
    tiny_config.fusion_layers = 7
    with pytest.raises(Exception, match=r"`fusion_layers` \(7\)"):
        tiny_config.save_pretrained(tmp_path)


def test_a_wrong_type_is_refused() -> None:
    with pytest.raises(Exception, match="'d_model' expected int"):
        DifnetConfig(d_model="512")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_layers": 10**8}, "`encoder_layers` must be at least 1 and at most 1,000, got 100000000"),
        ({"d_model": 10**5000}, "`d_model` must be .* got a number of 16610 bits"),
        ({"fusion_iterations": 10**9}, "`fusion_iterations` must be .* at most 1000"),
        ({"layer_norm_eps": float("nan")}, r"`layer_norm_eps` must be in \(0, 1\), got nan"),
        ({"dropout": float("nan")}, "`dropout` must be"),
        ({"d_model": None}, "'d_model' expected int, got NoneType"),
        ({"use_segmentation": "false"}, "'use_segmentation' expected bool, got str"),
        ({"decoder_layers": True}, "'decoder_layers' expected int, got bool"),
        ({"vocab_size": ["word"] * 10_000}, "'vocab_size' expected int, got list"),
        ({"eos_token_id": "3"}, "eos_token_id"),
    ],
)
def test_absurd_values_are_one_value_error(tiny_config: DifnetConfig, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(tiny_config, **changes)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
