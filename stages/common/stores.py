"""The stores between the stages: their layout, written down once. The only zarr import.

store                           array        shape                    dtype    meaning
tile/<slide>/patches.zarr       patch        [patch, px, px, 3]       uint8    RGB
                                origin       [patch, 2]               int64    x0, y0 of the top-left corner
detect/<slide>/nuclei.zarr      centroid     [nuclei, 2]              float32  x0, y0
                                patch_index  [nuclei]                 int64    row of `patch`
                                radius_um    [nuclei]                 float32  of the circle of equal area
                                score        [nuclei]                 float32  0 to 1
perturb/<slide>/views.zarr      patch        [view, px, px, 3]        uint8    perturbed RGB
                                source       [view]                   int64    row of the tile store
                                point        [points, 2]              float32  x, y in the patch: retained nuclei
                                view_index   [points]                 int64    row of `patch` in this store
perturb/<slide>/recipe.zarr     source       [view]                   int64    as in views.zarr, so point, view_index
                                seed         [view]                   int64    of the shuffle that makes the pixels
embed/<encoder>/<slide>/bag.zarr  embedding  [patch, dim]             float32  one instance a row, rows as in tile
                                origin       [patch, 2]               int64    x0, y0 of the patch
                                crop         [patch, dim]             float32  of its central half, where asked for

x0, y0 are level-0 pixels; x, y are patch pixels. Both are continuous: pixel column j covers
[j, j + 1). Attributes: slide_id, mpp (of the patches), slide_mpp (of level 0), input (content
digest of what the store was made from), schema. What made it stands beside it, in made.json.
"""  # noqa: E501

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from stages.common import headers, jpeg
from stages.common.layouts import BAG, CROP, NUCLEI, PATCHES, RECIPE, VIEWS
from stages.common.patches import ZSTD_LEVEL, PatchStore, Recipe, ViewStore, encoded
from stages.common.records import Bag, Nuclei
from stages.common.shards import write_shard

SCHEMA = 2
# Chunks are named c.0.0, not c/0/0: half as many folders, which DVC walks at each repro.
CHUNK_NAMES = {"name": "default", "separator": "."}
SHARD_PATCHES = 512
ATTRIBUTES = ("slide_id", "mpp", "slide_mpp", "input")

Store = TypeVar("Store", bound=PatchStore)


def create_patches(
    path: Path,
    patches: Iterable[np.ndarray],
    origins: np.ndarray,
    patch_px: int,
    attributes: dict[str, Any],
    codec: str = "jpeg",
) -> None:
    """Write a slide's patches as they come; `codec` is "jpeg" (4:4:4) or "zstd" (lossless)."""
    group = _create(path, attributes)
    _write_patches(group, path, patches, len(origins), patch_px, codec)
    _write_arrays(group, {"origin": origins}, PATCHES)


def create_views(
    path: Path,
    patches: Iterable[np.ndarray],
    points: np.ndarray,
    view_index: np.ndarray,
    source: np.ndarray,
    patch_px: int,
    attributes: dict[str, Any],
    codec: str = "zstd",
) -> None:
    """Write a slide's perturbed patches and their retained nuclei."""
    group = _create(path, attributes)
    _write_patches(group, path, patches, len(source), patch_px, codec)
    arrays = {"source": source, "point": points, "view_index": view_index}
    _write_arrays(group, arrays, VIEWS)


def create_recipe(
    path: Path,
    points: np.ndarray,
    view_index: np.ndarray,
    source: np.ndarray,
    seed: np.ndarray,
    attributes: dict[str, Any],
) -> None:
    """Write of what a slide's views are to be made; `attributes` add `radius_px`, 0: no shuffle."""
    arrays = {"source": source, "seed": seed, "point": points, "view_index": view_index}
    _write_arrays(_create(path, attributes), arrays, RECIPE)


def create_nuclei(
    path: Path,
    centroid: np.ndarray,
    patch_index: np.ndarray,
    radius_um: np.ndarray,
    score: np.ndarray,
    attributes: dict[str, Any],
) -> None:
    """Write the nuclei of one slide."""
    arrays = dict(zip(NUCLEI, (centroid, patch_index, radius_um, score), strict=True))
    _write_arrays(_create(path, attributes), arrays, NUCLEI)


def create_bag(
    path: Path,
    embedding: np.ndarray,
    origin: np.ndarray,
    attributes: dict[str, Any],
    crop: np.ndarray | None = None,
) -> None:
    """Write the embeddings of one slide; `crop`: those of its patches' central halves."""
    arrays = {"embedding": embedding, "origin": origin} | ({} if crop is None else {"crop": crop})
    if crop is not None and crop.shape != embedding.shape:
        raise ValueError(f"{path}: crop is {crop.shape}: it must be as embedding {embedding.shape}")
    _write_arrays(_create(path, attributes), arrays, BAG | CROP)


def open_patches(path: Path) -> PatchStore:
    """Open `data/tile/<slide>/patches.zarr`."""
    return _open_store(PatchStore, path, PATCHES)


def count_patches(path: Path) -> int:
    """How many patches a finished store holds, at a hundredth of the cost of opening it."""
    return headers.length(path, "patch")


def open_views(path: Path) -> ViewStore:
    """Open `data/perturb/<slide>/views.zarr`."""
    return _open_store(ViewStore, path, VIEWS)


def open_recipe(path: Path, patches: PatchStore) -> Recipe:
    """Open `data/perturb/<slide>/recipe.zarr`, of the views that are made from `patches`."""
    arrays, attributes = _open(path, RECIPE)
    return Recipe(patches, {name: array[:] for name, array in arrays.items()}, attributes)


def open_nuclei(path: Path) -> Nuclei:
    """Open `data/detect/<slide>/nuclei.zarr`."""
    arrays, attributes = _open(path, NUCLEI)
    return Nuclei(**{name: array[:] for name, array in arrays.items()}, attributes=attributes)


def open_bag(path: Path) -> Bag:
    """Open `data/embed/<encoder>/<slide>/bag.zarr`; its `crop` is None where none was made."""
    layout = BAG | CROP if (path / "crop").is_dir() else BAG
    arrays, attributes = _open(path, layout)
    return Bag(**{name: array[:] for name, array in arrays.items()}, attributes=attributes)


def _create(path: Path, attributes: dict[str, Any]) -> zarr.Group:
    missing = [name for name in ATTRIBUTES if name not in attributes]
    if missing:
        raise ValueError(f"{path.name} has no attribute {missing[0]}: every store carries it")
    return zarr.create_group(path, attributes={**attributes, "schema": SCHEMA}, overwrite=False)


def _write_arrays(
    group: zarr.Group, arrays: dict[str, np.ndarray], layout: dict[str, tuple[str, int]]
) -> None:
    for name, values in arrays.items():
        dtype, axes = layout[name]
        if values.ndim != axes:
            raise ValueError(f"{group.store_path}: {name} has {values.ndim} axes: it needs {axes}")
        chunk = tuple(max(length, 1) for length in values.shape)  # one file an array
        how = {"chunk_key_encoding": CHUNK_NAMES, "compressors": ZstdCodec()}
        group.create_array(name, data=values.astype(dtype), chunks=chunk, **how)


def _write_patches(
    group: zarr.Group,
    path: Path,
    patches: Iterable[np.ndarray],
    count: int,
    patch_px: int,
    codec: str,
) -> None:
    shard = max(1, min(SHARD_PATCHES, count))
    group.create_array(
        "patch",
        shape=(count, patch_px, patch_px, 3),
        dtype="uint8",
        chunks=(1, patch_px, patch_px, 3),
        shards=(shard, patch_px, patch_px, 3),
        dimension_names=("patch", "height", "width", "channel"),
        chunk_key_encoding=CHUNK_NAMES,
        **_codec_arguments(codec),
    )
    chunks = encoded(patches, codec, patch_px)
    written = sum(
        write_shard(path / "patch" / f"c.{at}.0.0.0", islice(chunks, shard), shard)
        for at in range(-(-count // shard))
    )
    if written != count or next(chunks, None) is not None:
        raise ValueError(f"{path.name} was given {written} patches or more: it needs {count}")


def _codec_arguments(codec: str) -> dict[str, Any]:
    if codec == "jpeg":
        return {"serializer": jpeg.JpegCodec(jpeg.LEVEL), "compressors": None}
    if codec == "zstd":
        return {"compressors": ZstdCodec(level=ZSTD_LEVEL)}
    raise ValueError(f"codec is {codec!r}: it must be jpeg or zstd")


def _open_store(kind: type[Store], path: Path, layout: dict[str, tuple[str, int]]) -> Store:
    arrays, attributes = _open(path, layout)
    array = arrays.pop("patch")
    return kind(
        path=path,
        count=int(array.shape[0]),
        patch_px=int(array.shape[1]),
        shard_patches=int(array.shards[0]),
        codec="jpeg" if isinstance(array.serializer, jpeg.JpegCodec) else "zstd",
        attributes=attributes,
        arrays={name: array[:] for name, array in arrays.items()},
    )


def _open(
    path: Path, layout: dict[str, tuple[str, int]]
) -> tuple[dict[str, zarr.Array], dict[str, Any]]:
    """The arrays of a store, checked, and its attributes; each is looked up once: zarr is slow."""
    if not path.is_dir():
        raise FileNotFoundError(f"no {path}: run `dvc repro` for the stage {_stage_of(path)} first")
    group = zarr.open_group(path, mode="r")
    if group.attrs.get("schema") != SCHEMA:
        found = group.attrs.get("schema")
        raise ValueError(f"{path} has schema {found}: this version reads {SCHEMA}; rerun its stage")
    arrays = {name: group.get(name) for name in layout}
    for name, (dtype, axes) in layout.items():
        array = arrays[name]
        if array is None:
            raise ValueError(f"{path} has no array {name}: rerun the stage {_stage_of(path)}")
        if str(array.dtype) != dtype or array.ndim != axes:
            found = f"{array.dtype} with {array.ndim} axes"
            raise ValueError(f"{path}: {name} is {found}: it must be {dtype} with {axes} axes")
    return arrays, dict(group.attrs)


def _stage_of(path: Path) -> str:
    return path.parts[path.parts.index("data") + 1] if "data" in path.parts[:-1] else "that made it"
