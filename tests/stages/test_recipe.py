"""Recipes: views without pixels, from which pretraining makes the bits that pixels would have."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from stages import perturb
from stages.common import cache, stores, viewset
from stages.common.viewset import ViewSet
from tests.stages.runs import train, weights
from tests.stages.test_perturb import NUCLEI, PX, SETTINGS, a_job, a_slide, data  # noqa: F401

CPU = torch.device("cpu")
RECIPE = dataclasses.replace(SETTINGS, store="recipe")


def perturbed(data, settings, name):  # noqa: F811
    """A finished perturb stage, linked from the cache as the stage does it."""
    for slide in ("a", "b"):
        job = a_job(data, slide, settings)
        key = cache.key_of("perturb", slide, job.inputs, {"store": settings.store, "n": name}, "")
        cache.build("perturb", key, slide, {}, lambda folder, job=job: perturb.make(folder, job))
        cache.link(cache.entry("perturb", key), data / name / slide)
    return ViewSet(data / name, data / "tile")


@pytest.fixture
def slides(data):  # noqa: F811
    a_slide(data, "a", NUCLEI)
    a_slide(data, "b", NUCLEI[::-1])
    return data


def batches(views: ViewSet) -> viewset.Batch:
    return viewset.collate([views[row] for row in range(len(views))])


def test_a_recipe_makes_the_same_bits_as_stored_pixels(slides):
    stored, recipe = perturbed(slides, SETTINGS, "p"), perturbed(slides, RECIPE, "r")
    assert len(stored) == len(recipe) == 6
    one, other = batches(stored), batches(recipe)
    assert torch.equal(stored.pixels(one, CPU), recipe.pixels(other, CPU))
    assert not torch.equal(one.patches, other.patches)  # those are not shuffled yet
    assert torch.equal(one.points.nan_to_num(-1), other.points.nan_to_num(-1))


def test_a_run_from_recipes_sees_the_first_views_and_ends_with_the_weights_of_one_from_pixels(
    slides,
):
    made = {}
    for settings in (SETTINGS, RECIPE):
        perturbed(slides, settings, "perturb")
        made[settings.store] = train(slides / "perturb", target=f"from_{settings.store}")
        shutil.rmtree(slides / "perturb")
    assert weights(made["pixels"]) == weights(made["recipe"])
    assert weights(made["pixels"]) != weights(made["pixels"], "untrained")
    first, second = ((folder / "views.png").read_bytes() for folder in made.values())
    assert first == second
    assert len(list((cache.root() / "pretrain").glob("*/*"))) == 2  # neither took the other's


def test_bits_do_not_depend_on_the_batch(slides):
    recipe = perturbed(slides, RECIPE, "r")
    whole = recipe.pixels(batches(recipe), CPU)
    for row in range(len(recipe)):
        alone = recipe.pixels(viewset.collate([recipe[row]]), CPU)
        assert torch.equal(alone[0], whole[row])


def test_a_recipe_holds_no_pixels(slides):
    perturbed(slides, RECIPE, "r")
    folder = slides / "r" / "a" / "recipe.zarr"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < PX * PX * 3
    assert not (slides / "r" / "a" / "views.zarr").exists()
    assert (slides / "r" / "a" / "examples.jpg").is_file()


def test_without_perturbation_the_patch_is_the_view(slides):
    plain = dataclasses.replace(RECIPE, enabled=False)
    views = perturbed(slides, plain, "r")
    patches = stores.open_patches(slides / "tile" / "a" / "patches.zarr")
    got = views.pixels(batches(views), CPU)
    assert len(got) == 8
    np.testing.assert_array_equal(got[2].permute(1, 2, 0).numpy(), patches[2])


def test_refuses_patches_that_the_recipe_was_not_written_for(slides):
    perturbed(slides, RECIPE, "r")
    a_slide(slides, "c", NUCLEI[:2])
    (slides / "tile" / "a").rename(slides / "gone")
    (slides / "tile" / "c").rename(slides / "tile" / "a")
    with pytest.raises(ValueError, match="was written for other patches than .*tile/a"):
        ViewSet(slides / "r", slides / "tile")


def test_says_when_the_patches_are_gone(slides):
    perturbed(slides, RECIPE, "r")
    (slides / "tile" / "a").rename(slides / "gone")
    with pytest.raises(FileNotFoundError, match="patches.zarr: run `dvc repro` for the stage tile"):
        ViewSet(slides / "r", slides / "tile")


@pytest.mark.gpu
def test_a_gpu_makes_the_same_bits(slides):
    recipe = perturbed(slides, RECIPE, "r")
    batch = batches(recipe)
    assert torch.equal(recipe.pixels(batch, torch.device("cuda")).cpu(), recipe.pixels(batch, CPU))
