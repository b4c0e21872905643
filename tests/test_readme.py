"""
The README and the documents beside it agree with the program: commands, options, the tree of files,
links, and what works out of the box.
"""

import ast
import importlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from checkpoints import PRETRAINED, load_captioner
from utils import Parser

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/questions.md",
    "docs/results.md",
    "pretrained/README.md",
    "benchmarks/README.md",
    "docs/scale.md",
]
LESSON = json.loads((ROOT / "docs/lesson.ipynb").read_bytes())
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
TEXT["docs/lesson.ipynb"] = "\n".join(
    "".join(cell["source"]) for cell in LESSON["cells"] if cell["cell_type"] == "markdown"
)
README = TEXT["README.md"]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if "__main__" in path.read_text())
OTHER_PROGRAMS = {
    "--nproc_per_node",
    "--nnodes",
    "--rdzv_backend",
    "--rdzv_endpoint",  # torchrun's
    "--logdir",
    "--samples_per_plugin",
}  # TensorBoard's
GONE = {"--document_frequencies"}  # of runs that pretrained/README.md records
SOURCES = {".py", ".html", ".css", ".js", ".sh"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with photo.jpg, from which scripts are called."""
    shutil.copy(ROOT / "docs/photo.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Out of the box


def test_shipped_model_gives_the_caption_in_the_readme(here):
    done = subprocess.run(
        [sys.executable, ROOT / "caption.py", "--img", "photo.jpg", "--device", "cpu"],
        capture_output=True,
        text=True,
        check=True,
    )
    block = re.search(r"```\nmodel: .*\n(.+)\nattention: photo_attention.png\n```", README)
    assert done.stdout == f"{block[1]}\n"
    assert str(PRETRAINED) in done.stderr  # it says which model that was
    assert (here / "photo_attention.png").stat().st_size > 10_000


def test_library_example_runs_word_for_word(here, capsys):
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(example, names := {})
    captioned = names["captioned"]
    assert captioned.text in capsys.readouterr().out
    assert len(captioned.n_best) == 3 and captioned.attention.shape == (len(captioned.words), 196)
    assert captioned.text in (here / "photo.html").read_text(encoding="utf-8")


def test_shipped_file_is_small_in_float16_and_loads_with_weights_only():
    assert PRETRAINED.stat().st_size <= 30_000_000
    checkpoint = torch.load(PRETRAINED, weights_only=True)
    assert checkpoint["options"]["self_critical"]
    for weights in (checkpoint["encoder"], checkpoint["decoder"]):
        assert all(weight.dtype == torch.float16 for weight in weights.values() if weight.dim() > 1)
    _, decoder, word_map, _ = load_captioner(PRETRAINED, "cpu")
    assert decoder.fc.out_features == len(word_map) == 3530


def read_requirements(name):
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-r")]


def test_constraints_have_one_version_of_each_required_package_that_its_requirement_allows():
    required = [x for path in ROOT.glob("requirements*.txt") for x in read_requirements(path.name)]
    pinned = read_requirements("constraints.txt")
    versions = {pin.name: str(pin.specifier).removeprefix("==") for pin in pinned}
    assert sorted(pin.name for pin in pinned) == sorted(x.name for x in required)
    assert not [x for x in required if versions[x.name] not in x.specifier]


# Commands and options


def find_commands(text):
    """The calls of our scripts in a document's shell blocks and code spans: (script, arguments)"""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    commands = []
    for line in lines + [span for span in spans if len(span.split()) > 1]:
        words = shlex.split(line.partition(" > ")[0], comments=True)
        if words[:2] == ["python", "-m"] and words[2].startswith("preprocessing."):
            commands.append((words[2], words[3:]))
        script = next((i for i, word in enumerate(words[:6]) if word.endswith(".py")), None)
        if script is not None and words[script].removesuffix(".py") in SCRIPTS:
            commands.append((words[script].removesuffix(".py"), words[script + 1 :]))
    return commands


COMMANDS = sorted(
    {(script, *arguments) for text in TEXT.values() for script, arguments in find_commands(text)}
)


class Parsed(Exception):
    pass


def parse(script, arguments, monkeypatch):
    """Let a script read its options and do nothing else."""
    if script in SCRIPTS:
        return importlib.import_module(script).get_args(arguments)
    parse_args = Parser.parse_args

    def stop(parser):
        raise Parsed(parse_args(parser))

    monkeypatch.setattr(Parser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script.replace(".", "/")) + ".py", run_name="__main__")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_documented_command_is_accepted_by_its_script(command, monkeypatch):
    script, *arguments = command
    # Whether this machine has a GPU does not matter here.
    parse(script, ["cpu" if x == "cuda" else x for x in arguments], monkeypatch)


def test_readme_has_a_command_for_every_script():
    assert {script for script, _ in find_commands(README)} >= {*SCRIPTS, "preprocessing.demo"}


def test_every_documented_option_exists(capsys):
    for script in SCRIPTS:
        with pytest.raises(SystemExit):
            importlib.import_module(script).get_args(["--help"])
    option = re.compile(r"(?<![\w-])--[a-z][\w-]*")
    known = {*option.findall(capsys.readouterr().out), *OTHER_PROGRAMS, *GONE, "--help"}
    for name, text in TEXT.items():
        assert set(option.findall(text)) <= known, name


# The tree


def read_tree():
    """The paths in the README's tree, in its order; those of folders end in a slash."""
    block = re.search(r"\n## Where everything is\n.*?```\n(.*?)```", README, re.DOTALL)[1]
    paths, folder = [], ""
    for line in block.splitlines():
        name, _ = line.split(maxsplit=1)  # each has a description
        inside = line.startswith(" ")
        paths.append(folder + name if inside else name)
        if not inside:
            folder = name if name.endswith("/") else ""
    return paths


def test_tree_has_one_line_for_each_source_file_and_folder():
    packages = [folder for folder in ROOT.iterdir() if (folder / "__init__.py").exists()]
    files = [*ROOT.glob("*.py"), *(file for package in packages for file in package.rglob("*"))]
    there = [
        file.relative_to(ROOT).as_posix()
        for file in files
        if file.suffix in SOURCES and file.name != "__init__.py"
    ]
    there += [f"{folder.name}/" for folder in packages]
    there += [f"{name}/" for name in ("tests", "pretrained", "docs")]
    listed, there = Counter(read_tree()), Counter(there)
    without_line, without_file_or_twice = sorted(there - listed), sorted(listed - there)
    assert not without_line
    assert not without_file_or_twice


def imported_names(path):
    """The first part of each module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def test_files_import_only_from_further_down_the_tree():
    paths = read_tree()
    order = [
        path.strip("/").removesuffix(".py")
        for path in paths
        if path.endswith("/") or "/" not in path
    ]
    upwards = []
    for path in paths[: paths.index("benchmarks/")]:
        if path.endswith(".py") and (ROOT / path).exists():
            above = order[: order.index(path.partition("/")[0].removesuffix(".py"))]
            upwards += [(path, name) for name in imported_names(ROOT / path) if name in above]
    assert not upwards


# Links


def slug(heading):
    """A heading's anchor on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_in_all_documents_have_a_target():
    anchors = {
        (ROOT / name).resolve(): {
            slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        }
        for name, text in TEXT.items()
    }
    missing, count = [], 0
    for name, text in TEXT.items():
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if link.startswith("http"):
                continue
            path, _, anchor = link.partition("#")
            target = (ROOT / name).parent / path if path else ROOT / name
            count += 1
            if not target.exists() or anchor and anchor not in anchors[target.resolve()]:
                missing.append((name, link))
    assert count > 20 and not missing
