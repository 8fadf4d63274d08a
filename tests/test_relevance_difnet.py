"""Relevance against the original, against autograd, and by the sums that its rules promise."""

from dataclasses import fields

import pytest
import torch
from conftest import GOLDEN, golden_case, random_captions, random_features, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from modeling_difnet import (
    DifnetConfig,
    DifnetForConditionalGeneration,
    RelevanceOutput,
    faithfulness,
    relevance,
)

METHODS = ["original", "conservative", "gradient_x_input", "attention_rollout"]
# The original's rules add 1e-9 to every divisor, so that a little of what should be handed on is lost. A segmentation
# cell may bring a unit a single product, and one of 1e-5 loses this share.
LOSS, LOSS_AT_INPUTS = 1e-6, 1e-4


def largest_difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference over the largest reference value."""
    assert ours.shape == reference.shape
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def features_of(case, rows: slice) -> dict[str, torch.Tensor | None]:
    is_baseline = case.name.startswith("base")
    return {
        "grid_features": case.inputs["images"][rows],
        "segmentation_features": None if is_baseline else case.inputs["pixels"][rows],
    }


@pytest.mark.parametrize("one_by_one", [False, True], ids=["batched", "one by one"])
@pytest.mark.parametrize("name", ["base_lrp_small", "base_lrp_full", "difnet_lrp_small", "difnet_lrp_full"])
def test_equals_the_original(name: str, one_by_one: bool) -> None:
    case = golden_case(name)
    model, captions = case.model(), case.inputs["captions"]
    groups = [slice(i, i + 1) for i in range(len(captions))] if one_by_one else [slice(None)]
    results = [
        relevance(
            model, **features_of(case, rows), sequences=captions[rows], allow_unknown_words=True, through_encoder=False
        )
        for rows in groups
    ]
    for index in range(len(captions)):
        output, row = (results[index], 0) if one_by_one else (results[0], index)
        cells, words = case.outputs[f"lrp_inp_{index}"], case.outputs[f"lrp_out_{index}"]
        length = len(cells)  # <bos> and the words without <eos>
        assert largest_difference(output.encoder_output[row, :length], cells) < 1e-9
        assert largest_difference(output.caption_absolute[row, :length, :length], words) < 1e-9
        for rest in (output.encoder_output, output.caption, output.caption_absolute):
            assert not rest[row, length:].any()


def test_encoder_equals_what_the_original_never_calls() -> None:
    """To 1e-6: the original keeps one record for the copies of all layers, the last layer's, which moves its 1e-9."""
    case = golden_case("base_lrp_small")
    reference = load_file(GOLDEN / case.name / "encoder_relevance.safetensors")
    output = relevance(
        case.model(), **features_of(case, slice(None)), sequences=case.inputs["captions"], allow_unknown_words=True
    )
    for index in range(len(output.grid)):
        cells = reference[f"lrp_embedded_grid_{index}"]
        assert largest_difference(output.grid[index, : len(cells)], cells) < 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk_size", [1, 4, 13])
def test_chunks_and_batches_change_nothing(tiny_config: DifnetConfig, method: str, chunk_size: int) -> None:
    """Captions of different lengths, together in one chunk, or cut between captions and between words."""
    model, features = random_model(tiny_config), random_features(tiny_config, batch_size=3)
    captions = random_captions(tiny_config, num_captions=3, length=7)
    captions[1, 4], captions[1, 5:] = tiny_config.eos_token_id, tiny_config.pad_token_id
    together = relevance(model, **features, sequences=captions, method=method, chunk_size=100)
    chunked = relevance(model, **features, sequences=captions, method=method, chunk_size=chunk_size)
    alone = relevance(
        model, **{name: value[1:2] for name, value in features.items()}, sequences=captions[1:2, :4], method=method
    )
    for field in fields(RelevanceOutput):
        whole, parts, one = (getattr(output, field.name) for output in (together, chunked, alone))
        assert largest_difference(parts, whole) < 1e-8, field.name
        cut = whole[1, :4, :4] if field.name.startswith("caption") else whole[1, :4]
        assert largest_difference(cut, one[0]) < 1e-8, field.name


@st.composite
def networks(draw: st.DrawFn) -> dict:
    """A random small network of any shape with images on any grid, a caption each, and maybe masks.

    Not too small: the original's rules lose what reaches a unit that has no positive product, which with 8 inputs is
    one unit in 256, and with 32 none.
    """
    use_segmentation = draw(st.booleans())
    encoder_layers = draw(st.integers(2 if use_segmentation else 1, 4))
    config = DifnetConfig(
        vocab_size=40,
        grid_feature_size=draw(st.integers(8, 20)),
        num_segmentation_classes=draw(st.integers(1, 9)),
        use_segmentation=use_segmentation,
        d_model=2 * draw(st.integers(16, 24)),
        encoder_layers=encoder_layers,
        decoder_layers=draw(st.integers(1, 3)),
        encoder_attention_heads=draw(st.integers(2, 4)),
        decoder_attention_heads=draw(st.integers(2, 4)),
        head_dim=draw(st.integers(16, 20)),
        encoder_ffn_dim=draw(st.integers(96, 128)),
        decoder_ffn_dim=draw(st.integers(96, 128)),
        fusion_layers=draw(st.integers(1, encoder_layers - 1)) if use_segmentation else 1,
        fusion_iterations=draw(st.integers(1, 3)),
        max_position_embeddings=12,
    )
    seed = draw(st.integers(0, 10_000))
    height, width = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    features = random_features(config, batch_size=2, height=height, width=width, seed=seed)
    features.setdefault("segmentation_features", None)
    if use_segmentation and draw(st.booleans()):  # one class a cell, as most cells of segmentation maps have
        shares = features["segmentation_features"]
        features["segmentation_features"] = (shares == shares.amax(1, keepdim=True)).float()
    if draw(st.booleans()):
        mask = torch.rand(2, height * width, generator=torch.Generator().manual_seed(seed)) < 0.7
        mask[:, draw(st.integers(0, height * width - 1))] = True
        features["grid_attention_mask"] = features["segmentation_attention_mask"] = mask
    captions = random_captions(config, length=draw(st.integers(2, 7)), seed=seed)
    return {"model": random_model(config, seed).double(), **features, "sequences": captions}


@settings(max_examples=40, deadline=None)
@given(networks())
def test_original_rules_conserve_relevance(arguments: dict) -> None:
    output = relevance(**arguments)
    of_words, of_cells = output.caption.sum(-1), output.encoder_output.sum(-1)
    scale = 1 + output.encoder_output.abs().sum(-1) + output.caption_absolute.sum(-1)
    assert ((of_words + of_cells - 1).abs() / scale < LOSS).all()
    of_inputs = output.cells().sum(-1)
    scale = scale + output.grid.abs().sum(-1)
    if output.segmentation is not None:
        scale = scale + output.segmentation.abs().sum(-1)
        of_classes = output.segmentation_classes.sum(-1)
        assert ((of_classes - output.segmentation.sum(-1)).abs() / scale < LOSS_AT_INPUTS).all()
    assert ((of_inputs - of_cells).abs() / scale < LOSS_AT_INPUTS).all()


@settings(max_examples=25, deadline=None)
@given(networks(), st.sampled_from(METHODS))
def test_no_relevance_of_what_a_word_cannot_see(arguments: dict, method: str) -> None:
    """Words that come later, and cells that are masked in both flows."""
    output = relevance(**arguments, method=method)
    assert not output.caption.triu(1).any()
    mask = arguments.get("grid_attention_mask")
    if mask is not None:
        hidden = ~mask.unsqueeze(1).expand_as(output.encoder_output)
        for cells in (output.encoder_output, output.grid, output.segmentation):
            assert cells is None or not cells[hidden].any()


@settings(max_examples=25, deadline=None)
@given(networks())
def test_conservative_rules_explain_the_whole_logit_without_biases(arguments: dict) -> None:
    model = arguments["model"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    output = relevance(**arguments, method="conservative")
    features = {name: value for name, value in arguments.items() if name not in ("model", "sequences")}
    logits = model(**features, decoder_input_ids=arguments["sequences"]).logits
    logits = logits.gather(-1, output.target_ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(output.encoder_output.sum(-1) + output.caption.sum(-1), logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(output.cells().sum(-1) + output.caption.sum(-1), logits, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(networks())
def test_attention_rollout_adds_up_to_1(arguments: dict) -> None:
    output = relevance(**arguments, method="attention_rollout")
    ones = torch.ones_like(output.target_log_probs)
    torch.testing.assert_close(output.encoder_output.sum(-1) + output.caption.sum(-1), ones)
    torch.testing.assert_close(output.cells().sum(-1) + output.caption.sum(-1), ones)
    assert (output.cells() >= 0).all()


@settings(max_examples=15, deadline=None)
@given(networks())
def test_gradient_x_input_is_what_autograd_finds(arguments: dict) -> None:
    model, sequences = arguments["model"], arguments["sequences"]
    output = relevance(**arguments, method="gradient_x_input", targets="caption")
    leaves = {
        "grid_features": arguments["grid_features"].double().requires_grad_(),
        "decoder_inputs_embeds": model.get_input_embeddings()(sequences).detach().requires_grad_(),
    }
    if arguments["segmentation_features"] is not None:
        leaves["segmentation_features"] = arguments["segmentation_features"].double().requires_grad_()
    masks = {name: value for name, value in arguments.items() if name.endswith("mask")}
    logits = model(**leaves, **masks).logits
    position = torch.arange(1, sequences.shape[1] + 1)
    embeddings = leaves["decoder_inputs_embeds"] + model.model.decoder.embed_positions(position)
    for t in range(sequences.shape[1] - 1):
        total = logits[torch.arange(2), t, sequences[:, t + 1]].sum()
        gradients = dict(zip(leaves, torch.autograd.grad(total, leaves.values(), retain_graph=True), strict=True))
        of_grid = (gradients["grid_features"] * leaves["grid_features"]).sum(-1)
        torch.testing.assert_close(output.grid[:, t], of_grid, rtol=1e-8, atol=1e-10)
        of_words = (gradients["decoder_inputs_embeds"] * embeddings).sum(-1)
        torch.testing.assert_close(output.caption[:, t], of_words, rtol=1e-8, atol=1e-10)
        if "segmentation_features" in leaves:
            product = (gradients["segmentation_features"] * leaves["segmentation_features"]).flatten(2)
            torch.testing.assert_close(output.segmentation[:, t], product.sum(1), rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(output.segmentation_classes[:, t], product.sum(2), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_cells_are_counted_row_by_row(tiny_config: DifnetConfig, method: str) -> None:
    """One segmented cell on a grid of 3 x 4: row 1, column 2, class 5."""
    features = random_features(tiny_config, batch_size=1, height=3, width=4)
    features["segmentation_features"].zero_()
    features["segmentation_features"][0, 5, 1, 2] = 1
    output = relevance(random_model(tiny_config), **features, sequences=random_captions(tiny_config, 1), method=method)
    if method != "attention_rollout":  # which sees where attention goes, not what is there
        assert output.segmentation.abs().amax(1).squeeze(0).nonzero().flatten().tolist() == [1 * 4 + 2]
    assert output.segmentation_classes.abs().amax(1).squeeze(0).nonzero().flatten().tolist() == [5]


def test_targets(tiny_config: DifnetConfig) -> None:
    model, features = random_model(tiny_config), random_features(tiny_config)
    sequences = torch.tensor([[2, 10, 11, 12, 3, 1], [2, 20, 21, 3, 1, 1]])
    of_caption = relevance(model, **features, sequences=sequences, targets="caption")
    assert of_caption.target_ids.tolist() == [[10, 11, 12, 3], [20, 21, 3, 1]]
    log_probs = model.sequence_log_probs(sequences, **features)
    assert of_caption.target_log_probs.tolist() == pytest.approx(log_probs[:, :4].detach().double(), abs=1e-5)
    assert not of_caption.grid[1, 3].any()

    cut = relevance(model, **features, sequences=sequences[:, :3], targets="caption")
    assert cut.target_ids.tolist() == [[10, 11, 1], [20, 21, 1]], "nothing is known of the word after the last"

    predicted = relevance(model, **features, sequences=sequences)
    logits = model(**features, decoder_input_ids=sequences).logits[:, :4]
    assert predicted.target_ids[0].tolist() == logits.argmax(-1)[0].tolist()
    again = relevance(model, **features, sequences=sequences, targets=predicted.target_ids)
    assert torch.equal(again.grid, predicted.grid)
    assert not torch.equal(of_caption.grid, predicted.grid)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_model_is_not_changed(tiny_config: DifnetConfig, precision: torch.dtype) -> None:
    model = random_model(tiny_config).to(precision).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    output = relevance(model, **random_features(tiny_config), sequences=random_captions(tiny_config))
    assert output.grid.dtype == torch.float64
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    for name, value in model.state_dict().items():
        assert value.dtype == precision
        assert torch.equal(value, before[name])
    assert not any(module._forward_hooks for module in model.modules())


GOOD = [[2, 10, 11], [2, 12, 13]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lrp"}, "`method` must be one of 'original'"),
        ({"targets": "best"}, "`targets` must be"),
        ({"targets": torch.ones(2, 2, dtype=torch.long)}, r"`targets` must have the shape \(2, 3\)"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1"),
        ({"sequences": torch.tensor(GOOD[:1])}, "one caption for each of the 2 images"),
        ({"sequences": torch.tensor(GOOD)[0]}, "one caption for each of the 2 images"),
        ({"sequences": torch.tensor(GOOD).float()}, "must be token ids"),
        ({"sequences": torch.tensor([[2, 10, 11], [2, 0, 13]])}, "Caption 1, position 1 is <unk>"),
        ({"sequences": torch.tensor([[2, 10, 50], [2, 12, 13]])}, "Caption 0, position 2: 50 is no token"),
        ({"sequences": torch.tensor([[2, 10, 11], [2, 3, 1]])}, "Caption 1 is empty"),
        ({"sequences": torch.tensor([[2], [2]])}, "Caption 0 is empty"),
        ({"sequences": torch.empty(2, 0, dtype=torch.long)}, "Caption 0 must begin with <bos>"),
        ({"sequences": torch.tensor([[10, 11, 3], [2, 12, 13]])}, "Caption 0 must begin with <bos>"),
        ({"sequences": torch.tensor([[2, 10, 3, 11], [2, 12, 13, 3]])}, "Caption 0 continues after <eos> or <pad>"),
        ({"sequences": torch.full((2, 31), 10).index_fill(1, torch.tensor([0]), 2)}, "position table"),
        ({"grid_features": torch.rand(2, 12, 23)}, r"\(batch, cells, 24\)"),
        ({"segmentation_features": None}, "`segmentation_features` are missing"),
        ({"segmentation_features": torch.rand(2, 7, 3, 3)}, "same images on the same grid"),
    ],
)
def test_mistakes_are_named(tiny_config: DifnetConfig, changes: dict, message: str) -> None:
    arguments = {**random_features(tiny_config), "sequences": torch.tensor(GOOD), **changes}
    with pytest.raises(ValueError, match=message):
        relevance(random_model(tiny_config), **arguments)


def test_a_model_without_segmentation_has_no_relevance_of_it(tiny_config: DifnetConfig) -> None:
    features, sequences = random_features(tiny_config), torch.tensor(GOOD)
    tiny_config.use_segmentation = False
    model = random_model(tiny_config)
    with pytest.raises(ValueError, match="has no segmentation flow"):
        relevance(model, **features, sequences=sequences)
    output = relevance(model, features["grid_features"], None, sequences)
    assert output.segmentation is None
    assert output.segmentation_classes is None
    assert torch.equal(output.cells(), output.grid)


def test_unknown_words_can_be_allowed(tiny_config: DifnetConfig) -> None:
    sequences = torch.tensor([[2, 0, 11], [2, 12, 13]])
    features = random_features(tiny_config)
    output = relevance(random_model(tiny_config), **features, sequences=sequences, allow_unknown_words=True)
    assert output.caption[0, 2, 1] != 0


# Faithfulness


def without(model: DifnetForConditionalGeneration, features: dict, sequences: torch.Tensor, cells: list[int]):
    """Probabilities of the captions' words when the same cells are hidden in every image, by hand."""
    mask = torch.ones(features["grid_features"].shape[:2])
    mask[:, cells] = 0
    masks = {"grid_attention_mask": mask, "segmentation_attention_mask": mask}
    return model.sequence_log_probs(sequences, **features, **masks).exp().detach()


def test_faithfulness_removes_the_most_relevant_cells(tiny_config: DifnetConfig) -> None:
    model, features, sequences = random_model(tiny_config), random_features(tiny_config), torch.tensor(GOOD)
    explanation = relevance(model, **features, sequences=sequences, targets="caption")
    explanation.grid.zero_()
    explanation.segmentation.zero_()
    explanation.segmentation[..., 7], explanation.grid[..., 2] = 5, 3
    result = faithfulness(model, **features, sequences=sequences, explanation=explanation, shares=(0, 1 / 12, 0.17))
    for column, cells in enumerate(([], [7], [7, 2])):
        expected = without(model, features, sequences, cells)
        torch.testing.assert_close(result.relevant_first[:, :2, column], expected, msg=str(cells))
    torch.testing.assert_close(result.random[..., 0], result.relevant_first[..., 0])
    assert not result.relevant_first[:, 2].any(), "no word is asked for there"


def test_faithfulness_tells_a_good_ranking_from_a_bad_one(tiny_config: DifnetConfig) -> None:
    """Cells ranked by how far each alone lowers the probability beat random cells, and their reverse does not."""
    model, features, sequences = random_model(tiny_config, seed=3), random_features(tiny_config), torch.tensor(GOOD)
    explanation = relevance(model, **features, sequences=sequences, targets="caption")
    drops = torch.stack([-without(model, features, sequences, [cell]) for cell in range(12)], dim=-1)
    advantages = []
    for sign in (1, -1):
        explanation.grid, explanation.segmentation = torch.zeros(2, 3, 12), torch.zeros(2, 3, 12)
        explanation.grid[:, :2] = sign * drops
        result = faithfulness(
            model, **features, sequences=sequences, explanation=explanation, num_random=20, chunk_size=7
        )
        advantages.append(result.advantage()[:, :2].mean())
    assert advantages[0] > 0 > advantages[1]


def test_faithfulness_counts_visible_cells_only(tiny_config: DifnetConfig) -> None:
    model, features, sequences = random_model(tiny_config), random_features(tiny_config), torch.tensor(GOOD)
    mask = torch.ones(2, 12)
    mask[:, 4:] = 0
    masks = {"grid_attention_mask": mask, "segmentation_attention_mask": mask}
    explanation = relevance(model, **features, **masks, sequences=sequences, targets="caption")
    explanation.grid[:] = torch.arange(12)  # the hidden cells rank first
    explanation.segmentation[:] = 0
    result = faithfulness(model, **features, **masks, sequences=sequences, explanation=explanation, shares=(0.25,))
    expected = without(model, features, sequences, [3, *range(4, 12)])
    torch.testing.assert_close(result.relevant_first[:, :2, 0], expected)


@pytest.mark.parametrize("changes", [{"shares": (1.0,)}, {"shares": (-0.1,)}, {"num_random": 0}])
def test_faithfulness_names_mistakes(tiny_config: DifnetConfig, changes: dict) -> None:
    model, features, sequences = random_model(tiny_config), random_features(tiny_config), torch.tensor(GOOD)
    explanation = relevance(model, **features, sequences=sequences)
    with pytest.raises(ValueError, match="so that a cell remains"):
        faithfulness(model, **features, sequences=sequences, explanation=explanation, **changes)
