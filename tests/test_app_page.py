"""The page of `difnet app` in headless Chromium, Gradio's own API, and the blocks of docs/app.md."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import chromium
import numpy as np
import pytest
from app_world import features, make_service, npy_of, npz_of
from PIL import Image
from test_images import file_of, noise

pytest.importorskip("gradio")

from difnet_transformers.app.inputs import CaptionInput
from difnet_transformers.app.page import make_page_application
from difnet_transformers.app.rendering import class_color, results_html
from difnet_transformers.app.server import running_server
from difnet_transformers.app.tasks import CaptionResult
from modeling_difnet.confidence_difnet import CaptionConfidence, WordConfidence

ROOT = Path(__file__).parent.parent
SECONDS = 60  # a busy machine is slow, and nothing here measures time
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
PUT_INTO_CLIPBOARD = """async file => {
  const image = await createImageBitmap(await (await fetch(`data:image/png;base64,${file}`)).blob());
  const canvas = new OffscreenCanvas(image.width, image.height);
  canvas.getContext("2d").drawImage(image, 0, 0);
  await navigator.clipboard.write([new ClipboardItem({"image/png": await canvas.convertToBlob()})]);
}"""
DROP = """([place, ...files]) => {
  const transfer = new DataTransfer(), target = document.querySelector(place);
  const bytes = file => Uint8Array.from(atob(file), character => character.charCodeAt(0));
  for (const [name, file] of files) transfer.items.add(new File([bytes(file)], name));
  for (const kind of ["dragenter", "dragover", "drop"])
    target.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: transfer}));
}"""


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    return make_service(tmp_path_factory.mktemp("app"), max_upload=2**20)


@pytest.fixture(scope="module")
def url(service) -> Iterator[str]:
    with running_server(service, lambda: make_page_application(service)) as (address, page):
        assert page.is_ready.wait(60)
        assert page.problem is None
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if chromium.PROGRAM is None:
        pytest.skip("Chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium.PROGRAM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def new_page(browser, url) -> Iterator:
    """Opens the page as a new user, and looks at the end whether one asked other servers or failed."""
    contexts, requests, errors = [], [], []

    def open_page(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * SECONDS)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.locator("#caption").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
    assert [each for each in requests if not each.startswith((url, "data:", "blob:"))] == []


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "image.png"
    noise(width=160, height=120).save(path)
    return path


@pytest.fixture(scope="module")
def captioned(new_page, image):
    """A page whose user has sent an image, and does nothing but look."""
    page = new_page(permissions=["clipboard-read", "clipboard-write"], accept_downloads=True)
    upload(page, image)
    page.locator(".result").first.wait_for()
    return page


@pytest.fixture(scope="module")
def desk(new_page):
    """A page whose user sends one thing after another, and may use clipboard and camera."""
    return new_page(permissions=["clipboard-read", "clipboard-write", "camera"])


def upload(page, path: Path) -> None:
    page.locator("#image input[type=file]").set_input_files(str(path))


def drop(page, place: str, **files: bytes) -> None:
    page.evaluate(DROP, [place, *([name, base64.b64encode(file).decode()] for name, file in files.items())])


def remove_image(page) -> None:
    page.get_by_label("Upload file", exact=True).click()
    page.locator("#image").get_by_text("Click to Upload").wait_for()


def wait_for_result(page, name: str) -> None:
    page.locator(".result figure small").get_by_text(name, exact=True).first.wait_for()


def shape_of_preview(page) -> list[int]:
    return page.locator("#image img:not(.hide)").evaluate("image => [image.naturalWidth, image.naturalHeight]")


def write_prompt(page, text: str) -> None:
    page.locator("#prompt textarea, #prompt input").first.fill(text)


def lit_cells(card) -> int:
    return card.locator(".cells i").evaluate_all("cells => cells.filter(each => each.style.backgroundColor).length")


def painted_pixels(card) -> int:
    return card.locator("canvas").evaluate(
        "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 == 3 && v).length"
    )


def test_a_word_lights_up_its_cells_and_classes(captioned):
    cards = captioned.locator(".result")
    assert cards.locator("h3").all_inner_texts() == ["first", "second"]
    card = cards.first
    words = card.locator(".words button")
    assert words.count() == 5
    assert lit_cells(card) == 0
    words.nth(1).hover()
    assert lit_cells(card) == 49
    assert "probability" in card.locator(".about").inner_text()
    assert painted_pixels(card) > 0  # the classes of the word
    assert lit_cells(cards.nth(1)) == 0
    captioned.get_by_label("grid features").check()
    words.nth(1).hover()
    assert painted_pixels(card) == 0
    captioned.get_by_label("both flows").check()


def test_words_by_keyboard(captioned):
    card = captioned.locator(".result").nth(1)
    words = card.locator(".words button")
    words.first.focus()
    assert lit_cells(card) == 49
    captioned.keyboard.press("Tab")
    assert card.locator(".words button.lit").inner_text() == words.nth(1).inner_text()
    captioned.keyboard.press("Enter")
    assert words.nth(1).get_attribute("aria-pressed") == "true"
    captioned.locator("#caption").focus()
    assert lit_cells(card) == 49  # a word that was chosen stays


def test_the_segmentation_map_and_its_legend(captioned):
    card = captioned.locator(".result").first
    card.get_by_label("Segmentation map").check()
    assert painted_pixels(card) > 0
    card.get_by_label("Segmentation map").uncheck()
    assert painted_pixels(card) == 0
    card.locator(".legend button").first.hover()
    assert painted_pixels(card) > 0


def test_beams_copy_and_download(captioned):
    card = captioned.locator(".result").first
    assert card.locator(".beams tbody tr").count() == 3
    caption = card.locator(".beams tbody th").first.inner_text()
    card.get_by_role("button", name="Copy caption").click()
    card.get_by_role("button", name="Copied").wait_for()
    assert captioned.evaluate("navigator.clipboard.readText()") == caption
    with captioned.expect_download() as download:
        card.get_by_role("button", name="Download JSON").click()
    assert download.value.suggested_filename == "image.png.json"
    assert f'"caption": "{caption}"' in Path(download.value.path()).read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.png", b"no image at all", "broken.png: not an image that Pillow can read"),
        ("large.png", b"\0" * 2**21, "large.png: larger than 1 MB, the largest upload that is taken"),
        ("an image of no type", b"no image", "an image of no type: not an image that Pillow can read"),
        ("half.npz", npz_of({"segmentation_features": np.zeros((133, 7, 7))}), "grid_features are missing"),
    ],
    ids=["broken", "large", "no type", "one flow"],
)
def test_a_file_that_cannot_be_read_gets_a_message(desk, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    upload(desk, tmp_path / name)
    desk.get_by_text(message).first.wait_for()
    assert desk.get_by_text("Traceback").count() == 0


def test_an_image_is_pasted_and_shown_before_its_caption(desk):
    content = file_of(noise(3, 96, 64))
    desk.evaluate(PUT_INTO_CLIPBOARD, base64.b64encode(content).decode())
    desk.keyboard.press("Control+V")
    wait_for_result(desk, "image.png")
    assert shape_of_preview(desk) == [96, 64]
    remove_image(desk)
    desk.get_by_label("Paste from clipboard").click()
    desk.locator("#image img").wait_for()
    desk.evaluate("navigator.clipboard.writeText('the horse')")
    desk.locator("#prompt textarea, #prompt input").first.focus()
    desk.keyboard.press("Control+V")
    assert desk.locator("#prompt textarea, #prompt input").first.input_value() == "the horse"
    write_prompt(desk, "")


def test_files_are_dropped_anywhere_and_the_next_ones_replace_them(desk):
    drop(desk, "#results", one=file_of(noise(3, 96, 64), "JPEG"))
    wait_for_result(desk, "one")
    assert shape_of_preview(desk) == [96, 64]
    given = features()
    drop(desk, "#image", **{"a.npz": npz_of(given)})
    wait_for_result(desk, "a.npz")
    assert desk.locator("#image img").count() == 0
    arrays = {"grids.npy": npy_of(given["grid_features"]), "maps.npy": npy_of(given["segmentation_features"])}
    drop(desk, "#files", **arrays)
    wait_for_result(desk, "grids.npy")
    assert desk.locator("#files .filename").count() == 2
    drop(desk, "#prompt", two=file_of(noise(4, 64, 96)))
    wait_for_result(desk, "two")
    assert shape_of_preview(desk) == [64, 96]
    assert desk.locator("#files .filename").count() == 0


def test_the_next_image_gets_a_map_and_words_of_its_own(desk):
    drop(desk, "#results", before=file_of(noise(5)))
    wait_for_result(desk, "before")
    card = desk.locator(".result").first
    card.locator(".words button").first.click()  # which keeps it
    card.get_by_label("Segmentation map").check()
    drop(desk, "#results", behind=file_of(noise(6)))
    wait_for_result(desk, "behind")
    assert card.locator(".words button[aria-pressed=true]").count() == 0
    assert card.get_by_label("Segmentation map").is_checked()  # as chosen for the image before
    assert painted_pixels(card) > 0
    desk.evaluate("window.events = 0; document.addEventListener('word', () => window.events++)")
    card.locator(".words button").first.hover()
    assert desk.evaluate("window.events") == 1
    card.get_by_label("Segmentation map").uncheck()


def test_what_the_clipboard_button_cannot_take_gets_a_message(desk):
    remove_image(desk)
    large = Image.fromarray(np.random.default_rng(0).integers(0, 255, (700, 700, 3), dtype=np.uint8))
    for content, message in (
        (file_of(large), "image.png: larger than 1 MB, the largest upload that is taken"),
        (None, "the clipboard holds no image"),
    ):
        if content is None:
            desk.evaluate("navigator.clipboard.writeText('text')")
        else:
            desk.evaluate(PUT_INTO_CLIPBOARD, base64.b64encode(content).decode())
        desk.get_by_label("Paste from clipboard").click()
        desk.locator("#upload-message").get_by_text(message).wait_for()


def test_a_file_is_chosen_by_keyboard(desk, tmp_path):
    noise().save(tmp_path / "chosen.png")
    desk.once("filechooser", lambda chooser: chooser.set_files(str(tmp_path / "chosen.png")))
    remove_image(desk)
    desk.get_by_label("Drop an image file here to upload").focus()
    desk.keyboard.press("Enter")
    wait_for_result(desk, "chosen.png")


def test_a_photo_of_the_camera(desk):
    desk.get_by_label("Capture from camera").click()
    desk.get_by_text("Click to Access Webcam").click()
    desk.wait_for_function("document.querySelector('#image video')?.videoWidth")
    desk.get_by_label("capture photo").click()
    desk.locator("#image img:not(.hide)").wait_for()
    wait_for_result(desk, "image.png")
    assert min(shape_of_preview(desk)) > 100


def test_a_preview_that_the_browser_cannot_show_says_so(desk):
    drop(desk, "#image", **{"image.tif": file_of(noise(), "TIFF")})
    wait_for_result(desk, "image.tif")
    desk.get_by_alt_text("No preview: the browser cannot show this file.").wait_for()


def test_a_prompt(desk, image):
    write_prompt(desk, "zebra")
    upload(desk, image)
    desk.get_by_text("does not know the word 'zebra'").wait_for()
    write_prompt(desk, "the horse")
    desk.locator("#caption").click()
    card = desk.locator(".result").first
    card.wait_for()
    assert card.locator(".words button").first.inner_text().split() == ["the", "given"]
    assert card.locator(".beams tbody th").first.inner_text().startswith("the horse ")


def test_an_example(desk):
    write_prompt(desk, "")
    desk.locator("#examples button").nth(2).click()
    desk.locator(".result figure small", has_text="scene ").first.wait_for()


def test_a_second_user_on_a_telephone_in_the_dark(captioned, new_page, tmp_path):
    """Two users at once; nothing is wider than the screen, and words are light on dark."""
    page = new_page(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True, color_scheme="dark")
    noise(5, 90, 200).save(tmp_path / "other.png")
    upload(page, tmp_path / "other.png")
    captioned.locator("#caption").click()
    for user, shape in ((page, 90 / 200), (captioned, 160 / 120)):
        shown = user.locator(".result img").first
        shown.wait_for()
        assert shown.evaluate("each => each.naturalWidth / each.naturalHeight") == pytest.approx(shape, abs=0.02)
    card = page.locator(".result").first
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    card.locator(".words button").nth(1).tap()
    assert lit_cells(card) == 49
    brightness = "(e, p) => getComputedStyle(e)[p].match(/[0-9.]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0)"
    assert card.locator(".words button").first.evaluate(brightness, "color") > 500
    assert card.locator(".words button").first.evaluate(brightness, "borderBottomColor") > 400
    assert card.evaluate(brightness, "backgroundColor") < 200


# Gradio's API


def test_the_official_client_gets_confidences_and_relevance(url, image, tmp_path):
    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client(url, verbose=False)
    found = client.predict(files=[gradio_client.handle_file(image)], with_relevance=True, api_name="/caption")
    assert found["caption"] == found["captions"][0]["caption"]
    assert [word["word"] for word in found["captions"][0]["words"]] == found["relevance"]["words"]
    assert np.shape(found["relevance"]["cells"]["both"]) == (5, 49)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(Exception, match="not an image that Pillow can read"):
        client.predict(files=[gradio_client.handle_file(tmp_path / "broken.png")], api_name="/caption")


def test_every_block_of_the_guide_runs(url, image, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "app.md").read_text(encoding="utf-8")
    shutil.copy(image, tmp_path / "image.png")
    Image.open(image).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        if "openai" in block:
            pytest.importorskip("openai")
        exec(compile(block.replace("http://127.0.0.1:7860", url), "app.md", "exec"), {"__name__": "docs"})
        assert capsys.readouterr().out.strip()


# HTML


def test_captions_and_names_are_escaped():
    hostile = "<img src=x onerror=alert(1)>'\""
    result = CaptionResult(hostile, [hostile], None, [True], remark=hostile, label_map=np.zeros((2, 2), int))
    result.class_names = [hostile]
    html = results_html([result, result], CaptionInput(Image.new("RGB", (2, 2)), name=hostile))
    assert "<img src=x" not in html
    assert "onerror=alert(1)>'" not in html


def result_of(**values) -> CaptionResult:
    words = [WordConfidence("dog", -0.1, 0.2, 0.9)]
    confidences = [CaptionConfidence(words, -0.2, -0.1, 0.3, 0.9) for _ in range(2)]
    return CaptionResult("a", ["a dog", "a cat"], confidences, [True, True], **values)


def test_samples_are_not_called_beams():
    beams, samples = (results_html([result_of(is_sampled=each)], CaptionInput(None)) for each in (False, True))
    assert "2 best captions" in beams
    assert "Agreement of the beams" in beams
    assert "2 samples, the most probable first" in samples
    assert "beam" not in samples.partition("<thead>")[2]


def test_words_that_nothing_is_known_of_have_no_level():
    html = results_html([CaptionResult("a", ["a dog"], None, [True])], CaptionInput(None))
    assert not re.search(r'class="word \w', html)


def test_classes_have_colors_of_their_own():
    assert len({class_color(index) for index in range(200)}) == 200


def test_an_image_of_no_class_has_no_map():
    result = CaptionResult("a", ["a dog"], None, [True], label_map=np.full((3, 3), -1))
    assert "data-labels" not in results_html([result], CaptionInput(None))
    assert file_of(noise())
