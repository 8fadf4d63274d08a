"""Image files of the toolkit. `modeling_difnet.images_difnet`, which checkpoints carry along, opens them."""

from __future__ import annotations

import os

from modeling_difnet.images_difnet import fitted_size, open_image

from ..command_line import requires

with requires("images"):
    from PIL import Image

THUMBNAIL_SIDE = 320  # pixels
MISSING_COLOR = "#d9d9d6"


def thumbnail(image: str | os.PathLike | Image.Image, longest_side: int = THUMBNAIL_SIDE) -> Image.Image:
    """A small form of an image; a grey square where its file is gone or broken.

    Args:
        image: a file, or an RGB image, which is never enlarged.
        longest_side: of the result, in pixels.

    Returns:
        8-bit RGB.
    """
    if not isinstance(image, Image.Image):
        try:
            image = open_image(image)
        except ValueError:
            return Image.new("RGB", (longest_side, longest_side), MISSING_COLOR)
    return image.resize(fitted_size(image.size, longest_side), Image.Resampling.LANCZOS)
