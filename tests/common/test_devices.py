"""Devices: what auto, cpu and cuda become, here and in worker processes."""

import pytest

from stages.common import devices


@pytest.fixture
def three(monkeypatch):
    monkeypatch.setattr(devices, "count", lambda: 3)
    for name in (devices.WORKER, devices.DEVICE):
        monkeypatch.delenv(name, raising=False)


def test_auto_takes_cuda_where_there_is_one(three, monkeypatch):
    assert devices.pick("auto", "detect.x") == devices.pick("cuda", "detect.x") == "cuda"
    monkeypatch.setattr(devices, "count", lambda: 0)
    assert devices.pick("auto", "detect.x") == "cpu"


def test_cpu_is_cpu_whatever_there_is(three, monkeypatch):
    monkeypatch.setenv(devices.WORKER, "1")
    assert devices.pick("cpu", "detect.x") == "cpu"


def test_workers_take_the_devices_in_turn(three, monkeypatch):
    chosen = []
    for worker in range(7):
        monkeypatch.setenv(devices.WORKER, str(worker))
        chosen.append(devices.pick("auto", "detect.x"))
    assert chosen == [f"cuda:{number}" for number in (0, 1, 2, 0, 1, 2, 0)]


@pytest.mark.parametrize("told", ["cpu", "cuda:2"])
def test_in_a_worker_the_engine_knows_better_than_auto(three, monkeypatch, told):
    monkeypatch.setenv(devices.DEVICE, told)
    assert devices.pick("auto", "detect.x") == told
    assert devices.pick("cpu", "detect.x") == "cpu"


def test_cuda_that_is_not_there_is_named_by_its_param(monkeypatch):
    monkeypatch.setattr(devices, "count", lambda: 0)
    with pytest.raises(ValueError, match=r"detect\.x\.device is cuda, and there is none: set it"):
        devices.pick("cuda", "detect.x")
