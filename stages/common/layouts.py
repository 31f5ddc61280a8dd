"""The arrays of each store, name: (dtype, axes); what they mean stands at the head of stores.py."""

PATCHES = {"patch": ("uint8", 4), "origin": ("int64", 2)}
NUCLEI = {
    "centroid": ("float32", 2),
    "patch_index": ("int64", 1),
    "radius_um": ("float32", 1),
    "score": ("float32", 1),
}
VIEWS = {
    "patch": ("uint8", 4),
    "source": ("int64", 1),
    "point": ("float32", 2),
    "view_index": ("int64", 1),
}
RECIPE = {"source": ("int64", 1), "seed": ("int64", 1)} | {
    name: VIEWS[name] for name in ("point", "view_index")
}
BAG = {"embedding": ("float32", 2), "origin": ("int64", 2)}
CROP = {"crop": ("float32", 2)}  # beside BAG where embed.central_crop asked for it
