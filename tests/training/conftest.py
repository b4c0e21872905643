"""Small data and finished runs, which tests copy: a run takes about a second."""

import shutil

import pytest
from factories import NAME, train_args, write_scenes

import train


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """22 training, 6 validation and 6 test scenes of 64 x 64 pixels, features cached by a run."""
    return write_scenes(tmp_path_factory.mktemp("data"), 22, 6, 6, image_size=64)


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """To draw log_NAME.png takes longer than to train for an epoch; test_run.py draws it."""
    if "curves" not in request.node.name:
        monkeypatch.setattr("visualization.curves.write_curves", lambda log, picture: None)


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """The folder of a run of three epochs of four batches, for reading"""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visualization.curves.write_curves", lambda log, picture: None)
        train.main(train_args(data, folder, "--epochs 3 --batch_size 30"))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to resume and to change"""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def best(finished):
    """The model of that run, to start a phase from"""
    return finished / f"BEST_checkpoint_{NAME}.pth.tar"
