"""Image files to uint8 tensors of one size and channel count, whatever mode, depth or orientation they have."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def decode_image(file: bytes | str, size: int, channels: int) -> Tensor:
    """Decode the bytes, or the path, of an image file and fit it to a square.

    Args:
        file: contents or path of any file that Pillow opens; the first frame counts.
        size: side of the square in pixels.
        channels: 1 or 3.

    Returns:
        [channels, size, size] uint8.

    Raises:
        Exception: the file is missing, no image, or truncated; Pillow's plugins raise many types.
    """
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        # Lets a JPEG decode at 1/2, 1/4 or 1/8 of its size where that leaves twice the pixels we need.
        image.draft(None, (2 * size, 2 * size))
        ImageOps.exif_transpose(image, in_place=True)
        return fit_image(image, size, channels)


def fit_image(image: Image.Image, size: int, channels: int) -> Tensor:
    """Convert an image to grey or RGB, resize its shorter side to `size` (bicubic, antialiased) and crop the centre.

    Sixteen-bit values are divided by 257; transparent pixels show white; palette, CMYK, two-level and other modes
    convert as Pillow does.

    Args, Returns:
        As in `decode_image`.
    """
    mode = "L" if channels == 1 else "RGB"
    if image.mode.startswith("I"):  # 16-bit grey; Pillow would clip it at 255
        levels = np.asarray(image).clip(0, 65535)
        image = Image.fromarray(np.round(levels / 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image))
    return pixels.reshape(size, size, channels).permute(2, 0, 1).contiguous()
