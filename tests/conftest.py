"""Shared by the tests: the golden models of the original, built from their seeds."""

import importlib.util
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import setuptools  # noqa: F401  (torch.compile fails where something imported distutils before it)
import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

from convert_checkpoint import convert_state_dict
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration

if TYPE_CHECKING:
    from difnet_transformers.bulk import ImageCaptioner

GOLDEN = Path(__file__).parent / "golden" / "model"
CASES = [f"{mode}_{size}" for mode in ("base", "base_lrp", "difnet", "difnet_lrp") for size in ("small", "full")]

# Test workers share the machine's cores, and results are bit-equal whatever their number; child processes alike.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# What a shell starts in the background ignores SIGINT, and so would the programs that tests stop with it.
signal.signal(signal.SIGINT, signal.default_int_handler)

specification = importlib.util.spec_from_file_location("reference_weights", GOLDEN / "reference_weights.py")
reference_weights = importlib.util.module_from_spec(specification)
specification.loader.exec_module(reference_weights)


@dataclass
class GoldenCase:
    """One mode and size of the original: its weights, its inputs and what it computed from them."""

    name: str
    meta: dict
    state_dict: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    def model(self, state_dict: dict[str, torch.Tensor] | None = None) -> DifnetForConditionalGeneration:
        """Our network with the case's weights (or others under the original's names), in eval mode."""
        sizes = self.meta["config"]
        return convert_state_dict(
            state_dict or self.state_dict,
            num_heads=sizes["h"],
            fusion_layers=sizes.get("Lf", 1),
            fusion_iterations=sizes.get("T", 2),
        ).model()

    def features(self, inputs: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """The keyword arguments that show the model the case's images."""
        inputs = inputs or self.inputs
        return {"grid_features": inputs["images"], "segmentation_features": inputs["pixels"]}


@cache
def golden_case(name: str) -> GoldenCase:
    folder = GOLDEN / name
    meta = json.loads((folder / "meta.json").read_text())
    state_dict = reference_weights.reference_state_dict(
        json.loads((folder / "keys.json").read_text()), **meta["weights"]
    )
    inputs = reference_weights.reference_inputs(**meta["inputs"])
    assert reference_weights.fingerprint(state_dict) == meta["weights_fingerprint"]
    assert reference_weights.fingerprint(inputs) == meta["inputs_fingerprint"]
    return GoldenCase(name, meta, state_dict, inputs, load_file(folder / "outputs.safetensors"))


@pytest.fixture(params=CASES)
def golden(request: pytest.FixtureRequest) -> GoldenCase:
    return golden_case(request.param)


@pytest.fixture(scope="session", autouse=True)
def assets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Exports that programs keep go to a folder of the tests, not to the cache of who runs them."""
    folder = tmp_path_factory.mktemp("assets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(folder))
        patch.setenv("HF_ASSETS_CACHE", str(folder))  # of child processes
        yield folder


@pytest.fixture(autouse=True)
def transformers_stays_as_it_is() -> Iterator[None]:
    """A test that leaves a method of Transformers replaced, as loading does for a moment, fails itself."""
    before = PreTrainedModel.tie_weights
    yield
    after, PreTrainedModel.tie_weights = PreTrainedModel.tie_weights, before
    assert after is before


def pytest_configure(config: pytest.Config) -> None:
    """Ends the run where `.ci/test_versions.py` would test another Transformers than it says."""
    expected = os.environ.get("EXPECTED_TRANSFORMERS")
    if expected not in (None, transformers.__version__):
        loaded = f"{transformers.__version__} of {transformers.__file__}"
        raise pytest.UsageError(f"Transformers {expected} is to be tested, but {loaded} is loaded.")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With FAIL_ON_SKIP=WORD in the environment, a test that is skipped for a reason with this word fails the run."""
    word = os.environ.get("FAIL_ON_SKIP")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if word and reporter and any(word in str(report.longrepr) for report in reporter.stats.get("skipped", [])):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_report_header(config: pytest.Config) -> str:
    return f"transformers {transformers.__version__} of {transformers.__file__}, torch {torch.__version__}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The largest difference from the original in each kind of comparison that ran (tests/test_parity.py)."""
    reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    largest: dict[str, dict[str, float]] = {}
    for report in reports:
        for name, value in report.user_properties:
            if name == "parity":
                case, column, difference = value
                row = largest.setdefault(case, {})
                row[column] = max(difference, row.get(column, 0.0))
    if not largest:
        return
    columns = sorted({column for row in largest.values() for column in row})
    terminalreporter.section("largest differences from the original")
    terminalreporter.write_line("| golden case | " + " | ".join(columns) + " |")
    terminalreporter.write_line("| --- " * (len(columns) + 1) + "|")
    for case in sorted(largest):
        cells = [f"{largest[case][column]:.1e}" if column in largest[case] else "" for column in columns]
        terminalreporter.write_line(f"| {case} | " + " | ".join(cells) + " |")


@pytest.fixture
def tiny_config() -> DifnetConfig:
    """A network that runs in milliseconds, with sizes that are all different."""
    return DifnetConfig(
        vocab_size=50,
        grid_feature_size=24,
        num_segmentation_classes=7,
        d_model=32,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=2,
        head_dim=10,
        encoder_ffn_dim=40,
        decoder_ffn_dim=48,
        max_position_embeddings=30,
    )


def random_features(
    config: DifnetConfig, batch_size: int = 2, height: int = 3, width: int = 4, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The keyword arguments that show a model `batch_size` random images."""
    generator = torch.Generator().manual_seed(seed)
    features = {"grid_features": torch.rand(batch_size, height * width, config.grid_feature_size, generator=generator)}
    if config.use_segmentation:
        shape = (batch_size, config.num_segmentation_classes, height, width)
        features["segmentation_features"] = torch.rand(shape, generator=generator)
    return features


def random_captions(config: DifnetConfig, num_captions: int = 2, length: int = 6, seed: int = 0) -> torch.Tensor:
    """`<bos>` and words, (num_captions, length), without other special tokens."""
    generator = torch.Generator().manual_seed(seed)
    captions = torch.randint(4, config.vocab_size, (num_captions, length), generator=generator)
    captions[:, 0] = config.bos_token_id
    return captions


def random_model(config: DifnetConfig, seed: int = 0) -> DifnetForConditionalGeneration:
    """A captioner with random weights, in eval mode."""
    torch.manual_seed(seed)
    return DifnetForConditionalGeneration(config).eval()


@pytest.fixture(scope="session")
def captioner_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny captioner of small images, for tests of many of them."""
    from bulk_campaign import save_captioner

    return save_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.fixture(scope="module")
def image_captioner(captioner_folder: Path) -> "ImageCaptioner":
    """It and its grid backbone, loaded."""
    from bulk_campaign import config_of

    from difnet_transformers.bulk import ImageCaptioner

    return ImageCaptioner(config_of(captioner_folder))
