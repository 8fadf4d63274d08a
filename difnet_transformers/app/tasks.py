"""What is asked of a captioner, and what it answers; needs neither PyTorch nor Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..command_line import reason_of
from ..data.feature_records import difference_of_backbones
from ..files import printable
from .inputs import CaptionInput, RequestError

if TYPE_CHECKING:
    from modeling_difnet.confidence_difnet import CaptionConfidence

    from ..reports.relevance import ExplainedImage

SEARCHES = {
    "beam": "beam search",
    "original": "the original's beam search",
    "sample": "sampling",
}
MAX_BEAMS, MAX_TEMPERATURE = 20, 5.0
MAX_PROMPT_CHARACTERS = 1000


@dataclass(frozen=True)
class DecodingOptions:
    """How captions are searched for.

    Args:
        search: a key of `SEARCHES`; by default the original's, which is faster, unless the checkpoint's settings mean
            something else.
        num_beams: hypotheses of a beam search, 1 for greedy decoding; by default the checkpoint's. Of sampling the
            number of captions.
        num_captions: of these, returned; the best first.
        max_new_tokens: longest caption; by default the checkpoint's.
        temperature: of sampling.

    Raises:
        RequestError: a value out of range.
    """

    search: str | None = None
    num_beams: int | None = None
    num_captions: int = 1
    max_new_tokens: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.search is not None and self.search not in SEARCHES:
            raise RequestError(f"search must be one of {', '.join(SEARCHES)}, not {printable(self.search)}")
        for name, highest in (("num_beams", MAX_BEAMS), ("num_captions", MAX_BEAMS), ("max_new_tokens", 10_000)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= highest):
                raise RequestError(f"{name} must be a whole number from 1 to {highest:,}, not {printable(value)}")
        if self.num_captions > (self.num_beams or MAX_BEAMS):
            raise RequestError(f"{self.num_captions} captions need as many beams, not {self.num_beams}")
        if type(self.temperature) not in (int, float) or not 0 < self.temperature <= MAX_TEMPERATURE:
            raise RequestError(f"temperature must be above 0 and at most {MAX_TEMPERATURE:g}")

    def arguments(self, default_beams: int, default_search: str) -> dict[str, Any]:
        """Of `generate`; of the original's search without `custom_generate`.

        Args:
            default_beams, default_search: of the checkpoint.
        """
        search = self.search or default_search
        lengths = {} if self.max_new_tokens is None else {"max_new_tokens": self.max_new_tokens}
        if search == "sample":
            sampling = {"do_sample": True, "num_beams": 1, "early_stopping": False, "temperature": self.temperature}
            return sampling | lengths | {"num_return_sequences": self.num_captions}
        num_beams = max(self.num_beams or default_beams, self.num_captions)
        options = lengths | {"num_beams": num_beams, "num_return_sequences": self.num_captions}
        return options | ({"early_stopping": False} if num_beams == 1 and search == "beam" else {})


@dataclass(frozen=True)
class CaptionTask:
    """One image for one captioner.

    Args:
        given: the image, or its features.
        prompt: how the caption begins.
        decoding: how it is searched for.
        with_confidence: whether captions come with their confidences.
        with_relevance: whether the best caption's words are explained.
    """

    given: CaptionInput
    prompt: str = ""
    decoding: DecodingOptions = DecodingOptions()
    with_confidence: bool = False
    with_relevance: bool = False


@dataclass
class CaptionResult:
    """What a captioner says of an image.

    Args:
        model: name of the captioner.
        captions: the best first.
        confidences: of the captions, if asked for.
        is_complete: of each caption whether it ended by itself, not at the longest length.
        num_tokens: of the prompt and of all captions, `<eos>` included.
        explained: the relevance of the best caption's words, if asked for and if there is one.
        remark: why there is none.
        is_sampled: whether the captions are samples; the most probable first.
        label_map (`(H, W)`): the class of each pixel, or of each cell where there are only features, as an index of
            `class_names`; -1 for no class. `None` for a captioner with one flow.
        class_names: of the segmentation features, where they are known.
    """

    model: str
    captions: list[str]
    confidences: list[CaptionConfidence] | None
    is_complete: list[bool]
    num_tokens: tuple[int, int] = (0, 0)
    explained: ExplainedImage | None = None
    remark: str | None = None
    is_sampled: bool = False
    label_map: np.ndarray | None = None
    class_names: Sequence[str] | None = None


class Captioner(Protocol):
    """What the server calls, see `ServedCaptioner`.

    Attributes:
        name: for users.
        default_beams: of the checkpoint.
        usual_length: the checkpoint's longest caption, in tokens.
    """

    name: str
    default_beams: int

    @property
    def usual_length(self) -> int: ...

    def prepare(self, task: CaptionTask) -> tuple: ...

    def caption(self, tasks: Sequence[CaptionTask]) -> Sequence[CaptionResult | Exception]: ...


def usual_search(settings: Any) -> str:
    """The search that captions are decoded by unless another is asked for, a key of `SEARCHES`.

    Args:
        settings: content of generation_config.json, as attributes.
    """
    if getattr(settings, "do_sample", None):
        return "sample"
    is_original = (
        getattr(settings, "length_penalty", None) == 0 and getattr(settings, "early_stopping", None) == "never"
    )
    return "original" if is_original and getattr(settings, "repetition_penalty", None) in (None, 1.0) else "beam"


def usual_length(settings: Any, longest: int) -> int:
    """The checkpoint's longest caption, in tokens.

    Args:
        settings: content of generation_config.json, as attributes.
        longest: tokens that a caption may have at most, `<eos>` among them.
    """
    max_new_tokens, max_length = (getattr(settings, name, None) for name in ("max_new_tokens", "max_length"))
    return max(1, min(max_new_tokens or (max_length or longest) - 1, longest - 1))


def check_feature_input(
    name: str, given: CaptionInput, recorded_backbone: Any, use_segmentation: bool, force: bool
) -> None:
    """As `feature_items` (evaluation/image_captions.py) does for files.

    Args:
        name: of the captioner.
        given: features.
        recorded_backbone: what the captioner says of the network of its grid features.
        use_segmentation: whether it has two flows.
        force: whether features of other networks are taken.

    Raises:
        RequestError: they are not for this captioner.
    """
    assert given.features is not None
    difference = difference_of_backbones(recorded_backbone, given.grid_backbone)
    if difference is not None and not force:
        raise RequestError(f"{name} was trained on other grid features: {difference}")
    if use_segmentation and "segmentation_features" not in given.features:
        raise RequestError(f"{name} needs segmentation_features beside grid_features")


def classes_of_cells(shares: np.ndarray) -> np.ndarray:
    """The class of each cell of features `(classes, rows, columns)`, -1 for none."""
    return np.where(shares.max(0) > 0, shares.argmax(0), -1)


def of_user(error: Exception) -> Exception:
    """The checks of processor and `generate` are about what was sent; whatever else is raised is ours."""
    if isinstance(error, ValueError) and not isinstance(error, RequestError):
        return RequestError(reason_of(error).replace(" of image 0", ""))
    return error
