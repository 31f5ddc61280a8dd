"""Write pictures so that a full disk is an error: OpenCV's own writer only returns False."""

from pathlib import Path

import cv2
from jaxtyping import UInt8
from numpy import ndarray

QUALITY = 85


def write_jpeg(path: Path, pixels: UInt8[ndarray, "height width 3"]) -> None:
    """Write RGB pixels as a JPEG file.

    Raises:
        OSError: the file could not be written whole.
    """
    encoded = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
    path.write_bytes(encoded.tobytes())
