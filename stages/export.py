"""Take an encoder away: as an ONNX file, or as a plain encoder with its adapters merged.

    python -m stages.export data/pretrain/pretrained encoder.onnx
    python -m stages.export data/pretrain/pretrained plain

It is no stage of the pipeline: it reads a saved encoder and writes where you say.
"""

import dataclasses
import logging
import sys
from pathlib import Path

from stages.common import card, encoders, export, run

logger = logging.getLogger(__name__)

CHATTY = ("torch.onnx", "onnxscript", "onnx_ir", "onnxruntime")


def main(folder: Path, target: Path) -> None:
    """Write the encoder in `folder` to `target`: ONNX if it ends in .onnx, else a folder."""
    for name in CHATTY:  # each tells of every pass over the graph
        logging.getLogger(name).setLevel(logging.WARNING)
    if target.suffix == ".onnx":
        difference = export.to_onnx(folder, target)
        logger.info("%s written; it differs from torch by %.1e", target, difference)
        return
    if target.exists():
        raise ValueError(f"{target} is there already: name a new folder, or a file ending in .onnx")
    made = encoders.describe(folder)["provenance"]
    model, spec = encoders.load(folder)
    encoders.save(target, model, dataclasses.replace(spec, lora=None), made)
    card.write(target)
    logger.info("%s written: a plain encoder", target)


def command() -> None:
    """`python -m stages.export <folder> <target>`."""
    if len(sys.argv) != 3:
        raise ValueError(
            f"export got {sys.argv[1:]}: give an encoder's folder, and a file ending in .onnx or a "
            "new folder"
        )
    main(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    run.start(command)
