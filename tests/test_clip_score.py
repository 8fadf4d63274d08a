"""CLIPScore as a reward, with random CLIP and SigLIP models of the tests' own."""

import json
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from training_runs import arguments, make_data, read_log, run
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
)

from difnet_transformers.training import load_reward, load_rewards
from difnet_transformers.training.clip_score import PROMPT, ClipScore

CAPTIONS = ["a red dog", "a cat", "a very long caption of a dog that sits on the grass by a cat"]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE_SIZES = {**SIZES, "image_size": 8, "patch_size": 4}


def image_processor(name: str, folder: Path):
    """Of a class that needs no torchvision, as the model's processor loads it."""
    size = {"shortest_edge": 8} if name == "CLIP" else {"height": 8, "width": 8}
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_processor_type": f"{name}ImageProcessor", "size": size, "crop_size": {"height": 8, "width": 8}}
        )
    )
    return AutoImageProcessor.from_pretrained(folder, backend="pil")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """The folder of a CLIP model whose tokens are letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    vocab = {token: number for number, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    ids = {"bos_token_id": len(letters), "eos_token_id": len(letters) + 1, "pad_token_id": len(letters) + 1}
    text = {**SIZES, "vocab_size": len(vocab), "max_position_embeddings": 24, **ids}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=IMAGE_SIZES, projection_dim=8))
    model.save_pretrained(folder)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=24)
    CLIPProcessor(image_processor("CLIP", folder), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = {}
    for number in range(40):
        paths[100 + number] = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(paths[100 + number])
    return paths


def expected_scores(reward: ClipScore, captions: list[str], paths: list[Path]) -> list[float]:
    """By the model's own similarity of each pair, which is the cosine times its scale."""
    scores = []
    for caption, path in zip(captions, paths, strict=True):
        inputs = reward.processor(
            text=[PROMPT + caption],
            images=Image.open(path).convert("RGB"),
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=24,
        )
        with torch.no_grad():
            output = reward.model(**inputs)
        cosine = torch.nn.functional.cosine_similarity(output.text_embeds, output.image_embeds).item()
        scores.append(2.5 * max(cosine, 0))
    return scores


def test_it_is_the_scaled_cosine_of_the_models_embeddings(clip, images):
    reward = load_reward(f"clip_score:{clip}", image_paths=images)
    ids = [103, 100, 103]
    scores = reward(CAPTIONS, [[]] * 3, image_id=ids)
    assert scores == pytest.approx(expected_scores(reward, CAPTIONS, [images[number] for number in ids]), abs=1e-5)
    assert len(set(scores)) > 1
    by_path = load_reward(f"clip_score:{clip}")(CAPTIONS, [[]] * 3, image_path=[str(images[number]) for number in ids])
    assert by_path == scores


def test_siglip(images, tmp_path):
    words = ["<unk>", "<pad>", "a", "A", "photo", "depicts", "dog", "cat", "red"]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    text = {**SIZES, "vocab_size": len(words), "max_position_embeddings": 24}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=IMAGE_SIZES))
    reward = ClipScore(model, SiglipProcessor(image_processor("Siglip", tmp_path), fast), images)
    ids = [103, 100, 101]
    expected = expected_scores(reward, CAPTIONS, [images[number] for number in ids])
    assert reward(CAPTIONS, [[]] * 3, image_id=ids) == pytest.approx(expected, abs=1e-5)


def test_images_are_embedded_once_and_the_embeddings_are_kept(clip, images, tmp_path):
    reward = load_reward(f"clip_score:{clip}", image_paths=images, cache=tmp_path / "cache")
    first = reward(CAPTIONS[:2], [[]] * 2, image_id=[103, 100])
    kept = dict(reward.embeddings)
    assert reward(CAPTIONS[:2], [[]] * 2, image_id=[103, 100]) == first
    assert all(reward.embeddings[key] is value for key, value in kept.items())
    (table,) = (tmp_path / "cache").iterdir()
    assert np.isfinite(np.load(table)).all(-1).sum() == 2
    # A run that resumes reads them; the files may be gone.
    for number in (103, 100):
        images[number].rename(images[number].with_suffix(".gone"))
    try:
        resumed = load_reward(f"clip_score:{clip}", image_paths=images, cache=tmp_path / "cache")
        assert resumed(CAPTIONS[:2], [[]] * 2, image_id=[103, 100]) == first
    finally:
        for number in (103, 100):
            images[number].with_suffix(".gone").rename(images[number])
    # A row that was being written when the run was killed is computed again.
    values = np.load(table, mmap_mode="r+")
    values[3, 4:] = np.nan
    values.flush()
    again = load_reward(f"clip_score:{clip}", image_paths=images, cache=tmp_path / "cache")
    assert again(CAPTIONS[:2], [[]] * 2, image_id=[103, 100]) == first
    table.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{table.name} is damaged; delete it"):
        load_reward(f"clip_score:{clip}", image_paths=images, cache=tmp_path / "cache")


def test_what_is_no_model_for_it(tmp_path, images, clip):
    with pytest.raises(ValueError, match=f"the reward clip_score: {tmp_path} is no model that Transformers can load"):
        load_reward(f"clip_score:{tmp_path}", image_paths=images)
    with pytest.raises(ValueError, match="there is no reward clip_score: choose from"):
        load_reward("clip_score")
    rewards = load_rewards({f"clip_score:{clip}": 1.0}, image_paths=images)
    with pytest.raises(ValueError, match="clip_score has no file of image 7"):
        rewards(["a dog"], [[]], image_id=[7])
    with pytest.raises(ValueError, match="clip_score needs the images: give the column image_id, or image_path"):
        rewards(["a dog"], [[]])


def test_a_run_that_is_rewarded_by_it(clip, images, tmp_path, capsys):
    data = make_data(tmp_path / "data")
    folder = next(iter(images.values())).parent
    for number in range(40):  # the dataset names JPEG files
        images[100 + number].with_suffix(".jpg").write_bytes(images[100 + number].read_bytes())
    assert run(*arguments(data, tmp_path / "xe", "--stage", "xe", xe_epochs=1)) == 0
    words = ["--stage", "scst", "--rewards", "cider_d", f"clip_score:{clip}", "--reward-images", str(folder)]
    words = arguments(data, tmp_path / "run", *words, config=None, model=tmp_path / "xe" / "best")
    assert run(*words) == 0
    name = f"reward_clip_score:{clip}"
    assert all(0 <= line[name] <= 2.5 for line in read_log(tmp_path / "run", "train"))
    (folder / "7.jpg").unlink()
    words[words.index("--output") + 1] = str(tmp_path / "other")
    assert run(*words) == 2
    assert "no file of image 107, 7.jpg" in capsys.readouterr().err
