"""A round trip with a small model: original checkpoint -> folder -> fresh process -> captions -> original checkpoint.

    python scripts/demo.py [--output demo_output]

The model is small and its weights are random, so the captions mean nothing; what is shown is that every step works.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from convert_checkpoint import load_original_checkpoint, to_original_state_dict  # noqa: E402
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration  # noqa: E402

WORDS = [
    "a",
    "man",
    "woman",
    "dog",
    "cat",
    "horse",
    "bus",
    "kite",
    "on",
    "in",
    "with",
    "of",
    "riding",
    "holding",
    "red",
]

IN_A_FRESH_PROCESS = """
import sys
import torch
import modeling_difnet
from transformers import AutoModel, AutoProcessor

folder = sys.argv[1]
model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
torch.manual_seed(1)
inputs = processor(
    grid_features=torch.rand(3, 49, 2048), segmentation_features=torch.rand(3, 133, 7, 7), return_tensors="pt"
)
for caption in processor.batch_decode(model.generate(**inputs), skip_special_tokens=True):
    print("  generate:             ", caption)
sequences = model.generate(**inputs, custom_generate=modeling_difnet.original_beam_search)
for caption in processor.batch_decode(sequences, skip_special_tokens=True):
    print("  original_beam_search: ", caption)
"""


def run(*command: str) -> None:
    """Shows a command, runs it, and stops the demo if it fails."""
    print("$ python " + " ".join("-c ..." if "\n" in part else part for part in command if part != "-c"), flush=True)
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "demo_output", help="default: demo_output/")
    parser.add_argument("--seed", type=int, default=3, help="of the random weights (default: 3)")
    options = parser.parse_args()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)

    print("1. A checkpoint as the original writes it, with random weights", flush=True)
    torch.manual_seed(options.seed)
    tokens = ["<unk>", "<pad>", "<bos>", "<eos>", *WORDS]
    model = DifnetForConditionalGeneration(
        DifnetConfig(vocab_size=len(tokens), d_model=128, head_dim=16, encoder_ffn_dim=256, decoder_ffn_dim=256)
    )
    torch.save({"state_dict": to_original_state_dict(model)}, output / "original.pth")
    (output / "vocab.json").write_text(json.dumps(tokens), encoding="utf-8")

    print("2. Converted to a folder", flush=True)
    folder, checkpoint = str(output / "difnet"), str(output / "original.pth")
    vocab = str(output / "vocab.json")
    run("convert_checkpoint.py", "--checkpoint", checkpoint, "--vocab", vocab, "--output", folder, "--overwrite")

    print("3. Loaded in a fresh process; three made-up pictures captioned", flush=True)
    run("-c", IN_A_FRESH_PROCESS, folder)

    print("4. Converted back", flush=True)
    back = str(output / "back.pth")
    run("convert_checkpoint.py", "--to-original", "--checkpoint", folder, "--output", back, "--overwrite")
    before, after = load_original_checkpoint(checkpoint), load_original_checkpoint(back)
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    print(f"All {len(before)} tensors are equal bit for bit. The results are in {output}")


if __name__ == "__main__":
    main()
