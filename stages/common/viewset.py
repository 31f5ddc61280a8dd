"""Every view store of a cohort as one data set, read in an order that seed and epoch decide."""

import hashlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cytossl_core.perturbation import perturb
from stages.common import cache, stores
from stages.common.patches import Recipe, ViewStore

Sample = tuple[UInt8[np.ndarray, "px px 3"], Float[np.ndarray, "point 2"], int, int]


@dataclass(frozen=True)
class Batch:
    """Some patches on their way to the device; crops are made there."""

    patches: UInt8[Tensor, "batch px px 3"]
    points: Float[Tensor, "batch point 2"]  # retained nuclei, x, y in patch pixels; NaN: padding
    rows: Int64[Tensor, " batch"]  # numbers of the patches in the data set
    seeds: Int64[Tensor, " batch"]  # of the shuffles that are still to be made

    def pin_memory(self) -> "Batch":
        """With pixels that the device can fetch by itself."""
        return replace(self, patches=self.patches.pin_memory())


class ViewSet(Dataset[Sample]):
    """The perturbed patches of all slides, numbered in the order of slide ids.

    Args:
        source: Folder of the perturb stage.
        tiles: Folder of the tile stage, whose patches recipes (`perturb.store`) are made from.
        slides: Ids of those to take; None: all.

    Raises:
        FileNotFoundError: a stage has not run.
        ValueError: slides have patches of different sides or resolutions, or the patches of a
            recipe are not those that it was written for.
    """

    def __init__(self, source: Path, tiles: Path, slides: set[str] | None = None) -> None:
        folders = sorted(path for path in source.glob("*") if path.is_dir())
        folders = [path for path in folders if slides is None or path.name in slides]
        if not folders:
            raise FileNotFoundError(f"no slides in {source}: run `dvc repro perturb`")
        self.slide_ids = [folder.name for folder in folders]
        inputs = [f"{folder.name} {cache.content(folder)}" for folder in folders]
        self.digest = hashlib.sha256("\n".join(inputs).encode()).hexdigest()
        self.stores = [open_slide(folder, tiles / folder.name) for folder in folders]
        self.ends = np.cumsum([len(store) for store in self.stores])
        # All slides were perturbed by one run, with one radius and one resolution.
        self.radius_px = float(self.stores[0].attributes.get("radius_px", 0))
        kinds = {(store.patch_px, store.attributes["mpp"]) for store in self.stores}
        if len(kinds) > 1:
            found = ", ".join(f"{px} px at {mpp} mpp" for px, mpp in sorted(kinds))
            raise ValueError(
                f"the slides of {source} have patches of {found}: they must be alike; run "
                "`dvc repro tile` anew"
            )

    @property
    def patch_px(self) -> int:
        """Side of the patches, pixels."""
        return self.stores[0].patch_px

    @property
    def mpp(self) -> float:
        """Of the patches, microns per pixel."""
        return float(self.stores[0].attributes["mpp"])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def order(self, seed: int, epoch: int) -> Int64[np.ndarray, " row"]:
        """The order of one epoch, from nothing but seed and epoch."""
        return np.random.default_rng([seed % 2**64, epoch]).permutation(len(self))

    def __getitem__(self, row: int) -> Sample:
        """Pixels and retained nuclei of patch number `row`, the number, and a shuffle's seed."""
        at = int(np.searchsorted(self.ends, row, side="right"))
        store = self.stores[at]
        inner = row - (int(self.ends[at]) - len(store))
        return store[inner], store.points_of(inner), row, store.seed_of(inner)

    def pixels(self, batch: Batch, device: torch.device) -> UInt8[Tensor, "batch 3 px px"]:
        """The perturbed patches on the device: shuffled there, to the same bits, if by recipe."""
        patches = batch.patches.to(device, non_blocking=True).permute(0, 3, 1, 2)
        if not self.radius_px:
            return patches
        points, seeds = (values.to(device) for values in (batch.points, batch.seeds))
        return perturb(patches, points, self.radius_px, seeds)


def open_slide(folder: Path, tiles: Path) -> ViewStore | Recipe:
    """A slide's views, from either kind of store that the perturb stage writes.

    Raises:
        FileNotFoundError: neither is there, or a recipe's patches are not.
        ValueError: the patches are not those that the recipe was written for.
    """
    recipe = folder / "recipe.zarr"
    if not recipe.is_dir():
        return stores.open_views(folder / "views.zarr")
    opened = stores.open_recipe(recipe, stores.open_patches(tiles / "patches.zarr"))
    if opened.attributes["input"].split("+")[0] != cache.content(tiles):
        raise ValueError(f"{recipe} was written for other patches than {tiles}: run `dvc repro`")
    return opened


def loader(
    data: ViewSet, rows: Iterator[list[int]], workers: int, pinned: bool
) -> DataLoader[Batch]:
    """A batch for each list of patch numbers; nothing else is read."""
    return DataLoader(
        data,
        batch_sampler=rows,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pinned,
        worker_init_fn=_leave_signals_to_main,
        generator=torch.Generator(),  # or it would draw from the stream of everyone
    )


def rows_of(data: ViewSet, batch: int, seed: int, steps: range) -> Iterator[list[int]]:
    """Patch numbers of each step: all patches in a new order every epoch, an odd rest left out."""
    order, epoch_of_order = np.empty(0, np.int64), -1
    for step in steps:
        epoch, at = divmod(step, len(data) // batch)
        if epoch != epoch_of_order:
            order, epoch_of_order = data.order(seed, epoch), epoch
        yield order[at * batch : (at + 1) * batch].tolist()


def collate(samples: list[Sample]) -> Batch:
    """Stack the patches; fill the lists of points up with NaN to one length."""
    patches, points, rows, seeds = zip(*samples, strict=True)
    padded = torch.full((len(points), max(map(len, points)), 2), torch.nan)
    for row, of_patch in zip(padded, points, strict=True):
        row[: len(of_patch)] = torch.from_numpy(of_patch)
    stacked = torch.from_numpy(np.stack(patches))
    return Batch(stacked, padded, torch.tensor(rows), torch.tensor(seeds, dtype=torch.int64))


def _leave_signals_to_main(_: int) -> None:
    # A terminal and a batch system signal every process; readers must outlive the last step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
