"""What the methods ask of their params."""

from typing import Any


def require(method: str, name: str, value: float, low: float, high: float) -> None:
    """Refuse a value outside [low, high].

    Raises:
        ValueError: it is outside; the message names the key of params.yaml.
    """
    if not low <= value <= high:
        wanted = f"{low:g} or more" if high == float("inf") else f"from {low:g} to {high:g}"
        raise ValueError(f"params.yaml: pretrain.{method}.{name} is {value}: it must be {wanted}")


def require_views(section: str, values: Any) -> None:
    """Refuse crops and chances that no view can have, among the fields of `values`.

    Args:
        section: Where they are in section pretrain, e.g. "simclr.views".
        values: Any of global_scale, local_scale and scale, and flip, jitter, gray, blur, solarize.

    Raises:
        ValueError: there is one; the message names the key of params.yaml.
    """
    for name, value in vars(values).items():
        if name in ("global_scale", "local_scale", "scale") and not 0 < value[0] <= value[1] <= 1:
            raise ValueError(
                f"params.yaml: pretrain.{section}.{name} is {list(value)}: it must be two shares "
                "of the patch's area, above 0, up to 1, the smaller first"
            )
        if name in ("flip", "jitter", "gray", "blur", "solarize"):
            for chance in value if isinstance(value, tuple) else (value,):
                require(section, name, chance, 0, 1)
