"""SRAttention: the layer that takes the place of timm's Attention."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cytossl_core.attention.functional import check_backend, sr_attention, without_autocast
from cytossl_core.attention.grid import ToldGrid, token_grid
from cytossl_core.attention.inputs import Inputs, check, check_fits, check_topk
from cytossl_core.attention.irpe import cross_table, irpe_buckets, table_rows
from cytossl_core.attention.reference import reference_weights

TABLES = {
    "none": (),
    "k": ("k",),
    "qk": ("q", "k"),
    "qkv": ("q", "k", "v"),
    "bias": ("bias",),
}


class SRAttention(nn.Module):
    """Multi-head attention with top-h selection and image relative position encoding.

    Arguments up to `norm_layer` are those of timm's Attention, and so are `qkv`, `proj`, their
    weights' names and the call; with topk=None and tables at zero the numbers are too. The token
    grid is told by the model after `with_sr_attention`; a layer used alone takes `.grid`, and where
    that is None its tokens as a square.

    Args:
        dim: Width of the tokens.
        num_heads: Number of heads.
        qkv_bias: Whether the query, key and value projections have a bias.
        attn_head_dim: Width of a head; None is dim / num_heads.
        dim_out: Width of the output; None is dim.
        qk_norm: Whether queries and keys are normalised by `norm_layer`.
        scale_norm: Whether the output is normalised before the last projection.
        proj_bias: Whether the last projection has a bias.
        gated: Whether a sigmoid gate multiplies the output.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout of the output.
        norm_layer: Makes a norm from a width, for qk_norm and scale_norm.
        topk: h, the keys that a query keeps (16 in the paper); None is dense.
        irpe: Which tables there are: "none", "k", "qk", "qkv", or "bias" (one number per bucket,
            added to the scaled scores).
        method: How offsets become buckets, see `irpe_buckets`.
        ratio: Scale of the buckets, see `irpe_buckets`.
        shared_head: Whether heads share a table.
        special_tokens: Tokens before the grid (class, registers).
        backend: See `sr_attention`.
        device: Where the parameters live.
        dtype: Of the parameters.

    Raises:
        ValueError: sizes that do not divide, topk below 1, an unknown irpe, method or backend; in
            the call tokens that are no [batch, token, dim], or that do not fill the grid.

    Source:
        Cyto-SSL, SR-Transformer, equations 3 to 9; "bias" is iRPE's other mode.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        topk: int | None = 16,
        irpe: str = "qkv",
        method: str = "product",
        ratio: float = 1.9,
        shared_head: bool = True,
        special_tokens: int = 1,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads, attn_head_dim)
        check_topk(topk)
        check_backend(backend)
        made = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads if attn_head_dim is None else attn_head_dim
        self.attn_dim = num_heads * self.head_dim
        self.scale = self.head_dim**-0.5
        self.grid: tuple[int, int] | None = None  # of a layer used alone; None: a square
        self.told: ToldGrid | None = None  # by the model, see with_sr_attention
        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, **made)
        self.q_norm = norm_layer(self.head_dim, **made) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **made) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(self.attn_dim, **made) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **made) if gated else None
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, **made)
        self.proj_drop = nn.Dropout(proj_drop)
        self.topk, self.irpe, self.method, self.ratio = topk, irpe, method, ratio
        self.special_tokens, self.backend = special_tokens, backend
        self._make_tables(num_heads if not shared_head else 1, made)

    def _make_tables(self, heads: int, made: dict) -> None:
        if self.irpe not in TABLES:
            raise ValueError(f"irpe is {self.irpe!r}: choose one of {', '.join(TABLES)}")
        irpe_buckets(1, 1, **self._buckets)  # an unknown method or ratio is refused here
        shape = (heads, table_rows(self.method, self.ratio, self.special_tokens), self.head_dim)
        for name in ("q", "k", "v", "bias"):
            size = shape if name != "bias" else (*shape[:2], 1)
            table = nn.Parameter(torch.zeros(size, **made)) if name in TABLES[self.irpe] else None
            self.register_parameter(f"table_{name}", table)

    def extra_repr(self) -> str:
        """What torch's repr of a model shows."""
        return f"topk={self.topk}, irpe={self.irpe!r}, special_tokens={self.special_tokens}"

    @property
    def _buckets(self) -> dict:
        return {"method": self.method, "ratio": self.ratio, "special_tokens": self.special_tokens}

    def forward(
        self,
        x: Float[Tensor, "batch token dim"],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "batch token dim_out"]:
        """Attend; attn_mask is torch's: Bool, True takes part, or added to the scores."""
        query, key, value = self._project(x)
        out = sr_attention(
            query,
            key,
            value,
            **self._position(query, attn_mask, is_causal),
            dropout=self.attn_drop.p if self.training else 0.0,
            backend=self.backend,
        )
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    @torch.no_grad()
    def attention_weights(
        self, x: Float[Tensor, "batch token dim"]
    ) -> Float[Tensor, "batch head token token"]:
        """The weights after selection, zero where a key was dropped; rows sum to 1."""
        query, key, value = self._project(x)
        inputs = Inputs(query, key, value, dropout=0.0, **self._position(query, None, False))
        check(inputs)
        with without_autocast(query):
            return reference_weights(inputs.in_float32())

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.ndim != 3:
            raise ValueError(f"tokens are {tuple(x.shape)}: they must be [batch, token, dim]")
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        return self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype), value

    def _position(self, query: Tensor, attn_mask: Tensor | None, is_causal: bool) -> dict:
        """What depends on where the tokens are: tables, their ids, masks; and topk and scale."""
        bias = additive(attn_mask, is_causal, query)
        tables = {f"table_{name}": self._table(f"table_{name}") for name in "qkv"}
        buckets = self._ids(query) if self.irpe != "none" else None
        if self.irpe == "bias":
            per_pair = self._table("table_bias")[:, buckets, 0]  # [head or 1, token, token]
            bias = per_pair[None] if bias is None else bias + per_pair
            buckets = None
        return {"topk": self.topk, "scale": self.scale, "bias": bias, "buckets": buckets, **tables}

    def _table(self, name: str) -> Tensor | None:
        table = getattr(self, name)
        if table is None or self.method != "cross":
            return table
        return cross_table(table, self.special_tokens)

    def _ids(self, query: Tensor) -> Int64[Tensor, "token token"]:
        height, width = token_grid(query.shape[2], self.special_tokens, self.grid, self.told)
        return irpe_buckets(height, width, **self._buckets, device=query.device)[0]


def _check_heads(dim: int, num_heads: int, attn_head_dim: int | None) -> None:
    for name, count in (("num_heads", num_heads), ("attn_head_dim", attn_head_dim)):
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}: it must be 1 or more")
    if attn_head_dim is None and dim % num_heads:
        raise ValueError(f"dim is {dim}: it must be a multiple of num_heads, {num_heads}")


def additive(attn_mask: Tensor | None, is_causal: bool, query: Tensor) -> Tensor | None:
    """Torch's attn_mask or is_causal as a term added to the scores, with four axes."""
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask and is_causal are both given: give one of them")
    if is_causal:
        token = query.shape[2]
        attn_mask = torch.ones(token, token, dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        return None
    if attn_mask.dtype != torch.bool:
        check_fits("attn_mask", attn_mask, query)
    else:
        removed = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = removed.masked_fill(~attn_mask, -torch.inf)
    return attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape)
