"""Weights that are not numbers are refused before anything is done with them."""

import pytest
import torch
from torch import nn

from modeling_difnet.weights_difnet import check_finite_weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_named_with_file_and_tensor(dtype, value):
    weight = torch.ones(3, 4, dtype=dtype)
    weight[1, 2] = value
    with pytest.raises(ValueError, match=r"^a/b: NaN or infinity among the weights: x\.weight \(1 of 12 values\)\. "):
        check_finite_weights({"x.weight": weight, "x.bias": torch.ones(3)}, "a/b")


def test_a_list_of_many_tensors_is_cut():
    weights = {f"layer.{number}": torch.tensor([float("nan")]) for number in range(500)}
    with pytest.raises(ValueError, match=r"layer\.2 \(1 of 1 values\) and 497 more tensors") as error:
        check_finite_weights(weights, "a")
    assert len(str(error.value)) < 300


def test_large_numbers_integers_sparse_and_empty_tensors_are_fine():
    largest = torch.full((9,), torch.finfo(torch.float64).max, dtype=torch.float64)  # whose sum is infinite
    sparse = torch.sparse_coo_tensor([[10**9]], [1.0], (2 * 10**9,), check_invariants=True)
    check_finite_weights({"a": largest, "b": torch.arange(3), "c": torch.empty(0), "d": sparse, "e": "text"}, "a")


def test_a_module():
    module = nn.Linear(2, 2)
    check_finite_weights(module, "a")
    module.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="bias"):
        check_finite_weights(module, "a")
