"""`Seq2SeqTrainer` and PEFT train the model as any other, and docs/transformers_training.md says the truth."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from safetensors.torch import load_file
from tiny_packed import COLOURS, GRID_FEATURE_SIZE, NUM_CLASSES, SIZES, THINGS, write_packed
from transformers import AutoModel, AutoProcessor, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from convert_checkpoint import default_generation_config
from difnet_transformers.data.batches import CaptionCollator, CaptionPairs
from difnet_transformers.data.packed_dataset import PackedImages
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

PAGE = Path(__file__).parent.parent / "docs" / "transformers_training.md"
IMAGES = {"train": 18, "validation": 10, "test": 6}  # with three captions each
WORDS = sorted({*THINGS, *COLOURS, *["a", "on", "the", "grass", "photo", "of", "there", "is", "one", "here"]})


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> DatasetDict:
    return load_from_disk(write_packed(tmp_path_factory.mktemp("packed"), IMAGES))


@pytest.fixture(scope="module")
def processor() -> DifnetProcessor:
    extractor = DifnetFeatureExtractor(2, GRID_FEATURE_SIZE, NUM_CLASSES)
    return DifnetProcessor(extractor, DifnetTokenizer(vocab=["<unk>", "<pad>", "<bos>", "<eos>", *WORDS]))


def configuration(processor: DifnetProcessor) -> DifnetConfig:
    return DifnetConfig(
        vocab_size=len(processor.tokenizer),
        grid_feature_size=GRID_FEATURE_SIZE,
        num_segmentation_classes=NUM_CLASSES,
        **SIZES,
    )


@pytest.fixture
def config(processor: DifnetProcessor) -> DifnetConfig:
    return configuration(processor)


@pytest.fixture
def pairs(packed: DatasetDict, processor: DifnetProcessor) -> CaptionPairs:
    return CaptionPairs(packed["train"], processor.tokenizer)


def fresh_model(config: DifnetConfig) -> DifnetForConditionalGeneration:
    torch.manual_seed(0)
    return DifnetForConditionalGeneration(config)


def make_trainer(
    model: torch.nn.Module, pairs: CaptionPairs, processor: DifnetProcessor, folder: Path, **settings
) -> Seq2SeqTrainer:
    """On the CPU, silent, and without files unless `settings` ask for them."""
    defaults = {
        "per_device_train_batch_size": 6,
        "max_steps": 2,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(output_dir=str(folder), **{**defaults, **settings}),
        train_dataset=pairs,
        data_collator=CaptionCollator(processor.tokenizer),
        processing_class=processor,
    )


def losses(trainer: Seq2SeqTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# --- what the Trainer is fed -----------------------------------------------------------------------------------------


def test_pairs_are_all_captions_of_all_images_in_order(packed: DatasetDict, processor: DifnetProcessor) -> None:
    pairs = CaptionPairs(packed["train"], processor.tokenizer)
    assert len(pairs) == 18 * 3
    items = pairs.__getitems__([0, 1, 2, 3, 53])
    words = processor.tokenizer.decode_captions([item["labels"] for item in items])
    captions = packed["train"]["captions"]
    expected = [*captions[0], captions[1][0], captions[17][2]]
    assert words == [caption.lower().rstrip(".") for caption in expected]
    features = PackedImages(packed["train"]).read([0, 0, 0, 1, 17])
    for name, expected in features.items():
        assert torch.equal(torch.stack([item[name] for item in items]), expected)
    for name, value in pairs[53].items():
        assert torch.equal(value, items[-1][name])


def test_one_caption_an_image_for_evaluation(packed: DatasetDict, processor: DifnetProcessor) -> None:
    pairs = CaptionPairs(packed["validation"].select([3, 1]), processor.tokenizer, captions_per_image=1)
    expected = [packed["validation"][image]["captions"][0].lower().rstrip(".") for image in (3, 1)]
    assert processor.tokenizer.decode_captions([item["labels"] for item in pairs]) == expected
    with pytest.raises(ValueError, match="captions_per_image"):
        CaptionPairs(packed["validation"], processor.tokenizer, captions_per_image=0)
    with pytest.raises(ValueError, match="image 118: a caption has 7 tokens"):
        CaptionPairs(packed["validation"], processor.tokenizer, max_length=6)


@pytest.mark.parametrize("indices", [[0, 3], [3, 4]])
def test_padded_cells_are_masked_in_every_item_of_a_split_that_has_them(
    packed: DatasetDict, processor: DifnetProcessor, indices: list[int]
) -> None:
    rows = packed["train"].select(range(2)).with_format("numpy", dtype=np.float16)[:]
    rows["segmentation_features"] = packed["train"][:2]["segmentation_features"]
    rows["grid_cells"] = np.array([3, 4], dtype=np.uint16)
    padded = Dataset.from_dict(dict(rows), features=packed["train"].features)
    pairs = CaptionPairs(padded, processor.tokenizer)
    batch = CaptionCollator(processor.tokenizer)(pairs.__getitems__(indices))
    masks = {0: [1, 1, 1, 0], 3: [1, 1, 1, 1], 4: [1, 1, 1, 1]}
    assert batch["grid_attention_mask"].tolist() == [masks[index] for index in indices]
    unmasked = CaptionPairs(padded, processor.tokenizer, mask_padded_cells=False)
    assert "grid_attention_mask" not in unmasked[0]


def test_a_batch_is_what_the_processor_makes_of_its_captions(
    config: DifnetConfig, packed: DatasetDict, processor: DifnetProcessor, pairs: CaptionPairs
) -> None:
    batch = CaptionCollator(processor.tokenizer)(pairs.__getitems__([2, 3, 7]))
    texts = [packed["train"][image]["captions"][number] for image, number in ((0, 2), (1, 0), (2, 1))]
    assert torch.equal(batch["labels"], processor(text=texts, return_tensors="pt")["labels"])
    model = fresh_model(config)
    assert torch.equal(batch["decoder_input_ids"], model.prepare_decoder_input_ids_from_labels(batch["labels"]))


def test_images_without_captions_make_a_batch(pairs: CaptionPairs, processor: DifnetProcessor) -> None:
    items = [{name: value for name, value in pairs[i].items() if name != "labels"} for i in (0, 3)]
    batch = CaptionCollator(processor.tokenizer)(items)
    assert set(batch) == set(items[0])
    with pytest.raises(ValueError, match="`labels` is missing in item 1 of a batch whose other items have it"):
        CaptionCollator(processor.tokenizer)([pairs[0], items[1]])


def test_an_image_without_a_mask_has_only_real_cells(pairs: CaptionPairs, processor: DifnetProcessor) -> None:
    num_cells = pairs[0]["grid_features"].shape[0]
    mask = torch.zeros(num_cells, dtype=torch.long)
    items = [pairs[0], {**pairs[3], "grid_attention_mask": mask}]
    batch = CaptionCollator(processor.tokenizer)(items)
    assert batch["grid_attention_mask"].tolist() == [[1] * num_cells, [0] * num_cells]


# --- the Trainer -----------------------------------------------------------------------------------------------------


def test_accumulated_small_batches_train_as_one_big_batch(
    config: DifnetConfig, pairs: CaptionPairs, processor: DifnetProcessor, tmp_path: Path
) -> None:
    # The captions have different lengths: a mean of the small batches' means would be another number.
    config.dropout = config.attention_dropout = 0.0
    trained = []
    for batch_size, accumulation in ((12, 1), (3, 4)):
        trainer = make_trainer(
            fresh_model(config).double(),
            pairs,
            processor,
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=1.0,
            max_steps=3,
        )
        trainer.train()
        trained.append((losses(trainer), dict(trainer.model.named_parameters())))
    (big_losses, big), (small_losses, small) = trained
    assert big_losses == pytest.approx(small_losses, rel=1e-6)
    for name, parameter in big.items():
        torch.testing.assert_close(small[name], parameter, rtol=1e-9, atol=1e-12)


def test_a_resumed_run_is_the_uninterrupted_run(
    config: DifnetConfig, pairs: CaptionPairs, processor: DifnetProcessor, tmp_path: Path
) -> None:
    # 54 pairs are 9 batches an epoch; the run stops in the second one. Dropout is on.
    whole = make_trainer(fresh_model(config), pairs, processor, tmp_path / "whole", max_steps=14)
    whole.train()
    settings = {"save_strategy": "steps", "save_steps": 11, "max_steps": 14}
    stopped = make_trainer(fresh_model(config), pairs, processor, tmp_path / "stopped", **settings)
    stopped.train()
    resumed = make_trainer(fresh_model(config), pairs, processor, tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-11"))
    assert resumed.state.global_step == 14
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), parameter)


def test_label_smoothing_is_the_librarys(
    config: DifnetConfig, pairs: CaptionPairs, processor: DifnetProcessor, tmp_path: Path
) -> None:
    config.dropout = config.attention_dropout = 0.0
    settings = {"label_smoothing_factor": 0.1, "max_steps": 1, "per_device_train_batch_size": len(pairs)}
    trainer = make_trainer(fresh_model(config), pairs, processor, tmp_path, **settings)
    batch = CaptionCollator(processor.tokenizer)(list(pairs))
    with torch.no_grad():
        expected = LabelSmoother(0.1)(trainer.model(**batch), batch["labels"])
        assert expected != pytest.approx(trainer.model(**batch).loss.item(), rel=1e-3)
    trainer.train()
    assert losses(trainer) == [pytest.approx(expected.item(), rel=1e-4)]


def test_the_trainer_predicts_images_without_captions(
    config: DifnetConfig, pairs: CaptionPairs, processor: DifnetProcessor, tmp_path: Path
) -> None:
    items = [{name: value for name, value in pairs[i].items() if name != "labels"} for i in (0, 3)]
    settings = {"predict_with_generate": True, "generation_num_beams": 1, "generation_max_length": 8}
    trainer = make_trainer(fresh_model(config), pairs, processor, tmp_path, **settings)
    predicted = torch.as_tensor(trainer.predict(items).predictions)
    captions = trainer.model.generate(**CaptionCollator(processor.tokenizer)(items), num_beams=1, max_length=8)
    assert torch.equal(predicted[:, : captions.shape[1]], captions)


def test_gradient_checkpointing_changes_no_number(
    config: DifnetConfig, pairs: CaptionPairs, processor: DifnetProcessor, tmp_path: Path
) -> None:
    # Dropout is on: the second pass through a layer has to draw the masks of the first.
    trained = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            fresh_model(config), pairs, processor, tmp_path, gradient_checkpointing=checkpointing, max_steps=3
        )
        trainer.train()
        trained.append(dict(trainer.model.named_parameters()))
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, rtol=1e-5, atol=1e-6)


def test_bf16_trains_fp32_weights(
    config: DifnetConfig, pairs: CaptionPairs, processor: DifnetProcessor, tmp_path: Path
) -> None:
    config.dropout = config.attention_dropout = 0.0
    trained = []
    for bf16 in (False, True):
        trainer = make_trainer(fresh_model(config), pairs, processor, tmp_path, bf16=bf16, max_steps=4)
        trainer.train()
        assert trainer.model.dtype == torch.float32
        trained.append(losses(trainer))
    assert trained[0] != trained[1]
    assert trained[1] == pytest.approx(trained[0], rel=1e-2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler for the CPU")
def test_a_compiled_training_step_is_the_same_step(
    config: DifnetConfig, packed: DatasetDict, processor: DifnetProcessor, tmp_path: Path
) -> None:
    # Captions of one length, so that there is one shape to compile for.
    pairs = CaptionPairs(packed["train"], processor.tokenizer, captions_per_image=1)
    config.dropout = config.attention_dropout = 0.0
    trained = []
    for compiled in (False, True):
        trainer = make_trainer(fresh_model(config), pairs, processor, tmp_path, torch_compile=compiled, max_steps=3)
        trainer.train()
        trained.append((losses(trainer), dict(trainer.model.named_parameters())))
    (eager_losses, eager), (compiled_losses, compiled) = trained
    assert compiled_losses == pytest.approx(eager_losses, rel=1e-5)
    for name, parameter in eager.items():
        torch.testing.assert_close(compiled[name], parameter, rtol=1e-4, atol=1e-5)


# --- the page --------------------------------------------------------------------------------------------------------


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def page(packed: DatasetDict, processor: DifnetProcessor, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The names that the page's blocks leave behind, run in order in a folder that holds what they start from."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("page")
    packed.save_to_disk(folder / "coco_packed")
    model = fresh_model(configuration(processor))
    model.generation_config = default_generation_config(model.config)
    model.save_pretrained(folder / "difnet")
    processor.save_pretrained(folder / "difnet")
    names = {"folder": folder}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ACCELERATE_USE_CPU", "1")
        torch.manual_seed(0)
        for block in blocks(PAGE):
            exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_every_block_of_the_page_runs(page: dict) -> None:
    assert page["trainer"].state.epoch == 3
    assert page["smooth"].state.global_step == 4


def test_the_trainer_evaluates_by_the_projects_metrics(page: dict, packed: DatasetDict) -> None:
    evaluations = [entry for entry in page["trainer"].state.log_history if "eval_cider_d" in entry]
    assert [entry["epoch"] for entry in evaluations] == [1, 2, 3]
    assert {"eval_bleu_4", "eval_rouge_l", "eval_loss"} <= evaluations[-1].keys()
    trainer, processor = page["trainer"], page["processor"]
    inputs = PackedImages(packed["validation"]).read(range(10))
    captions = processor.post_process_captions(trainer.model.eval().generate(**inputs))
    scores = page["score_captions"](captions, packed["validation"]["captions"])
    measured = trainer.evaluate()
    for name, score in scores.items():
        assert measured[f"eval_{name}"] == pytest.approx(score, abs=1e-12)


def test_what_the_trainer_saves_is_complete(page: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(page["folder"])
    for saved in ("runs/xe/final", "runs/xe/checkpoint-2"):
        model, processor = AutoModel.from_pretrained(saved), AutoProcessor.from_pretrained(saved)
        assert isinstance(model, DifnetForConditionalGeneration)
        assert processor.tokenizer.get_vocab() == page["processor"].tokenizer.get_vocab()
        auto_map = json.loads(Path(saved, "config.json").read_text())["auto_map"]
        assert all(Path(saved, name.split(".")[0] + ".py").is_file() for name in auto_map.values())


def test_lora_trains_the_adapter_alone_and_merges(page: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(page["folder"])
    adapter = load_file("runs/lora/adapter/adapter_model.safetensors")
    assert sorted(path.name for path in Path("runs/lora/adapter").glob("adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not Path("runs/lora/adapter/model.safetensors").exists()
    attentions = sum(".q_proj." in name for name in page["model"].state_dict()) // 2
    assert len(adapter) == 2 * 2 * attentions  # q and v, the two factors of each
    assert all(tensor.abs().sum() > 0 for tensor in adapter.values())  # the second factor starts at zero

    inputs = page["inputs"]
    adapted = page["adapted"].eval()
    tokens = torch.tensor([[2, 10, 4], [2, 14, 5]])
    original = AutoModel.from_pretrained("difnet")
    merged = AutoModel.from_pretrained("difnet_finetuned")
    with torch.no_grad():
        logits = adapted(**inputs, decoder_input_ids=tokens).logits
        before = original(**inputs, decoder_input_ids=tokens).logits
        assert not torch.allclose(before, logits, atol=1e-3)
        torch.testing.assert_close(merged(**inputs, decoder_input_ids=tokens).logits, logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(merged.generate(**inputs), adapted.generate(**inputs))
        with adapted.disable_adapter():
            assert torch.equal(adapted(**inputs, decoder_input_ids=tokens).logits, before)


@pytest.mark.slow
def test_two_processes_with_half_the_batch_are_one_process(
    config: DifnetConfig, packed: DatasetDict, processor: DifnetProcessor, tmp_path: Path
) -> None:
    """The page's first block: the same training, and every image in the scores once (10 images, batches of 2 x 8)."""
    config.dropout = config.attention_dropout = 0.0
    model = fresh_model(config)
    model.generation_config = default_generation_config(config)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "difnet")
    packed.save_to_disk(tmp_path / "coco_packed")
    environment = {**os.environ, "PYTHONPATH": str(PAGE.parent.parent), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    logs = []
    for processes in (1, 2):
        # 54 pairs are 3 batches an epoch. SGD, since Adam makes whole steps of gradients that are rounding alone.
        block = blocks(PAGE)[0].replace("runs/xe", f"runs/{processes}").replace("adam_beta2=0.98", 'optim="sgd"')
        batch = f"use_cpu=True, per_device_train_batch_size={18 // processes}"
        block = block.replace("per_device_train_batch_size=50", batch).replace(
            "learning_rate=1e-4", "learning_rate=0.1"
        )
        (tmp_path / "train.py").write_text(block)
        command = [*torchrun, str(processes), "train.py"]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr[-3000:]
        state = json.loads((tmp_path / "runs" / str(processes) / "checkpoint-6" / "trainer_state.json").read_text())
        logs.append([entry["eval_cider_d"] for entry in state["log_history"] if "eval_cider_d" in entry])
        logs[-1].append(load_file(tmp_path / "runs" / str(processes) / "checkpoint-6" / "model.safetensors"))
    (*one_scores, one), (*two_scores, two) = logs
    assert len(one_scores) == 2
    assert two_scores == pytest.approx(one_scores, abs=1e-9)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
