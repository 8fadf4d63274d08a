"""Segmentation models and object detectors of Transformers in less time, for inference on a CPU.

The original (mrwu-mac/DIFNet, CVPR 2022) has no segmentation model; see `segmentation_difnet.py`. Three things make
those of Transformers slow on a CPU, and each is replaced by an equal form:

- the multi-scale deformable attention of Mask2Former, OneFormer and Deformable DETR samples every channel of every
  head at scattered places (`grid_sample`). Here a sample is a row of channels, and a weighted sum of rows is what
  `embedding_bag` computes;
- float32 matrices go to MKL, which uses half of what some processors can do (`linear_difnet.py`);
- with bfloat16, matrices and convolutions are multiplied in it (autocast); sums, norms and softmax stay in float32.

Nothing of a model's weights is changed.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .linear_difnet import Linear

SAMPLING = "multi_scale_deformable_attention"  # Mask2Former's and OneFormer's function


class DeformableSampling(nn.Module):
    """Takes the place of the `MultiScaleDeformableAttention` modules of Deformable DETR and its relatives.

    Args:
        usual: the module, which other devices than CPUs keep.
    """

    def __init__(self, usual: nn.Module) -> None:
        super().__init__()
        self.usual = usual

    def forward(
        self,
        value: torch.Tensor,
        value_spatial_shapes: torch.Tensor,
        value_spatial_shapes_list: Sequence[tuple[int, int]],
        level_start_index: torch.Tensor,
        sampling_locations: torch.Tensor,
        attention_weights: torch.Tensor,
        im2col_step: int,
    ) -> torch.Tensor:
        if value.device.type == "cpu":
            return deformable_attention(value, value_spatial_shapes_list, sampling_locations, attention_weights)
        return self.usual(
            value,
            value_spatial_shapes,
            value_spatial_shapes_list,
            level_start_index,
            sampling_locations,
            attention_weights,
            im2col_step,
        )


def deformable_attention(
    value: torch.Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    """Weighted sums of bilinear samples of feature maps (Zhu et al., "Deformable DETR", ICLR 2021, equation 3).

    A sample is a weighted sum of four cells, zero outside of the map; that of a query and head is one of
    4 * levels * points rows.

    Args:
        value: `(B, S, heads, D)`, the cells of all maps, row by row.
        spatial_shapes: height and width of each map.
        sampling_locations: `(B, Q, heads, levels, points, 2)`, x and y, 0 to 1.
        attention_weights: `(B, Q, heads, levels, points)`.

    Returns:
        `(B, Q, heads * D)`.
    """
    batch_size, num_cells, num_heads, head_size = value.shape
    shape = (*sampling_locations.shape[:4], 4, sampling_locations.shape[4])  # (B, Q, heads, levels, corners, points)
    rows = torch.empty(shape, dtype=torch.int32, device=value.device)
    weights = torch.empty(shape, dtype=value.dtype, device=value.device)
    # Row of a cell's head in `value`: ((image * S) + cell) * heads + head.
    image = torch.arange(batch_size, dtype=torch.int32, device=value.device).view(-1, 1, 1, 1) * num_cells
    head = torch.arange(num_heads, dtype=torch.int32, device=value.device).view(1, 1, -1, 1)
    first_cell = 0
    for level, (height, width) in enumerate(spatial_shapes):
        locations = sampling_locations[:, :, :, level].float()
        columns = corners(locations[..., 0] * width - 0.5, width)
        lines = corners(locations[..., 1] * height - 0.5, height)
        offset = (image + first_cell) * num_heads + head
        places = [(column * num_heads + offset, of_column) for column, of_column in columns]
        for index, (line, of_line) in enumerate(lines):
            of_line = of_line * attention_weights[:, :, :, level]
            line_start = line * (width * num_heads)
            for side, (place, of_column) in enumerate(places):
                torch.add(line_start, place, out=rows[:, :, :, level, 2 * index + side])
                weights[:, :, :, level, 2 * index + side] = of_line * of_column
        first_cell += height * width
    samples = F.embedding_bag(
        rows.flatten(3).flatten(0, 2),
        value.reshape(-1, head_size),
        mode="sum",
        per_sample_weights=weights.flatten(3).flatten(0, 2),
    )  # (B * Q * heads, D)
    return samples.view(batch_size, -1, num_heads * head_size)


def corners(positions: torch.Tensor, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The two cells around positions on a line of cells, int32, and their shares; those outside have none."""
    low = positions.floor()
    share = positions - low
    result = []
    for cell, weight in ((low, 1 - share), (low + 1, share)):
        inside = cell.clamp(0, length - 1)
        result.append((inside.int(), torch.where(inside == cell, weight, 0.0)))
    return result


def use_fast_form(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Lets a model run in its faster form: float32 results differ by rounding.

    Args:
        model: in eval mode; changed in place. Its weights stay as they are, under their names.
        dtype: bfloat16 for products of matrices and convolutions; everything else, and what the model returns, is
            float32.
    """
    functions: list[Any] = []
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                child.__class__ = Linear
            elif type(child).__name__ == "MultiScaleDeformableAttention":
                setattr(module, name, DeformableSampling(child))
        source = sys.modules[type(module).__module__]
        if type(module).__name__.endswith("MultiscaleDeformableAttention") and hasattr(source, SAMPLING):
            functions = [source]
    forward = model.forward

    @functools.wraps(forward)
    def fast_forward(*args: Any, **kwargs: Any) -> Any:
        device = model.device.type
        with contextlib.ExitStack() as stack:
            if device == "cpu":  # on GPUs a kernel for each sample is the better form
                for source in functions:
                    stack.enter_context(own_sampling(source))
            if dtype != torch.float32:
                stack.enter_context(torch.autocast(device, dtype))
            outputs = forward(*args, **kwargs)
        for key, value in outputs.items():
            if isinstance(value, torch.Tensor) and value.dtype == dtype:
                outputs[key] = value.float()
        return outputs

    model.forward = fast_forward
    return model


@contextlib.contextmanager
def own_sampling(module: Any) -> Iterator[None]:
    """`deformable_attention` in the place of a module's function for a while."""
    usual = getattr(module, SAMPLING)
    setattr(module, SAMPLING, deformable_attention)
    try:
        yield
    finally:
        setattr(module, SAMPLING, usual)


def resize_shortest_edge_to(processor: Any, image_size: int) -> None:
    """Lets an image processor, or the one of a whole processor, resize the shortest edge to another size.

    The other edge keeps its ratio to it, or its limit the ratio to the former size.
    """
    processor = getattr(processor, "image_processor", processor)
    size = {key: value for key, value in dict(processor.size).items() if value is not None}
    shortest = min(size.values())
    processor.size = {key: round(value * image_size / shortest) for key, value in size.items()}


__all__ = ["deformable_attention", "resize_shortest_edge_to", "use_fast_form"]
