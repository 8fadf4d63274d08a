"""Training runs of a second or two, which the tests of training share."""

import json
import signal
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_packed import write_config, write_packed

from difnet_transformers.cli import train
from difnet_transformers.options import parse_options
from difnet_transformers.training import TrainingConfig
from difnet_transformers.training.checkpoint import copy_checkpoint

REPOSITORY = Path(__file__).parent.parent
SCRIPT = REPOSITORY / "scripts" / "train.py"

QUICK = {
    "xe-batch-size": 10,
    "xe-epochs": 2,
    "xe-learning-rate": 3e-3,
    "xe-schedule": "constant",
    "scst-epochs": 1,
    "scst-learning-rate": 3e-4,
    "max-new-tokens": 10,
    "log-every": 1,
    "report-to": "none",
}

# All regularization that draws no random numbers, for runs that must be equal however they are cut into parts.
REGULARIZED = ["--label-smoothing", "0.1", "--weight-decay", "0.1", "--scst-weight-decay", "0.2"]
REGULARIZED += ["--scst-schedule", "cosine", "--scst-warmup-steps", "1", "--ema-decay", "0.8"]
REGULARIZED += ["--scst-kl-weight", "0.1", "--scst-entropy-weight", "0.01"]
REGULARIZED += ["--freeze", "model.encoder.grid_embedding", "model.decoder.layers.0.self_attn"]


def make_data(folder: Path) -> Path:
    """A folder with a packed dataset and the sizes of a network."""
    write_packed(folder / "packed", {"train": 40, "validation": 10})
    write_config(folder / "config.json")
    return folder


def arguments(data: Path, output: Path, *flags: str, **changes) -> list[str]:
    options = {"dataset": data / "packed", "config": data / "config.json", "output": output, **QUICK}
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    return [*words, *flags]


def config(*words: str) -> TrainingConfig:
    """The options of a command."""
    return parse_options(TrainingConfig, words, prog="train.py", description="", positional_recipe=True)


def reset_accelerator() -> None:
    """Accelerate keeps settings of a process, of which the tests have several."""
    AcceleratorState._reset_state(reset_partial_state=True)


def run(*words: str) -> int:
    """The program, in this process."""
    reset_accelerator()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return train.main([*words, "--cpu"])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def finish_run(data: Path, output: Path) -> Path:
    """A whole run of both stages with dropout, saved at every third step besides."""
    assert run(*arguments(data, output, save_every=3)) == 0
    return output


def read_log(output: Path, event: str | None = None) -> list[dict]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if event in (None, line["event"])]


def same_weights(first: Path, second: Path) -> bool:
    """Whether two checkpoints are bit-equal: weights, optimizer and the random numbers that training draws.

    It draws none of Python's own, which libraries use in moments of their own.
    """
    files = ["model.safetensors", "training_state/optimizer.safetensors"]
    averaged = [(folder / "training_state" / "trained_weights.safetensors").exists() for folder in (first, second)]
    if averaged[0] != averaged[1]:
        return False
    files += ["training_state/trained_weights.safetensors"] if averaged[0] else []
    states = [load_file(folder / "training_state" / "random_states.safetensors") for folder in (first, second)]
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in files) and all(
        torch.equal(value, states[1][name]) for name, value in states[0].items() if "python" not in name
    )


# What the first version, which read its options with argparse, wrote of a run with the options of `finish_run`.
FIRST_VERSION_OPTIONS = {
    "dataset": "packed",
    "output": "run",
    "stage": "both",
    "resume": None,
    "train_split": "train",
    "validation_split": "validation",
    "seed": 0,
    "license": None,
    "model": None,
    "config": "config.json",
    "no_segmentation": False,
    "dropout": None,
    "vocab": None,
    "min_word_count": 5,
    "new_vocabulary": False,
    "recipe": "original",
    "xe_batches": "pairs",
    "xe_batch_size": 10,
    "xe_learning_rate": 0.003,
    "xe_schedule": "constant",
    "warmup_steps": 0,
    "xe_adam_betas": [0.9, 0.98],
    "xe_epochs": 2,
    "xe_patience": 5,
    "scst_batch_size": 10,
    "scst_learning_rate": 0.0003,
    "scst_adam_betas": [0.9, 0.999],
    "scst_epochs": 1,
    "scst_patience": 5,
    "scst_samples": "beam",
    "scst_num_captions": 5,
    "eos_in_reward": False,
    "max_epochs": 100,
    "max_new_tokens": 10,
    "max_steps": None,
    "max_grad_norm": None,
    "gradient_accumulation_steps": 1,
    "mixed_precision": None,
    "compile": False,
    "cpu": True,
    "evaluation_batch_size": 50,
    "log_every": 1,
    "save_every": 3,
    "report_to": ["none"],
    "debug": False,
}


def first_version_checkpoint(source: Path, folder: Path, **changes) -> Path:
    """A checkpoint of `finish_run` as the first version wrote it: without checksums and fingerprints of the data."""
    copy_checkpoint(source, folder)
    (folder / "training_state" / "SHA256SUMS").unlink()
    path = folder / "training_state" / "progress.json"
    content = json.loads(path.read_text())
    del content["version"], content["data"]
    content["options"] = FIRST_VERSION_OPTIONS | {"config": content["options"]["config"]}
    content["progress"] |= changes
    path.unlink()
    path.write_text(json.dumps(content))
    return folder


def changed_file(path: Path, content: bytes) -> None:
    """Another file in the place of a hard link."""
    path.unlink()
    path.write_bytes(content)


# Of the first epoch of SCST, which has four batches.
IN_SCST = {"stage": "scst", "epoch": 1, "batch": 3, "step": 3, "total_epochs": 2}
