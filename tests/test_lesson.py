"""docs/lesson.ipynb: it runs, what it shows is what is stored in it, and it runs in Colab."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from factories import ROOT

LESSON = ROOT / "docs" / "lesson.ipynb"
NUMBER = re.compile(r"-?\d+\.\d+|-?\d+")


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(cell):
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


def pictures(cell):
    """The formats of a cell's pictures"""
    return [
        sorted({*shown["data"]} - {"text/plain"}) for shown in cell["outputs"] if "data" in shown
    ]


@pytest.mark.slow
def test_the_lesson_runs_and_prints_what_is_stored_in_it(monkeypatch):
    """Its own cells assert that each step by hand equals the repository's function."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("TEST_THREADS", "1"))
    stored = json.loads(LESSON.read_bytes())
    fresh = nbformat.read(LESSON, as_version=4)
    folder = {"metadata": {"path": str(LESSON.parent)}}
    nbclient.NotebookClient(fresh, timeout=600, kernel_name="python3", resources=folder).execute()
    for before, after in zip(code_cells(stored), code_cells(fresh)):
        assert pictures(before) == pictures(after)
        if "manual_seed" in "".join(before["source"]):  # other processors draw other numbers
            assert printed(before).count("\n") == printed(after).count("\n")
            continue
        before, after = printed(before), printed(after)
        assert NUMBER.sub("#", before) == NUMBER.sub("#", after)
        for old, new in zip(NUMBER.findall(before), NUMBER.findall(after)):
            # Processors round differently: the last digit that is printed may change.
            assert np.isclose(float(old), float(new), rtol=0.02, atol=0.011 if "." in old else 1)


def test_every_cell_was_run_in_order_and_every_part_ends_with_an_assertion():
    notebook = json.loads(LESSON.read_bytes())
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    part, asserted = None, {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if heading := re.match(r"## (?:(\d+)\.)?", source):
            part = heading[1]
        if part and cell["cell_type"] == "code":
            asserted[part] = "assert" in source
    assert asserted == dict.fromkeys("123456789", True)


def test_in_colab_the_first_cell_fetches_the_repository_and_its_packages(tmp_path, monkeypatch):
    cell, commands = "".join(code_cells(json.loads(LESSON.read_bytes()))[0]["source"]), []

    def run(command, check):
        commands.append(command)
        if command[0] == "git":
            os.symlink(ROOT, command[-1])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    monkeypatch.chdir(tmp_path)
    pytest.raises(SystemExit, exec, cell, {}).match("into REPOSITORY first")
    for _ in range(2):
        exec(cell.replace('"URL"  #', '"https://x"  #'), {})
    assert commands[0] == ["git", "clone", "-q", "https://x", "show-attend-and-tell"]
    requirements = "show-attend-and-tell/requirements.txt"
    pip = [sys.executable, "-m", "pip", "install", "-q", "-r", requirements]
    assert commands[1:] == [pip, pip] and sys.path[0] == "show-attend-and-tell"
