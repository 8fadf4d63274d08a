"""8-bit captioners in PyTorch, by torchao through Transformers: made, captioning, saved and loaded again."""

import re
from pathlib import Path

import pytest
import torch
from conftest import random_features, random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, TorchAoConfig

from difnet_transformers.checkpoints import load_captioner
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration, original_beam_search
from modeling_difnet.decoding_step_difnet import ForwardStep, decoding_step
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

quantization = pytest.importorskip("torchao.quantization")

KINDS = {
    "weights": quantization.Int8WeightOnlyConfig,
    "weights and activations": quantization.Int8DynamicActivationInt8WeightConfig,
}
LEFT_OUT = "decoder.layers.1.self_attn.q_proj"
SEARCH = {"custom_generate": original_beam_search, "num_beams": 3, "max_new_tokens": 8}


@pytest.fixture
def checkpoint(tiny_config: DifnetConfig, tmp_path: Path) -> Path:
    """A captioner with its processor."""
    words = ["<unk>", "<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(tiny_config.vocab_size - 4))]
    extractor = DifnetFeatureExtractor(12, tiny_config.grid_feature_size, tiny_config.num_segmentation_classes)
    DifnetProcessor(extractor, DifnetTokenizer(vocab=words)).save_pretrained(tmp_path / "checkpoint")
    model = random_model(tiny_config)
    model.lm_head.weight.data *= 5  # captions differ, and end
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def quantised(checkpoint: Path, kind: str) -> DifnetForConditionalGeneration:
    config = TorchAoConfig(KINDS[kind]())
    return AutoModelForImageTextToText.from_pretrained(checkpoint, quantization_config=config).eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_all_projections_but_that_to_words(checkpoint: Path, kind: str) -> None:
    model, plain = quantised(checkpoint, kind), DifnetForConditionalGeneration.from_pretrained(checkpoint).eval()
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    in_8_bits = {name for name in names if type(model.get_submodule(name).weight.data) is not torch.Tensor}
    assert names - in_8_bits == {"lm_head"}
    features = random_features(model.config)
    tokens = torch.tensor([[2, 7, 8], [2, 9, 10]])
    found, expected = (each(**features, decoder_input_ids=tokens).logits.log_softmax(-1) for each in (model, plain))
    assert 0 < (found - expected).abs().max() < 0.3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_both_searches_caption_by_the_forward_of_the_model(checkpoint: Path, kind: str) -> None:
    """The fast decoding step packs plain weights, and leaves these alone; a static cache does not change that."""
    model = quantised(checkpoint, kind)
    features = random_features(model.config, 3)
    states = model.get_encoder()(**features).last_hidden_state
    assert isinstance(decoding_step(model, states, None, 9), ForwardStep)
    captions = model.generate(**features, **SEARCH)
    assert torch.equal(captions, model.generate(**features, **SEARCH, cache_implementation="static"))
    settings = {"num_beams": 3, "length_penalty": 0.0, "early_stopping": "never", "max_new_tokens": 8}
    assert model.generate(**features, **settings).shape[0] == 3
    log_probs = model.sequence_log_probs(captions, **features)
    scores = model.generate(**features, **SEARCH, return_dict_in_generate=True).sequences_scores
    torch.testing.assert_close(log_probs.sum(-1), scores, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_saved_and_loaded_again(checkpoint: Path, kind: str, tmp_path: Path) -> None:
    """By Transformers and by the commands, which take a folder with its processor."""
    model = quantised(checkpoint, kind)
    features = random_features(model.config, 3)
    captions = model.generate(**features, **SEARCH)
    model.save_pretrained(tmp_path / "int8")
    DifnetProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "int8")
    weights = load_file(tmp_path / "int8" / "model.safetensors")
    assert sum(weight.dtype == torch.int8 for weight in weights.values()) > 20
    again = DifnetForConditionalGeneration.from_pretrained(tmp_path / "int8").eval()
    assert torch.equal(again.generate(**features, **SEARCH), captions)
    assert torch.equal(load_captioner(tmp_path / "int8")[0].generate(**features, **SEARCH), captions)


def test_a_quantised_checkpoint_that_lacks_weights_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    quantised(checkpoint, "weights").save_pretrained(tmp_path / "int8")
    path = tmp_path / "int8" / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys() if LEFT_OUT not in name}  # noqa: SIM118
    save_file(weights, path, metadata)
    with pytest.raises(ValueError, match=f"int8.*{re.escape(LEFT_OUT)}"):
        load_captioner(tmp_path / "int8")
