"""JPEG as a zarr v3 chunk codec, under the name and keys that imagecodecs gives it.

imagecodecs ships this codec for Python 3.12 and later; zarr stores made here open there.
"""

from dataclasses import dataclass
from typing import Any, Self

import imagecodecs
import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.common import JSON
from zarr.registry import register_codec

NAME = "imagecodecs_jpeg"
LEVEL = 92
SUBSAMPLING = "444"


def encode(patch: np.ndarray, level: int) -> bytes:
    """An RGB patch, uint8 [height, width, 3], as a JPEG file without chroma subsampling."""
    return imagecodecs.jpeg_encode(patch, level=level, subsampling=SUBSAMPLING)


def decode(data: bytes) -> np.ndarray:
    """The RGB patch, uint8 [height, width, 3], of a JPEG file."""
    return imagecodecs.jpeg_decode(data)


@dataclass(frozen=True)
class JpegCodec(ArrayBytesCodec):
    """One patch a chunk, [1, height, width, 3] uint8, as one JPEG file."""

    level: int

    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        """Read the codec from zarr.json."""
        configuration: Any = data["configuration"]
        return cls(level=int(configuration["level"]))

    def to_dict(self) -> dict[str, JSON]:
        """Write the codec to zarr.json."""
        return {"name": NAME, "configuration": {"level": self.level, "subsampling": SUBSAMPLING}}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """JPEG has no size known beforehand."""
        raise NotImplementedError

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        pixels = decode(chunk_bytes.to_bytes()).reshape(chunk_spec.shape)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(pixels)

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        data = encode(np.ascontiguousarray(chunk_array.as_numpy_array()[0]), self.level)
        return chunk_spec.prototype.buffer.from_bytes(data)


register_codec(NAME, JpegCodec)
