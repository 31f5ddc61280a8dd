"""The tiles of a TIFF slide, each decoded once: several times as fast as asking OpenSlide.

OpenSlide looks the directory up and blends with cairo for every tile. Here a region is put together
from the file's own tiles. `stages.common.pyramid` uses this only where it found the pixels equal to
OpenSlide's, and asks OpenSlide again wherever `region` returns None: a tile that is absent, cut
short or damaged.

JPEG goes through libjpeg-turbo by way of kornia_rs, which takes its warnings ("premature end of
data") for errors, as OpenSlide does; imagecodecs passes them over and returns grey.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import kornia_rs
import numpy as np
import tifffile
from jaxtyping import Int64, UInt8
from tifffile import COMPRESSION, PHOTOMETRIC

# Decoded tiles kept, bytes. A dense grid needs those that the next row of patches shares: 256-px
# tiles fit for slides up to 340,000 px wide, 1024-px tiles up to 85,000 px. Beyond that they are
# decoded twice.
CACHE_BYTES = 256 << 20
EXACT = {
    COMPRESSION.NONE,
    COMPRESSION.LZW,
    COMPRESSION.ADOBE_DEFLATE,
    COMPRESSION.DEFLATE,
    COMPRESSION.ZSTD,
    COMPRESSION.APERIO_JP2000_RGB,
}
SAMPLES = 4  # tiles of most detail, and as many others, that are compared with OpenSlide


@dataclass(frozen=True)
class Level:
    """One directory of the file; tiles are numbered row by row."""

    page: tifffile.TiffPage
    tables: bytes | None  # JPEG: of all tiles
    offsets: Int64[np.ndarray, " tile"]
    lengths: Int64[np.ndarray, " tile"]  # bytes; 0: the tile is absent

    @property
    def columns(self) -> int:
        """Tiles in a row."""
        return -(-self.page.imagewidth // self.page.tilewidth)


class Tiles:
    """An open TIFF file, some of its tiles in memory."""

    def __init__(self, path: Path, level_dimensions: list[tuple[int, int]]) -> None:
        """Read the directories; `level_dimensions` are (width, height) as OpenSlide gives them.

        Raises:
            ValueError: the file is no TIFF, or damaged.
            OSError: it cannot be read.
        """
        self._file = -1  # these two first: `close` needs them, also of a file that is refused
        self._kept: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        with tifffile.TiffFile(path) as tiff:
            self._levels = [_level(tiff.pages, extent) for extent in level_dimensions]
        self._decoder = kornia_rs.io.ImageDecoder()
        self._kept_bytes = 0
        self._waiting: dict[int, np.ndarray] = {}  # by level: uses of each tile that are to come
        self._file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file and the tiles."""
        self._kept.clear()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def has(self, level: int) -> bool:
        """Whether the level is stored in a way that is read here."""
        return self._levels[level] is not None

    def under(self, level: int, x: int, y: int, width: int, height: int) -> list[int]:
        """Numbers of the tiles under a region."""
        rows, columns = _span(self._levels[level], x, y, width, height)
        across = self._levels[level].columns
        return [
            row * across + column
            for row in range(rows.start, rows.stop)
            for column in range(columns.start, columns.stop)
        ]

    def samples(self, level: int) -> list[tuple[int, int]]:
        """Corners (x, y) of some tiles, level pixels: those of most detail, and others."""
        found = self._levels[level]
        largest = np.argsort(found.lengths, kind="stable")[-SAMPLES:]
        others = np.random.default_rng(0).choice(len(found.lengths), SAMPLES)
        places = [divmod(int(at), found.columns) for at in (*largest, *others)]
        return [(x * found.page.tilewidth, y * found.page.tilelength) for y, x in places]

    @contextmanager
    def expecting(
        self, level: int, corners: Int64[np.ndarray, "region 2"], width: int, height: int
    ) -> Iterator[None]:
        """Keep a tile until the last of these regions (x, y of their corners) has used it."""
        found = self._levels[level]
        uses = np.zeros((-(-len(found.lengths) // found.columns), found.columns), np.int32)
        for x, y in corners:
            uses[_span(found, int(x), int(y), width, height)] += 1
        self._waiting[level] = uses
        try:
            yield
        finally:
            self._waiting.pop(level, None)

    def region(
        self, level: int, x: int, y: int, width: int, height: int, background: tuple[int, int, int]
    ) -> UInt8[np.ndarray, "height width 3"] | None:
        """RGB pixels of a region in level pixels, or None where OpenSlide has to judge."""
        found = self._levels[level]
        tile_width, tile_height = found.page.tilewidth, found.page.tilelength
        pixels = np.empty((height, width, 3), np.uint8)
        if x + width > found.page.imagewidth or y + height > found.page.imagelength:
            pixels[:] = background
        rows, columns = _span(found, x, y, width, height)
        for row in range(rows.start, rows.stop):
            for column in range(columns.start, columns.stop):
                tile = self._tile(level, row, column)
                if tile is None:
                    return None
                _paste(pixels, tile, column * tile_width - x, row * tile_height - y)
        return pixels

    def decode(self, level: int, at: int) -> np.ndarray | None:
        """Tile number `at` without what lies beyond the edge; None: OpenSlide has to judge."""
        found = self._levels[level]
        page = found.page
        length = int(found.lengths[at])
        segment = os.pread(self._file, length, int(found.offsets[at])) if length else b""
        if not length or len(segment) < length:
            return None
        try:
            if page.compression == COMPRESSION.JPEG:
                tile = self._decoder.decode(_whole_jpeg(segment, found.tables, page.photometric))
            else:
                tile = page.decode(segment, at)[0][0]
        except Exception:  # what kornia_rs raises; OpenSlide tells the user what is wrong
            return None
        if tile.shape != (page.tilelength, page.tilewidth, 3):
            return None
        row, column = divmod(at, found.columns)
        bottom = page.imagelength - row * page.tilelength
        right = page.imagewidth - column * page.tilewidth
        return tile[:bottom, :right]

    def _tile(self, level: int, row: int, column: int) -> np.ndarray | None:
        at = row * self._levels[level].columns + column
        tile = self._kept.pop((level, at), None)
        if tile is None:
            tile = self.decode(level, at)
            if tile is None:
                return None
        else:
            self._kept_bytes -= tile.nbytes
        waiting = self._waiting.get(level)
        if waiting is not None:
            waiting[row, column] -= 1
        if waiting is None or waiting[row, column] > 0:
            self._keep((level, at), tile)
        return tile

    def _keep(self, key: tuple[int, int], tile: np.ndarray) -> None:
        self._kept[key] = tile
        self._kept_bytes += tile.nbytes
        while self._kept_bytes > CACHE_BYTES:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes


def _level(pages: tifffile.TiffPages, extent: tuple[int, int]) -> Level | None:
    """The one tiled 8-bit RGB directory of this width and height, if there is one."""
    fitting = [
        page for page in pages if page.is_tiled and (page.imagewidth, page.imagelength) == extent
    ]
    page = fitting[0] if len(fitting) == 1 else None
    if page is None or (page.samplesperpixel, page.bitspersample, page.planarconfig) != (3, 8, 1):
        return None
    jpeg = page.compression == COMPRESSION.JPEG
    colours = (PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR) if jpeg else (PHOTOMETRIC.RGB,)
    if page.photometric not in colours or not (jpeg or page.compression in EXACT):
        return None
    offsets, lengths = (np.array(it, np.int64) for it in (page.dataoffsets, page.databytecounts))
    rows = -(-page.imagelength // page.tilelength)
    tiles = rows * -(-page.imagewidth // page.tilewidth)
    if not len(offsets) == len(lengths) == tiles:  # damaged
        return None
    return Level(page, page.jpegtables, offsets, lengths)


def _span(level: Level, x: int, y: int, width: int, height: int) -> tuple[slice, slice]:
    """Rows and columns of the tiles under a region."""
    page = level.page
    right, bottom = min(x + width, page.imagewidth), min(y + height, page.imagelength)
    rows = slice(y // page.tilelength, -(-bottom // page.tilelength))
    return rows, slice(x // page.tilewidth, -(-right // page.tilewidth))


def _paste(pixels: np.ndarray, tile: np.ndarray, left: int, top: int) -> None:
    """Lay the tile over the pixels, its corner at (left, top), which may be outside."""
    tile = tile[max(0, -top) :, max(0, -left) :]
    under = pixels[max(0, top) :, max(0, left) :][: tile.shape[0], : tile.shape[1]]
    under[:] = tile[: under.shape[0], : under.shape[1]]


def _whole_jpeg(segment: bytes, tables: bytes | None, photometric: int) -> bytes:
    """A tile as a JPEG file: with the tables that tiles share, and a marker for its colours.

    Adobe's APP14 marker says whether the channels are YCbCr (1) or RGB (0), which Aperio stores
    without a word in the tile itself.
    """
    marker = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
    colours = b"\x00" if photometric == PHOTOMETRIC.RGB else b"\x01"
    return segment[:2] + marker + colours + (tables or b"")[2:-2] + segment[2:]
