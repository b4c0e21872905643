"""caption.py: what it prints, what it draws and what it refuses."""

import errno
import io
import json
import os
import pickle
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import caption
import checkpoints
import utils
from modeling import field_of_view
from models import DecoderWithAttention, Encoder
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["a", "dog", "cat", "on", "the", "grass", "red", "ball"]
WORD_MAP = {w: i for i, w in enumerate(["<pad>", *WORDS, "<unk>", "<start>", "<end>"])}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The path of a small random model that ends its captions after some words."""
    torch.manual_seed(2)
    encoder = Encoder(name="mobilenet_v3_small", weights="none")
    decoder = DecoderWithAttention(16, 16, 16, len(WORD_MAP), encoder_dim=encoder.encoder_dim)
    with torch.no_grad():
        # So that captions differ between images, though their mean vectors hardly do.
        decoder.init_h.weight.mul_(3)
        decoder.embedding.weight.normal_(0, 2)
        decoder.fc.weight.normal_(0, 2)
        for name, bias in {"<pad>": -99, "<unk>": -99, "<start>": -99, "<end>": -5}.items():
            decoder.fc.bias[WORD_MAP[name]] = bias
    path = tmp_path_factory.mktemp("model") / "BEST_checkpoint_x.pth.tar"
    checkpoints.save(path, encoder, decoder, WORD_MAP)
    return path


load_once = cache(checkpoints.load_captioner)


@pytest.fixture
def photos(tmp_path):
    """A folder of five photographs of several shapes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i, shape in enumerate([(40, 60), (60, 40), (50, 50), (30, 90), (64, 64)]):
        colour = tuple(generator.integers(0, 256, 3).tolist())
        Image.new("RGB", shape, colour).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def run(model, monkeypatch, capsys):
    """Call the script; returns its exit code, stdout and stderr."""
    monkeypatch.setattr(caption, "load_captioner", load_once)

    def call(*arguments):
        argv = ["caption.py", f"--model={model}", "--max_len=6", "--device=cpu", "--img"]
        monkeypatch.setattr(sys, "argv", argv + [str(argument) for argument in arguments])
        code = 0
        try:
            utils.run_script(caption.main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def overlays(folder):
    return sorted(path.name for path in folder.glob("*_attention.png"))


def test_one_file_gives_its_caption_and_an_overlay_beside_it(run, photos):
    code, out, err = run(photos / "0.png")
    assert code == 0
    assert out.count("\n") == 1 and "\t" not in out and set(out.split()) <= set(WORDS)
    assert overlays(photos) == ["0_attention.png"] and "0_attention.png" in err
    assert not list(photos.glob(".*"))  # no temporary file is left


def test_one_line_per_image_in_order(run, photos):
    code, out, err = run(photos, "--batch_size=2")
    paths = [line.split("\t")[0] for line in out.splitlines()]
    assert code == 0 and paths == [str(photos / f"{i}.png") for i in range(5)]
    assert overlays(photos) == [f"{i}_attention.png" for i in range(5)]


def test_the_tutorials_spelling_of_the_options_works_too():
    theirs = caption.get_args(
        ["-i", "x.jpg", "-m", "BEST.pth.tar", "-wm", "WORDMAP.json", "-b", "3", "--dont_smooth"]
    )
    ours = caption.get_args(
        [
            "--img",
            "x.jpg",
            "--model",
            "BEST.pth.tar",
            "--word_map",
            "WORDMAP.json",
            "--beam_size",
            "3",
            "--no-smooth",
        ]
    )
    assert theirs == ours and (ours.beam_size, ours.smooth) == (3, False)
    assert caption.get_args(["-i", "x.jpg"]).smooth is True
    with pytest.raises(UserError, match="^--beam_size is 0, it must be at least 1"):
        caption.get_args(["-i", "x.jpg", "-b", "0"])


def test_our_overlays_are_not_captioned(run, photos):
    _, first, _ = run(photos)
    assert run(photos, "--no_attention")[1] == first
    assert run(photos / "*.png", "--no_attention")[1] == first
    assert run(*sorted(photos.glob("*.png")), "--no_attention")[1] == first  # as the shell does


def test_batched_equals_single(run, photos):
    batched = [json.loads(line) for line in run(photos, "--json", "--no_attention")[1].splitlines()]
    assert len({line["caption"] for line in batched}) > 1  # otherwise a mix-up would not be noticed
    for line in batched:
        single = json.loads(run(line["image"], "--json", "--no_attention")[1])
        assert single.pop("score") == pytest.approx(line.pop("score"), abs=1e-4)
        assert single == line


def test_json_lines_hold_all_fields(run, photos):
    code, out, _ = run(photos / "0.png", "--json", "--n_best=3", "--no_attention")
    line = json.loads(out)
    assert set(line) == {"image", "caption", "words", "score", "finished", "n_best"}
    assert line["caption"] == " ".join(line["words"]) == line["n_best"][0]["caption"]
    assert "n_best" not in json.loads(run(photos / "0.png", "--json", "--no_attention")[1])


def test_n_best_are_printed_with_their_scores_the_best_first(run, photos):
    _, out, _ = run(photos / "0.png", "--n_best=4", "--no_attention")
    scores, captions = zip(*(line.split("\t") for line in out.splitlines()))
    scores = [float(score) for score in scores]
    assert scores == sorted(scores, reverse=True) and len(set(captions)) == len(captions) > 1
    assert captions[0] == run(photos / "0.png", "--no_attention")[1].rstrip("\n")


def test_bad_image_among_good_ones_is_reported_and_the_rest_captioned(run, photos):
    (photos / "1.png").write_bytes(b"no image at all")
    code, out, err = run(photos, "--batch_size=2")
    assert code == 2
    assert [line.split("\t")[0][-5] for line in out.splitlines()] == ["0", "2", "3", "4"]
    assert "1.png is not a readable image" in err and "1 of 5 images" in err
    assert overlays(photos) == [f"{i}_attention.png" for i in (0, 2, 3, 4)]


def test_an_overlay_of_unknown_format_is_refused_before_the_model_is_read(run, photos, monkeypatch):
    monkeypatch.setattr(caption, "Captioner", None)
    code, _, err = run(photos / "0.png", f"--out={photos / 'x.abc'}")
    assert code == 2 and "x.abc cannot be written: Format 'abc' is not supported" in err


def test_the_only_checkpoint_is_found(model, photos, monkeypatch, capsys):
    monkeypatch.chdir(model.parent)
    monkeypatch.setattr(sys, "argv", ["caption.py", "--img", str(photos / "0.png")])
    caption.main()
    assert f"model: {model.name}, the only one in this folder" in capsys.readouterr().err


def test_out_is_a_file_for_one_image_and_a_folder_for_several(run, photos):
    run(photos / "0.png", "--out", photos / "new" / "one.png")
    assert (photos / "new" / "one.png").exists()
    run(photos / "0.png", photos / "1.png", "--out", photos / "several")
    assert overlays(photos / "several") == ["0_attention.png", "1_attention.png"]
    assert overlays(photos) == []


def test_a_page_holds_one_image_or_all(run, photos):
    code, out, err = run(photos / "0.png", "--out", photos / "new" / "one.html", "--n_best=3")
    assert code == 0 and f"attention: {photos / 'new' / 'one.html'}" in err
    one = (photos / "new" / "one.html").read_text()
    assert one.count("<article") == 1 and "3 captions, the most probable first" in one
    assert all(score.replace("-", "\u2212") in one for score in re.findall(r"-\d+\.\d{3}", out))
    (photos / "1.png").write_bytes(b"no image at all")
    code, out, err = run(photos, "--out", photos / "all.html")
    assert code == 2 and "1 of 5 images" in err
    page = (photos / "all.html").read_text()
    assert page.count("<article") == 4 and "<title>4 captions</title>" in page
    assert re.findall(r'<article[^>]* aria-label="(.*?)"', page) == [
        f"{i}.png" for i in (0, 2, 3, 4)
    ]
    assert overlays(photos) == []


def test_an_animation_and_a_beam_tree_are_drawn_for_one_image(run, photos):
    code, out, err = run(
        photos / "0.png",
        "--out",
        photos / "x.gif",
        "--beam_size=2",
        "--beam_tree",
        photos / "tree.svg",
    )
    assert code == 0 and (photos / "x.gif").read_bytes()[:4] == b"GIF8"
    tree = ElementTree.parse(photos / "tree.svg")
    drawn = "".join(tree.getroot().itertext())
    assert all(word in drawn for word in out.split()) and f"beam tree: {photos}/tree.svg" in err
    assert "beam_tree is for one image" in run(photos, "--beam_tree", photos / "tree.svg")[2]
    assert "must end in .svg" in run(photos / "0.png", "--beam_tree", photos / "tree.png")[2]


def test_a_notebook_shows_the_view(model, photos):
    captioned = caption.Captioner(model, device="cpu")(photos / "0.png", max_len=6)
    assert "<article" in captioned._repr_html_() and captioned.text in captioned._repr_html_()


HEADLESS = {
    name: value
    for name, value in os.environ.items()
    if name not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
} | {"OMP_NUM_THREADS": "1"}


def test_works_without_a_display(model, photos):
    command = [
        sys.executable,
        "caption.py",
        f"--img={photos / '0.png'}",
        f"--model={model}",
        "--word_map=unused.json",
        "--beam_size=5",
        "--device=cpu",
        "--show",
    ]
    result = subprocess.run(command, cwd=ROOT, env=HEADLESS, capture_output=True, text=True)
    assert result.stdout.strip() and overlays(photos) == ["0_attention.png"]
    assert result.returncode == 2  # for --show alone
    assert result.stderr.count("\n") == 1 and "no display" in result.stderr


def test_where_the_encoder_looks_is_measured_once_and_only_to_draw(model, photos, monkeypatch):
    measured = []
    monkeypatch.setattr(
        field_of_view, "measure_offset", lambda *_: measured.append(1) or (0.1, 0.2)
    )
    first, second = caption.Captioner(model, device="cpu")([photos / "0.png", photos / "1.png"])
    assert first.text and not measured
    assert first.offset == second.offset == (0.1, 0.2) and len(measured) == 1
    content = pickle.dumps(second)  # without the encoder
    assert pickle.loads(content).offset == (0.1, 0.2) and len(content) < model.stat().st_size / 10


def test_captioner_takes_paths_pictures_arrays_and_lists_of_them(model, photos):
    model = caption.Captioner(model, device="cpu")
    paths = sorted(photos.glob("*.png"))
    expected = model(paths, max_len=6, batch_size=2)
    assert [c.name for c in expected] == [str(path) for path in paths]
    assert len({c.text for c in expected}) > 1
    pictures = [Image.open(path) for path in paths]
    arrays = [np.asarray(picture) for picture in pictures]
    for kind in (list(map(str, paths)), tuple(pictures), arrays):
        for found, one in zip(model(kind, max_len=6), expected):
            assert (found.text, found.words, found.finished) == (one.text, one.words, one.finished)
            assert found.score == pytest.approx(one.score, abs=1e-4)
            np.testing.assert_allclose(found.attention, one.attention, atol=1e-5)
            np.testing.assert_array_equal(found.image, one.image)
        alone = model(kind[3], max_len=6)
        assert alone.text == expected[3].text and alone.attention.shape == (len(alone.words), 196)
    batch = model(np.stack([np.asarray(p.resize((50, 40))) for p in pictures]), max_len=6)
    assert len(batch) == 5 and batch[0].image.shape == (40, 50, 3)
    assert model([]) == []
    grey = model(np.zeros((20, 30), np.uint8), max_len=6)
    assert grey.image.shape == (20, 30, 3) and grey.name == "image"
    best = model(pictures[0], beam_size=4, n_best=4)
    scores = [score for _, score in best.n_best]
    assert best.n_best[0] == (best.text, best.score) and scores == sorted(scores, reverse=True)
    assert len(scores) == 4


def test_captioner_names_what_it_cannot_read(model, photos, tmp_path):
    model = caption.Captioner(str(model), device="cpu")
    with pytest.raises(UserError, match="nowhere.jpg not found"):
        model([photos / "0.png", "nowhere.jpg"])
    for array in (np.zeros((20, 30, 3)), np.zeros((20, 30, 2), np.uint8), np.zeros((0, 3), "u1")):
        with pytest.raises(UserError, match="is not an image; pass uint8"):
            model(array)
    one = model(photos / "1.png", max_len=6)
    one.save(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size[0] > 100
    for kind in ("png", "gif", "html"):
        with pytest.raises(ValueError, match="overlay 'heap' is not one of: heat, light"):
            one.save(tmp_path / f"y.{kind}", overlay="heap")


@pytest.mark.parametrize("kind", ["png", "pdf", "gif", "html"])
def test_heat_and_light_differ_in_every_format(run, photos, tmp_path, kind):
    paths = {overlay: tmp_path / f"{overlay}.{kind}" for overlay in ("light", "heat")}
    for overlay, path in paths.items():
        assert run(photos / "0.png", f"--overlay={overlay}", f"--out={path}")[0] == 0
    assert paths["light"].read_bytes() != paths["heat"].read_bytes()
    if kind == "html":
        colours = [
            re.search('data-colours="(.*?)"', path.read_text())[1] for path in paths.values()
        ]
        assert colours[0] == "" and len(colours[1]) == 4 * 256


def test_closed_pipe_ends_without_a_traceback(model, photos):
    """As in `caption.py ... | head -1`."""
    command = [
        sys.executable,
        "caption.py",
        f"--img={photos}",
        f"--model={model}",
        "--device=cpu",
        "--no_attention",
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, env=HEADLESS, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


def test_slow_libraries_are_imported_only_where_they_are_used():
    """Those that draw, and torchvision, which takes as long as all the rest of train.py."""
    code = (
        "import sys, caption, eval, train\n"
        "print(sys.modules.keys() & {'matplotlib', 'torchvision'})"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr


def test_the_library_says_unk_only_when_asked(model, photos):
    captioner = caption.Captioner(model, device="cpu")
    with torch.no_grad():
        captioner.decoder.fc.bias[WORD_MAP["<unk>"]] = 99
    path = photos / "0.png"
    assert "<unk>" not in captioner(path, beam_size=2, max_len=4).words
    assert captioner(path, beam_size=2, max_len=4, no_unk=False).words == ["<unk>"] * 4


def test_sampling_is_repeated_by_its_seed(run, photos):
    first = run(photos / "0.png", "--sample", "--n_best=4", "--no_attention")[1]
    assert first.count("\n") == 4
    assert run(photos / "0.png", "--sample", "--n_best=4", "--no_attention")[1] == first
    assert run(photos / "0.png", "--sample", "--n_best=4", "--no_attention", "--seed=1")[1] != first
    greedy = run(photos / "0.png", "-b=1", "--no_attention")[1]
    assert run(photos / "0.png", "--sample", "--top_p=1e-9", "--no_attention")[1] == greedy


@pytest.mark.parametrize(
    "options, message",
    [
        (["--temperature", "2"], "--temperature and --top_p are for --sample"),
        (["--sample", "--length_penalty", "1"], "are for the search, not for --sample"),
        (["--sample", "--beam_tree", "x.svg"], "--beam_tree draws a search; leave --sample out"),
        (["--temperature", "0"], "--temperature is 0.0, it must be above 0"),
        (["--top_p", "1.5"], "--top_p is 1.5, it must be above 0 and at most 1"),
    ],
)
def test_options_that_contradict_sampling_are_errors(run, photos, options, message):
    code, _, err = run(photos / "0.png", *options)
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_folder_stands_for_every_format_and_says_what_it_passed_over(run, photos):
    for suffix in ("avif", "jfif", "jp2"):
        Image.open(photos / "0.png").save(photos / f"6.{suffix}")
    for name in ("a.txt", "b.txt", "c.mov", "README"):
        (photos / name).touch()
    code, out, err = run(photos, "--no_attention")
    assert code == 0 and out.count("\n") == 8
    assert "skipped, not images: 2 .txt, 1 readme, 1 .mov" in err.lower()


def test_two_stars_stand_for_any_number_of_folders(run, photos):
    (photos / "a" / "b").mkdir(parents=True)
    for folder in (photos / "a", photos / "a" / "b"):
        Image.open(photos / "0.png").save(folder / "x.png")
    code, out, _ = run(f"{photos}/**/*.png", "--no_attention")
    assert code == 0 and out.count("\n") == 7


def test_names_that_would_break_lines_or_steer_a_terminal_are_escaped(run, photos):
    os.rename(photos / "0.png", photos / "0\n\t\x1b[31m.png")
    code, out, _ = run(photos, "--no_attention")
    assert code == 0 and out.count("\n") == 5 and "0\\n\\t\\x1b[31m.png\t" in out


def test_captions_go_on_where_photographs_are_read_only(run, photos, monkeypatch):
    def refuse(captioned, path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))

    monkeypatch.setattr(caption.Captioned, "save", refuse)
    code, out, err = run(photos)
    assert code == 0 and out.count("\n") == 5
    assert err.count("captions go on without overlays, --out FOLDER takes them") == 1


def test_one_overlay_that_cannot_be_written_does_not_end_the_others(run, photos):
    name = "x" * 245 + ".png"
    os.rename(photos / "2.png", photos / name)
    code, out, err = run(photos)
    assert code == 2 and out.count("\n") == 5 and len(overlays(photos)) == 4
    assert name[:100] in err and "File name too long" in err
    assert "1 of 5 images could not be captioned" in err


def test_the_library_takes_bytes_files_generators_and_addresses(model, photos):
    captioner = caption.Captioner(model, device="cpu")
    path = photos / "1.png"
    expected = captioner(path, max_len=6)
    with open(path, "rb") as file:
        for source in (path.read_bytes(), io.BytesIO(path.read_bytes()), file):
            found = captioner(source, max_len=6)
            assert found.words == expected.words and found.name in ("image", str(path))
    several = captioner((p for p in [path, path]), max_len=6)
    assert [c.words for c in several] == [expected.words] * 2
    for options in ({"batch_size": -1}, {"max_len": 0}, {"beam_size": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            captioner(path, **options)
    cut_off = Image.open(io.BytesIO(path.read_bytes()[:100]))
    with pytest.raises(UserError, match="the image is not readable"):
        captioner(cut_off)
