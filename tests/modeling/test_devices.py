"""devices.py: one process unless torchrun says otherwise."""

import pytest

from modeling.devices import TORCHRUN_VARIABLES, distributed, find_device
from utils import UserError


def test_world_size_without_torchruns_other_variables_is_a_single_process(monkeypatch, capsys):
    for variables, is_said in (
        ({}, False),
        ({"WORLD_SIZE": ""}, False),
        ({"WORLD_SIZE": "1"}, False),
        (dict.fromkeys(TORCHRUN_VARIABLES, "1"), False),
        ({"WORLD_SIZE": "4"}, True),
        ({"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": ""}, True),
    ):
        for name in TORCHRUN_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with distributed("cpu") as processes:
            assert processes.world_size == 1 and processes.is_main
            assert processes.all_gather((1, 2)) == [1, 2]
            assert processes.all_reduce(3, 0.5) == (3, 0.5)
        assert ("LOCAL_RANK" in capsys.readouterr().err) == is_said
    for name in TORCHRUN_VARIABLES:
        monkeypatch.setenv(name, "first")
    with pytest.raises(UserError, match="RANK.*first"), distributed("cpu"):
        pass


def test_device_that_does_not_exist_is_named():
    assert find_device("cpu").type == "cpu"
    for name in ("cuda:99", "gpu"):
        with pytest.raises(UserError, match=f"--device {name} cannot be used here: .*"):
            find_device(name)
