"""Captions in a pipeline of datatrove: each task reads its part of the shards, captions it, and writes a JSONL file.

    pip install ".[images,data]" datatrove
    python examples/large_scale/datatrove_pipeline.py images/ --model my_captioner --output captions --tasks 8

With `SlurmPipelineExecutor` in the place of the local one the same pipeline runs on a cluster. datatrove starts no
task again that is complete. Captions are the texts of documents, which its filters, deduplication and statistics take.
"""

import argparse
from itertools import chain

from datatrove.data import Document, DocumentsPipeline
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.jsonl import JsonlWriter

from difnet_transformers.bulk import (
    CaptioningConfig,
    ImageCaptioner,
    InputConfig,
    plan_shards,
    read_shard,
)


class ImageCaptions(PipelineStep):
    """A document for each image of this task's shards: its caption, with key, source and score."""

    name = "DIFNet captions"
    type = "READER"

    def __init__(self, inputs: InputConfig, config: CaptioningConfig):
        super().__init__()
        self.inputs = inputs
        self.captioner = ImageCaptioner(config)  # loads its networks in the task

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:

        shards = plan_shards(self.inputs)[rank::world_size]
        for row in self.captioner.rows(chain.from_iterable(read_shard(shard, self.inputs) for shard in shards)):
            if row["error"] is not None:
                self.stat_update("errors")
                continue
            document = Document(row["caption"], row["key"], metadata={"source": row["source"], "score": row["score"]})
            self.update_doc_stats(document)
            yield document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="as for difnet caption --output")
    parser.add_argument("--model", required=True)
    parser.add_argument("--grid-backbone")
    parser.add_argument("--images-per-shard", type=int, default=1000)
    parser.add_argument("--output", required=True)
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="tasks that run at once on this machine")
    arguments = parser.parse_args()
    inputs = InputConfig(tuple(arguments.images), images_per_shard=arguments.images_per_shard)
    config = CaptioningConfig(arguments.model, grid_backbone=arguments.grid_backbone)
    LocalPipelineExecutor(
        [ImageCaptions(inputs, config), JsonlWriter(arguments.output)],
        tasks=arguments.tasks,
        workers=arguments.workers,
        logging_dir=f"{arguments.output}/logs",
    ).run()


if __name__ == "__main__":
    main()
