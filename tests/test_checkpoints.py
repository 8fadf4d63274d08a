"""Loading a captioner: whatever is wrong with a checkpoint is one ValueError that names the file and the remedy."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from difnet_transformers.checkpoints import check_device, load_captioner, load_model
from modeling_difnet import DifnetConfig, DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint of a tiny model."""
    folder = tmp_path_factory.mktemp("whole")
    config = DifnetConfig(
        vocab_size=20,
        grid_feature_size=6,
        num_segmentation_classes=5,
        d_model=8,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        head_dim=4,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_position_embeddings=10,
    )
    random_model(config).save_pretrained(folder)
    words = ["<unk>", "<pad>", "<bos>", "<eos>", *(f"word{index}" for index in range(16))]
    DifnetProcessor(DifnetFeatureExtractor(2, 6, 5), DifnetTokenizer(vocab=words)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "difnet"))


def change_json(folder: Path, name: str, **changes: object) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_threads_load_one_after_another(folder: Path) -> None:
    """Transformers' own classes are not left as they are only while a model loads."""
    tie_weights, dtype, interval = PreTrainedModel.tie_weights, torch.get_default_dtype(), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            models = [model for model, _ in pool.map(load_captioner, [folder] * 8)]
    finally:
        sys.setswitchinterval(interval)
        is_restored = PreTrainedModel.tie_weights is tie_weights
        PreTrainedModel.tie_weights = tie_weights
    assert is_restored
    assert torch.get_default_dtype() == dtype
    assert all(equal_weights(model, models[0]) for model in models)


def equal_weights(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    expected = other.state_dict()
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_a_whole_checkpoint_loads(folder: Path) -> None:
    model, processor = load_captioner(folder)
    assert not model.training
    assert all(
        torch.equal(model.state_dict()[key], value) for key, value in load_file(folder / "model.safetensors").items()
    )
    assert len(processor.tokenizer) == model.config.vocab_size
    assert load_model(folder, torch.bfloat16).dtype == torch.bfloat16


def test_a_sharded_checkpoint_loads_and_a_missing_shard_is_named(folder: Path) -> None:
    model = load_model(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="2KB")
    assert all(map(torch.equal, load_model(folder).state_dict().values(), model.state_dict().values()))
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name}: no such file"):
        load_model(folder)


def test_tied_embeddings_need_no_second_copy(folder: Path) -> None:
    change_json(folder, "config.json", tie_word_embeddings=True)
    change_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    model = load_model(folder)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight


def test_settings_with_a_byte_order_mark(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert load_model(folder).config.vocab_size == 20


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("difnet", r"^difnet: no such folder\. A local checkpoint is .* \./difnet"),
        ("./difnet", r"^\./difnet: no such folder"),
        ("runs/a/best", r"^runs/a/best: no such folder"),
        ("a\0b", r"^a\\x00b: no such folder"),
        ("a" * 5000, r"^a+ .. a+: not a folder name"),
        ("", r"no config\.json"),
    ],
)
def test_a_folder_that_is_not_there(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_captioner(name)


def test_a_name_of_the_hub_that_was_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"^runs/best: no such folder, and the Hub .* local checkpoint needs \./ .*\./runs/best$"
    ):
        load_captioner("runs/best")


SETTINGS = {
    "not_json": ("config.json", "{", r"config\.json: malformed JSON"),
    "list": ("config.json", "[]", r"config\.json: a JSON object is expected"),
    "brackets": ("config.json", "[" * 2**20, r"config\.json: malformed JSON \(nested too deeply\)"),
    "tokenizer_not_json": ("tokenizer_config.json", "{", r"tokenizer_config\.json: malformed JSON"),
    "processor_null": ("processor_config.json", "null", r"processor_config\.json: a JSON object is expected"),
    "generation_not_json": ("generation_config.json", "nonsense", r"generation_config\.json: malformed JSON"),
    "tokenizer_types": ("tokenizer_config.json", '{"unk_token": 5}', r"tokenizer_config\.json: the processor cannot"),
    "vocabulary_short": (
        "vocab.json",
        '["<unk>", "<pad>", "<bos>", "<eos>"]',
        r"vocab\.json has 4 tokens and the mod",
    ),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_that_are_damaged(kind: str, folder: Path) -> None:
    name, content, message = SETTINGS[kind]
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_captioner(folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_layers": 10**8}, r"config\.json: DifnetConfig: `encoder_layers` must be .* at most 1,000"),
        ({"encoder_layers": 900}, r"asks for 900 encoder and 1 decoder layers, and there are \d+ weights"),
        ({"d_model": 2048}, r"\d+ weights are missing or have other shapes .* \(`lm_head.weight`"),
        ({"vocab_size": "20"}, r"config\.json: DifnetConfig: Field 'vocab_size' expected int, got str"),
        ({"vocab_size": [0] * 1000}, r"config\.json: DifnetConfig: Field 'vocab_size' expected int, got list"),
        ({"d_model": None}, r"'d_model' expected int"),
        ({"use_segmentation": False}, r"\d+ weights are (missing|unknown)"),
        ({"model_type": "blip"}, r"config\.json: `model_type` is blip"),
        ({"id2label": 3}, r"config\.json: "),
        ({"dtype": "float99"}, r"difnet"),
        ({"attn_implementation": "somebody/kernel"}, r"`attn_implementation` is somebody/kernel; remove it"),
        ({"attn_implementation": 5}, r"`attn_implementation` is 5; remove it"),
    ],
)
def test_configurations_that_fit_no_weights(changes: dict, message: str, folder: Path) -> None:
    change_json(folder, "config.json", **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_captioner(folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


def test_sizes_of_the_processor_are_compared(folder: Path) -> None:
    extractor = json.loads((folder / "processor_config.json").read_text())["feature_extractor"]
    change_json(folder, "processor_config.json", feature_extractor={**extractor, "grid_feature_size": 7})
    with pytest.raises(ValueError, match=r"`grid_feature_size` is 7 in processor_config.json and 6 in config.json"):
        load_captioner(folder)


KEY = "model.encoder.grid_embedding.projection.bias"
WEIGHTS = {
    "nan": (lambda w: w[KEY].fill_(float("nan")), rf"NaN or infinity among the weights: {KEY} \(8 of 8"),
    "inf": (lambda w: w[KEY][3:4].fill_(float("inf")), rf"NaN or infinity among the weights: {KEY} \(1 of 8"),
    "missing": (lambda w: w.pop(KEY), rf"1 weights are missing or have other shapes .*\(`{KEY}`\)"),
    "shape": (lambda w: w.update({KEY: torch.zeros(9)}), rf"1 weights are missing or have other shapes .*\(`{KEY}`\)"),
    "integers": (lambda w: w.update({KEY: torch.zeros(8, dtype=torch.int64)}), rf"`{KEY}` is of type I64"),
    "unknown": (lambda w: w.update({"more": torch.zeros(1)}), r"1 weights are unknown .*\(`more`\)"),
    "empty": (lambda w: w.clear(), r"no complete captioner: .* there are 0 weights"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_not_a_captioner(kind: str, folder: Path) -> None:
    change, message = WEIGHTS[kind]
    change_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        load_captioner(folder)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_by_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [truncate, replace_by_a_pipe, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.json", "tokenizer_config.json"])
def test_files_that_are_missing_cut_or_no_files(name: str, damage: Callable, folder: Path) -> None:
    damage(folder / name)
    if name == "tokenizer_config.json" and damage is Path.unlink:
        load_captioner(folder)  # all its values have defaults
        return
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_captioner(folder)


def test_a_shard_outside_the_folder_is_not_read(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "model.safetensors")
    index = {"weight_map": {KEY: "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="leads out of"):
        load_captioner(folder)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("length_penalty", "1"), ("do_sample", 1.5), ("top_k", [5]), ("num_beams", "5"), ("temperature", float("inf"))],
)
def test_generation_settings_of_wrong_types_are_named(folder, setting, value):
    (folder / "generation_config.json").write_text(json.dumps({setting: value}))
    with pytest.raises(ValueError, match=rf"(generation_config\.json|cannot be loaded).*{setting}"):
        load_captioner(folder)


def test_generation_settings_without_special_tokens_take_those_of_the_model(folder):
    (folder / "generation_config.json").write_text('{"num_beams": 2, "max_length": 9}')
    model, _ = load_captioner(folder)
    assert model.generation_config.decoder_start_token_id == model.config.decoder_start_token_id
    assert model.generation_config.eos_token_id == model.config.eos_token_id


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_by_name(device):
    check_device(None)
    check_device("cpu")
    with pytest.raises(ValueError, match=f"--device {device}: no such device for this PyTorch; it has cpu"):
        check_device(device)
