"""Finished results of the stage tile, with random patches, for the tests of what reads them."""

from pathlib import Path

import numpy as np

from stages.common import cache, stores

PX = 31


def a_slide(source: Path, name: str, count: int, mpp: float = 0.5, codec: str = "zstd") -> None:
    """A slide's patches, different for each name, in the cache and under `source`."""
    rng = np.random.default_rng(ord(name[0]))
    attributes = {"slide_id": name, "mpp": mpp, "slide_mpp": 0.25, "input": "-"}

    def make(folder: Path) -> None:
        patches = rng.integers(0, 256, (count, PX, PX, 3), dtype=np.uint8)
        origin = rng.integers(0, 10**5, (count, 2))
        stores.create_patches(folder / "patches.zarr", patches, origin, PX, attributes, codec)

    key = cache.key_of("tile", name, (str(count), str(mpp), codec), {}, "")
    cache.build("tile", key, name, {}, make)
    cache.link(cache.entry("tile", key), source / name)


def opened(source: Path, names: str) -> list[stores.PatchStore]:
    """The stores of these slides, a letter each."""
    return [stores.open_patches(source / name / "patches.zarr") for name in names]
