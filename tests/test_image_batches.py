"""Images decoded in threads beside the networks, batches of equal sizes, and the times of the stages."""

import contextlib
import re
import threading
import time

import numpy as np
import pytest
import torch
from test_images import noise, save_captioner

from difnet_transformers.cli import caption, extract
from difnet_transformers.stage_times import StageTimes
from difnet_transformers.vision import image_batches
from difnet_transformers.vision.image_batches import NUM_AHEAD, NUM_THREADS, grid_features_of, load_image, prefetch
from modeling_difnet import GridFeatureBackbone, GridFeatureBackboneConfig
from modeling_difnet.feature_networks_difnet import load_segmenter

# Prefetching


def test_results_come_in_order_however_long_each_takes() -> None:
    def slow_at_first(number: int) -> int:
        time.sleep(0.02 if number % 3 == 0 else 0)
        return number * number

    assert list(prefetch(slow_at_first, range(20), num_threads=4)) == [number**2 for number in range(20)]
    assert list(prefetch(slow_at_first, [])) == []


def test_an_error_comes_in_the_place_of_its_item() -> None:
    def odd(number: int) -> int:
        if number % 2 == 0:
            raise ValueError(f"{number} is even")
        return number

    results = list(prefetch(odd, range(5)))
    assert [str(result) for result in results] == ["0 is even", "1", "2 is even", "3", "4 is even"]
    assert [isinstance(result, ValueError) for result in results] == [True, False, True, False, True]


def test_only_a_few_items_are_begun_ahead_of_the_consumer() -> None:
    begun = []
    results = prefetch(begun.append, range(1000))
    for taken in range(1, 6):
        next(results)
        assert len(begun) <= taken + NUM_AHEAD
    results.close()


def test_large_images_are_not_piled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_batches, "MAX_BYTES_AHEAD", 1000)
    begun = []
    results = prefetch(begun.append, range(100), num_bytes=lambda _: 1001)
    for taken in range(1, 100):
        next(results)
        # One waits, or was begun, beside the one that is taken; of the first ones the size is not known.
        assert len(begun) <= taken + (NUM_THREADS + 1 if taken == 1 else NUM_THREADS)
    assert len(list(results)) == 1


def test_after_an_interruption_nothing_further_is_begun() -> None:
    begun = []

    def begin(number: int) -> None:
        begun.append(number)
        time.sleep(0.01)

    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(prefetch(begin, range(1000))) as results:
        next(results)
        raise KeyboardInterrupt
    num_begun = len(begun)
    assert num_begun <= 1 + NUM_AHEAD
    for thread in threading.enumerate():
        if thread.name.startswith("prefetch"):
            thread.join(timeout=10)
            assert not thread.is_alive()
    assert len(begun) <= num_begun + NUM_THREADS  # those that a thread had taken already


# Batches


@pytest.fixture(scope="module")
def backbone() -> GridFeatureBackbone:
    torch.manual_seed(0)
    sizes = {"groups": 2, "width_per_group": 4, "shortest_side": 64, "longest_side": 100}
    return GridFeatureBackbone(GridFeatureBackboneConfig(depths=(1, 1, 1, 1), **sizes)).eval()


def test_images_whose_resized_forms_have_one_size_run_as_one_batch(backbone: GridFeatureBackbone) -> None:
    """X-101 sees files of 48 x 64 and of 96 x 128 pixels in one size; a portrait has another one."""
    images = [noise(0, 64, 48), noise(1, 48, 64), noise(2, 128, 96), noise(3, 64, 48)]
    batch_sizes: list[int] = []
    handle = backbone.stem.register_forward_pre_hook(lambda _, inputs: batch_sizes.append(len(inputs[0])))
    grids = grid_features_of(backbone, [load_image(image, backbone) for image in images])
    handle.remove()
    assert sorted(batch_sizes) == [1, 3]
    for image, grid in zip(images, grids, strict=True):
        np.testing.assert_allclose(grid, backbone.grid_features(image).numpy(), rtol=1e-4, atol=1e-5)


def test_an_image_that_fails_in_a_batch_does_not_take_the_others_with_it(backbone: GridFeatureBackbone) -> None:
    loaded = [load_image(noise(seed), backbone) for seed in range(3)]
    loaded[1].pixel_values[0, 0, 0, 0] = float("nan")
    grids = grid_features_of(backbone, loaded)
    assert isinstance(grids[1], ValueError)
    for place in (0, 2):
        assert (grids[place] == backbone.grid_features(noise(place)).numpy()).all()


def test_images_are_prepared_for_both_networks(backbone: GridFeatureBackbone) -> None:
    segmenter = load_segmenter(None, untrained=True)
    image = noise(0, 64, 48)
    loaded = load_image(image, backbone, segmenter)
    values = loaded.segmentation_inputs["pixel_values"]
    assert loaded.num_bytes >= 3 * 64 * 48 + loaded.pixel_values.nbytes + values.nbytes
    assert (segmenter(image, loaded.segmentation_inputs) == segmenter(image)).all()
    assert load_image(image, None).segmentation_inputs is None


# Times of the stages


def test_the_summary_names_every_stage_that_took_time() -> None:
    times = StageTimes("decoding", "grid backbone", "writing")
    with times.stage("grid backbone"):
        time.sleep(0.06)
    with times.stage("decoding", beside=True):
        time.sleep(0.06)
    with contextlib.suppress(ValueError), times.stage("captioning"):
        time.sleep(0.06)
        raise ValueError
    line = times.summary(3)
    rate, stages = line.split(" images/s: ")
    assert re.fullmatch(r"3 images in 0\.[2-9] s, [0-9.]+", rate)
    assert [stage.rpartition(" s")[0].split(" 0.")[0] for stage in stages.split(", ")] == [
        "decoding",
        "grid backbone",
        "captioning",
    ]
    assert "decoding 0.0 s (and 0.1 s beside)" in line
    assert "1 image in" in times.summary(1)


def test_threads_add_to_one_stage() -> None:
    times = StageTimes()

    def work(_: int) -> None:
        with times.stage("decoding", beside=True):
            time.sleep(0.01)

    list(prefetch(work, range(20), num_threads=4))
    assert times.seconds_beside["decoding"] >= 0.2


def test_extract_and_caption_print_the_times_of_their_stages(tmp_path, capsys) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        noise(number).save(tmp_path / "images" / f"{number}.png")
    save_captioner(tmp_path / "captioner")
    arguments = [str(tmp_path / "images"), "--untrained", "--device", "cpu"]
    assert extract.main([*arguments, "--output", str(tmp_path / "features")]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("3 images in ")]
    assert re.search("decoding .* grid backbone .* segmentation .* writing", line)
    assert extract.main([*arguments, "--output", str(tmp_path / "features")]) == 0  # complete already
    assert "images in" not in capsys.readouterr().err
    assert caption.main([*arguments, "--model", str(tmp_path / "captioner")]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("3 images in ")]
    assert re.search("decoding .* grid backbone .* segmentation .* captioning .* writing", line)
