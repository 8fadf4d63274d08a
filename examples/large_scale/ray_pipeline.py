"""Captions in a pipeline of Ray Data: anything that Ray reads, captioned by a pool of actors, filtered and written.

    pip install ".[images,ray]"
    python examples/large_scale/ray_pipeline.py images/ --model my_captioner --output captions --workers 4

`difnet caption --engine ray` is for whole jobs: it has manifests, resumes, and notices what changed. This is for what
comes before and after captions in a pipeline of your own.
"""

import argparse
import os

import pyarrow as pa
import pyarrow.compute as pc
import ray

from difnet_transformers.bulk import CaptionImages, CaptioningConfig


def without_errors(captions: pa.Table) -> pa.Table:
    return captions.filter(pc.is_null(captions["error"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="folder or URL of image files; see ray.data.read_* for tars, Parquet, ..")
    parser.add_argument("--model", required=True)
    parser.add_argument("--grid-backbone")
    parser.add_argument("--output", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus-per-worker", type=float, default=0)
    arguments = parser.parse_args()
    if "RAY_ADDRESS" not in os.environ:  # this machine: actors keep their cores, and reading needs one too
        ray.init("local", num_cpus=arguments.workers + 1, include_dashboard=False)
    config = CaptioningConfig(arguments.model, grid_backbone=arguments.grid_backbone, batch_size=16)
    captions = ray.data.read_binary_files(arguments.images, include_paths=True).map_batches(
        CaptionImages,
        fn_constructor_args=(config,),
        batch_format="pyarrow",
        batch_size=64,
        compute=ray.data.ActorPoolStrategy(size=arguments.workers),
        num_gpus=arguments.gpus_per_worker,
    )
    captions.map_batches(without_errors, batch_format="pyarrow").write_parquet(arguments.output)


if __name__ == "__main__":
    main()
