"""Rows of features for images of any origin: the stages of `difnet extract`, shard by shard.

The columns are those of a packed dataset; `difnet pack --features FOLDER --segmentation FOLDER` packs them. The
original (mrwu-mac/DIFNet, CVPR 2022) downloads one HDF5 file and a file for each image's segmentation, which remain
what `difnet extract` writes by default.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from modeling_difnet.feature_networks_difnet import (
    GridBackbone,
    Segmenter,
    provenance_of,
    segmentation_provenance_of,
)
from modeling_difnet.vision_backbone_difnet import as_pair

from ..allocation import keep_freed_memory
from ..checkpoints import check_device
from ..command_line import describe
from ..data.packed_dataset import encode_segmentation, to_stored
from ..stage_times import StageTimes
from ..vision.image_batches import (
    DECODING,
    MAX_BYTES_AHEAD,
    NUM_THREADS,
    LoadedImage,
    grid_features_of,
    prefetch,
)
from ..vision.networks import open_grid_backbone, open_segmenter
from .fetching import Fetcher
from .outputs import feature_schema
from .readers import ImageItem
from .rows import FailureWatch, Row, error_row, load_item


@dataclass(frozen=True)
class FeatureConfig:
    """What makes features.

    Args:
        grid_backbone, layer, image_size, grid_size, precision, runtime, untrained, seed: as for `open_grid_backbone`;
            without a grid backbone there are segmentation features alone.
        segmentation_model, segmentation_size, score_threshold: as for `open_segmenter`; without it there are grid
            features alone.
        dtype: of the stored values, "float16" or "float32".
        batch_size: images that the backbone sees together, if they are of one size.
        num_threads, allow_private_hosts: as for `CaptioningConfig`.
        device: of the networks.
    """

    grid_backbone: str | None = None
    layer: int | None = None
    image_size: tuple[int, int] | None = None
    grid_size: int | tuple[int, int] | None = None
    precision: str | None = None
    runtime: str | None = None
    segmentation_model: str | None = None
    segmentation_size: int | None = None
    score_threshold: float | None = None
    untrained: bool = False
    seed: int = 0
    dtype: str = "float16"
    batch_size: int = 8
    num_threads: int | None = None
    device: str | None = None
    allow_private_hosts: bool = False


class FeatureMaker:
    """Makes the features of images; each has one row, in their order.

    Networks are loaded when they are first needed, and are not pickled along.

    Args:
        config: networks and options.

    Raises:
        ValueError: there is nothing to make.
    """

    what = "features"

    def __init__(self, config: FeatureConfig) -> None:
        if not (config.grid_backbone or config.segmentation_model or config.untrained):
            raise ValueError("nothing to make: give --grid-backbone, --segmentation-model, or both")
        self.config = config
        self._networks: tuple[GridBackbone | None, Segmenter | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])  # type: ignore[misc]

    @property
    def batch_size(self) -> int:
        return self.config.batch_size

    @property
    def device(self) -> torch.device:
        return torch.device(self.config.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def networks(self) -> tuple[GridBackbone | None, Segmenter | None]:
        """Grid backbone and segmentation model.

        Raises:
            ValueError: one cannot be loaded.
        """
        if self._networks is None:
            config = self.config
            check_device(config.device)
            keep_freed_memory()
            backbone, segmenter = None, None
            cells: Any = config.grid_size or 7
            if config.grid_backbone or config.untrained:
                backbone = open_grid_backbone(
                    config.grid_backbone, self.device, config.untrained, config.seed,
                    layer=config.layer, image_size=config.image_size, grid_size=config.grid_size,
                    precision=config.precision, runtime=config.runtime,
                )  # fmt: skip
                rows, columns = as_pair(backbone.config.grid_size)
                cells = rows if rows == columns else (rows, columns)
            if config.segmentation_model or config.untrained:
                segmenter = open_segmenter(
                    config.segmentation_model, self.device, config.untrained, config.seed, cells,
                    score_threshold=config.score_threshold, precision=config.precision,
                    image_size=config.segmentation_size, runtime=config.runtime,
                )  # fmt: skip
            self._networks = backbone, segmenter
        return self._networks

    def records(self, with_names: bool = True) -> dict[str, Any]:
        """What the features say about the networks that made them, as a manifest of `difnet extract`."""
        backbone, segmenter = self.networks
        config, said = self.config, {}
        if backbone is not None:
            said["grid_backbone"] = provenance_of(backbone, config.grid_backbone if with_names else None)
        if segmenter is not None:
            name = config.segmentation_model if with_names else None
            said["segmentation_model"] = segmentation_provenance_of(segmenter, name)
        return said

    @cached_property
    def schema(self) -> Any:
        """The columns of the rows, a `pyarrow.Schema` that carries `records`."""
        backbone, segmenter = self.networks
        schema = feature_schema(backbone is not None, segmenter is not None, self.config.dtype)
        return schema.with_metadata({"difnet": json.dumps(self.records())})

    def identity(self) -> dict[str, Any]:
        """What decides about the rows, but for the images: hashes of all weights, and the options."""
        said = {name.replace("_", " "): record for name, record in self.records(with_names=False).items()}
        return json.loads(json.dumps({**said, "--dtype": self.config.dtype}))

    def rows(self, items: Iterable[ImageItem], times: StageTimes | None = None) -> Iterator[Row]:
        """The rows of images as they come, which are read and decoded ahead in threads.

        Args:
            items: images.
            times: gets the times of the stages.
        """
        config, times, watch = self.config, times or StageTimes(), FailureWatch()
        networks = self.networks
        threads = NUM_THREADS if config.num_threads is None else config.num_threads
        fetcher = Fetcher(config.allow_private_hosts, threads, times)

        def read(item: ImageItem) -> tuple[ImageItem, LoadedImage | Exception]:
            with times.stage(DECODING, beside=True) if threads else contextlib.nullcontext():
                try:
                    return item, load_item(item, *networks, networks[1] is not None)
                except Exception as error:
                    return item._replace(content=b""), error

        def num_bytes(pair: tuple[ImageItem, LoadedImage | Exception]) -> int:
            return pair[1].num_bytes if isinstance(pair[1], LoadedImage) else 0

        batch: list[tuple[ImageItem, LoadedImage | Exception]] = []
        prefetched = prefetch(read, fetcher.fetched(items), num_bytes, threads)
        with contextlib.closing(prefetched) as ahead, fetcher:
            while True:
                with times.stage(DECODING):  # as far as the threads are not ahead
                    pair = next(ahead, None)
                assert not isinstance(pair, Exception)
                if pair is not None:
                    batch.append(pair)
                num_read = sum(not isinstance(each, Exception) for _, each in batch)
                if pair is None or num_read == config.batch_size or sum(map(num_bytes, batch)) > MAX_BYTES_AHEAD:
                    yield from self._rows_of(batch, times, watch)
                    batch = []
                if pair is None:
                    break

    def _rows_of(
        self, batch: list[tuple[ImageItem, LoadedImage | Exception]], times: StageTimes, watch: FailureWatch
    ) -> Iterator[Row]:
        backbone, segmenter = self.networks
        images = [each for _, each in batch if isinstance(each, LoadedImage)]
        grids: Iterator[np.ndarray | Exception] = iter(())
        if backbone is not None and images:
            with times.stage("grid backbone"):
                grids = iter(grid_features_of(backbone, images))
        for item, each in batch:
            row: Row = {"key": item.key, "source": item.source, "error": None}
            try:
                if isinstance(each, Exception):
                    raise each
                if backbone is not None:
                    grid = next(grids)
                    if isinstance(grid, Exception):
                        raise grid
                    row |= {"grid_features": to_stored(grid.astype(np.float32), self.config.dtype)}
                    row["grid_cells"] = len(grid)
                if segmenter is not None:
                    assert each.image is not None
                    with times.stage("segmentation"):
                        found = segmenter(each.image, each.segmentation_inputs)  # (classes, rows, columns)
                        shares = np.asarray(found, dtype=np.float32)
                    row["segmentation_features"] = encode_segmentation(to_stored(shares, self.config.dtype))
                watch.look(None)
            except Exception as error:
                watch.look(describe(error))
                row = error_row(item, describe(error))
            yield row
