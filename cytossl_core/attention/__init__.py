"""SR-attention: top-h sparse self-attention with image relative position encoding."""

from cytossl_core.attention.functional import sr_attention, sr_attention_backend
from cytossl_core.attention.irpe import irpe_buckets
from cytossl_core.attention.layer import SRAttention
from cytossl_core.attention.swap import with_sr_attention

__all__ = [
    "SRAttention",
    "irpe_buckets",
    "sr_attention",
    "sr_attention_backend",
    "with_sr_attention",
]
