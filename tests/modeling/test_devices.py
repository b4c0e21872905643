"""devices.py: one process unless torchrun says otherwise."""

import pytest

from modeling import devices
from modeling.devices import distributed


@pytest.mark.parametrize(
    "variables, said",
    [
        ({}, False),
        ({"WORLD_SIZE": ""}, False),
        ({"WORLD_SIZE": "1"}, False),
        ({"WORLD_SIZE": "4"}, True),
        ({"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": ""}, True),
    ],
)
def test_world_size_without_torchruns_other_variables_is_a_single_process(
    monkeypatch, capsys, variables, said
):
    for name in devices.TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with distributed("cpu") as processes:
        assert processes.world_size == 1 and processes.is_main
    assert (
        "this is a single process; for several start torchrun" in capsys.readouterr().err
    ) == said
