"""README and docs agree with the program: commands, options, files, links, and what they print."""

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from checkpoints import PRETRAINED, load_captioner

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "pretrained/README.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
CELLS = json.loads((ROOT / "docs/lesson.ipynb").read_bytes())["cells"]
LESSON = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]
TEXT["docs/lesson.ipynb"] = "\n".join(LESSON)
README = TEXT["README.md"]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if "__main__" in path.read_text())
OTHER_OPTIONS = {  # torchrun's, TensorBoard's, git's, of old runs, of an example
    *("--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--signals-to-handle"),
    *("--logdir", "--samples_per_plugin", "--depth", "--document_frequencies", "--heads"),
}


def test_shipped_model_gives_the_caption_in_the_readme(tmp_path):
    shutil.copy(ROOT / "docs/photo.jpg", tmp_path)
    command = [sys.executable, ROOT / "caption.py", "--img", "photo.jpg", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"\n{done.stdout}attention: photo_attention.png\n" in README
    assert str(PRETRAINED) in done.stderr  # it says which model that was
    assert (tmp_path / "photo_attention.png").stat().st_size > 10_000


def test_library_example_runs_word_for_word(tmp_path, monkeypatch, capsys):
    shutil.copy(ROOT / "docs/photo.jpg", tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], names := {})
    captioned = names["captioned"]
    assert captioned.text in capsys.readouterr().out
    assert len(captioned.n_best) == 3 and captioned.attention.shape == (len(captioned.words), 196)
    assert captioned.text in Path("photo.html").read_text(encoding="utf-8")


def test_shipped_file_is_small_in_float16_and_loads_with_weights_only():
    assert PRETRAINED.stat().st_size <= 30_000_000
    checkpoint = torch.load(PRETRAINED, weights_only=True)
    weights = [*checkpoint["encoder"].values(), *checkpoint["decoder"].values()]
    assert all(weight.dtype == torch.float16 for weight in weights if weight.dim() > 1)
    _, decoder, word_map, _ = load_captioner(PRETRAINED, "cpu")
    assert decoder.fc.out_features == len(word_map) == 3530


def test_constraints_have_one_version_of_each_required_package_that_its_requirement_allows():
    def read(path):
        return [Requirement(line) for line in re.findall(r"^\w[^#\n]*", path.read_text(), re.M)]

    required = [package for path in ROOT.glob("requirements*.txt") for package in read(path)]
    pins = read(ROOT / "constraints.txt")
    versions = {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}
    assert sorted(pin.name for pin in pins) == sorted(package.name for package in required)
    assert not [package for package in required if versions[package.name] not in package.specifier]


def find_commands(text):
    """The calls of our scripts in a page's shell blocks and code spans: (script, arguments)"""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in lines.splitlines() + [span for span in spans if " " in span]:
        words = shlex.split(line.partition(" > ")[0], comments=True)
        for i, word in enumerate(words[:6]):
            if word.endswith(".py") and word[:-3] in SCRIPTS:
                yield word[:-3], words[i + 1 :]


def test_scripts_accept_each_documented_command_and_option(capsys):
    commands = [command for text in TEXT.values() for command in find_commands(text)]
    assert len(commands) > 50
    for script, arguments in commands:
        arguments = ["cpu" if x == "cuda" else x for x in arguments]  # there may be no GPU
        importlib.import_module(script).get_args(arguments)  # SystemExit if refused
    option = re.compile(r"(?<![\w-])--[a-z][\w-]*")
    assert {script for script, _ in find_commands(README)} == set(SCRIPTS)
    for script in SCRIPTS:
        pytest.raises(SystemExit, importlib.import_module(script).get_args, ["--help"])
    known = {*option.findall(capsys.readouterr().out), *OTHER_OPTIONS}
    assert not [(page, x) for page in TEXT for x in option.findall(TEXT[page]) if x not in known]


def test_list_of_files_is_complete_and_imports_go_down_it():
    block = re.search(r"\n## Where everything is\n.*?```\n(.*?)```", README, re.DOTALL)[1]
    names = [line.split(maxsplit=1)[0] for line in block.splitlines()]
    there = ["tests/", "pretrained/", "docs/", *(path.name for path in ROOT.glob("*.py"))]
    there += [f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")]
    assert sorted(names) == sorted(there)
    order, upwards = [name.strip("/").removesuffix(".py") for name in names], []
    for i, name in enumerate(order[: order.index("benchmarks")]):
        for path in [*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/*.py")]:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                imported = [x.name for x in node.names] if isinstance(node, ast.Import) else []
                imported += [node.module] if isinstance(node, ast.ImportFrom) else []
                upwards += [(path, x) for x in imported if x.partition(".")[0] in order[:i]]
    assert not upwards


def slug(title):
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")  # as on GitHub


def test_links_and_paths_in_all_documents_have_a_target():
    missing = []
    for page, text in TEXT.items():
        links = [x for x in re.findall(r"\]\(([^)]+)\)", text) if not x.startswith("http")]
        for path, _, anchor in (link.partition("#") for link in links):
            target = ((ROOT / page).parent / path if path else ROOT / page).resolve()
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if anchor else []
            if not target.exists() or anchor and anchor not in map(slug, titles):
                missing.append((page, path, anchor))
        paths = re.findall(r"\b(?:\w+/)+\w+\.(?:py|md|ipynb)\b", re.sub(r"\]\([^)]+\)", "", text))
        missing += [(page, path) for path in paths if not (ROOT / path).exists()]
    assert not missing
