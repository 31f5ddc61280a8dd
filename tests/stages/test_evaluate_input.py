"""Evaluation of bad input: one sentence that names slide and remedy, before anything is trained."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stages.common import bags, splits
from stages.common.bags import StoredBags
from tests.stages.evaluated import (
    DIM,
    Laboratory,
    embedding_of,
    write_bag,
)


def refuses(lab: Laboratory, kind: type[Exception], message: str, head: str = "meanpool") -> None:
    with pytest.raises(kind, match=message):
        lab.run(head)
    assert not (lab.data / "evaluate").exists() and not Path("cache").exists()


def test_a_missing_bag(lab: Laboratory) -> None:
    (lab.bags / "val-2").rename(lab.data / "elsewhere")
    refuses(lab, FileNotFoundError, "slide val-2 has no bag at .* run `dvc repro`")


def test_nan_by_slide_and_patch(lab: Laboratory) -> None:
    embedding = np.random.default_rng(0).normal(size=(4, DIM)).astype(np.float32)
    embedding[2, 1] = np.nan
    lab.rewrite_bag("test-3", embedding)
    refuses(lab, ValueError, r"slide test-3 has NaN .* patch 2 \(1 of 4 patches\)")


def test_constant_embeddings_of_a_slide(lab: Laboratory) -> None:
    lab.rewrite_bag("train-5", np.full((3, DIM), 0.3, np.float32) + np.float32(1e-8))
    refuses(lab, ValueError, "the 3 embeddings of slide train-5 are equal")


def test_a_collapsed_encoder_even_with_one_patch_a_slide(lab: Laboratory) -> None:
    shutil.rmtree(lab.bags)
    for row in lab.rows:
        write_bag(lab.bags, row.slide_id, np.ones((1, DIM), np.float32))
    refuses(lab, ValueError, "all embeddings in .* the encoder has collapsed")


def test_an_empty_bag(lab: Laboratory) -> None:
    lab.rewrite_bag("train-0", np.empty((0, DIM), np.float32))
    refuses(lab, ValueError, "slide train-0 has no patches")


def test_embeddings_of_two_widths(lab: Laboratory) -> None:
    lab.rewrite_bag("train-1", np.random.default_rng(0).normal(size=(3, 11)).astype(np.float32))
    refuses(lab, ValueError, "slide train-1 has embeddings of 11 numbers, slide test-0 of 5")


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_part_without_a_class(lab: Laboratory, part: str) -> None:
    lab.rows = [row for row in lab.rows if row.split != part or row.label == "well"]
    lab.split()
    refuses(lab, ValueError, f"{part} of repeat 0, fold 0 has no slide of class ill")


def test_one_patient(lab: Laboratory) -> None:
    lab.rows = [replace(row, patient="A") for row in lab.rows]
    lab.split()
    refuses(lab, ValueError, "all slides are of one patient, A")


def test_a_label_outside_of_the_classes(lab: Laboratory) -> None:
    lab.rows[4] = replace(lab.rows[4], label="unclear")
    lab.split()
    refuses(lab, ValueError, "slide train-4 has the label 'unclear': .* classes are well, ill")


def test_splits_that_were_not_made_or_changed(lab: Laboratory) -> None:
    file = lab.data / "split" / "splits.csv"
    file.write_text(file.read_text().replace("test\n", "train\n", 1))
    refuses(lab, ValueError, "splits.csv is not what was written")
    file.unlink()
    refuses(lab, FileNotFoundError, "run `dvc repro split` first")


def test_a_damaged_bag(lab: Laboratory) -> None:
    (lab.bags / "val-2" / "bag.zarr" / "zarr.json").unlink()
    refuses(lab, ValueError, "the bag of slide val-2 at .* cannot be read: .* delete that folder")


def test_a_class_that_no_slide_has(lab: Laboratory) -> None:
    lab.classes = ["well", "ill", "unclear"]
    lab.split()
    refuses(lab, ValueError, "train of repeat 0, fold 0 has no slide of class unclear")


def test_no_classes(lab: Laboratory) -> None:
    (lab.data / "cohort" / "classes.json").unlink()
    refuses(lab, FileNotFoundError, "dvc repro cohort")


def test_an_unknown_head_and_sizes_that_do_not_fit(lab: Laboratory) -> None:
    refuses(lab, ValueError, "no 'abmill' in stages/heads: choose one of abmil,", "abmill")


def test_slides_of_one_patch_are_no_error(lab: Laboratory) -> None:
    shutil.rmtree(lab.bags)
    for row in lab.rows:
        write_bag(lab.bags, row.slide_id, embedding_of(row)[:1])
    assert (lab.run("abmil") / "metrics.json").is_file()


def test_bags_beyond_memory_are_read_again(lab: Laboratory, monkeypatch) -> None:
    slide_ids = [row.slide_id for row in lab.rows]
    whole = list(StoredBags(lab.bags, slide_ids))
    monkeypatch.setattr(bags, "KEPT_BYTES", sum(bag.nbytes for bag in whole) // 2)
    scarce = StoredBags(lab.bags, slide_ids)
    for _ in range(2):
        assert all(np.array_equal(a, b) for a, b in zip(scarce, whole, strict=True))
    kept = sum(bag.nbytes for bag in scarce._kept.values())
    assert 0 < kept <= bags.KEPT_BYTES and len(scarce._kept) < len(whole)


def test_an_encoder_that_saw_the_labels_of_a_folds_test_slides(lab: Laboratory) -> None:
    folder = lab.data / "pretrain" / "enc"
    folder.mkdir(parents=True)
    made = {"method": "vpu", "steps": 9}
    (folder / "encoder.json").write_text(json.dumps({"provenance": made}))
    lab.split(splits.crossval(lab.rows, 1, 3, 0.3, seed=1), "crossval")
    refuses(lab, ValueError, "learned from the labels of .* set it to holdout")
    (folder / "encoder.json").write_text(json.dumps({"provenance": made | {"steps": 0}}))
    assert (lab.run() / "metrics.json").is_file()
    (folder / "encoder.json").write_text(json.dumps({"provenance": made}))
    lab.split()
    assert (lab.run() / "metrics.json").is_file()
