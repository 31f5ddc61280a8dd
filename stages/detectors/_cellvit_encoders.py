"""The two encoders of CellViT, in the names and shapes of the released weights."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

TOKEN_PX = 16

Image = Float[Tensor, "batch channel height width"]


@dataclass(frozen=True)
class Sizes:
    """What differs between the released networks."""

    dim: int
    depth: int
    heads: int
    taps: tuple[int, int, int, int]  # blocks, counted from 1, that the decoder reads
    skips: tuple[int, int]  # channels in the skips from the first two taps
    widths: tuple[int, int, int, int]  # channels from the coarsest to the finest step
    grid: int  # tokens a side of the table of positions
    window: int  # tokens a side of a block's view; 0: ViT-256, every block sees the whole image
    wide: tuple[int, ...] = ()  # blocks, counted from 0, that see the whole image in spite of it


SMALL, LARGE = ((256, 128), (312, 256, 128, 64)), ((512, 256), (512, 256, 128, 64))
RELEASED = {
    "ViT256": Sizes(384, 12, 6, (3, 6, 9, 12), *SMALL, 14, 0),
    "SAM-B": Sizes(768, 12, 12, (3, 6, 9, 12), *LARGE, 64, 14, (2, 5, 8, 11)),
    "SAM-L": Sizes(1024, 24, 16, (6, 12, 18, 24), *LARGE, 64, 14, (5, 11, 17, 23)),
    "SAM-H": Sizes(1280, 32, 16, (8, 16, 24, 32), *LARGE, 64, 14, (7, 15, 23, 31)),
}


class _Embed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, TOKEN_PX, stride=TOKEN_PX)


class Plain(nn.Module):
    """DINO's vision transformer (Caron et al. 2021), without what follows its last block."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.taps = sizes.taps
        self.cls_token = nn.Parameter(torch.zeros(1, 1, sizes.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, sizes.grid**2 + 1, sizes.dim))
        self.patch_embed = _Embed(sizes.dim)
        self.blocks = nn.ModuleList(_PlainBlock(sizes) for _ in range(sizes.depth))

    def forward(self, image: Image) -> list[Image]:
        tokens = self.patch_embed.proj(image)
        side = tokens.shape[-1]
        tokens = torch.cat([self.cls_token.expand(len(image), 1, -1), _rows(tokens)], dim=1)
        tokens = tokens + self._positions(side)
        found = []
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens)
            if number in self.taps:
                found.append(tokens[:, 1:].mT.unflatten(2, (side, side)))
        return found

    def _positions(self, side: int) -> Float[Tensor, "1 token dim"]:
        grid = math.isqrt(self.pos_embed.shape[1] - 1)
        if side == grid:
            return self.pos_embed
        table = self.pos_embed[:, 1:].mT.unflatten(2, (grid, grid))
        # The tenth is DINO's (against rounding) and shifts the samples: the weights are used to it.
        scale = (side + 0.1) / grid
        resized = F.interpolate(table, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], _rows(resized)], dim=1)


def _rows(image: Image) -> Float[Tensor, "batch token channel"]:
    return image.flatten(2).mT


class _PlainBlock(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.dim, eps=1e-6)
        self.attn = _Attention(sizes.dim, sizes.heads)
        self.norm2 = nn.LayerNorm(sizes.dim, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(sizes.dim, 4 * sizes.dim), "fc2": nn.Linear(4 * sizes.dim, sizes.dim)}
        )

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(tokens))))


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Float[Tensor, "batch token dim"]) -> Tensor:
        query, key, value = (
            self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self._bias(query))
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def _bias(self, query: Tensor) -> Tensor | None:
        return None


class Windowed(nn.Module):
    """Segment Anything's image encoder (Kirillov et al. 2023), without its neck."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.taps = sizes.taps
        self.pos_embed = nn.Parameter(torch.zeros(1, sizes.grid, sizes.grid, sizes.dim))
        self.patch_embed = _Embed(sizes.dim)
        self.blocks = nn.ModuleList(
            _WindowedBlock(sizes, 0 if number in sizes.wide else sizes.window)
            for number in range(sizes.depth)
        )

    def forward(self, image: Image) -> list[Image]:
        tokens = self.patch_embed.proj(image).movedim(1, 3)
        side = tokens.shape[1]
        tokens = tokens + self.pos_embed[:, :side, :side]
        found = []
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens)
            if number in self.taps:
                found.append(tokens.movedim(3, 1))
        return found


class _WindowedBlock(nn.Module):
    def __init__(self, sizes: Sizes, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(sizes.dim, eps=1e-6)
        self.attn = _RelativeAttention(sizes.dim, sizes.heads, window or sizes.grid)
        self.norm2 = nn.LayerNorm(sizes.dim, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {
                "lin1": nn.Linear(sizes.dim, 4 * sizes.dim),
                "lin2": nn.Linear(4 * sizes.dim, sizes.dim),
            }
        )

    def forward(self, tokens: Float[Tensor, "batch side side dim"]) -> Tensor:
        tokens = tokens + self._attend(self.norm1(tokens))
        return tokens + self.mlp["lin2"](F.gelu(self.mlp["lin1"](self.norm2(tokens))))

    def _attend(self, tokens: Tensor) -> Tensor:
        batch, side = tokens.shape[:2]
        window = self.window or side
        padded = F.pad(
            tokens, (0, 0, 0, -side % window, 0, -side % window)
        )  # zeros are attended to
        count = padded.shape[1] // window
        cut = padded.unflatten(2, (count, window)).unflatten(1, (count, window)).transpose(2, 3)
        mixed = self.attn(cut.reshape(batch * count**2, window**2, -1))
        whole = mixed.reshape(batch, count, count, window, window, -1).transpose(2, 3)
        return whole.flatten(3, 4).flatten(1, 2)[:, :side, :side]


class _RelativeAttention(_Attention):
    """With a term for the distance in rows and one for that in columns (MViTv2)."""

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__(dim, heads)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))

    def _bias(self, query: Float[Tensor, "batch head token dim"]) -> Tensor:
        side = math.isqrt(query.shape[2])
        grid = query.unflatten(2, (side, side))
        rows = torch.einsum("bnhwc,hkc->bnhwk", grid, _distances(self.rel_pos_h, side))
        columns = torch.einsum("bnhwc,wkc->bnhwk", grid, _distances(self.rel_pos_w, side))
        return (rows[..., :, None] + columns[..., None, :]).flatten(4, 5).flatten(2, 3)


def _distances(table: Float[Tensor, "distance dim"], side: int) -> Float[Tensor, "side side dim"]:
    """The entry for each pair of rows; the table is stretched or shrunk where its image was not."""
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
    at = torch.arange(side, device=table.device)
    return table[at[:, None] - at[None] + side - 1]
