"""The views of methods that compare two views of a patch: SimCLR, MoCo v3, BYOL."""

from dataclasses import dataclass

from torch import Tensor

from stages.common.views import ViewPolicy


@dataclass(frozen=True)
class Pair:
    """Both views are cut at one range of scales, as Cyto-SSL asks of such methods (Step 3)."""

    # Area of a crop, share of the patch. SimCLR has (0.08, 1); similar scales need a narrow range:
    # at (0.5, 1) a nucleus is at most 1.4 times as wide in one view as in the other.
    scale: tuple[float, float]
    rotation_degrees: float  # crops are turned by up to so much either way; 180: any way (0)
    flip: float  # chance of mirroring, for each axis (0.5, left to right only)
    jitter: float  # chance of changed brightness, contrast, saturation and hue (0.8)
    gray: float  # chance of losing the colours (0.2)
    blur: tuple[float, float]  # chance for first and second view (SimCLR 0.5, 0.5; others 1, 0.1)
    solarize: float  # chance that the second view's bright pixels are inverted (SimCLR 0, 0.2)

    @staticmethod
    def check(views: list[Tensor], method: str) -> None:
        """Refuse a pass of one patch, in which there is nothing to compare it with.

        Raises:
            ValueError: see above.
        """
        if len(views[0]) < 2:
            raise ValueError(
                f"pretrain.method {method} compares the patches of a pass, and each process has "
                f"{len(views[0])} in one: raise pretrain.batch or lower pretrain.accumulate"
            )

    def policies(self, image_px: int) -> list[ViewPolicy]:
        """One policy for each of the two views."""
        shared = {name: getattr(self, name) for name in ("rotation_degrees", "flip", "jitter")}
        shared |= {"views": 1, "crop_px": image_px, "scale": self.scale, "gray": self.gray}
        first, second = self.blur
        return [
            ViewPolicy(**shared, blur=first, solarize=0.0),
            ViewPolicy(**shared, blur=second, solarize=self.solarize),
        ]
