"""Relevance that a person can look at: panels (PNG), a page on which a word lights up its cells (HTML), curves (PNG).

Used by explain.py, caption.py and the demo. In place of the original's `show_cam_on_image` and `show_source2target`
(`lrp_total.py`), which write a grey picture for each word, stretched by hand, and one curve.

Colours mean the same everywhere: orange cells speak for the word, blue ones against it, as strongly as they are
opaque; the strongest cell of a word is the measure of all its cells.
"""

from __future__ import annotations

import base64
import html
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_difnet import DifnetForConditionalGeneration, RelevanceOutput, relevance
from modeling_difnet.images_difnet import open_picture
from modeling_difnet.pipeline_difnet import DifnetImageCaptioningPipeline
from modeling_difnet.segmentation_difnet import CLASS_NAMES
from processing_difnet import DifnetTokenizer

from ..command_line import requires
from ..files import printable

with requires("images"):
    from PIL import Image, ImageDraw, ImageFont

FOR, AGAINST = (217, 95, 2), (43, 108, 196)
OPACITY = 0.8  # of the strongest cell
FLOWS = ("both", "grid", "segmentation")
INK, PAPER, FAINT = "#1c1c1c", "#f6f6f4", "#777777"
CURVE_COLOURS = ("#1b6ca8", "#d95f02", "#2a9d5c", "#8e44ad", "#7f6000", "#c0392b")


@dataclass
class ExplainedPicture:
    """The words of one caption and where they come from; `<eos>` is left out.

    Args:
        name: what the picture is called.
        picture: None where there are only features; the cells are drawn on grey then.
        words: T words.
        probabilities: (T,), of the words.
        grid_shape: rows and columns of cells.
        flows: (T, rows * columns) for "grid", for "segmentation" unless the model is the baseline, and for "both".
        classes: (T, number of classes), or None in the baseline.
        earlier_words: (T, T); entry [t, j] is the relevance of word j for word t, j < t.
        method: of `relevance`.
    """

    name: str
    picture: Image.Image | None
    words: list[str]
    probabilities: np.ndarray
    grid_shape: tuple[int, int]
    flows: dict[str, np.ndarray]
    classes: np.ndarray | None
    earlier_words: np.ndarray
    method: str

    def strongest_classes(self, word: int, number: int = 3) -> list[tuple[str, float]]:
        """The classes that spoke loudest for a word, and their relevance."""
        if self.classes is None:
            return []
        names = CLASS_NAMES if self.classes.shape[1] == len(CLASS_NAMES) else None
        best = np.argsort(-self.classes[word])[:number]
        return [
            (names[index] if names else f"class {index}", float(self.classes[word, index]))
            for index in best
            if self.classes[word, index] > 0
        ]


def explain_captions(
    model: DifnetForConditionalGeneration,
    tokenizer: DifnetTokenizer,
    features: Mapping[str, torch.Tensor],
    sequences: torch.LongTensor,
    names: Sequence[str],
    pictures: Sequence[Image.Image | None],
    *,
    method: str = "conservative",
    allow_unknown_words: bool = True,
) -> tuple[list[ExplainedPicture], RelevanceOutput]:
    """Explains one caption of each picture: what the drawing functions below take, and the numbers behind it.

    Args:
        features: as the processor or a batch of the packed dataset gives them; segmentation features are left out for
            a model that has no use for them.
        sequences (`(B, L)`): captions as `generate` returns them, none of them empty.
        names, pictures: one for each caption.
        method, allow_unknown_words: of `relevance`.

    Raises:
        ValueError: as `relevance`.
    """
    features = dict(features)
    if not model.config.use_segmentation:
        features.pop("segmentation_features", None)
    features.setdefault("segmentation_features", None)
    output = relevance(
        model,
        **features,
        sequences=sequences,
        method=method,
        targets="caption",
        allow_unknown_words=allow_unknown_words,
    )
    shape = grid_shape(features["grid_features"], features["segmentation_features"])
    flows = {"both": output.cells(), "grid": output.grid, "segmentation": output.segmentation}
    explained = []
    for index, (name, picture) in enumerate(zip(names, pictures, strict=True)):
        tokens = tokenizer.convert_ids_to_tokens(output.target_ids[index])
        ends = [
            position for position, token in enumerate(tokens) if token in (tokenizer.eos_token, tokenizer.pad_token)
        ]
        number = min([len(tokens), *ends])
        explained.append(
            ExplainedPicture(
                name=name,
                picture=picture,
                words=tokens[:number],
                probabilities=output.target_log_probs[index, :number].exp().cpu().numpy(),
                grid_shape=shape,
                flows={
                    flow: cells[index, :number].cpu().numpy() for flow, cells in flows.items() if cells is not None
                },
                classes=(
                    None
                    if output.segmentation_classes is None
                    else output.segmentation_classes[index, :number].cpu().numpy()
                ),
                # Column 0 is <bos>; word j is read one column later.
                earlier_words=output.caption[index, :number, 1 : number + 1].cpu().numpy(),
                method=method,
            )
        )
    return explained, output


def explain_picture(
    captioner: DifnetImageCaptioningPipeline,
    source: str | Path | Image.Image,
    *,
    name: str | None = None,
    caption: str | None = None,
    method: str = "conservative",
    **generation_options: Any,
) -> ExplainedPicture:
    """Captions one picture, unless a caption is given, and explains every word.

    Raises:
        ValueError: the picture cannot be read, or the caption is empty or holds words that the model does not know.
    """
    picture = open_picture(source)
    features = captioner.processor(**captioner.features_of(picture), return_tensors="pt").to(captioner.device)
    if caption is None:
        sequences = captioner.model.generate(**features, **generation_options)[:1]
    else:
        sequences = tokens_of(captioner.processor.tokenizer, caption).to(captioner.device)
    explained, _ = explain_captions(
        captioner.model,
        captioner.processor.tokenizer,
        features,
        sequences,
        [name or ("picture" if isinstance(source, Image.Image) else printable(Path(source).name, 100))],
        [picture],
        method=method,
    )
    return explained[0]


def unique_names(paths: Sequence[Path]) -> list[str]:
    """A name for each picture that a file can have: its own without the ending, and a number where two are equal.

    `a.png`, `a.jpg` and `a-2.png` are called `a`, `a-3` and `a-2`. Case makes no difference, as on some disks.
    """
    stems = [printable(path.stem, 100).replace("\\", "_").replace("/", "_") for path in paths]
    reserved = {stem.lower() for stem in stems}
    given: set[str] = set()
    names = []
    for stem in stems:
        name, number = stem, 1
        while name.lower() in given or (number > 1 and name.lower() in reserved):
            number += 1
            name = f"{stem}-{number}"
        given.add(name.lower())
        names.append(name)
    return names


def tokens_of(tokenizer: DifnetTokenizer, caption: str) -> torch.LongTensor:
    """`<bos> w1 .. wn <eos>` as (1, L); ValueError where there is no word, or an unknown one."""
    words = tokenizer.tokenize(caption.strip())
    if not words:
        raise ValueError(f"the caption {printable(repr(caption))} is empty: there is no word to explain")
    ids = tokenizer.convert_tokens_to_ids(words)
    unknown = [word for word, index in zip(words, ids, strict=True) if index == tokenizer.unk_token_id]
    if unknown:
        words = ", ".join(printable(repr(word), 40) for word in unknown[:10]) + (", .." if len(unknown) > 10 else "")
        raise ValueError(f"the model does not know {words}: use other words in --caption")
    return torch.tensor([[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]])


def grid_shape(grid_features: torch.Tensor, segmentation_features: torch.Tensor | None) -> tuple[int, int]:
    """Rows and columns of cells; without a segmentation, which tells, they are as many."""
    if segmentation_features is not None:
        return tuple(segmentation_features.shape[-2:])
    side = round(grid_features.shape[1] ** 0.5)
    if side * side != grid_features.shape[1]:
        raise ValueError(f"{grid_features.shape[1]} cells are no square grid: without segmentation features its rows "
                         "and columns are not known.")  # fmt: skip
    return side, side


def arrays_of(explained: Sequence[ExplainedPicture]) -> dict[str, np.ndarray]:
    """All numbers, named NAME/words, NAME/probabilities, NAME/grid .. for each picture.

    Maps of cells are (words, rows, columns).
    """
    arrays = {}
    for each in explained:
        arrays[f"{each.name}/words"] = np.array(each.words, dtype=np.str_)
        arrays[f"{each.name}/probabilities"] = each.probabilities
        arrays[f"{each.name}/earlier_words"] = each.earlier_words
        for flow, cells in each.flows.items():
            arrays[f"{each.name}/{flow}"] = cells.reshape(len(cells), *each.grid_shape)
        if each.classes is not None:
            arrays[f"{each.name}/classes"] = each.classes
    return arrays


def npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A file for `numpy.load`, without pickle."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# Panels


def heat(cells: np.ndarray, shape: tuple[int, int], picture: Image.Image) -> Image.Image:
    """A picture with its cells (rows * columns,) over it, row 0 at the top and column 0 at the left."""
    strength = cells.reshape(shape) / max(np.abs(cells).max(), 1e-30)
    layer = np.zeros((*shape, 4))
    layer[..., :3] = np.where(strength[..., None] >= 0, FOR, AGAINST)
    layer[..., 3] = 255 * OPACITY * np.abs(strength)
    layer = Image.fromarray(layer.round().astype(np.uint8), "RGBA")
    layer = layer.resize(picture.size, Image.Resampling.NEAREST)
    return Image.alpha_composite(picture.convert("L").convert("RGBA"), layer).convert("RGB")


def shown_picture(explained: ExplainedPicture, longer_side: int) -> Image.Image:
    """The picture at one size for all, or a grey one of square cells."""
    rows, columns = explained.grid_shape
    width, height = (columns, rows) if explained.picture is None else explained.picture.size
    scale = longer_side / max(width, height)
    size = max(1, round(scale * width)), max(1, round(scale * height))
    if explained.picture is None:
        return Image.new("RGB", size, "#d9d9d6")
    return explained.picture.resize(size, Image.Resampling.LANCZOS)


def panels(explained: ExplainedPicture, flow: str = "both", columns: int = 4) -> Image.Image:
    """The picture, then one panel a word: its cells, its probability and the classes that spoke for it."""
    margin, side = 14, 220
    picture = shown_picture(explained, side)
    text_height = 24 + (0 if explained.classes is None else 3 * 15)
    width = margin + columns * (side + margin)
    font, small = ImageFont.load_default(size=16), ImageFont.load_default(size=12)
    title = textwrap.wrap(" ".join(explained.words), width // 9) or [""]
    top = margin + 22 * len(title) + 20
    rows = -(-(len(explained.words) + 1) // columns)
    sheet = Image.new("RGB", (width, top + rows * (picture.height + text_height + margin)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((margin, margin - 4), "\n".join(title), INK, font, spacing=4)
    draw.text((margin, top - 22), f"{explained.name} · rules: {explained.method} · flow: {flow}", FAINT, small)
    for place in range(len(explained.words) + 1):
        left = margin + place % columns * (side + margin)
        upper = top + place // columns * (picture.height + text_height + margin)
        if place == 0:
            sheet.paste(picture, (left, upper))
            continue
        word = place - 1
        sheet.paste(heat(explained.flows[flow][word], explained.grid_shape, picture), (left, upper))
        draw.text((left, upper + picture.height + 3), explained.words[word], INK, font)
        shift = draw.textlength(explained.words[word] + "  ", font)
        draw.text((left + shift, upper + picture.height + 7), f"{explained.probabilities[word]:.0%}", FAINT, small)
        for line, (name, value) in enumerate(explained.strongest_classes(word)):
            draw.text((left, upper + picture.height + 24 + 15 * line), f"{name}  {value:+.3f}", FAINT, small)
    return sheet


# Page

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@title@</title>
<style>
  body { font: 16px/1.45 system-ui, sans-serif; margin: 24px auto; max-width: 1080px; padding: 0 16px;
         background: #f6f6f4; color: #1c1c1c }
  fieldset { border: 0; padding: 0; margin: 0 0 20px }
  fieldset label { margin-right: 14px }
  figure { margin: 0 0 28px; padding: 16px; background: #fff; border: 1px solid #ddd; border-radius: 8px;
           display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 8px 20px }
  .picture { position: relative; align-self: start; justify-self: start }
  .picture img { display: block; max-width: 100%; max-height: 70vh; transition: filter .15s }
  .picture.lit img { filter: grayscale(1) }
  .cells { position: absolute; inset: 0; display: grid }
  .caption { grid-column: 1 / -1; font-size: 20px; margin: 0 }
  .caption button { font: inherit; color: inherit; background: none; border: 0; border-bottom: 2px solid #bbb;
                    border-radius: 4px 4px 0 0; padding: 4px 5px; margin: 0 1px; cursor: pointer }
  .caption button.lit { background: #1c1c1c !important; color: #fff }
  .caption button[aria-pressed=true] { border-bottom-color: rgb(@for@) }
  .caption button:focus-visible { outline: 3px solid rgb(@against@) }
  .about { min-height: 12em; overflow-wrap: anywhere }
  .about p { margin: 0 0 6px }
  .bar { display: grid; grid-template-columns: 9em 1fr 4.5em; gap: 8px; align-items: center; font-size: 14px }
  .bar i { height: 10px; border-radius: 3px; background: rgb(@for@) }
  .bar span:last-child { text-align: right; font-variant-numeric: tabular-nums }
  small, .hint { color: #666 }
  .warning { background: #fff3cd; border: 1px solid #d9b84a; border-radius: 6px; padding: 10px 14px }
  @media (max-width: 640px) { figure { grid-template-columns: 1fr } .about { min-height: 0 } }
</style>
<h1>@title@</h1>
@warning@<p class="hint">Point at a word, move to it with the Tab key or touch it:
<b style="color: rgb(@for@)">orange</b> cells speak for it, <b style="color: rgb(@against@)">blue</b> ones against it,
and the shade of earlier words says the same of them. A click keeps a word. Rules: @method@.</p>
@choice@
@figures@
<script>
const FOR = [@for@], AGAINST = [@against@], OPACITY = @opacity@;
const colour = share => `rgba(${(share < 0 ? AGAINST : FOR).join()},${(OPACITY * Math.abs(share)).toFixed(3)})`;
const largest = values => Math.max(1e-30, ...values.map(Math.abs));
const shows = [];
for (const figure of document.querySelectorAll("figure")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const cells = [...figure.querySelectorAll(".cells i")], words = [...figure.querySelectorAll(".caption button")];
  const about = figure.querySelector(".about");
  let kept = null, current = null;
  const show = word => {
    current = word;
    figure.querySelector(".picture").classList.toggle("lit", word !== null);
    words.forEach((button, index) => button.classList.toggle("lit", index === word));
    const flow = document.querySelector("input[name=flow]:checked")?.value ?? "both";
    const map = word === null ? null : data.flows[flow][word];
    const before = word === null ? [] : data.earlier[word].slice(0, word);
    cells.forEach((cell, index) => { cell.style.backgroundColor = map ? colour(map[index] / largest(map)) : "" });
    words.forEach((button, index) => {
      button.style.backgroundColor = index < before.length ? colour(before[index] / largest(before) / 2) : "";
    });
    about.replaceChildren();
    if (word === null) return;
    const line = document.createElement("p");
    line.textContent = `“${data.words[word]}”: probability ${(100 * data.probabilities[word]).toFixed(0)}%`;
    about.append(line);
    for (const [name, value] of data.classes[word]) {
      const bar = document.createElement("div"), label = document.createElement("span");
      const length = document.createElement("i"), number = document.createElement("span");
      bar.className = "bar";
      label.textContent = name;
      length.style.width = `${100 * value / data.classes[word][0][1]}%`;
      number.textContent = value.toFixed(3);
      bar.append(label, length, number);
      about.append(bar);
    }
  };
  words.forEach((button, word) => {
    button.addEventListener("pointerenter", () => show(word));
    button.addEventListener("pointerleave", () => show(kept));
    button.addEventListener("focus", () => show(word));
    button.addEventListener("blur", () => show(kept));
    button.addEventListener("click", () => {
      kept = kept === word ? null : word;
      words.forEach((other, index) => other.setAttribute("aria-pressed", index === kept));
      show(word);
    });
  });
  shows.push(() => show(current));
}
document.querySelectorAll("input[name=flow]").forEach(input =>
  input.addEventListener("change", () => shows.forEach(show => show())));
</script>
</html>
"""


def page(explained: Sequence[ExplainedPicture], title: str = "Why this word", warning: str | None = None) -> bytes:
    """One HTML file with pictures, numbers and program inside it; it needs no network."""
    flows = [flow for flow in FLOWS if all(flow in each.flows for each in explained)]
    names = {"both": "both flows", "grid": "grid features", "segmentation": "segmentation"}
    choice = "".join(
        f'<label><input type="radio" name="flow" value="{flow}"{" checked" * (flow == "both")}> {names[flow]}</label>'
        for flow in flows
    )
    parts = {
        "title": html.escape(title),
        "warning": "" if warning is None else f'<p class="warning">{html.escape(warning)}</p>\n',
        "choice": f"<fieldset>{choice}</fieldset>" if len(flows) == 3 else "",
        "method": html.escape(", ".join(sorted({each.method for each in explained}))),
        "figures": "\n".join(_figure(each, flows) for each in explained),
        "for": ", ".join(map(str, FOR)),
        "against": ", ".join(map(str, AGAINST)),
        "opacity": str(OPACITY),
    }
    # The figures come last: what they say is text of pictures and captions, not of this page.
    content = PAGE
    for name in (*(name for name in parts if name != "figures"), "figures"):
        content = content.replace(f"@{name}@", parts[name])
    return content.encode(errors="backslashreplace")


def _figure(explained: ExplainedPicture, flows: Sequence[str]) -> str:
    buffer = io.BytesIO()
    shown_picture(explained, 640).save(buffer, "JPEG", quality=88)
    picture = base64.b64encode(buffer.getvalue()).decode()
    rows, columns = explained.grid_shape
    data = {
        "words": explained.words,
        "probabilities": _rounded(explained.probabilities),
        "flows": {flow: _rounded(explained.flows[flow]) for flow in flows},
        "earlier": _rounded(explained.earlier_words),
        "classes": [explained.strongest_classes(word, 6) for word in range(len(explained.words))],
    }
    # "</script>" inside the data would end it.
    data = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    words = " ".join(
        f'<button type="button" aria-pressed="false">{html.escape(word)}</button>' for word in explained.words
    )
    caption = html.escape(" ".join(explained.words), quote=True)
    return (
        f'<figure><p class="caption">{words}</p>'
        f'<div class="picture"><img src="data:image/jpeg;base64,{picture}" alt="{caption}">'
        f'<div class="cells" aria-hidden="true" style="grid-template: repeat({rows}, 1fr) / repeat({columns}, 1fr)">'
        f"{'<i></i>' * (rows * columns)}</div></div>"
        f'<div><div class="about" aria-live="polite"></div><small>{html.escape(explained.name)}</small></div>'
        f'<script type="application/json">{data}</script></figure>'
    )


def _rounded(values: np.ndarray) -> list:
    return json.loads(json.dumps(values.tolist()), parse_float=lambda text: float(f"{float(text):.4g}"))


# Curves


@dataclass
class Curve:
    """One line of a chart: `values` at `positions`, and in how many captions each was measured."""

    name: str
    positions: np.ndarray
    values: np.ndarray
    counts: np.ndarray


def position_curves(name: str, outputs: Sequence[RelevanceOutput], pad_token_id: int) -> dict[str, Curve]:
    """The paper's two figures: means over captions for the second word, the third, .. and the `<eos>` behind the last.

    As in the paper, the first word, which has no earlier word beside it, is left out. "contribution" is the relevance
    that reaches the encoder's output, the rest having gone to the caption so far; "entropy" is that of the absolute
    relevance over cells, in nats: log(cells) if spread evenly, 0 if on one cell.
    """
    sums: dict[str, dict[int, list[float]]] = {"contribution": {}, "entropy": {}}
    for output in outputs:
        cells = output.encoder_output
        shares = cells.abs() / cells.abs().sum(-1, keepdim=True).clamp(min=1e-300)
        values = {"contribution": cells.sum(-1), "entropy": torch.special.entr(shares).sum(-1)}
        for row, word in (output.target_ids != pad_token_id).nonzero().tolist():
            for kind, measured in values.items():
                if word > 0:
                    sums[kind].setdefault(word + 1, []).append(measured[row, word].item())
    return {
        kind: Curve(
            name,
            np.array(sorted(measured)),
            np.array([np.mean(measured[position]) for position in sorted(measured)]),
            np.array([len(measured[position]) for position in sorted(measured)]),
        )
        for kind, measured in sums.items()
    }


def chart(
    title: str, across: str, up: str, curves: Sequence[Curve], size: tuple[int, int] = (620, 420)
) -> Image.Image:
    """A line for each curve, axes with round numbers, and their names."""
    font, small = ImageFont.load_default(size=16), ImageFont.load_default(size=13)
    image = Image.new("RGB", size, "#ffffff")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 72, 58, size[0] - 20, size[1] - 56 - 20 * len(curves)
    x_values, y_values = (
        np.concatenate([getattr(curve, axis) for curve in curves]) for axis in ("positions", "values")
    )
    are_positions = all(curve.positions.dtype.kind == "i" for curve in curves)
    ticks = [
        _round_numbers(x_values.min(), x_values.max(), are_positions),
        _round_numbers(y_values.min(), y_values.max()),
    ]
    (x_low, x_high), (y_low, y_high) = ((numbers[0], numbers[-1]) for numbers in ticks)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_low) / (x_high - x_low) * (right - left),
            bottom - (y - y_low) / (y_high - y_low) * (bottom - top),
        )

    draw.text((12, 8), title, INK, font)
    draw.text((12, top - 20), up, FAINT, small)
    draw.text((right, bottom + 26), across, FAINT, small, anchor="ra")
    for y in ticks[1]:
        draw.line([place(x_low, y), place(x_high, y)], "#e4e4e0")
        draw.text((left - 8, place(x_low, y)[1]), f"{y:.4g}", INK, small, anchor="rm")
    for x in ticks[0]:
        draw.text((place(x, y_low)[0], bottom + 6), f"{x:.4g}", INK, small, anchor="ma")
    draw.line([(left, top), (left, bottom), (right, bottom)], INK)
    for index, curve in enumerate(curves):
        colour = CURVE_COLOURS[index % len(CURVE_COLOURS)]
        points = [place(x, y) for x, y in zip(curve.positions, curve.values, strict=True)]
        draw.line(points, colour, width=3, joint="curve")
        for x, y in points:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
        line = bottom + 56 + 20 * index
        draw.line([(left, line), (left + 26, line)], colour, width=3)
        draw.text((left + 34, line), curve.name, INK, small, anchor="lm")
    return image


def _round_numbers(low: float, high: float, whole: bool = False) -> list[float]:
    """About five round numbers that span a range; whole numbers if asked for."""
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        low, high = low - max(0.1 * abs(low), 1e-3), high + max(0.1 * abs(high), 1e-3)
    step = 10 ** np.floor(np.log10((high - low) / 4))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) <= 5)
    step = np.ceil(step) if whole else step
    return [step * number for number in range(int(np.floor(low / step)), int(np.ceil(high / step)) + 1)]


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "#ffffff")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    return sheet
