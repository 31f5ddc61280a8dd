"""The methods' settings: what is left to the data, and what is refused by the name of its key."""

import dataclasses
import logging
from pathlib import Path

import pytest
import yaml

from stages.common import params, plugins
from stages.methods import dino
from stages.methods._dino_params import AUTO
from tests.stages.small_methods import build, section


@pytest.mark.parametrize(
    ("patches", "prototypes"),
    [
        (1, 1024),
        (20_000, 1024),
        (20_001, 2048),
        (50_000, 2048),
        (100_000, 4096),
        (200_000, 16384),
        (500_000, 32768),
        (500_001, 65536),
        (2_500_000, 65536),
    ],
)
def test_prototypes_go_with_the_number_of_patches(caplog, patches, prototypes):
    _, settings = section("dino")
    auto = dataclasses.replace(settings, prototypes=AUTO)
    with caplog.at_level(logging.INFO):
        assert auto.fitted(patches) == dataclasses.replace(settings, prototypes=prototypes)
    assert f"pretrain.dino.prototypes: {prototypes}, for {patches} patches" in caplog.text
    assert settings.fitted(patches) is settings


def write(folder: Path, **changes: object) -> Path:
    plain = params.section_of("pretrain.dino")
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump({"pretrain": {"dino": {**plain, **changes}}}))
    return path


def test_params_may_say_auto_or_a_number_and_nothing_else(tmp_path):
    path = write(tmp_path, prototypes="auto")
    assert params.load(dino.Params, "pretrain.dino", path).prototypes == AUTO
    for wrong, message in (
        ("many", r"prototypes is 'many': it must be int, or one of auto"),
        (2.5, r"prototypes is 2\.5 \(float\): it must be int"),
        (None, r"prototypes is None \(NoneType\): it must be int"),
        (1, r"pretrain\.dino\.prototypes is 1: it must be 2 or more"),
    ):
        path = write(tmp_path, prototypes=wrong)
        with pytest.raises(ValueError, match=message):
            params.load(dino.Params, "pretrain.dino", path)


def test_a_number_left_to_the_data_is_not_built():
    with pytest.raises(ValueError, match=r"prototypes is auto: `Params\.fitted` must choose it"):
        build("dino", prototypes=AUTO)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_px": 8}, r"pretrain\.dino\.local_px is 8: it must be 13 or more"),
        ({"global_scale": (1.0, 0.4)}, r"pretrain\.dino\.global_scale is \[1\.0, 0\.4\]: it must"),
        ({"local_scale": (0.0, 0.4)}, r"pretrain\.dino\.local_scale is \[0\.0, 0\.4\]: it must"),
        ({"flip": 1.5}, r"pretrain\.dino\.flip is 1\.5: it must be from 0 to 1"),
        ({"blur": (1.0, 0.1, -0.5)}, r"pretrain\.dino\.blur is -0\.5: it must be from 0 to 1"),
    ],
)
def test_names_the_key_of_what_no_view_of_dino_can_have(changes, message):
    with pytest.raises(ValueError, match=message):
        build("dino", **changes)


@pytest.mark.parametrize("name", ["simclr", "mocov3", "byol"])
def test_names_the_key_of_what_no_pair_of_views_can_have(name):
    pair = section(name)[1].views
    for changes, what in (
        ({"scale": (1.0, 0.5)}, r"scale is \[1\.0, 0\.5\]"),
        ({"gray": -1.0}, r"gray is -1\.0"),
    ):
        with pytest.raises(ValueError, match=rf"pretrain\.{name}\.views\.{what}: it must be"):
            build(name, views=dataclasses.replace(pair, **changes))


def test_names_the_key_of_what_no_view_of_vpu_can_have():
    module = plugins.load("methods", "vpu")
    settings = params.load(module.Params, "pretrain.vpu")
    with pytest.raises(ValueError, match=r"pretrain\.vpu\.scale is \[0\.9, 0\.5\]"):
        dataclasses.replace(settings, scale=(0.9, 0.5))
