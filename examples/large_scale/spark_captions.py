"""Captions with Spark's `mapInPandas`: any table with images, captioned in the tasks of a Spark job.

    pip install ".[images,data]" "pyspark[sql]"   # Java 17 or later
    python examples/large_scale/spark_captions.py images/ --model my_captioner --output captions

On a cluster the executors need these packages, in the Python that PYSPARK_PYTHON names, and the model; `spark-submit`
takes this file as it is. With GPUs, give each task one (`spark.task.resource.gpu.amount=1`). A task that fails is
Spark's to start again.
"""

import argparse
from collections.abc import Callable, Iterator

import pandas as pd
from pyspark.sql import SparkSession

from difnet_transformers.bulk import CaptioningConfig, ImageCaptioner

COLUMNS = {"key": "string", "caption": "string", "score": "float", "error": "string"}


def caption_with(config: CaptioningConfig) -> Callable[[Iterator[pd.DataFrame]], Iterator[pd.DataFrame]]:
    """A function for `mapInPandas` of tables with the columns `path` and `content`."""

    def caption(tables: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        captioner = ImageCaptioner(config)  # once for each partition
        for table in tables:
            pairs = zip(table["path"], table["content"], strict=True)
            rows = captioner([{"key": path, "image": bytes(content)} for path, content in pairs])
            yield pd.DataFrame(rows, columns=list(COLUMNS))

    return caption


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="folder or URL of image files")
    parser.add_argument("--model", required=True)
    parser.add_argument("--grid-backbone")
    parser.add_argument("--output", required=True)
    parser.add_argument("--partitions", type=int, help="default: Spark's; the networks are loaded once for each")
    arguments = parser.parse_args()
    # An Arrow batch has its images in memory: few at a time, a multiple of what is captioned together.
    spark = SparkSession.builder.config("spark.sql.execution.arrow.maxRecordsPerBatch", 64).getOrCreate()
    images = spark.read.format("binaryFile").option("recursiveFileLookup", True).load(arguments.images)
    if arguments.partitions is not None:
        images = images.repartition(arguments.partitions)
    config = CaptioningConfig(arguments.model, grid_backbone=arguments.grid_backbone, batch_size=16)
    schema = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
    images.select("path", "content").mapInPandas(caption_with(config), schema).write.parquet(arguments.output)


if __name__ == "__main__":
    main()
