"""A Space of captioners (https://huggingface.co/docs/hub/spaces): `difnet app` on the port that Spaces are shown from.

Variables of the Space choose what is served: DIFNET_MODEL (folders or repositories, separated by spaces),
DIFNET_GRID_BACKBONE and DIFNET_SEGMENTATION_MODEL. Without DIFNET_MODEL the demo's captioner is trained first, which
takes a few minutes on two cores; it captions the examples on the page.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from difnet_transformers.cli import app, demo

DEMO = Path("demo_output")
OPTIONS = {"DIFNET_GRID_BACKBONE": "--grid-backbone", "DIFNET_SEGMENTATION_MODEL": "--segmentation-model"}


def arguments(variables: Mapping[str, str]) -> list[str]:
    """The words of `difnet app` for a Space's variables."""
    models = variables.get("DIFNET_MODEL", "").split() or [str(DEMO / "run" / "best")]
    words = ["--model", *models, "--host", "0.0.0.0", "--port", variables.get("PORT", "7860")]
    for name, option in OPTIONS.items():
        if variables.get(name):
            words += [option, variables[name]]
    return words


if __name__ == "__main__":
    if not os.environ.get("DIFNET_MODEL") and (failed := demo.main(["--output", str(DEMO)])):
        sys.exit(failed)
    sys.exit(app.main(arguments(os.environ)))
