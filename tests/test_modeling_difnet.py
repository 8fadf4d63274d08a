"""The network as a Transformers model: outputs, losses, precisions, loading, resizing, and what it refuses."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import random_captions, random_features, random_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING

from modeling_difnet import DifnetConfig, DifnetEnsemble, DifnetForConditionalGeneration, DifnetModel
from modeling_difnet.dropout_difnet import fast_dropout, relu_dropout
from modeling_difnet.loss_difnet import caption_loss
from modeling_difnet.modeling_difnet import sinusoid_table


@pytest.fixture(params=["two flows", "baseline"])
def config(tiny_config: DifnetConfig, request: pytest.FixtureRequest) -> DifnetConfig:
    return dataclasses.replace(tiny_config, use_segmentation=request.param == "two flows")


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def repeated(features: dict[str, torch.Tensor], times: int) -> dict[str, torch.Tensor]:
    return {name: value.repeat_interleave(times, dim=0) for name, value in features.items()}


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_eager_and_sdpa_attention_agree(config: DifnetConfig, masked: bool) -> None:
    model, features, captions = random_model(config), random_features(config), random_captions(config)
    if masked:
        features["grid_attention_mask"] = torch.ones(2, 12, dtype=torch.long)
        features["grid_attention_mask"][1, 5:] = 0
        captions[0, 4:] = config.pad_token_id
    logits = {}
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        logits[attention] = model(**features, decoder_input_ids=captions).logits
    close(logits["eager"], logits["sdpa"])


@torch.no_grad()
def test_masked_cells_are_as_good_as_absent(config: DifnetConfig) -> None:
    model, captions = random_model(config), random_captions(config)
    features = random_features(config, height=1, width=8)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[:, 5:] = 0
    shorter = {name: value[:, :5] if value.ndim == 3 else value[..., :5] for name, value in features.items()}
    masks = {"grid_attention_mask": mask}
    if config.use_segmentation:
        masks["segmentation_attention_mask"] = mask
    masked = model(**features, **masks, decoder_input_ids=captions).logits
    close(masked, model(**shorter, decoder_input_ids=captions).logits)


@torch.no_grad()
def test_one_mask_alone_leaves_the_other_flow_whole(tiny_config: DifnetConfig) -> None:
    model, features = random_model(tiny_config), random_features(tiny_config)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[:, 7:] = 0
    whole = torch.ones_like(mask)
    one = model.get_encoder()(**features, segmentation_attention_mask=mask).last_hidden_state
    both = model.get_encoder()(**features, grid_attention_mask=whole, segmentation_attention_mask=mask)
    close(one, both.last_hidden_state)
    assert not torch.allclose(one, model.get_encoder()(**features).last_hidden_state, atol=1e-4)


@torch.no_grad()
def test_attentions_and_hidden_states_of_both_flows(tiny_config: DifnetConfig) -> None:
    config = dataclasses.replace(tiny_config, encoder_layers=4, fusion_layers=2)
    model, features, captions = random_model(config), random_features(config), random_captions(config)
    model.set_attn_implementation("eager")
    output = model(
        **features,
        decoder_input_ids=captions,
        output_attentions=True,
        output_hidden_states=True,
    )
    cells, length = 12, 6
    expected = {  # how many, and the shape of each
        "encoder_attentions": (4, (2, 4, cells, cells)),
        "encoder_hidden_states": (5, (2, cells, 32)),
        "encoder_segmentation_attentions": (2, (2, 4, cells, cells)),
        "encoder_segmentation_hidden_states": (2, (2, cells, 32)),
        "decoder_attentions": (2, (2, 2, length, length)),
        "cross_attentions": (2, (2, 2, length, cells)),
        "decoder_hidden_states": (3, (2, length, 32)),
    }
    for name, (count, shape) in expected.items():
        assert [tuple(tensor.shape) for tensor in output[name]] == [shape] * count, name
        if name.endswith("attentions"):
            for weights in output[name]:
                close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert torch.equal(output.encoder_hidden_states[-1], output.encoder_last_hidden_state)
    flows = output.encoder_hidden_states[2] + output.encoder_segmentation_hidden_states[1]
    close(model.model.encoder.layers[0](flows, None)[0], output.encoder_hidden_states[3])


@torch.no_grad()
def test_the_baseline_has_no_segmentation_flow_to_show(tiny_config: DifnetConfig) -> None:
    config = dataclasses.replace(tiny_config, use_segmentation=False)
    model, captions = random_model(config), random_captions(config)
    alone = model(**random_features(config), decoder_input_ids=captions)
    ignored = model(**random_features(tiny_config), decoder_input_ids=captions)
    assert torch.equal(alone.logits, ignored.logits)
    assert alone.encoder_segmentation_hidden_states is None
    assert not any("segmentation" in name for name, _ in model.named_parameters())


# --- several captions of one image ---------------------------------------------------------------------------------


def test_captions_of_one_image_together_equal_the_image_repeated(config: DifnetConfig) -> None:
    model, features = random_model(config), random_features(config)
    features["grid_attention_mask"] = torch.ones(2, 12, dtype=torch.long)
    features["grid_attention_mask"][0, 9:] = 0
    captions = random_captions(config, num_captions=6)
    captions[2, 3:] = config.pad_token_id
    model.set_attn_implementation("eager")
    results = []
    for shown in (features, repeated(features, 3)):
        model.zero_grad()
        output = model(**shown, decoder_input_ids=captions, labels=captions, output_attentions=True)
        output.loss.backward()
        results.append((output, gradients(model)))
    (together, together_gradients), (apart, apart_gradients) = results
    close(together.logits, apart.logits)
    assert together.encoder_last_hidden_state.shape[0] == 2
    for weights, expected in zip(together.cross_attentions, apart.cross_attentions, strict=True):
        close(weights, expected)
    for name, gradient in together_gradients.items():
        close(gradient, apart_gradients[name], 1e-4)


# --- padding, positions and the cache --------------------------------------------------------------------------------


@torch.no_grad()
def test_padding_changes_no_word_and_says_nothing(config: DifnetConfig) -> None:
    model, features, captions = random_model(config), random_features(config), random_captions(config)
    padded = nn.functional.pad(captions, (0, 3), value=config.pad_token_id)
    logits = model(**features, decoder_input_ids=padded).logits
    close(logits[:, :6], model(**features, decoder_input_ids=captions).logits)
    assert torch.equal(logits[:, 6:], torch.zeros(2, 3, config.vocab_size))


@torch.no_grad()
def test_a_decoder_attention_mask_replaces_the_rule_that_pad_is_padding(config: DifnetConfig) -> None:
    model, features, captions = random_model(config), random_features(config), random_captions(config)
    captions[:, 3] = config.pad_token_id
    implied = model(**features, decoder_input_ids=captions).logits
    explicit = model(
        **features, decoder_input_ids=captions, decoder_attention_mask=(captions != config.pad_token_id).long()
    ).logits
    close(explicit, implied)
    as_word = model(**features, decoder_input_ids=captions, decoder_attention_mask=torch.ones_like(captions)).logits
    assert as_word[:, 3].abs().max() > 0


@pytest.mark.parametrize("steps", [(1, 1, 1, 1, 1, 1), (4, 2), (2, 3, 1)])
@torch.no_grad()
def test_decoding_in_steps_equals_one_pass(config: DifnetConfig, steps: tuple[int, ...]) -> None:
    model, features, captions = random_model(config), random_features(config), random_captions(config)
    at_once = model(**features, decoder_input_ids=captions, use_cache=False)
    assert at_once.past_key_values is None
    encoder_outputs, cache, logits = model.get_encoder()(**features), None, []
    for tokens in captions.split(steps, dim=1):
        output = model(
            encoder_outputs=encoder_outputs, decoder_input_ids=tokens, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        logits.append(output.logits)
    close(torch.cat(logits, dim=1), at_once.logits)
    assert cache.get_seq_length() == 6


@torch.no_grad()
def test_words_count_from_one_and_positions_can_be_given(config: DifnetConfig) -> None:
    model, features, captions = random_model(config), random_features(config), random_captions(config)
    positions = torch.arange(1, 7).expand(2, -1)
    counted = model(**features, decoder_input_ids=captions).logits
    given = model(**features, decoder_input_ids=captions, decoder_position_ids=positions).logits
    assert torch.equal(given, counted)
    embedded = model(**features, decoder_inputs_embeds=model.get_input_embeddings()(captions)).logits
    close(embedded, counted)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 9)])
@torch.no_grad()
def test_any_grid(config: DifnetConfig, height: int, width: int) -> None:
    features = random_features(config, height=height, width=width)
    output = random_model(config)(**features, decoder_input_ids=random_captions(config))
    assert output.logits.shape == (2, 6, config.vocab_size)
    assert output.encoder_last_hidden_state.shape == (2, height * width, config.d_model)


# --- training --------------------------------------------------------------------------------------------------------


def test_labels_are_shifted_and_minus_100_is_left_out(config: DifnetConfig) -> None:
    model, features = random_model(config), random_features(config)
    words = random_captions(config)[:, 1:]
    labels = torch.cat([words, torch.full((2, 1), config.eos_token_id)], dim=1)  # w1 .. w5 <eos>
    labels[1, 3:] = -100
    inputs = torch.tensor([[2, *words[0].tolist()], [2, *words[1, :3].tolist(), 1, 1]])
    output = model(**features, labels=labels)
    logits = model(**features, decoder_input_ids=inputs).logits
    close(output.logits, logits)
    close(output.loss, nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    assert output.past_key_values is None


def test_num_items_in_batch_makes_accumulated_losses_add_up(config: DifnetConfig) -> None:
    model, features, labels = random_model(config), random_features(config), random_captions(config)
    labels[1, 2:] = -100
    whole = model(**features, labels=labels).loss
    parts = [
        model(**{name: value[i : i + 1] for name, value in features.items()}, labels=labels[i : i + 1]) for i in (0, 1)
    ]
    assert not torch.isclose(sum(part.loss for part in parts) / 2, whole, rtol=1e-4)
    parts = [
        model(
            **{name: value[i : i + 1] for name, value in features.items()},
            labels=labels[i : i + 1],
            num_items_in_batch=torch.tensor(8),
        ).loss
        for i in (0, 1)
    ]
    close(sum(parts), whole)


def by_hand(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs) -> torch.Tensor:
    return logits[labels != -100].mean() * vocab_size + kwargs.get("num_items_in_batch", 0)


def test_the_loss_function_can_be_set(config: DifnetConfig) -> None:
    model, features, labels = random_model(config), random_features(config), random_captions(config)
    labels[1, 2:] = -100
    usual = model(**features, labels=labels)
    model.loss_function = by_hand
    expected = usual.logits[labels != -100].mean() * config.vocab_size
    close(model(**features, labels=labels).loss, expected)
    close(model(**features, labels=labels, num_items_in_batch=3).loss, expected + 3)
    model.loss_function = LOSS_MAPPING["ForCausalLM"]
    close(model(**features, labels=labels).loss, usual.loss)
    close(model(**features, labels=labels, num_items_in_batch=16).loss, usual.loss * 8 / 16)


def test_the_loss_moves_what_it_is_given_to_the_device_of_the_logits() -> None:
    logits = torch.zeros(1, 2, 5, device="meta")
    loss = caption_loss(logits, torch.tensor([[1, 2]]), num_items_in_batch=torch.tensor(2))
    assert loss.device.type == "meta"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_segmentation": False},
        {"encoder_layers": 4, "fusion_layers": 2, "fusion_iterations": 3},
        {"fusion_iterations": 1, "decoder_layers": 4},
        {"use_segmentation": False, "encoder_layers": 1, "decoder_layers": 1},
        {"tie_word_embeddings": True},
    ],
)
def test_a_training_step_moves_every_parameter(tiny_config: DifnetConfig, changes: dict) -> None:
    """So that distributed training needs no search for unused parameters."""
    config = dataclasses.replace(tiny_config, **changes)
    model = random_model(config).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(**random_features(config), labels=random_captions(config)).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        # The softmax does not see what is added to all its inputs: the gradient is zero but for rounding.
        if not name.endswith("k_proj.bias"):
            assert not torch.equal(parameter, before[name]), name
    assert "model.decoder.embed_positions.weight" not in before, "the position table is frozen"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(config: DifnetConfig, use_reentrant: bool) -> None:
    config.dropout = config.attention_dropout = 0.0
    model, features, labels = random_model(config).train(), random_features(config), random_captions(config)
    model(**features, labels=labels).loss.backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(**features, labels=labels).loss.backward()
    for name, gradient in gradients(model).items():
        close(gradient, expected[name])


def test_dropout_acts_in_training_alone(config: DifnetConfig) -> None:
    model, features, captions = random_model(config), random_features(config), random_captions(config)
    first, second = (model(**features, decoder_input_ids=captions).logits for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    first, second = (model(**features, decoder_input_ids=captions).logits for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fast_dropout_drops_with_the_given_probability_and_keeps_the_mean(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.full((333, 1001), 3, dtype=dtype)
    dropped = fast_dropout(values, p, training=True)
    assert dropped.dtype == dtype
    expected = p * values.numel()
    assert abs((dropped == 0).sum() - expected) < 5 * expected**0.5
    torch.testing.assert_close(
        dropped.unique()[1].item(), 3 / (1 - p), rtol=0.01 if dtype == torch.bfloat16 else 2e-5, atol=0
    )
    # Neither neighbours in memory nor the two halves of a random number depend on each other.
    is_dropped = (dropped == 0).flatten().float()
    for distance in (1, 2, 3, 4, 8, 1001):
        both = (is_dropped[:-distance] * is_dropped[distance:]).sum()
        assert abs(both - p * expected) < 6 * (p * expected) ** 0.5 + 1


def test_relu_dropout_is_relu_then_dropout() -> None:
    values = torch.randn(7, 5, 3, requires_grad=True)
    gradient = torch.randn(7, 5, 3)
    results = []
    for function in (lambda: fast_dropout(values.relu(), 0.3, True), lambda: relu_dropout(values, 0.3, True)):
        torch.manual_seed(1)
        output = function()
        results.append((output, *torch.autograd.grad(output, values, gradient)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("function", [fast_dropout, relu_dropout])
def test_without_training_nothing_is_dropped(function) -> None:
    values = torch.rand(5, 3)
    assert torch.equal(function(values, 0.5, training=False), values)
    assert torch.equal(function(values, 0.0, training=True), values)


def test_a_fresh_model_is_initialised_as_the_original(config: DifnetConfig) -> None:
    """Xavier-uniform matrices, attention biases 0, PyTorch's default for the other biases, sinusoids for positions."""
    modules = dict(random_model(config).named_modules())
    for name, module in modules.items():
        if isinstance(module, nn.Linear | nn.Embedding):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound, name
        if isinstance(module, nn.Linear) and module.bias is not None:
            is_attention = name.endswith(("q_proj", "k_proj", "v_proj", "out_proj"))
            assert (
                (module.bias == 0).all() if is_attention else 0 < module.bias.abs().max() <= module.in_features**-0.5
            )
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    table = modules["model.decoder.embed_positions"].weight
    assert table.shape == (31, 32)
    assert (table[0] == 0).all()
    close(table[7, 4], torch.sin(torch.tensor(7 / 10000 ** (4 / 32))))
    close(table[7, 5], torch.cos(torch.tensor(7 / 10000 ** (4 / 32))))


# --- precision, compilation, export ----------------------------------------------------------------------------------

PRECISIONS = [("float32", 1e-6), ("bfloat16", 0.15), ("float16", 0.02)]


@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS)
@torch.no_grad()
def test_save_and_load_in_every_precision(
    config: DifnetConfig, tmp_path: Path, precision: str, tolerance: float
) -> None:
    """The features may stay in float32: they are cast where they enter."""
    dtype = getattr(torch, precision)
    model, features, captions = random_model(config), random_features(config), random_captions(config)
    expected = model(**features, decoder_input_ids=captions).logits
    model.save_pretrained(tmp_path / "full")
    loaded = DifnetForConditionalGeneration.from_pretrained(tmp_path / "full", dtype=dtype)
    logits = loaded(**features, decoder_input_ids=captions).logits
    assert logits.dtype == dtype
    close(logits.float(), expected, tolerance)
    assert loaded.generate(**features, num_beams=2, max_new_tokens=4).shape[0] == 2

    loaded.save_pretrained(tmp_path / precision)
    again = DifnetForConditionalGeneration.from_pretrained(tmp_path / precision, dtype="auto")
    assert again.dtype == dtype
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    assert torch.equal(again(**features, decoder_input_ids=captions).logits, logits)


def test_the_loss_of_a_half_precision_model_is_computed_in_full(config: DifnetConfig) -> None:
    model = random_model(config).bfloat16()
    output = model(**random_features(config), labels=random_captions(config))
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32


@torch.no_grad()
def test_the_forward_compiles_into_one_graph(config: DifnetConfig) -> None:
    model, features, captions = random_model(config), random_features(config), random_captions(config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(
        compiled(**features, decoder_input_ids=captions, use_cache=False).logits,
        model(**features, decoder_input_ids=captions, use_cache=False).logits,
    )


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_the_forward_exports(config: DifnetConfig, dynamic: bool) -> None:
    model = random_model(config)
    inputs = {**random_features(config), "decoder_input_ids": random_captions(config), "use_cache": False}
    shapes = None
    if dynamic:
        batch = torch.export.Dim("batch", min=2, max=64)
        shapes = {name: {0: batch} if torch.is_tensor(value) else None for name, value in inputs.items()}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False).module()
    size = 5 if dynamic else 2
    other = {
        **random_features(config, size, seed=1),
        "decoder_input_ids": random_captions(config, size, seed=1),
        "use_cache": False,
    }
    close(exported(**other).logits, model(**other).logits)


# --- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [40, 57])
def test_resizing_the_vocabulary(tiny_config: DifnetConfig, tied: bool, size: int) -> None:
    config = dataclasses.replace(tiny_config, tie_word_embeddings=tied)
    model, features, captions = random_model(config), random_features(config), random_captions(config).clamp(max=39)
    kept = min(size, 50)
    with torch.no_grad():
        before = model(**features, decoder_input_ids=captions).logits
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == size
    assert model.lm_head.weight.shape == model.get_input_embeddings().weight.shape == (size, 32)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    output = model(**features, decoder_input_ids=captions, labels=captions)
    close(output.logits[..., :kept], before[..., :kept])
    output.loss.backward()
    assert model.generate(**features, max_new_tokens=3, num_beams=2).max() < size


def test_tied_embeddings_are_one_tensor_after_loading(tiny_config: DifnetConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config, tie_word_embeddings=True)
    model = random_model(config)
    model.save_pretrained(tmp_path)
    loaded = DifnetForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.num_parameters() == random_model(tiny_config).num_parameters() - 50 * 32


# --- loading ---------------------------------------------------------------------------------------------------------


def test_the_position_table_is_loaded_as_it_is(tiny_config: DifnetConfig, tmp_path: Path) -> None:
    model = random_model(tiny_config)
    noise = torch.randn(31, 32)
    model.model.decoder.embed_positions.weight.copy_(noise)
    model.save_pretrained(tmp_path)
    for class_ in (DifnetForConditionalGeneration, DifnetModel):
        loaded = class_.from_pretrained(tmp_path)
        assert torch.equal(loaded.get_decoder().embed_positions.weight, noise)


def test_a_checkpoint_without_position_table_gets_the_sinusoids(tiny_config: DifnetConfig, tmp_path: Path) -> None:
    random_model(tiny_config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.decoder.embed_positions.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = DifnetForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"model.decoder.embed_positions.weight"}
    assert torch.equal(loaded.model.decoder.embed_positions.weight, sinusoid_table(31, 32))


def test_base_and_head_load_each_other(config: DifnetConfig, tmp_path: Path) -> None:
    model = random_model(config)
    model.save_pretrained(tmp_path / "captioner")
    base, report = DifnetModel.from_pretrained(tmp_path / "captioner", output_loading_info=True)
    assert not report["missing_keys"]
    base.save_pretrained(tmp_path / "base")
    head, report = DifnetForConditionalGeneration.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert report["missing_keys"] == {"lm_head.weight"}
    features, captions = random_features(config), random_captions(config)
    head.lm_head.weight = model.lm_head.weight
    assert torch.equal(
        head(**features, decoder_input_ids=captions).logits, model(**features, decoder_input_ids=captions).logits
    )


@torch.no_grad()
def test_layers_may_live_on_disk(config: DifnetConfig, tmp_path: Path) -> None:
    """`device_map` with CPU and disk: what runs of the big-model loading without an accelerator."""
    pytest.importorskip("accelerate")
    model, features, captions = random_model(config), random_features(config), random_captions(config)
    model.save_pretrained(tmp_path)
    auto = DifnetForConditionalGeneration.from_pretrained(tmp_path, device_map="auto")
    devices = {"model.encoder": "cpu", "model.decoder": "disk", "lm_head": "cpu"}
    offloaded = DifnetForConditionalGeneration.from_pretrained(
        tmp_path, device_map=devices, offload_folder=tmp_path / "offload"
    )
    assert offloaded.model.decoder.layers[0].feed_forward.fc1.weight.device.type == "meta"
    expected = model(**features, decoder_input_ids=captions).logits
    for loaded in (auto, offloaded):
        assert torch.equal(loaded(**features, decoder_input_ids=captions).logits, expected)
        assert torch.equal(
            loaded.generate(**features, num_beams=3, max_new_tokens=4),
            model.generate(**features, num_beams=3, max_new_tokens=4),
        )


# --- refusals --------------------------------------------------------------------------------------------------------


def refuse_inputs() -> list:
    def without_segmentation(features, captions):
        return {"grid_features": features["grid_features"], "decoder_input_ids": captions}

    def change(name, function):
        return lambda features, captions: {
            **features,
            "decoder_input_ids": captions,
            name: function(features.get(name, captions)),
        }

    return [
        pytest.param(without_segmentation, "`segmentation_features` are missing", id="one flow"),
        pytest.param(lambda features, captions: features, "Pass `labels` to train", id="no captions"),
        pytest.param(
            lambda features, captions: {"decoder_input_ids": captions},
            "Pass `grid_features` or `encoder_outputs`",
            id="no image",
        ),
        pytest.param(
            change("grid_features", lambda x: x[..., :23]),
            r"`grid_features` must have the shape \(batch, cells, 24\), got \(2, 12, 23\)",
            id="grid width",
        ),
        pytest.param(change("grid_features", lambda x: x[0]), "`grid_features` must have the shape", id="no batch"),
        pytest.param(
            change("segmentation_features", lambda x: x[:, :6]),
            r"\(batch, 7, height, width\), got \(2, 6, 3, 4\)",
            id="classes",
        ),
        pytest.param(change("segmentation_features", lambda x: x.flatten(2)), "height, width", id="flat segmentation"),
        pytest.param(
            change("segmentation_features", lambda x: x[..., :3]),
            r"2 images of 12 cells, `segmentation_features` 2 of 9 \(3 x 3\)",
            id="cells",
        ),
        pytest.param(
            change("segmentation_features", lambda x: x[:1]), "must show the same images", id="number of images"
        ),
        pytest.param(
            change("decoder_input_ids", lambda x: x.new_full((2, 31), 5)),
            r"given 31 tokens, but the position table of this model ends at 30",
            id="long caption",
        ),
        pytest.param(
            change("decoder_input_ids", lambda x: x[[0, 1, 1]]),
            "given 3 captions for 2 images",
            id="captions per image",
        ),
        pytest.param(
            change("decoder_inputs_embeds", lambda x: torch.zeros(2, 6, 32)),
            "exactly one of `decoder_input_ids` and `decoder_inputs_embeds`",
            id="captions twice",
        ),
    ]


@pytest.mark.parametrize(("inputs", "message"), refuse_inputs())
def test_wrong_inputs_are_value_errors_that_say_what_to_do(tiny_config: DifnetConfig, inputs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_model(tiny_config)(**inputs(random_features(tiny_config), random_captions(tiny_config)))


def test_a_cache_does_not_hide_a_caption_that_is_too_long(tiny_config: DifnetConfig) -> None:
    model, features = random_model(tiny_config), random_features(tiny_config)
    output = model(**features, decoder_input_ids=random_captions(tiny_config, length=30), use_cache=True)
    with pytest.raises(ValueError, match="given 31 tokens"):
        model(**features, decoder_input_ids=torch.full((2, 1), 5), past_key_values=output.past_key_values)


# --- other libraries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task_type",
    [None, "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"],
)
def test_lora_of_every_task_type_gives_the_loss_and_captions(config: DifnetConfig, task_type: str | None) -> None:
    """Each task of PEFT passes arguments of its own kind of model, as None."""
    peft = pytest.importorskip("peft")
    features, labels = random_features(config), random_captions(config)
    expected = random_model(config)(**features, labels=labels).loss
    captions = random_model(config).generate(**features, max_new_tokens=5)
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_dropout=0.0, task_type=task_type)
    model = peft.get_peft_model(random_model(config), lora).eval()
    loss = model(**features, labels=labels).loss
    close(loss, expected)
    loss.backward()
    assert torch.equal(model.generate(**features, max_new_tokens=5), captions)


@pytest.mark.parametrize("name", ["inputs_embeds", "input_ids", "attention_mask", "task_ids", "return_dict", "past"])
@torch.no_grad()
def test_unknown_arguments_that_are_none_say_nothing(config: DifnetConfig, name: str) -> None:
    model, features, captions = random_model(config), random_features(config), random_captions(config)
    for part, inputs in ((model, {"decoder_input_ids": captions}), (model.model, {"decoder_input_ids": captions})):
        assert torch.equal(part(**features, **inputs, **{name: None})[0], part(**features, **inputs)[0])
    encoder = model.get_encoder()
    assert torch.equal(encoder(**features, **{name: None})[0], encoder(**features)[0])
    ensemble = DifnetEnsemble([model])
    inputs = {**features, "decoder_input_ids": captions}
    assert torch.equal(ensemble(**inputs, **{name: None})[0], ensemble(**inputs)[0])


def test_lora_on_the_attention_trains_saves_and_loads(config: DifnetConfig, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    features, labels = random_features(config), random_captions(config)
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_dropout=0.0, init_lora_weights=False)
    model = peft.get_peft_model(random_model(config), lora)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    first = model(**features, labels=labels).loss
    first.backward()
    optimizer.step()
    model.eval()
    trained = model(**features, labels=labels).loss
    assert trained < first
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(random_model(config), tmp_path)
    close(loaded(**features, labels=labels).loss, trained)
    close(loaded.merge_and_unload()(**features, labels=labels).loss, trained)


def test_the_trainer_of_transformers_trains_and_predicts(config: DifnetConfig, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    features, labels = random_features(config, batch_size=4), random_captions(config, num_captions=4)
    examples = [
        {**{name: value[i] for name, value in features.items()}, "labels": labels[i, 1:]} for i in range(len(labels))
    ]
    trainer = Seq2SeqTrainer(
        model=random_model(config),
        args=Seq2SeqTrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            learning_rate=1e-2,
            predict_with_generate=True,
            generation_num_beams=2,
            generation_max_length=8,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=examples,
    )
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.model.lm_head.weight, before)
    predicted = trainer.predict(examples).predictions
    assert predicted.shape[0] == 4
    assert (predicted[:, 0] == config.bos_token_id).all()
