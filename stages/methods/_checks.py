"""What the methods ask of their params."""


def require(method: str, name: str, value: float, low: float, high: float) -> None:
    """Refuse a value outside [low, high].

    Raises:
        ValueError: it is outside; the message names the key of params.yaml.
    """
    if not low <= value <= high:
        wanted = f"{low:g} or more" if high == float("inf") else f"from {low:g} to {high:g}"
        raise ValueError(f"params.yaml: pretrain.{method}.{name} is {value}: it must be {wanted}")
