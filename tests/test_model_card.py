"""The model card: what the Hub reads in its head, and results that are filled in after the fact."""

import re

import pytest
from conftest import random_model
from huggingface_hub import ModelCard

from difnet_transformers.model_card import update_results, write_model_card
from modeling_difnet import DifnetConfig, DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

WORDS = ["<unk>", "<pad>", "<bos>", "<eos>", *(f"word{index}" for index in range(46))]

SCORES = {"bleu_1": 0.8171, "bleu_4": 0.4, "rouge_l": 0.594, "cider_d": 1.362, "spice": None, "images": 5000}
MEASURED = {"dataset": "COCO Karpathy", "split": "test", "decoding": "original", "num_beams": 5}


def one_line(text: str) -> str:
    """Line ends inside a paragraph mean nothing in Markdown."""
    return " ".join(text.split())


def written(folder, **options) -> ModelCard:
    write_model_card(folder, DifnetConfig(vocab_size=60), "Made for a test.", **options)
    return ModelCard.load(folder / "README.md")


def test_what_a_card_says(tmp_path):
    card = written(tmp_path)
    assert card.data.library_name == "transformers"
    assert (card.data.license, card.data.datasets) == (None, None), "nothing is claimed that was not said"
    assert "Made for a test." in card.text
    assert "vocabulary of 60 tokens" in card.text
    assert "## Training" not in card.text
    assert card.data.eval_results is None


def test_a_card_tells_of_the_training(tmp_path):
    card = written(tmp_path, training="SCST with five beams; `<eos>` counts in the reward, at $0 cost.")
    assert "## Training\n\nSCST with five beams; `<eos>` counts in the reward, at $0 cost.\n\n## Limits" in card.text


def test_results_are_written_as_in_the_literature(tmp_path):
    text = written(tmp_path).text
    update_results(tmp_path, SCORES, **MEASURED)
    card = ModelCard.load(tmp_path / "README.md")
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == {
        "BLEU-1": 81.71,
        "BLEU-4": 40.0,
        "ROUGE-L": 59.4,
        "CIDEr-D": 136.2,
    }
    for result in card.data.eval_results:
        assert (result.dataset_name, result.dataset_split) == ("COCO Karpathy", "test")
        assert result.metric_args == {"decoding": "original", "num_beams": 5}
        assert result.dataset_revision is None
    assert card.text == text
    assert card.data.tags == ["image-captioning", "difnet"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md"]


def test_results_are_replaced_where_they_are_the_same_and_kept_where_not(tmp_path):
    written(tmp_path)
    update_results(tmp_path, {"cider_d": 1.0}, **MEASURED)
    update_results(tmp_path, {"cider_d": 2.0}, **{**MEASURED, "split": "validation"})
    update_results(tmp_path, {"cider_d": 3.0}, **{**MEASURED, "decoding": "transformers"})
    update_results(tmp_path, {"cider_d": 1.5}, **MEASURED)
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    found = {(result.dataset_split, result.metric_args["decoding"]): result.metric_value for result in results}
    assert found == {("test", "original"): 150.0, ("validation", "original"): 200.0, ("test", "transformers"): 300.0}
    assert len(results) == 3


def test_a_card_that_is_not_there_or_broken_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"README\.md: no such file"):
        update_results(tmp_path, SCORES, **MEASURED)
    (tmp_path / "README.md").write_text("---\ntags: [a\n---\ntext\n")
    with pytest.raises(ValueError, match=r"README\.md: the card's YAML head cannot be read"):
        update_results(tmp_path, SCORES, **MEASURED)
    assert (tmp_path / "README.md").read_text() == "---\ntags: [a\n---\ntext\n"


def test_the_task_is_one_that_transformers_has(tmp_path):
    from transformers.pipelines import PIPELINE_REGISTRY

    assert written(tmp_path).data.pipeline_tag in PIPELINE_REGISTRY.supported_tasks


@pytest.mark.parametrize("license", ["apache-2.0", "cc-by-nc-4.0", "other"])
def test_the_license_is_the_writers_choice(tmp_path, license):
    assert written(tmp_path, license=license).data.license == license


@pytest.mark.parametrize("license", ["Apache 2.0", "", "mit\nlicense: other", "x" * 100])
def test_a_license_that_the_hub_cannot_read(tmp_path, license):
    with pytest.raises(ValueError, match=r"no license as the Hub abbreviates it"):
        written(tmp_path, license=license)


@pytest.mark.parametrize(
    ("dataset", "named"), [("user/coco", ["user/coco"]), ("coco_packed", None), ("./packed/coco", None), (None, None)]
)
def test_only_datasets_of_the_hub_are_in_the_head(tmp_path, dataset, named):
    assert written(tmp_path, dataset=dataset).data.datasets == named


def test_a_folder_is_no_dataset_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "packed" / "coco").mkdir(parents=True)
    assert written(tmp_path, dataset="packed/coco").data.datasets is None


LARGE = {"vocab_size": 500, "grid_feature_size": 1024, "num_segmentation_classes": 150, "d_model": 256}


def test_sizes_are_those_of_the_model(tmp_path):
    config = DifnetConfig(**LARGE, encoder_layers=4)
    write_model_card(
        tmp_path, config, "Made.", grid_size=12, grid_backbone="a Swin transformer", segmentation="SegFormer (ADE20K)"
    )
    text = one_line((tmp_path / "README.md").read_text())
    assert "4 encoder and 3 decoder layers, 256 wide" in text
    assert "grid features `(144, 1024)`, the cells of a 12 x 12 grid row by row, made by a Swin transformer." in text
    assert "share of each of 150 classes in the same cells, `(150, 12, 12)`, made by SegFormer (ADE20K)." in text
    assert "torch.zeros(144, 1024)" in text
    for wrong in ("2048", "49", "133", "COCO", "ResNeXt", "7 x 7"):
        assert wrong not in text


def test_a_model_without_segmentation_says_nothing_of_classes(tmp_path):
    write_model_card(tmp_path, DifnetConfig(use_segmentation=False), "Made.")
    text = (tmp_path / "README.md").read_text()
    assert "segmentation" not in text
    assert "Which networks made the features of the training data is not recorded here." in text


def test_the_grid_is_that_of_the_processor(tmp_path):
    DifnetProcessor(DifnetFeatureExtractor(grid_size=9), DifnetTokenizer(vocab=WORDS)).save_pretrained(tmp_path)
    assert "`(81, 2048)`" in written(tmp_path).text


def test_the_snippet_runs(tmp_path, tiny_config, monkeypatch, capsys):
    tiny_config.decoder_attention_heads = tiny_config.encoder_attention_heads
    random_model(tiny_config).save_pretrained(tmp_path)
    extractor = DifnetFeatureExtractor(3, tiny_config.grid_feature_size, tiny_config.num_segmentation_classes)
    DifnetProcessor(extractor, DifnetTokenizer(vocab=WORDS)).save_pretrained(tmp_path)
    write_model_card(tmp_path, tiny_config, "Made.")
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    exec(snippet, {})
    assert capsys.readouterr().out.startswith("['")
