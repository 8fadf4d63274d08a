"""The model card: what the Hub reads in its head, and results that are filled in after the fact."""

import pytest
from huggingface_hub import ModelCard

from model_card import update_results, write_model_card
from modeling_difnet import DifnetConfig

SCORES = {"bleu_1": 0.8171, "bleu_4": 0.4, "rouge_l": 0.594, "cider_d": 1.362, "spice": None, "images": 5000}
MEASURED = {"dataset": "COCO Karpathy", "split": "test", "decoding": "original", "num_beams": 5}


def written(folder, **options) -> ModelCard:
    write_model_card(folder, DifnetConfig(vocab_size=60), "Made for a test.", **options)
    return ModelCard.load(folder / "README.md")


def test_what_a_card_says(tmp_path):
    card = written(tmp_path)
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
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
    update_results(tmp_path, {"cider_d": 3.0}, **{**MEASURED, "decoding": "library"})
    update_results(tmp_path, {"cider_d": 1.5}, **MEASURED)
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    found = {(result.dataset_split, result.metric_args["decoding"]): result.metric_value for result in results}
    assert found == {("test", "original"): 150.0, ("validation", "original"): 200.0, ("test", "library"): 300.0}
    assert len(results) == 3


def test_a_card_that_is_not_there_or_broken_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"README\.md: no such file"):
        update_results(tmp_path, SCORES, **MEASURED)
    (tmp_path / "README.md").write_text("---\ntags: [a\n---\ntext\n")
    with pytest.raises(ValueError, match=r"README\.md: the card's YAML head cannot be read"):
        update_results(tmp_path, SCORES, **MEASURED)
    assert (tmp_path / "README.md").read_text() == "---\ntags: [a\n---\ntext\n"
