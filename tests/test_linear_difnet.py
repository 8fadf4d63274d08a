"""Linear layers by oneDNN: those of PyTorch, to rounding, wherever PyTorch's are not needed."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import random_captions, random_features, random_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modeling_difnet import DifnetConfig
from modeling_difnet.linear_difnet import Linear, linear, use_onednn

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


def tensors(*shape: int, with_bias: bool = True) -> list[torch.Tensor | None]:
    """States (.., 6), a weight (5, 6) and a bias (5)."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((*shape, 6), (5, 6), (5,))
    made = [torch.randn(each, generator=generator, requires_grad=True) for each in shapes]
    return made if with_bias else [*made[:2], None]


@needs_onednn
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 2), (0,), ()])
def test_values_and_gradients(shape: tuple[int, ...], with_bias: bool) -> None:
    inputs = tensors(*shape, with_bias=with_bias)
    found, expected = linear(*inputs), nn.functional.linear(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    known = [each for each in inputs if each is not None]
    weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), known),
        torch.autograd.grad((expected * weights).sum(), known),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_strides_do_not_matter() -> None:
    states, weight, _ = (each.detach() for each in tensors(4))
    expected = states @ weight.t()
    turned = [states.t().contiguous().t(), states.repeat_interleave(2, 0)[::2], states.repeat_interleave(2, 1)[:, ::2]]
    for each in turned:
        torch.testing.assert_close(linear(each, weight.t().contiguous().t()), expected, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_second_derivatives() -> None:
    def penalty(function: object) -> torch.Tensor:
        inputs = tensors(4)
        (gradient,) = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs[0], create_graph=True)
        return torch.cat([each.flatten() for each in torch.autograd.grad(gradient.pow(2).sum(), inputs)])

    torch.testing.assert_close(penalty(linear), penalty(nn.functional.linear), rtol=1e-4, atol=1e-3)


@contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


class TestWhereItIsPyTorchs:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_other_types(self, dtype: torch.dtype) -> None:
        states, weight, bias = (each.detach().to(dtype) for each in tensors(4))
        assert not use_onednn(states, weight, bias)
        assert torch.equal(linear(states, weight, bias), nn.functional.linear(states, weight, bias))

    def test_mixed_types_are_refused_alike(self) -> None:
        states, weight, bias = tensors(4)
        with pytest.raises(RuntimeError, match="dtype"):
            linear(states, weight.double(), bias.double())

    @pytest.mark.parametrize(
        "context", [autocast, lambda: FlopCounterMode(display=False)], ids=["autocast", "counter"]
    )
    def test_under_autocast_and_counters(self, context: object) -> None:
        inputs = tensors(4)
        with context():
            assert not use_onednn(*inputs)
            linear(*inputs)

    def test_subclasses(self) -> None:
        class Marked(torch.Tensor):
            pass

        states, weight, _ = tensors(4)
        assert not use_onednn(states.as_subclass(Marked), weight)

    def test_transformed_functions(self) -> None:
        states, weight, bias = (each.detach() for each in tensors(4))
        jacobian = torch.func.jacrev(lambda each: linear(each, weight, bias))(states[0])
        torch.testing.assert_close(jacobian, weight)
        torch.testing.assert_close(torch.func.vmap(lambda each: linear(each, weight))(states), states @ weight.t())

    def test_gradients_in_eval_mode(self) -> None:
        """They can be differentiated forward, too."""
        layer, states = Linear(6, 5).eval(), torch.ones(1, 6)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(states, torch.ones(1, 6))
            tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
        torch.testing.assert_close(tangent, layer.weight.sum(1).unsqueeze(0))


@needs_onednn
def test_a_training_step_has_the_gradients_of_pytorchs_layers(tiny_config: DifnetConfig) -> None:
    """All projections of the network: in training mode, without dropout, as in eval mode."""
    tiny_config.dropout = tiny_config.attention_dropout = 0.0
    model, captions = random_model(tiny_config), random_captions(tiny_config)
    results = []
    for mode in (True, False):
        model.train(mode).zero_grad()
        model.sequence_log_probs(captions, **random_features(tiny_config)).sum().backward()
        results.append({name: each.grad for name, each in model.named_parameters()})
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-3, atol=1e-4, msg=name)
