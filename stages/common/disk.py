"""Room on the disks: what results will take beside what is free, before hours of work.

Results lie in the cache and are hard-linked into data/ and from there into DVC's cache, so that a
disk holds them once; where the cache is on another disk than data/, each of the two holds them.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from stages.common import cache

logger = logging.getLogger(__name__)

UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True)
class Needs:
    """What results will take."""

    bytes_: float
    remedy: str  # which settings take less
    firm: bool = True  # False: a bound that may lie far above; it is told and refuses nothing


def check(stage: str, needs: Needs, target: Path) -> None:
    """Refuse to begin what the disks cannot hold.

    Raises:
        OSError: the disk of the cache, or of `target` where that is another one, has less room.
    """
    for place in places(target):
        free = free_bytes(place)
        if needs.bytes_ <= free:
            continue
        said = f"{stage} has about {human(needs.bytes_)} to write"
        remedy = f"free some, set CYTOSSL_CACHE to a folder on a larger disk, or {needs.remedy}"
        if needs.firm:
            raise OSError(f"{said}, and the disk of {place} has {human(free)} free: {remedy}")
        logger.warning("%s at most, and %s has %s free: if it fills up, what is finished is kept, "
                       "and then %s", said, place, human(free), remedy)  # fmt: skip


def places(target: Path) -> list[Path]:
    """The folder of the cache, and `target` if it is on another disk."""
    found = [cache.root(), target]
    disks = [_nearest(place).stat().st_dev for place in found]
    return found if disks[0] != disks[1] else found[:1]


def free_bytes(place: Path) -> int:
    """What a user may still write where `place` is, or will be."""
    return shutil.disk_usage(_nearest(place)).free


def _nearest(place: Path) -> Path:
    """The folder itself, or the first around it that exists."""
    whole = place.absolute()
    return next(folder for folder in (whole, *whole.parents) if folder.exists())


def human(count: float) -> str:
    """Bytes in a unit that reads well, powers of 1,000 as on the labels of disks."""
    for unit in UNITS:
        if count < 1000 or unit == UNITS[-1]:
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == UNITS[0] or count >= 10 else f"{count:.1f} {unit}"
