"""Speed of captioning at full size (10,201 words), from features to tokens.

    python benchmarks/generation.py                        # on whatever device there is
    python benchmarks/generation.py --original ../DIFNet   # with a clone of mrwu-mac/DIFNet: beside the original
    python benchmarks/generation.py --compile              # on a CPU: the static form compiled, as it is on a GPU

Weights and features are functions of a seed (tests/golden/model/reference_weights.py), made so that captions end after
different numbers of words, as trained ones do. With `--original`, the original implementation runs the same weights on
the same features in turn with this one, and its tokens are compared: ratios are of medians in one run. The table goes
to the terminal and to benchmarks/results/.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    Row,
    add_timing_options,
    header,
    make_parser,
    markdown_table,
    measure,
    original_model,
    original_state_dict,
    reference_features,
    reference_of,
    results_path,
    seconds_range,
    write_report,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import CompileConfig

from convert_checkpoint import convert_state_dict
from modeling_difnet import DifnetForConditionalGeneration, original_beam_search

MAX_NEW_TOKENS = 20
ORIGINAL = "original implementation"


def original_captioner(clone: Path, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The original implementation's beam search as a function of the two features."""
    model: Any = original_model(clone).to(device)
    return lambda grid_features, segmentation_features: model.beam_search(
        grid_features, segmentation_features, MAX_NEW_TOKENS, 3, 5, out_size=1
    )[0]


def caption_rows(
    models: dict[str, DifnetForConditionalGeneration],
    batch_sizes: list[int],
    original: Callable | None,
    device: torch.device,
    compiles: bool,
) -> list[Row]:
    """Each search in each precision, attention implementation and kind of cache, for each batch size."""
    compile_config = CompileConfig()
    compile_config._compile_all_devices = compiles  # Transformers compiles static caches on a GPU, else when told to
    searches: dict[str, dict[str, Any]] = {
        "original_beam_search": {"num_beams": 5, "custom_generate": original_beam_search},
        "beam 5 of Transformers": {"num_beams": 5, "length_penalty": 0.0, "early_stopping": "never"},
        "greedy": {"num_beams": 1},
    }
    rows = []
    for batch_size in batch_sizes:
        features = reference_features(batch_size, device)
        if original is not None:
            rows.append(Row(batch_size, ORIGINAL, partial(original, **features)))
        for search, options in searches.items():
            variants: list[tuple[str, str, str | None]] = [
                ("fp32", "sdpa", None),
                ("fp32", "eager", None),
                ("bf16", "sdpa", None),
            ]
            if search != "original_beam_search":
                variants.append(("fp32", "sdpa", "static"))
            elif compiles or device.type == "cuda":
                variants += [("fp32", "sdpa", "static"), ("bf16", "sdpa", "static")]
            for precision, attention, cache in variants:
                model = models[precision]
                arguments = {**features, **options, "max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
                if cache:
                    arguments["cache_implementation"] = cache
                    if search == "original_beam_search":
                        arguments["compile_config"] = compile_config
                rows.append(
                    Row(
                        batch_size,
                        f"{search}, {precision}, {attention}" + (f", {cache} cache" if cache else ""),
                        partial(model.generate, **arguments),
                        prepare=partial(model.set_attn_implementation, attention),
                    )
                )
    return rows


def check_tokens(rows: list[Row]) -> None:
    """Exits where the tokens of the two implementations differ."""
    for row in rows:
        if row.name.startswith("original_beam_search, fp32, sdpa"):
            expected = reference_of(row, rows).run()
            found = row.run()[:, 1:]
            found = found.masked_fill(found == 1, 0)
            if not torch.equal(expected[:, : found.shape[1]], found):
                sys.exit("The tokens differ from the original implementation's: nothing was measured.")


def speed_table(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        num_tokens = row.result.shape[-1]
        num_steps = num_tokens - (num_tokens > MAX_NEW_TOKENS)  # <bos> is no step
        lines.append(
            [
                row.group,
                row.name,
                seconds_range(row),
                f"{int(row.group) / row.median:.1f}",
                f"{1000 * row.median / num_steps:.1f}",
                f"{reference_of(row, rows).median / row.median:.2f}",
            ]
        )
    return markdown_table(
        ["batch", "how", "seconds (min to max)", "captions/s", "ms/step", "times the reference"], lines
    )


def flops_table() -> list[str]:
    """A line for each of the original's modes; the `_lrp` modes are the same networks."""
    lines = []
    for mode in ("base", "difnet"):
        model = convert_state_dict(original_state_dict(mode)).model()
        features = {"grid_features": torch.rand(1, 49, 2048), "segmentation_features": torch.rand(1, 133, 7, 7)}
        twenty_words = {"min_new_tokens": MAX_NEW_TOKENS, "max_new_tokens": MAX_NEW_TOKENS}
        counts = []
        for function, arguments in (
            (model.get_encoder(), {}),
            (model, {"decoder_input_ids": torch.full((1, MAX_NEW_TOKENS), 5)}),
            (model.generate, {"custom_generate": original_beam_search, "num_beams": 5, **twenty_words}),
        ):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                function(**features, **arguments)
            counts.append(f"{counter.get_total_flops() / 1e9:.2f} GFLOP")
        size = sum(parameter.numel() for parameter in model.parameters())
        lines.append([f"`{mode}`, `{mode}_lrp`", f"{size:,}", *counts])
    columns = ["encoder, one image", "caption of 20 tokens, teacher-forced", "beam 5, 20 steps"]
    return markdown_table(["mode", "parameters", *columns], lines)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 50])
    parser.add_argument("--compile", action="store_true", help="time the compiled original_beam_search on a CPU, too")
    add_timing_options(parser)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    original = original_captioner(options.original, device) if options.original else None
    models = {
        name: convert_state_dict(original_state_dict("difnet")).model().to(device, dtype)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    rows = caption_rows(models, options.batch_sizes, original, device, options.compile)
    if original is not None:
        check_tokens(rows)
    matmul = measure(rows, options.repeats, device)
    notes = [f"medians of {options.repeats} runs, taken in turn; up to {MAX_NEW_TOKENS} tokens"]
    lines = [
        *header("Captioning at full size", "generation.py", options.original, device, matmul, notes),
        *speed_table(rows),
        "",
        f"The reference is the first row of its batch size: {rows[0].name}.",
        "",
        "## Parameters and FLOPs (PyTorch's counter)",
        "",
        *flops_table(),
    ]
    write_report(lines, options.output or results_path("generation", device.type))


if __name__ == "__main__":
    main()
