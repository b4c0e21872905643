"""caption.py: what it prints, what it draws and what it refuses; and the library."""

import io
import itertools
import json
import os
import subprocess
import sys
from collections import deque
from functools import cache

import numpy as np
import pytest
import torch
from factories import ROOT
from PIL import Image

import caption
import checkpoints
import utils
from modeling import field_of_view
from modeling.evidence import find_evidence
from modeling.sampling import most_likely_location
from models import DecoderWithAttention, Encoder
from preprocessing.images import read_image
from utils import UserError

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
def captioner(model, monkeypatch):
    monkeypatch.setattr(caption, "load_captioner", load_once)
    return caption.Captioner(str(model), device="cpu")


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
def run(model, captioner, monkeypatch, capsys):
    """Call the script; returns its exit code, stdout and stderr."""

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


def test_several_give_a_line_each_in_order_and_overlays_are_not_captioned(run, photos):
    name = "0\n\t\x1b[31m.png"  # would break lines and steer a terminal
    os.rename(photos / "0.png", photos / name)
    code, first, _ = run(photos, "--batch_size=2")
    assert code == 0 and first.startswith(f"{photos}/0\\n\\t\\x1b[31m.png\t")
    paths = [line.split("\t")[0] for line in first.splitlines()]
    assert paths[1:] == [str(photos / f"{i}.png") for i in range(1, 5)]
    assert len(overlays(photos)) == 5
    for again in ([photos], [photos / "*.png"]):
        assert run(*again, "--no_attention")[1] == first
    (photos / "lone").mkdir()
    os.rename(photos / "4.png", photos / "lone" / "4.png")
    out = run(photos / "lone", "--no_attention")[1]  # one image, but a folder was asked for
    assert out.startswith(f"{photos}/lone/4.png\t")


def test_the_tutorials_spelling_of_the_options_works_too():
    theirs = caption.get_args("-i x.jpg -m BEST -wm WORDMAP -b 3 --dont_smooth".split())
    ours = "--img x.jpg --model BEST --word_map WORDMAP --beam_size 3 --no-smooth".split()
    assert theirs == caption.get_args(ours) and (theirs.beam_size, theirs.smooth) == (3, False)
    args = caption.get_args(["-i", "x.jpg"])
    assert args.smooth is True and (args.beam_size, args.n_best, args.max_len) == (5, 1, 50)


def test_batched_equals_single_and_json_holds_all_fields(run, photos):
    batched = [json.loads(line) for line in run(photos, "--json", "--no_attention")[1].splitlines()]
    assert len({line["caption"] for line in batched}) > 1  # otherwise a mix-up would not be noticed
    for line in batched:
        assert list(line) == ["image", "caption", "score", "words", "finished"]
        single = json.loads(run(line["image"], "--json", "--no_attention")[1])
        assert single.pop("score") == pytest.approx(line.pop("score"), abs=1e-4)
        assert single == line and line["caption"] == " ".join(line["words"])
    best = json.loads(run(photos / "0.png", "--json", "--n_best=4", "--no_attention")[1])["n_best"]
    scores = [one["score"] for one in best]
    assert len({one["caption"] for one in best}) == 4 and scores == sorted(scores, reverse=True)
    assert best[0]["caption"] == batched[0]["caption"]
    out = run(photos / "0.png", "--n_best=4", "--no_attention")[1]
    assert out == "".join(f"{one['score']:.3f}\t{one['caption']}\n" for one in best)


def test_what_cannot_be_read_or_written_is_a_line_each_and_the_others_go_on(run, photos):
    (photos / "1.png").write_bytes(b"no image at all")
    name = "x" * 245 + ".png"  # too long for that of an overlay
    os.rename(photos / "2.png", photos / name)
    code, out, err = run(photos, "--batch_size=2")
    assert code == 2 and [line.split("\t")[0][-5] for line in out.splitlines()] == [*"034", "x"]
    assert overlays(photos) == [f"{i}_attention.png" for i in (0, 3, 4)]
    lines = [line for line in err.splitlines() if line.startswith("caption.py: ")]
    assert "1.png" in lines[0] and name[:100] in lines[1] and "2 of 5 images" in lines[2]
    assert len(lines) == 3
    code, out, err = run(photos / "1.png")
    assert (code, out, err.count("\n")) == (2, "", 1) and "1.png is not a readable image" in err


def test_captions_come_without_overlays_where_photographs_are_read_only(run, photos, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, _: os.fspath(path) != str(photos))
    code, out, err = run(photos)
    assert code == 0 and out.count("\n") == 5 and overlays(photos) == []
    assert err.count("is read-only") == 1 and str(photos) in err and "--out FOLDER" in err
    assert run(photos, "--out", photos / "new")[0] == 0 and len(overlays(photos / "new")) == 5


def test_out_is_a_file_for_one_image_and_a_folder_or_a_page_for_several(run, photos, monkeypatch):
    new = photos / "new"
    assert run(photos / "0.png", "--out", new / "one.png", "--dont_smooth")[0] == 0
    assert run(photos / "0.png", "--out", new / "smooth.png")[0] == 0
    assert (new / "one.png").read_bytes() != (new / "smooth.png").read_bytes()
    assert "evidence: " in run(photos / "0.png", "--out", new / "e.png", "--evidence")[2]
    assert (new / "e.png").read_bytes() != (new / "smooth.png").read_bytes()
    run(photos / "0.png", photos / "1.png", "--out", photos / "several")
    assert overlays(photos / "several") == ["0_attention.png", "1_attention.png"]
    (photos / "1.png").write_bytes(b"no image at all")
    assert run(photos, "--out", photos / "all.html")[0] == 2
    page = (photos / "all.html").read_text()
    assert page.count("<article") == 4 and "<title>4 captions</title>" in page
    tree = new / "new" / "tree.svg"
    options = ["--out", photos / "x.gif", "--beam_size=2", "--beam_tree", tree]
    code, _, err = run(photos / "0.png", *options)
    assert code == 0 and (photos / "x.gif").read_bytes()[:4] == b"GIF8"
    assert b"<svg" in tree.read_bytes() and str(tree) in err and str(photos / "x.gif") in err
    assert overlays(photos) == []
    monkeypatch.setattr(caption, "Captioner", None)  # the next one is refused before it is needed
    code, _, err = run(photos / "0.png", "--out", photos / "x.abc")
    assert code == 2 and "x.abc cannot be written" in err and err.count("\n") == 1


def test_one_file_gives_its_caption_and_an_overlay_but_no_window_without_a_display(
    run, photos, model, monkeypatch
):
    monkeypatch.chdir(model.parent)
    code, caption_line, err = run(photos / "0.png", "--model=")
    assert f"model: {model.name}, the only one in this folder" in err
    assert code == 0 and caption_line.count("\n") == 1 and set(caption_line.split()) <= set(WORDS)
    assert overlays(photos) == ["0_attention.png"] and "0_attention.png" in err
    assert not list(photos.glob(".*"))  # no temporary file is left
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    code, out, err = run(photos / "0.png", "--show")
    assert (code, out, err.count("\n")) == (2, caption_line, 1) and "--show" in err


@pytest.mark.slow
def test_closed_pipe_ends_without_a_traceback(model, photos):
    """As in `caption.py ... | head -1`."""
    command = [sys.executable, "caption.py", f"--img={photos}", f"--model={model}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, "--no_attention", "--device=cpu"], cwd=ROOT, **pipes)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


def test_slow_libraries_are_imported_only_where_they_are_used():
    """
    Those that draw, torchvision, which takes as long as all the rest of train.py, and to caption
    torch._dynamo, which takes as long as torch itself: drawing initial weights would import it.
    """
    code = "import sys, caption, eval, train; "
    code += "print(sys.modules.keys() & {'matplotlib', 'skimage', 'torchvision'}); "
    code += (
        "caption.Captioner(device='cpu')('docs/photo.jpg'); print('torch._dynamo' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "set()\nFalse\n", result.stderr


def test_sampling_is_repeated_by_its_seed(run, photos):
    options = (photos / "0.png", "--sample", "--no_attention")
    first = run(*options, "--n_best=7")[1]
    assert first.count("\n") == 7 and run(*options, "--n_best=7")[1] == first
    assert run(*options, "--n_best=7", "--seed=1")[1] != first
    greedy = run(photos / "0.png", "-b=1", "--no_attention")[1]
    assert run(*options, "--top_p=1e-9")[1] == greedy


def test_options_that_contradict_each_other_are_errors_of_one_line(run, photos):
    for options, names in (
        ("--temperature 2", "--temperature --sample"),
        ("--sample --beam_tree x.svg", "--beam_tree --sample"),
        ("--beam_tree x.svg --img 1.png 2.png", "--beam_tree --img"),
        ("--n_best 6", "--n_best --beam_size"),
        ("--no_attention --out x.png", "--no_attention --out"),
        ("--no_attention --show", "--no_attention --show"),
        ("--no_attention --evidence", "--no_attention --evidence"),
        ("--out x.html --no-smooth", "--no-smooth x.html"),
        ("--beam_size 0", "--beam_size 0"),
        ("--img nowhere.jpg", "nowhere.jpg"),
    ):
        code, out, err = run(photos / "0.png", *options.split())
        assert (code, out, err.count("\n")) == (2, "", 1), options
        assert all(name in err for name in names.split()), err


# The library


def test_where_the_encoder_looks_is_measured_once_and_only_to_draw(captioner, photos, monkeypatch):
    measured = []
    measure = lambda *_: measured.append(1) or (0.1, 0.2)  # noqa: E731
    monkeypatch.setattr(field_of_view, "measure_offset", measure)
    monkeypatch.setattr(captioner.encoder, "offset", None, raising=False)
    first, second = captioner([photos / "0.png", photos / "1.png"])
    assert first.text and not measured
    assert first.offset == second.offset == (0.1, 0.2) and len(measured) == 1
    monkeypatch.setattr("visualization.attention.attention_grid", lambda *given: given)
    assert first.figure(False)[1:] == (first.words, first.attention, False, (0.1, 0.2))


@pytest.mark.parametrize("hard", [False, True])
def test_evidence_is_computed_if_asked_for_and_shown_instead_of_attention(
    captioner, photos, monkeypatch, hard
):
    paths, rest = sorted(photos.glob("*.png")), (WORD_MAP["<start>"], None)
    if hard:
        rest = WORD_MAP["<start>"], most_likely_location
    options = {"max_len": 6, "n_best": 2, "hard_attention": hard}
    monkeypatch.setattr("visualization.attention.attention_grid", lambda *given: given)
    plain, found = captioner(paths, **options), captioner(paths, evidence=True, **options)
    for path, before, one in zip(paths, plain, found):
        square = torch.from_numpy(read_image(path))[None]
        with torch.inference_mode():
            [features] = captioner.encoder.cells(square)
        tokens = [WORD_MAP[word] for word in one.words]
        expected = find_evidence(captioner.decoder, features, tokens, *rest)
        np.testing.assert_allclose(one.evidence, expected, atol=1e-5)
        assert one.text == before.text and before.evidence is None
        assert one.figure()[2] is one.evidence and before.figure()[2] is before.attention
        pages = one._repr_html_(), before._repr_html_()
        assert ["show evidence" in page for page in pages] == [True, False]


def test_images_of_every_kind_get_the_same_caption_and_are_drawn_as_they_were(captioner, photos):
    paths = sorted(photos.glob("*.png"))
    expected = captioner(paths, max_len=6, batch_size=2)
    assert [one.name for one in expected] == [str(path) for path in paths]
    assert len({one.text for one in expected}) > 1
    arrays = [np.asarray(Image.open(path)).copy() for path in paths]
    for images in (
        deque(map(str, paths)),
        np.array(list(map(str, paths))),
        np.array(paths),  # of objects
        tuple(Image.open(path) for path in paths),
        dict(enumerate(arrays)).values(),
        [torch.from_numpy(array) for array in arrays],
        (kind(path.read_bytes()) for kind, path in zip([bytes, bytearray] * 3, paths)),
        [io.BytesIO(path.read_bytes()) for path in paths],
    ):
        for found, one in zip(captioner(images, max_len=6), expected, strict=True):
            assert (found.text, found.words, found.finished) == (one.text, one.words, one.finished)
            assert found.score == pytest.approx(one.score, abs=1e-4)
            np.testing.assert_allclose(found.attention, one.attention, atol=1e-5)
            np.testing.assert_array_equal(found.image, one.image)
            assert found.name in ("image", one.name)
    for one_image in (arrays[3], io.BytesIO(paths[3].read_bytes()), Image.open(paths[3])):
        alone = captioner(one_image, max_len=6)
        assert alone.text == expected[3].text and alone.attention.shape == (len(alone.words), 196)
    arrays[3][:] = 0  # the caption was for the pixels before
    np.testing.assert_array_equal(alone.image, expected[3].image)
    batch = captioner(np.zeros((2, 40, 50, 3), np.uint8), max_len=6)
    assert [one.image.shape for one in batch] == [(40, 50, 3)] * 2 and captioner([]) == []
    assert captioner(np.zeros((20, 30), np.uint8)).image.shape == (20, 30, 3)


def test_each_reads_a_batch_ahead_of_what_is_asked_for_and_goes_on_after_errors(captioner, photos):
    asked = itertools.count()
    endless = ("nowhere.jpg" if next(asked) % 2 else photos / "0.png" for _ in itertools.repeat(0))
    results = list(itertools.islice(captioner.each(endless, batch_size=3, max_len=6), 4))
    assert [isinstance(result, UserError) for result in results] == [False, True] * 2
    assert next(asked) == 9


def test_a_picture_of_a_web_address_is_read_once(captioner, run, tmp_path, monkeypatch):
    pixels, read = np.zeros((30, 40, 3), np.uint8), []
    monkeypatch.setattr("preprocessing.images.read_rgb", lambda url: read.append(url) or pixels)
    found = captioner("http://x.org/1.png", max_len=6)
    assert found.image is pixels and read == [found.name] == ["http://x.org/1.png"]
    tree = tmp_path / "tree.svg"
    code, *_ = run("http://x.org/2.png", "--beam_tree", tree, "--out", tmp_path / "x.html")
    assert code == 0 and tree.exists() and read[1:] == ["http://x.org/2.png"]


def test_pictures_that_change_later_are_captioned_and_drawn_as_they_were(captioner, photos):
    paths = sorted(photos.glob("*.png"))
    pictures = [Image.open(path).convert("RGB").resize((64, 64)) for path in paths]
    expected = [one.text for one in captioner(pictures, max_len=6)]
    array, picture, stream = np.zeros((64, 64, 3), np.uint8), pictures[0].copy(), io.BytesIO()

    def frames(kind):  # of a camera, which uses its memory again
        for frame in pictures:
            array[:] = np.asarray(frame)
            picture.paste(frame)
            stream.seek(0), stream.truncate(), frame.save(stream, "PNG")
            yield kind
        array[:] = 0

    assert len(set(expected)) > 1
    for kind in (array, picture, stream):
        found = captioner(frames(kind), max_len=6)
        assert [one.text for one in found] == expected
        for one, frame in zip(found, pictures):
            np.testing.assert_array_equal(one.image, np.asarray(frame))


def test_a_file_that_was_replaced_by_another_picture_is_not_drawn(captioner, photos):
    found, content = captioner(photos / "0.png", max_len=6), (photos / "0.png").read_bytes()
    (photos / "0.png").write_bytes((photos / "1.png").read_bytes())
    with pytest.raises(UserError, match=r"0\.png has changed"):
        found.save(photos / "x.html")
    (photos / "0.png").write_bytes(content)
    found.save(photos / "x.html")


def test_what_it_cannot_read_or_search_for_is_named(captioner, photos):
    with pytest.raises(UserError, match="nowhere.jpg not found"):
        captioner([photos / "0.png", "nowhere.jpg"])
    cut_off = Image.open(io.BytesIO((photos / "1.png").read_bytes()[:100]))
    for image in (cut_off, np.zeros((0, 3), np.uint8), np.zeros((20, 30, 3)), None):
        for function in (captioner, captioner.grow_tree):
            with pytest.raises(UserError, match="is not a readable image"):
                function(image)
    closed = io.BytesIO()
    closed.close()
    for image, reason in ((closed, "closed file"), ("iVBORw0KGgo" * 8000, "File name too long")):
        with pytest.raises(UserError, match=f"is not a readable image: .*{reason}") as error:
            captioner(image)
        assert len(str(error.value)) <= 600
    for options in ({"batch_size": 0}, {"max_len": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            captioner(photos / "0.png", **options)


@pytest.mark.parametrize("file", ["utils.py", "datasets/__init__.py", "modeling.py"])
def test_a_foreign_module_of_our_name_is_an_import_error_that_names_it(tmp_path, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    code = "try: import caption\nexcept ImportError as error: print(error)"
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "text": True}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, **options)
    assert done.stdout.startswith(f"{tmp_path / file} hides ") and "torch.hub" in done.stdout


def test_the_beam_tree_holds_the_caption_and_a_notebook_shows_the_view(captioner, photos):
    found = captioner(photos / "0.png", max_len=6, beam_size=3, n_best=3)
    tree = captioner.grow_tree(photos / "0.png", max_len=6, beam_size=3)
    assert tree.words == found.words and tree.score == pytest.approx(found.score, abs=1e-4)
    assert found.n_best[0] == (found.text, found.score) and len(found.n_best) == 3
    assert "<article" in found._repr_html_() and found.n_best[2][0] in found._repr_html_()


def test_the_library_says_unk_only_when_asked(model, photos):
    captioner = caption.Captioner(model, device="cpu", amp="bf16", plain=True)
    assert captioner.decoder.plain and captioner.amp == "bf16"
    with torch.no_grad():
        captioner.decoder.fc.bias[WORD_MAP["<unk>"]] = 99
    path = photos / "0.png"
    assert "<unk>" not in captioner(path, beam_size=2, max_len=4).words
    assert captioner(path, beam_size=2, max_len=4, no_unk=False).words == ["<unk>"] * 4
