"""SR-attention and iRPE as loops over the printed equations, Cyto-SSL 3 to 9 and iRPE 18 to 22.

Written apart from cytossl_core, for one head at a time, on nested lists of numbers.
"""

import math


def attention(query, key, value, topk=None, buckets=None, r_q=None, r_k=None, r_v=None, scale=1.0):
    """Output rows and kept key indices of one head; r_* are tables [bucket][head_dim]."""
    tokens = range(len(query))
    out, kept = [], []
    for i in tokens:
        p = []
        for j in tokens:
            r = 0.0  # equation 7
            if r_k is not None:
                r += dot(query[i], r_k[buckets[i][j]])
            if r_q is not None:
                r += dot(key[j], r_q[buckets[j][i]])
            p.append((dot(query[i], key[j]) + r) * scale)  # equation 8
        threshold = sorted(p, reverse=True)[min(topk or len(p), len(p)) - 1]
        kept.append([j for j in tokens if p[j] >= threshold])  # equation 5
        largest = max(p)
        power = {j: math.exp(p[j] - largest) for j in kept[i]}
        row = [0.0] * len(value[0])
        for j in kept[i]:
            for d in range(len(row)):
                v = value[j][d] + (r_v[buckets[i][j]][d] if r_v is not None else 0.0)
                row[d] += power[j] / sum(power.values()) * v  # equation 9
        out.append(row)
    return out, kept


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def piecewise(x, ratio):
    """Equation 18 with alpha:beta:gamma = 1:2:8 times ratio; whole buckets within +-int(beta)."""
    alpha, beta, gamma = ratio, 2 * ratio, 8 * ratio
    if abs(x) <= alpha:
        return round(x)
    log = math.log(abs(x) / alpha) / math.log(gamma / alpha)
    return int(math.copysign(min(beta, round(alpha + log * (beta - alpha))), x))


def bucket(query, key, method, ratio):
    """Bucket of a query at (row, column) and a key at (row, column)."""
    down, right = query[0] - key[0], query[1] - key[1]
    beta = int(2 * ratio)
    if method == "euclidean":
        return piecewise(round(math.hypot(down, right)), ratio) + beta
    if method == "quantization":
        return piecewise(down**2 + right**2, ratio) + beta
    return (piecewise(down, ratio) + beta) * (2 * beta + 1) + piecewise(right, ratio) + beta


def buckets(height, width, method, ratio, special):
    """Table of ids, the special tokens first; the last id is theirs."""
    side = 2 * int(2 * ratio) + 1
    last = side**2 if method == "product" else side
    where = [None] * special + [(y, x) for y in range(height) for x in range(width)]
    return [[last if None in (q, k) else bucket(q, k, method, ratio) for k in where] for q in where]
