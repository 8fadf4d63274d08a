"""Conversion of original checkpoints and vocabularies: exact, complete, closed to anything but tensors and words."""

import argparse
import datetime
import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, GoldenCase, golden_case, random_model
from safetensors.torch import load_file

import convert_checkpoint
from convert_checkpoint import (
    MODES,
    convert,
    convert_back,
    convert_state_dict,
    load_original_checkpoint,
    main,
    read_vocabulary,
    to_original_state_dict,
)
from difnet_transformers import conversion
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration, DifnetProcessor, original_beam_search

ROOT = Path(__file__).resolve().parent.parent
SMALL = [f"{mode}_small" for mode in MODES]


def training_checkpoint(state_dict: dict[str, torch.Tensor]) -> dict:
    """What the original's `train.py` saves."""
    return {
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
        "numpy_rng_state": np.random.RandomState(0).get_state(),
        "random_rng_state": random.Random(0).getstate(),
        "epoch": 3,
        "val_loss": 1.5,
        "val_cider": np.float64(1.3),
        "state_dict": state_dict,
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0, 1]}]},
        "scheduler": {"last_epoch": 3},
        "patience": 0,
        "best_cider": np.float64(1.3),
        "use_rl": False,
    }


def save_as_in_2022(checkpoint: dict, path: Path) -> None:
    """Saves as an old PyTorch and an old numpy on a GPU machine did: `cuda:0` tags, names under `numpy.core`."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            target.writestr(entry, content)


def pickle_vocabulary(tokens: list[str], path: Path) -> None:
    """Pickles the original's `data.vocab.Vocab`, whose module exists for this moment only."""
    module = types.ModuleType("data.vocab")
    module.Vocab = type("Vocab", (), {"__module__": "data.vocab"})
    module._default_unk_index = lambda: 0
    module._default_unk_index.__module__ = "data.vocab"
    module._default_unk_index.__qualname__ = "_default_unk_index"
    vocabulary = module.Vocab()
    vocabulary.freqs = Counter(dict.fromkeys(tokens, 5))
    vocabulary.itos = tokens
    vocabulary.stoi = defaultdict(module._default_unk_index, {token: index for index, token in enumerate(tokens)})
    vocabulary.vectors = None
    modules = {"data": types.ModuleType("data"), "data.vocab": module}
    sys.modules.update(modules)
    try:
        path.write_bytes(pickle.dumps(vocabulary, protocol=2))
    finally:
        for name in modules:
            del sys.modules[name]


def words(count: int) -> list[str]:
    return ["<unk>", "<pad>", "<bos>", "<eos>", *(f"word{index}" for index in range(count - 4))]


class RunsCode:
    """Pickles to a call of `os.mkdir`: a file that would run code when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "DIFNet_lrp.pth"
    save_as_in_2022(training_checkpoint(golden_case("difnet_lrp_small").state_dict), path)
    return path


def arguments(case: GoldenCase) -> dict:
    sizes = case.meta["config"]
    return {"num_heads": sizes["h"], "fusion_layers": sizes.get("Lf", 1), "fusion_iterations": sizes.get("T", 2)}


# ---------------------------------------------------------------------------------------------------------------------
# State dicts
# ---------------------------------------------------------------------------------------------------------------------


def test_every_key_is_mapped_or_dropped_for_a_reason(golden: GoldenCase) -> None:
    conversion = convert_state_dict(golden.state_dict, **arguments(golden))
    assert set(conversion.mapped) | set(conversion.dropped) == set(golden.state_dict)
    assert not set(conversion.mapped) & set(conversion.dropped)
    for original_key, key in conversion.mapped.items():
        assert torch.equal(conversion.state_dict[key], golden.state_dict[original_key])
    unused = {key for key in conversion.dropped if "running_" not in key}
    assert unused == set(golden.meta["unused_parameters"])
    assert all(conversion.dropped.values())


def test_sizes_are_read_from_keys_and_shapes(golden: GoldenCase) -> None:
    sizes, config = golden.meta["config"], convert_state_dict(golden.state_dict, **arguments(golden)).config
    assert config.use_segmentation == golden.meta["mode"].startswith("difnet")
    assert (config.vocab_size, config.d_model, config.head_dim) == (
        sizes["vocab_size"],
        sizes["d_model"],
        sizes["d_k"],
    )
    assert (config.encoder_layers, config.decoder_layers) == (sizes["n_enc"], sizes["n_dec"])
    assert (config.encoder_ffn_dim, config.max_position_embeddings) == (sizes["d_ff"], sizes["max_len"])


@pytest.mark.parametrize("name", SMALL)
def test_there_and_back_is_the_same_on_every_used_key(name: str) -> None:
    case = golden_case(name)
    conversion = convert_state_dict(case.state_dict, **arguments(case))
    back = to_original_state_dict(conversion.model(), case.meta["mode"])
    assert set(back) == set(case.state_dict)
    for key, value in case.state_dict.items():
        assert (back[key].shape, back[key].dtype) == (value.shape, value.dtype), key
        if key not in conversion.dropped:
            assert torch.equal(back[key], value), key


def test_back_without_a_mode_has_the_keys_of_the_published_checkpoint() -> None:
    model = golden_case("difnet_small").model()
    assert set(to_original_state_dict(model)) == set(golden_case("difnet_lrp_small").state_dict)
    with pytest.raises(ValueError, match="Mode `base` does not fit"):
        to_original_state_dict(model, "base")


@pytest.mark.parametrize("fusion_layers", [1, 2])
def test_a_model_of_any_size_goes_there_and_back(tiny_config: DifnetConfig, fusion_layers: int) -> None:
    tiny_config.decoder_attention_heads = tiny_config.encoder_attention_heads
    tiny_config.fusion_layers = fusion_layers
    model = DifnetForConditionalGeneration(tiny_config)
    for mode in ("difnet", "difnet_lrp"):
        original = to_original_state_dict(model, mode)
        conversion = convert_state_dict(
            original, num_heads=tiny_config.encoder_attention_heads, fusion_layers=fusion_layers
        )
        assert conversion.config.to_dict() | {"dtype": None} == tiny_config.to_dict() | {"dtype": None}
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in conversion.state_dict.items())


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_makes_a_complete_folder(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pickle_vocabulary(words(60), tmp_path / "vocab.pkl")
    output = tmp_path / "out" / "difnet"
    options = ["--checkpoint", str(checkpoint), "--vocab", str(tmp_path / "vocab.pkl"), "--output", str(output)]
    assert main([*options, "--num-heads", "4"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"encoder\.layers\.0\.lnorm1\.weight +512 +model\.encoder\.flow_layers\.0\.layer_norm", table)
    assert re.search(r"decoder\.running_seq +1 +dropped, decoding state", table)
    assert "159 keys mapped, 16 dropped" in table

    names = {path.name for path in output.iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "vocab.json", "processor_config.json"}
    expected |= {"tokenizer_config.json", "modeling_difnet.py", "configuration_difnet.py", "generation_difnet.py"}
    assert names >= expected | {"processing_difnet.py", "README.md"}
    assert not [name for name in names if name.endswith((".bin", ".pkl", ".pth"))]
    assert [path.name for path in output.parent.iterdir()] == ["difnet"], "no temporary files remain"

    case = golden_case("difnet_lrp_small")
    model = DifnetForConditionalGeneration.from_pretrained(output)
    processor = DifnetProcessor.from_pretrained(output)
    inputs = processor(**case.features(), return_tensors="pt")
    sequences = model.generate(**inputs, custom_generate=original_beam_search)
    tokens = case.outputs["beam5_out1_tokens"]
    ends = (tokens == 3).cumsum(-1) - (tokens == 3).long() > 0
    assert torch.equal(sequences[:, 1:], tokens.masked_fill(ends, 1)[:, : sequences.shape[1] - 1])
    assert model.generation_config.num_beams == 5
    assert processor.tokenizer.decode_captions(sequences)[0].split()[0] == f"word{tokens[0, 0] - 4}"

    back = tmp_path / "back.pth"
    assert main(["--to-original", "--checkpoint", str(output), "--output", str(back)]) == 0
    dropped = convert_state_dict(case.state_dict, **arguments(case)).dropped
    returned = load_original_checkpoint(back)
    assert set(returned) == set(case.state_dict)
    assert all(torch.equal(returned[key], case.state_dict[key]) for key in returned if key not in dropped)


def test_a_bare_state_dict_and_no_vocabulary(tmp_path: Path) -> None:
    case = golden_case("base_small")
    torch.save(case.state_dict, tmp_path / "bare.pth")
    conversion = convert(tmp_path / "bare.pth", tmp_path / "base", num_heads=4)
    assert not conversion.config.use_segmentation
    assert not (tmp_path / "base" / "vocab.json").exists()
    weights = load_file(tmp_path / "base" / "model.safetensors")
    assert all(torch.equal(weights[key], value) for key, value in conversion.state_dict.items())


def test_the_recipe_in_the_folder_repeats_the_conversion(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "difnet"
    assert main(["--checkpoint", str(checkpoint), "--output", str(output), "--num-heads", "4"]) == 0
    again = ["--recipe", str(output / "recipe.yaml"), "--output", str(tmp_path / "again")]
    assert main(again) == 0
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (output / name).read_bytes(), name


def test_messages_have_the_name_of_the_program(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--checkpoint", "absent.pth", "--output", str(tmp_path / "out")]
    assert main(arguments, prog="difnet convert") == 2
    assert capsys.readouterr().err == "difnet convert: error: absent.pth: no such file.\n"
    assert main(["grid-backbone", *arguments[1:]], prog="difnet convert") == 2
    assert capsys.readouterr().err == "difnet convert: error: absent.pth: no such file.\n"


def test_nothing_is_replaced_unasked(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "difnet"
    output.mkdir()
    (output / "thesis.txt").write_text("three years")
    with pytest.raises(ValueError, match="exists: nothing is replaced without `--overwrite`"):
        convert(checkpoint, output, num_heads=4)
    assert (output / "thesis.txt").read_text() == "three years"
    convert(checkpoint, output, num_heads=4, overwrite=True)
    assert (output / "model.safetensors").exists()


def test_an_input_inside_the_output_is_not_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "difnet"
    output.mkdir()
    source = Path(shutil.copy(checkpoint, output / "DIFNet.pth"))
    with pytest.raises(ValueError, match=r"DIFNet\.pth lies in .*difnet, which `--overwrite` would replace"):
        convert(source, output, num_heads=4, overwrite=True)
    assert source.exists()


def test_help_teaches(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--checkpoint DIFNet_lrp.pth --vocab vocab.pkl --output ./difnet" in text


# ---------------------------------------------------------------------------------------------------------------------
# Broken and hostile input
# ---------------------------------------------------------------------------------------------------------------------


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    case = golden_case("difnet_lrp_small")
    torch.save(training_checkpoint(case.state_dict) | {"epoch": RunsCode(trap)}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(RunsCode(trap)))
    torch.save(
        {"state_dict": case.state_dict, "x": RunsCode(trap)},
        tmp_path / "old.pth",
        _use_new_zipfile_serialization=False,
    )
    for name in ("zip.pth", "plain.pth", "old.pth"):
        with pytest.raises(ValueError, match=f"{name} was refused"):
            load_original_checkpoint(tmp_path / name)

    (tmp_path / "vocab.pkl").write_bytes(pickle.dumps(RunsCode(trap)))
    with pytest.raises(ValueError, match=r"vocab.pkl was refused: .* `posix.mkdir`"):
        read_vocabulary(tmp_path / "vocab.pkl")
    assert not trap.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
        b"\x80\x04\x8c\x0bcollections\x8c\x10Counter.__init__\x93.",
        b"\x80\x02cdata.vocab\nVocab.__init__\n.",
        b"\x80\x02X\x01\x00\x00\x00aQ.",
    ],
)
def test_the_vocabulary_reader_knows_four_names(tmp_path: Path, code: bytes) -> None:
    (tmp_path / "vocab.pkl").write_bytes(code)
    with pytest.raises(ValueError, match=r"vocab.pkl was refused"):
        read_vocabulary(tmp_path / "vocab.pkl")


def test_a_vocabulary_cannot_change_the_interpreter(tmp_path: Path) -> None:
    """A `BUILD` on one of the four names sets attributes of a stand-in, never of `collections.Counter`."""
    code = b"\x80\x02ccollections\nCounter\nN}X\x06\x00\x00\x00hackedX\x03\x00\x00\x00yess\x86b."
    (tmp_path / "vocab.pkl").write_bytes(code)
    with pytest.raises(ValueError, match=r"holds no list of tokens"):
        read_vocabulary(tmp_path / "vocab.pkl")
    assert not hasattr(Counter, "hacked")


def test_the_published_order_of_words_is_kept(tmp_path: Path) -> None:
    tokens = json.loads((GOLDEN.parent / "text" / "vocab_itos.json").read_text(encoding="utf-8"))
    pickle_vocabulary(tokens, tmp_path / "vocab.pkl")
    assert read_vocabulary(tmp_path / "vocab.pkl") == tokens
    (tmp_path / "vocab.json").write_text(json.dumps(tokens))
    assert read_vocabulary(tmp_path / "vocab.json") == tokens


@pytest.mark.parametrize("form", ["list", "ids", "itos"])
def test_the_forms_of_a_vocabulary_in_json(form: str, tmp_path: Path) -> None:
    tokens = words(20)
    content = {
        "list": tokens,
        "ids": {token: index for index, token in enumerate(tokens)},
        "itos": {"itos": tokens, "freqs": dict.fromkeys(tokens, 5)},  # GRIT's
    }[form]
    (tmp_path / "vocab.json").write_text(json.dumps(content), encoding="utf-8-sig")
    assert read_vocabulary(tmp_path / "vocab.json") == tokens


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("5", "a vocabulary is a list of tokens in the order of their ids"),
        ("[" * 100_000, "malformed JSON"),
        ('{"a": [0]}', "vocab.json"),
        (json.dumps({"words": words(5000)}), "vocab.json"),
        (json.dumps([None] * 5000), "vocab.json"),
        ('["<unk>", "<pad>", "<bos>", "<eos>", "a", "a"]', "'a'"),
    ],
)
def test_json_that_is_no_vocabulary_is_one_short_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_vocabulary(tmp_path / "vocab.json")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_a_pickle_cannot_reserve_memory(tmp_path: Path) -> None:
    """`LONG_BINPUT` stores under a number of the file's choice, for which the C reader makes a table of that size."""
    (tmp_path / "vocab.pkl").write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")
    with pytest.raises(ValueError, match="holds no list of tokens"):
        read_vocabulary(tmp_path / "vocab.pkl")


def changed(state_dict: dict[str, torch.Tensor], **changes) -> dict[str, torch.Tensor]:
    return {key: value for key, value in (state_dict | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder.layers.1.lnorm2.bias": None}, r"1 keys are missing \(`decoder.layers.1.lnorm2.bias`\)"),
        ({"decoder.fc.weight": None}, r"1 keys are missing \(`decoder.fc.weight`\)"),
        ({"embed_image.0.weight": None}, r"the key `embed_image.0.weight` is missing"),
        ({"encoder.layers.0.mhatt.attention.m_k": torch.zeros(1, 40, 64)}, r"1 are unknown \(`encoder.layers.0.mhatt"),
        ({"decoder.fc.weight": torch.zeros(60, 500)}, r"`decoder.fc.weight` has the shape \(60, 500\)"),
        ({"decoder.word_emb.weight": torch.zeros(60)}, r"`decoder.word_emb.weight` is missing or has the wrong"),
        (
            {"embed_image.0.bias": torch.full((512,), float("nan"))},
            r"x.pth: NaN or infinity among the weights: embed_image.0.bias \(512 of 512 values\)",
        ),
        ({"embed_image.0.bias": torch.zeros(512, dtype=torch.int64)}, r"`embed_image.0.bias` is of type torch.int64"),
    ],
)
def test_a_state_dict_that_is_not_whole(changes: dict, message: str) -> None:
    state_dict = changed(golden_case("difnet_lrp_small").state_dict, **changes)
    with pytest.raises(ValueError, match=message):
        convert_state_dict(state_dict, num_heads=4, name="x.pth")


def test_another_projects_checkpoint() -> None:
    with pytest.raises(ValueError, match=r"resnet.pth is not a checkpoint of DIFNet or of its baseline"):
        convert_state_dict({"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}, name="resnet.pth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 7}, "64 wide together, which 7 heads cannot share"),
        ({"num_heads": 0}, "which 0 heads cannot share"),
        ({"num_heads": 4, "fusion_layers": 3}, "`fusion_layers` .3. must be at least 1 and smaller than"),
        ({"num_heads": 4, "fusion_iterations": 0}, "`fusion_iterations` must be at least 1"),
        ({"num_heads": 4, "fusion_layers": 2}, "Lf=2.: 4 keys are missing"),
    ],
)
def test_numbers_that_do_not_fit(options: dict, message: str) -> None:
    state_dict = {
        key: value
        for key, value in golden_case("difnet_lrp_small").state_dict.items()
        if not key.startswith(("encoder.layers.1.lnorm1", "encoder.layers.1.pwff.layer_norm1"))
    }
    with pytest.raises(ValueError, match=message):
        convert_state_dict(state_dict, **options)


def test_files_that_cannot_be_read(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole = checkpoint.read_bytes()
    cases = {
        "truncated.pth": (whole[: len(whole) // 2], "truncated.pth cannot be read: the file is truncated"),
        "empty.pth": (b"", "empty.pth cannot be read: the file is truncated"),
        "text.pth": (b"hello, world\n", "text.pth"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert main(["--checkpoint", str(tmp_path / name), "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1, "one line"
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"state_dict": {}}, tmp_path / "nothing.pth")
    for name in ("list.pth", "nothing.pth"):
        with pytest.raises(ValueError, match=f"{name} holds no state dict"):
            load_original_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match=r"absent.pth: no such file"):
        load_original_checkpoint(tmp_path / "absent.pth")
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_whole_captioner(tmp_path: Path, tiny_config: DifnetConfig) -> None:
    """Transformers would fill in random numbers; here nothing is written."""
    model = DifnetForConditionalGeneration(tiny_config)
    model.model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "other_sizes")
    DifnetConfig(**{**tiny_config.to_dict(), "vocab_size": 40}).save_pretrained(tmp_path / "other_sizes")
    model.save_pretrained(tmp_path / "truncated")
    weights = tmp_path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for name, message in {
        "absent": "absent: no such folder",
        "base": r"base is no complete captioner: 1 weights are missing or have .* \(`lm_head.weight`\)",
        "other_sizes": r"other_sizes is no complete captioner: 2 weights .* `model.decoder.embed_tokens.weight`\)",
        "truncated": r"truncated/model\.safetensors: truncated or damaged",
    }.items():
        with pytest.raises(ValueError, match=message):
            convert_back(tmp_path / name, tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


def test_vocabularies_that_do_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "vocab.pkl"
    pickle_vocabulary(words(61), path)
    with pytest.raises(ValueError, match=r"has 61 tokens, but .* embeds 60: they do not belong together"):
        convert(checkpoint, tmp_path / "out", path, num_heads=4)
    pickle_vocabulary(["<start>", *words(60)[1:]], path)
    with pytest.raises(ValueError, match="has no token `<unk>`"):
        convert(checkpoint, tmp_path / "out", path, num_heads=4)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"vocab.pkl cannot be read"):
        convert(checkpoint, tmp_path / "out", path, num_heads=4)
    path.write_bytes(pickle.dumps(["<unk>", "<pad>"]))
    with pytest.raises(ValueError, match="holds no list of tokens"):
        convert(checkpoint, tmp_path / "out", path, num_heads=4)
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_one_line_and_2(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "convert_checkpoint.py", "--checkpoint", "absent.pth", "--output", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert process.stderr == "convert_checkpoint.py: error: absent.pth: no such file.\n"


# ---------------------------------------------------------------------------------------------------------------------
# Files of other writers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> dict[str, torch.Tensor]:
    """The original state dict of a network that converts in milliseconds."""
    config = DifnetConfig(
        vocab_size=20, grid_feature_size=6, num_segmentation_classes=5, d_model=8, encoder_layers=2, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, head_dim=4, encoder_ffn_dim=8, decoder_ffn_dim=8,
        max_position_embeddings=10,
    )  # fmt: skip
    return to_original_state_dict(random_model(config))


def saved(content: object, path: Path, **options: bool) -> Path:
    torch.save(content, path, **options)
    return path


WRAPPED = {
    "module": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "module_of_compiled": lambda key: f"module._orig_mod.{key}",
    "compiled_of_module": lambda key: f"_orig_mod.module.{key}",
    "compiled_encoder": lambda key: key.replace("encoder.layers", "encoder._orig_mod.layers"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_keys_of_wrapped_models(kind: str, tiny: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = saved({"state_dict": {WRAPPED[kind](key): value for key, value in tiny.items()}}, tmp_path / "x.pth")
    assert main(["--checkpoint", str(path), "--output", str(tmp_path / "out"), "--num-heads", "2"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^Left out of keys: `(module|_orig_mod)\.`", table, re.MULTILINE)
    assert all(WRAPPED[kind](key) in table for key in tiny)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], tiny["decoder.fc.weight"])


def test_a_weight_that_is_there_wrapped_and_not(tiny: dict) -> None:
    with pytest.raises(ValueError, match=r"`decoder.fc.weight` and `module.decoder.fc.weight` are the same weight"):
        convert_state_dict({**tiny, "module.decoder.fc.weight": tiny["decoder.fc.weight"]}, num_heads=2)


BESIDE = {
    "numpy_integer": np.int64(3),
    "numpy_bool": np.bool_(True),
    "numpy_float16": np.float16(1.5),
    "numpy_complex": np.complex64(1),
    "numpy_text": np.str_("best"),
    "integer_array": np.arange(5),
    "bool_array": np.zeros(3, bool),
    "big_endian_array": np.ones(3, ">f4"),
    "object_array": np.array(["a", None], dtype=object),
    "date": np.datetime64("2022-01-01"),
    "generator": np.random.default_rng(0),
    "random_state": np.random.RandomState(0),
    "options": argparse.Namespace(lr=1e-4, output=Path("runs")),
    "collections": [{1, 2}, frozenset([3]), Counter("aab"), defaultdict(list, a=[1]), deque([1])],
    "time": datetime.datetime(2022, 1, 1),
    "type": torch.float16,
    "device": torch.device("cpu"),
    "sparse": torch.eye(3).to_sparse(),
    "quantized": torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    "meta": torch.zeros(3, device="meta"),
}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "stream"])
@pytest.mark.parametrize("kind", BESIDE)
def test_harmless_values_beside_the_weights(kind: str, is_zip: bool, tiny: dict, tmp_path: Path) -> None:
    path = saved({"x": BESIDE[kind], "state_dict": tiny}, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
    if kind == "quantized" and not is_zip:
        # The old format does not say how many bytes they take.
        with pytest.raises(ValueError, match="damaged or quantized"):
            load_original_checkpoint(path)
        return
    read = load_original_checkpoint(path)
    assert all(torch.equal(read[key], value) for key, value in tiny.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "stream"])
def test_numbers_of_every_type_are_read_as_they_are(dtype: torch.dtype, is_zip: bool, tmp_path: Path) -> None:
    whole = torch.randint(0, 2, (6, 4)).to(dtype)
    tensors = {
        "whole": whole,
        "part": whole[1:3],
        "transposed": whole.T,
        "scalar": whole[0, 0],
        "empty": torch.empty(0, 3, dtype=dtype),
        "expanded": torch.ones((), dtype=dtype).expand(5),
        "parameter": torch.nn.Parameter(whole.clone(), requires_grad=False),
    }
    read = load_original_checkpoint(saved(tensors, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip))
    for key, value in tensors.items():
        assert read[key].dtype == dtype
        assert torch.equal(read[key], value), key


def test_numpy_arrays_among_the_weights(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.asfortranarray(np.ones((2, 3), ">f8"))}
    read = load_original_checkpoint(saved({"model": arrays}, tmp_path / "x.pth"), "model")
    assert all(np.array_equal(read[key].numpy(), value) for key, value in arrays.items())


def test_an_object_of_the_users_own_is_refused_by_its_name(tiny: dict, tmp_path: Path) -> None:
    path = saved({"state_dict": tiny, "case": golden_case("base_small")}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x.pth was refused: it asks for `conftest.GoldenCase`, .* state_dict alone"):
        load_original_checkpoint(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.eye(8).to_sparse(), "`decoder.fc.weight` is a sparse tensor"),
        (torch.zeros(8, device="meta"), "`decoder.fc.weight` is a meta tensor"),
        (torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8), "`decoder.fc.weight` is a quantized tensor"),
        ("a word", "holds no state dict.*the entry `decoder.fc.weight` is no tensor"),
    ],
)
def test_weights_that_are_no_plain_numbers(value: object, message: str, tiny: dict, tmp_path: Path) -> None:
    path = saved({"state_dict": {**tiny, "decoder.fc.weight": value}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        load_original_checkpoint(path)


def rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive with its parts changed."""
    with zipfile.ZipFile(path) as source:
        parts = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", compression) as target:
        for name, content in parts.items():
            target.writestr(name, change(name, content))
    return path


def test_a_flipped_bit_is_found(tiny: dict, tmp_path: Path) -> None:
    path = saved({"state_dict": tiny}, tmp_path / "x.pth")
    content = bytearray(path.read_bytes())
    place = content.find(tiny["decoder.fc.weight"].numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.pth cannot be read: the checksum of `x/data/\d+` in it is wrong"):
        load_original_checkpoint(path)


def test_an_archive_that_inflates_is_not_unpacked(tiny: dict, tmp_path: Path) -> None:
    path = saved({"state_dict": {**tiny, "x": torch.zeros(2**21)}}, tmp_path / "x.pth")
    rewritten(path, lambda name, content: content, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"unpack to [\d,]+ bytes from [\d,]+, which weights do not"):
        load_original_checkpoint(path)


def test_a_storage_of_another_size_than_it_says(tiny: dict, tmp_path: Path) -> None:
    """`torch.load` reads what lies behind it in memory."""
    path = saved({"state_dict": tiny}, tmp_path / "x.pth")
    rewritten(path, lambda name, content: content[:-4] if name.endswith("/data/0") else content)
    with pytest.raises(ValueError, match=r"`embed_image.0.weight` `data/0` has 188 bytes where 192 are expected"):
        load_original_checkpoint(path)


class Tensor:
    """Pickles to a tensor with an offset, a shape and strides of one's choice."""

    def __init__(self, *place: object) -> None:
        self.place = place

    def __reduce__(self) -> tuple:
        return torch._utils._rebuild_tensor_v2, (torch.zeros(8)._typed_storage(), *self.place, False, {})


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (9,), (1,)),
        (4, (5,), (1,)),
        (-1, (2,), (1,)),
        (0, (3, 3), (4, 1)),
        (0, (10**12,), (0,)),
        (0, (-1,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (0, 10**18), (1, 1)),
        (2**62, (1,), (1,)),
        (0, (10**30,), (0,)),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "stream"])
def test_tensors_outside_their_storage(is_zip: bool, offset: int, shape: tuple, stride: tuple, tmp_path: Path) -> None:
    tensor = Tensor(offset, shape, stride)
    path = saved({"state_dict": {"wrong": tensor}}, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"x.pth: `wrong` has the shape"):
        load_original_checkpoint(path)


@pytest.mark.parametrize("index", ["1000000000", "3", "9" * 5000, "\N{SUPERSCRIPT TWO}", "-1", "", "01"])
def test_a_layer_of_any_number_does_not_hang(index: str, tiny: dict) -> None:
    key = f"encoder.layers.{index}.lnorm.weight"
    with pytest.raises(ValueError, match=r"`encoder.layers..* belongs to a layer that does not follow on the others"):
        convert_state_dict({**tiny, key: torch.ones(8)}, num_heads=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
        (b"<!DOCTYPE html><html>", "it is a web page"),
        (b"\x10\0\0\0\0\0\0\0{}              ", "it is a safetensors file"),
        (b"\x1f\x8b\x08\0", "compressed by gzip"),
        (pickle.dumps({"a": 1}), "a pickle that torch.save did not write"),
        (pickle.dumps(2**70), "a pickle that torch.save did not write"),
    ],
)
def test_files_of_other_kinds_are_called_what_they_are(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x.pth cannot be read: .*{message}"):
        load_original_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("names", [["sys_info", "pickle", "storages", "tensors"], ["checkpoint.pth"]])
def test_tar_archives(names: list[str], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.pth", "w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    message = "tar format of PyTorch before" if len(names) > 1 else r"unpack it \(tar -xf\) and give the .pth in it"
    with pytest.raises(ValueError, match=message):
        load_original_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["x.pth", "vocab.pkl", "vocab.json"])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: not a regular file"):
        (load_original_checkpoint if name == "x.pth" else read_vocabulary)(tmp_path / name)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "stream"])
def test_a_cut_or_changed_file_is_one_line_or_its_numbers(is_zip: bool, tiny: dict, tmp_path: Path) -> None:
    """A stream has no checksums: what reads well there is at least of the right shapes."""
    whole = saved({"state_dict": tiny}, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip).read_bytes()
    rng, messages = random.Random(0), []
    for _ in range(60):
        content = bytearray(whole)
        if rng.random() < 0.3:
            del content[rng.randrange(len(whole)) :]
        else:
            place = rng.choice([rng.randrange(len(whole)), rng.randrange(2000)])
            content[place] = rng.randrange(256)
        (tmp_path / "x.pth").write_bytes(content)
        try:
            read = load_original_checkpoint(tmp_path / "x.pth")
        except ValueError as error:
            messages.append(str(error))
            continue
        if is_zip and set(read) == set(tiny):
            assert all(torch.equal(read[key], value) for key, value in tiny.items())
    assert len(messages) > 20
    for message in messages:
        assert "x.pth" in message
        assert "\n" not in message
        assert len(message) < 900


# ---------------------------------------------------------------------------------------------------------------------
# Outputs
# ---------------------------------------------------------------------------------------------------------------------


def test_a_folder_that_appears_meanwhile_is_kept(tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    write = conversion.write_model_card

    def write_and_be_overtaken(*args: object, **kwargs: object) -> None:
        write(*args, **kwargs)
        output.mkdir()
        (output / "thesis.txt").write_text("three years")

    monkeypatch.setattr(conversion, "write_model_card", write_and_be_overtaken)
    path = saved(tiny, tmp_path / "x.pth")
    with pytest.raises(OSError, match="nothing is replaced without --overwrite"):
        convert(path, output, num_heads=2)
    assert [file.name for file in output.iterdir()] == ["thesis.txt"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "x.pth"]


def test_what_a_killed_conversion_left_is_removed(tiny: dict, tmp_path: Path) -> None:
    left = tmp_path / ".out-abc.unfinished"
    left.mkdir()
    (left / "lock").touch()
    convert(saved(tiny, tmp_path / "x.pth"), tmp_path / "out", num_heads=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "x.pth"]


def test_the_card_has_the_license_that_was_given(tiny: dict, tmp_path: Path) -> None:
    path = saved(tiny, tmp_path / "x.pth")
    options = ["--checkpoint", str(path), "--output", str(tmp_path / "out"), "--num-heads", "2"]
    with pytest.raises(SystemExit, match="2"):
        main([*options, "--license", "no such license"])
    assert main([*options, "--license", "cc-by-4.0"]) == 0
    assert '\nlicense: "cc-by-4.0"\n' in (tmp_path / "out" / "README.md").read_text()


def test_captions_are_cut_to_the_positions_of_the_decoder(tiny: dict, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(words(20)))
    convert(saved(tiny, tmp_path / "x.pth"), tmp_path / "out", tmp_path / "vocab.json", num_heads=2)
    assert DifnetProcessor.from_pretrained(tmp_path / "out").tokenizer.model_max_length == 10


@pytest.mark.parametrize("command", [[], ["grid-backbone"]], ids=["captioner", "grid-backbone"])
def test_debug_shows_the_traceback(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    where = ["x.pth"] if command else ["--checkpoint", "x.pth"]
    arguments = [*command, *where, "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert capsys.readouterr().err == "convert_checkpoint.py: error: x.pth: no such file.\n"
    assert main([*arguments, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_weights_that_are_no_numbers_do_not_go_back(tiny: dict, tmp_path: Path) -> None:
    model = convert_state_dict(tiny, num_heads=2).model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=r"NaN or infinity among the weights: lm_head.weight \(1 of 160 values\)"):
        convert_back(tmp_path / "out", tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


@pytest.mark.parametrize(
    ("back", "size"), [(False, 500_000), (False, 4000), (True, 500_000)], ids=["weights", "code", "file"]
)
def test_a_full_disk_is_one_line_that_names_the_output(
    back: bool, size: int, tiny: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A limit of the size of files stands for the end of the disk: writing fails in the same place."""
    resource = pytest.importorskip("resource")
    large = {name: torch.zeros(20_000, 8) for name in ("decoder.word_emb.weight", "decoder.fc.weight")}
    checkpoint, output = saved({**tiny, **large}, tmp_path / "x.pth"), tmp_path / "out"
    if back:
        checkpoint = tmp_path / "folder"
        convert(tmp_path / "x.pth", checkpoint, num_heads=2)
    numbers = ["--to-original"] if back else ["--num-heads", "2"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        exit_code = main(["--checkpoint", str(checkpoint), "--output", str(output), *numbers])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert exit_code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"convert_checkpoint.py: error: {output}")
    assert error.endswith("File too large")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "out"))]


def test_a_backbone_of_a_billion_blocks_is_not_built(tiny: dict, tmp_path: Path) -> None:
    path = saved({"model": tiny}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"--depth 3 4 1000000000 3: .*x.pth has \d+ weights"):
        convert_checkpoint.convert_grid_backbone(path, tmp_path / "out", [3, 4, 10**9, 3])
