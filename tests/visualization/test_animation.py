"""The attention grid at every length, movies as they are read back, and training curves."""

import json
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from matplotlib.colors import same_color
from PIL import Image

import utils
from utils import UserError
from visualization import animation as movie
from visualization import attention as visualize
from visualization import curves

PLACES = [5, 0, 15, 6]  # where the words are looked at, on a grid of 4 x 4
WORDS = ["a", "$5", "<unk>", "dog"]
BOTH = pytest.mark.parametrize("kind", ["gif", "mp4"])


def one_hot(places=PLACES, cells=16):
    return np.eye(cells, dtype=np.float32)[places]


# The grid

@pytest.mark.parametrize("words", [12, 50])
@pytest.mark.parametrize("shape", [(60, 60, 3), (90, 30, 3), (30, 90, 3), (2, 30, 3)])
def test_grids_have_the_shape_of_a_page_whatever_the_caption(words, shape):
    figure = visualize.attention_grid(np.zeros(shape, np.uint8), ["dog"] * words,
                                      np.ones((words, 4)))
    width, height = figure.get_size_inches()
    assert 0.9 < width / height < 2.2


@pytest.mark.parametrize("words", [1, 2, 3, 12, 50])
def test_words_follow_each_other_row_by_row_without_holes(words):
    figure = visualize.attention_grid(np.zeros((60, 60, 3), np.uint8),
                                      [f"word{i}" for i in range(words)], np.ones((words, 4)))
    boxes = [axes.get_position() for axes in figure.axes]
    order = sorted(range(words + 1), key=lambda i: (round(-boxes[i].y0, 3), boxes[i].x0))
    assert order == list(range(words + 1))
    columns = len({round(box.x0, 3) for box in boxes})
    assert len({round(box.y0, 3) for box in boxes}) == -(-(words + 1) // columns)


def test_photographs_are_not_stretched_among_fifty_words():
    for shape in [(90, 30, 3), (30, 90, 3)]:
        figure = visualize.attention_grid(np.zeros(shape, np.uint8), ["dog"] * 50, np.ones((50, 4)))
        for axes in figure.axes:
            box = axes.get_window_extent()
            assert box.width / box.height == pytest.approx(shape[1] / shape[0])


def test_long_words_over_slim_photographs_are_no_smaller_than_nine_points():
    figure = visualize.attention_grid(np.zeros((90, 30, 3), np.uint8),
                                      ["counterintuitively", "a"], np.ones((2, 4)))
    assert min(axes.title.get_fontsize() for axes in figure.axes) > 8.99


@pytest.mark.parametrize("words, alphas", [
    (["a"], np.ones((2, 4))), (["a"], np.ones((1, 5))), (["a"], np.ones((1, 2, 2))), ([], []),
    (["a"], np.ones(4))])
def test_attention_must_be_a_square_for_each_word(words, alphas, tmp_path):
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="attention of shape"):
        visualize.attention_grid(image, words, alphas)
    with pytest.raises(ValueError, match="attention of shape"):
        movie.write_movie(tmp_path / "x.gif", image, words, alphas)
    assert not list(tmp_path.iterdir())


# Movies

@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(movie, "SIZE", 120)


def grey(height, width):
    return np.full((height, width, 3), 120, dtype=np.uint8)


def read(path):
    """Pictures by the tick, (ticks, H, W, 3), and the seconds that all of them take"""
    if path.suffix == ".mp4":
        meta = imageio.immeta(path, plugin="FFMPEG")
        pictures = imageio.imread(path, plugin="FFMPEG")
        assert meta["fps"] == pytest.approx(1 / movie.TICK)
        return pictures, len(pictures) / meta["fps"]
    pictures = imageio.imread(path, plugin="pillow")
    seconds = np.array([imageio.immeta(path, index=i, plugin="pillow")["duration"] / 1000
                        for i in range(len(pictures))])
    return pictures.repeat((seconds / movie.TICK).round().astype(int), 0), seconds.sum()


def photograph(picture, image):
    """The part of a frame where the photograph is"""
    height, width = (round(movie.SIZE * n / max(image.shape)) for n in image.shape[:2])
    left = (movie.SIZE - width) // 2
    return picture[:height, left:left + width].astype(float)


def cells(picture, image):
    """Mean brightness of a frame's photograph on a grid of 4 x 4: (16,)"""
    rows = np.array_split(photograph(picture, image).mean(2), 4)
    return np.array([part.mean() for row in rows for part in np.array_split(row, 4, axis=1)])


@BOTH
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("shape", [(60, 60), (30, 90), (90, 30)])
def test_a_word_is_seen_while_its_place_is_the_brightest(tmp_path, small, kind, shape, smooth):
    path, image = tmp_path / f"x.{kind}", grey(*shape)
    movie.write_movie(path, image, WORDS, one_hot(), smooth)
    pictures, seconds = read(path)
    word, end = movie.GLIDE + movie.STAY, movie.GLIDE + movie.END
    assert len(pictures) == word * len(WORDS) + end
    assert seconds == pytest.approx(len(pictures) * movie.TICK) and 0.5 < word * movie.TICK < 0.7
    for t, place in enumerate(PLACES):
        for picture in pictures[t * word + movie.GLIDE:(t + 1) * word]:
            light = cells(picture, image)
            assert light.argmax() == place and light[place] > 2 * np.median(light)


@BOTH
def test_the_light_moves_over_step_by_step(tmp_path, small, kind):
    path, image = tmp_path / f"x.{kind}", grey(60, 60)
    movie.write_movie(path, image, WORDS, one_hot())
    pictures, _ = read(path)
    word = movie.GLIDE + movie.STAY
    light = [cells(picture, image) for picture in pictures[word - 1:word + movie.GLIDE]]
    steps = np.diff([(new[PLACES[1]], -new[PLACES[0]]) for new in light], axis=0)
    assert (steps > 1).all()


@BOTH
def test_it_ends_on_the_photograph_and_the_whole_sentence(tmp_path, small, kind):
    path = tmp_path / f"x.{kind}"
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    movie.write_movie(path, image, WORDS, one_hot())
    pictures, _ = read(path)
    expected = np.asarray(Image.fromarray(image).resize((120, 80)), dtype=float)
    for picture in pictures[-movie.END:]:
        assert np.abs(photograph(picture, image) - expected).mean() < 12
    strip = movie.Sentence(WORDS).under(grey(80, 120), 99)[80:].astype(float)
    assert np.abs(pictures[-1][80:] - strip).mean() < 3
    assert np.abs(pictures[-movie.END - 8][80:] - strip).mean() > 5  # the last word emphasised


@BOTH
@pytest.mark.parametrize("height, width", [(50, 50), (50, 25), (25, 77), (333, 100), (1, 60)])
def test_photographs_keep_their_shape_and_frames_are_even(tmp_path, small, kind, height, width):
    path, image = tmp_path / f"x.{kind}", np.full((height, width, 3), (255, 0, 0), dtype=np.uint8)
    movie.write_movie(path, image, ["dog"], np.ones((1, 4)))
    pictures, _ = read(path)
    assert pictures.shape[2] == movie.SIZE and pictures.shape[1] % 2 == 0
    last = pictures[-1].astype(int)
    red = np.argwhere(last[..., 0] - last[..., 1] > 150)
    found_height, found_width = np.ptp(red, axis=0) + 1
    scale = movie.SIZE / max(height, width)
    assert abs(found_height - height * scale) <= 1 and abs(found_width - width * scale) <= 1


@BOTH
def test_an_empty_caption_shows_the_photograph(tmp_path, small, kind):
    path, image = tmp_path / f"x.{kind}", grey(60, 60)
    movie.write_movie(path, image, [], np.zeros((0, 16)))
    pictures, seconds = read(path)
    assert seconds == pytest.approx(movie.TICK * (movie.GLIDE + movie.END))
    assert np.abs(photograph(pictures, image[None])[0] - 120).max() < 10
    assert np.abs(cells(pictures[-1], image) - 120).max() < 5


LONG = (["a", "counterintuitively", "grey", "x" * 120, "$", "犬", ""] * 8)[:50]


@pytest.mark.parametrize("words", [LONG, ["dog"], ["W" * 30, "i"] * 6])
def test_words_neither_leave_the_frame_nor_touch_each_other(words):
    frame = movie.Sentence(words).under(grey(100, movie.SIZE), len(words))
    ground = frame[-1, 0]
    for edge in (frame[100:, :6], frame[100:, -6:], frame[100:104], frame[-6:]):
        assert (edge == ground).all()
    boxes = [(x, x + wide, y) for _, _, x, y, wide in movie.Sentence(words).words]
    for before, after in zip(boxes, boxes[1:]):
        assert after[2] > before[2] or after[0] >= before[1] + 8


def test_the_sentence_grows_and_its_last_word_is_emphasised():
    words = "a dog runs over the green grass towards a ball".split()
    sentence, yellow = movie.Sentence(words), np.array([255, 197, 61])
    whole = sentence.under(grey(100, 480), 99)
    for count in range(1, len(words) + 1):
        frame = sentence.under(grey(100, 480), count)
        for i, (_, _, x, y, wide) in enumerate(sentence.words, 1):
            place = np.s_[100 + y:100 + y + movie.LINE, int(x):int(x + wide)]
            emphasised = (frame[place] == yellow).all(2).mean() > 0.3
            assert emphasised == (i == count)
            if i < count:
                assert (frame[place] == whole[place]).all()
            elif i > count:
                assert (frame[place] == frame[-1, 0]).all()


def test_a_gif_of_twelve_words_stays_below_three_megabytes(tmp_path):
    rng, image = np.random.default_rng(0), np.zeros((480, 480, 3))
    for size, share in [(6, 0.4), (30, 0.3), (120, 0.2), (480, 0.1)]:  # coarse and fine detail
        part = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        image += share * np.asarray(part.resize((480, 480)), dtype=float)
    places = rng.uniform(0, 14, (12, 2, 1))
    near = np.exp(-((np.arange(14) + 0.5 - places)**2) / 8)  # (12, 2, 14)
    alphas = (near[:, 0, :, None] * near[:, 1, None]).reshape(12, 196)
    movie.write_movie(tmp_path / "x.gif", image.astype(np.uint8), ["word"] * 12, alphas)
    assert 1e6 < (tmp_path / "x.gif").stat().st_size < 3e6


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match="x.avi ends neither in .gif nor in .mp4"):
        movie.write_movie(tmp_path / "x.avi", grey(4, 4), [], np.zeros((0, 4)))


@BOTH
def test_a_failed_write_leaves_the_old_file(tmp_path, small, kind, monkeypatch):
    path, program = tmp_path / f"-x:y.{kind}", tmp_path / "ffmpeg"
    path.write_text("old")
    program.write_text("#!/bin/sh\nfor file; do :; done; echo half > ${file#file:}\n"
                       "echo '[mp4 @ 0] no space left' >&2\necho and so on >&2\nexit 1\n")
    program.chmod(0o755)

    def save(image, file, **options):
        with open(file, "w") as half:
            half.write("half")
        raise OSError("no space left")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(program))
    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="^no space left$"):
        movie.write_movie(path, grey(60, 60), WORDS, one_hot())
    assert path.read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"-x:y.{kind}", "ffmpeg"]


def test_without_the_package_only_mp4_fails_and_says_what_to_install(tmp_path, small, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    movie.write_movie(tmp_path / "x.GIF", grey(60, 60), WORDS, one_hot())
    with pytest.raises(UserError, match="pip install imageio-ffmpeg"):
        movie.write_movie(tmp_path / "x.mp4", grey(60, 60), WORDS, one_hot())
    assert [file.name for file in tmp_path.iterdir()] == ["x.GIF"]


def test_movies_are_whole_files_of_their_format(tmp_path, small, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, start, found in [("gif", b"GIF89a", 0), ("mp4", b"ftyp", 4)]:
        path = Path(f"-x:y.{kind}")  # neither an option nor an address
        movie.write_movie(path, grey(60, 60), WORDS, one_hot())
        assert path.read_bytes()[found:].startswith(start)
    from imageio_ffmpeg import get_ffmpeg_exe
    said = subprocess.run([get_ffmpeg_exe(), "-i", f"file:{path}"], capture_output=True, text=True)
    assert "h264" in said.stderr and "yuv420p" in said.stderr  # what every browser plays


# Curves

def row(epoch, **figures):
    return {"epoch": epoch, "lr": 4e-4, "train_loss": 5 / epoch, "train_top5": 50.0,
            "captions_per_second": 200.0, "val_loss": 6 / epoch, "teacher_forced_bleu4": 9.0,
            "bleu1": 50.0, "bleu4": 10.0 + epoch, **figures}


FIRST = [row(epoch) for epoch in (1, 2, 3)]
SECOND = [{"epoch": epoch, "lr": 1e-4, "train_reward": 0.4 + epoch, "captions_per_second": 90.0,
           "val_loss": 4.0, "bleu4": 20.0, "cider_d": 40.0 + epoch} for epoch in (1, 2)]


def write_log(path, rows, end=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return str(path)


def read_log(folder, rows):
    return curves.read_run(write_log(folder / "log_x.jsonl", rows), "run")


def lines(axes):
    """(x, y) of each line with points in a panel; an upright line has two points of one x"""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_there_is_a_panel_for_what_was_logged_only(tmp_path):
    titles = [title for title, _ in curves.PANELS]
    assert list(panels(curves.draw_curves([read_log(tmp_path, FIRST)]))) == [
        titles[i] for i in (0, 2, 4, 5)]
    assert list(panels(curves.draw_curves([read_log(tmp_path, FIRST + SECOND)]))) == titles
    assert list(panels(curves.draw_curves([read_log(tmp_path, SECOND)]))) == titles
    assert list(panels(curves.draw_curves([read_log(tmp_path, [{"epoch": 1, "lr": 1}])]))) == [
        titles[4]]


def test_lines_show_the_figures_of_the_log(tmp_path):
    axes = panels(curves.draw_curves([read_log(tmp_path, FIRST)]))
    loss = axes["Loss, nats per word"]
    assert lines(loss) == [([1, 2, 3], [5, 2.5, 5 / 3]), ([1, 2, 3], [6, 3, 2])]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training", "validation"]
    assert len({line.get_linestyle() for line in loss.get_lines()}) == 2
    assert lines(axes["BLEU-4 of validation"]) == [([1, 2, 3], [11, 12, 13]), ([1, 2, 3], [9] * 3)]
    assert lines(axes["Learning rate"]) == [([1, 2, 3], [4e-4] * 3)]
    assert lines(axes["Captions per second of training"]) == [([1, 2, 3], [200.0] * 3)]


def test_rates_are_seen_from_nothing_up_though_cosine_ends_near_it(tmp_path):
    rows = [row(1), row(2, lr=2e-4, captions_per_second=190), row(3, lr=3e-10)]
    axes = panels(curves.draw_curves([read_log(tmp_path, rows)]))
    for title, top in [("Learning rate", 4e-4), ("Captions per second of training", 200)]:
        assert axes[title].get_ylim() == pytest.approx((0, 1.1 * top))
        assert axes[title].get_yscale() == "linear"


def test_phases_follow_each_other_with_a_line_between(tmp_path):
    run = read_log(tmp_path, FIRST + SECOND)
    assert run.epochs == [1, 2, 3, 4, 5] and run.starts == [0, 3]
    for title, axes in panels(curves.draw_curves([run])).items():
        upright = [x for x, _ in lines(axes) if x[0] == x[-1]]
        assert upright == [[3.5, 3.5]], title
    bleu = [(x, y) for x, y in lines(axes.figure.axes[2]) if x[0] != x[-1]]
    assert bleu[0] == ([1, 2, 3], [11, 12, 13]) and bleu[2] == ([4, 5], [20, 20])  # not joined


def test_several_runs_are_lines_of_their_own_colours_with_a_legend(tmp_path):
    paths = [write_log(tmp_path / name / "log_x.jsonl", FIRST) for name in ("_$a_{$", "b")]
    runs = [curves.read_run(*pair) for pair in zip(paths, curves.name_runs(paths))]
    figure = curves.draw_curves(runs)
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["_$a_{$", "b"]
    for axes in figure.axes:
        colours = [line.get_color() for line in axes.get_lines()]
        assert len(set(colours)) == 2
        assert same_color(colours[0], legend.get_lines()[0].get_color())
    figure.canvas.draw()  # dollars and braces are no formula


def test_runs_are_named_by_what_tells_them_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert curves.name_runs(["a/log.jsonl", "b/log.jsonl"]) == ["a", "b"]
    assert curves.name_runs(["log_a.jsonl", "log_b.jsonl"]) == ["log_a", "log_b"]
    assert curves.name_runs(["a/x.jsonl", "b/x.jsonl", "b/y.jsonl"])[0].endswith("a/x.jsonl")


def test_a_long_list_of_long_names_stays_within_the_figure(tmp_path):
    names = [f"{'x' * 200}{i}" for i in range(12)]
    figure = curves.draw_curves([read_log(tmp_path, FIRST)._replace(name=name) for name in names])
    figure.canvas.draw()
    box, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and box.y1 <= whole.y1
    tops = [axes.title.get_window_extent().y1 for axes in figure.axes]
    assert box.y0 >= max(tops) - 1
    assert all(axes.get_window_extent().height > 100 for axes in figure.axes)


@pytest.fixture
def draw(monkeypatch, capsys, tmp_path):
    """visualize.py curves ARGUMENTS, in an empty folder: exit code and stderr"""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["visualize.py", "curves", *map(str, arguments)])
        code = 0
        try:
            utils.run(visualize.main)
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().err
    return call


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_script_writes_the_picture(draw, tmp_path, suffix):
    log = write_log(tmp_path / "a" / "log_x.jsonl", FIRST)
    assert draw(log, log, "-o", f"c.{suffix}") == (0, f"curves: c.{suffix}\n")
    assert (tmp_path / f"c.{suffix}").stat().st_size > 5000


def test_a_line_cut_off_by_a_kill_is_skipped_and_said(draw, tmp_path):
    log = write_log(tmp_path / "x.jsonl", FIRST, '{"epoch": 4, "lr": 0.00')
    code, said = draw(log)
    assert code == 0 and (tmp_path / "curves.png").exists()
    assert said == f"{log}: no row of a log, skipped: line 4\ncurves: curves.png\n"
    assert curves.read_run(log, "").epochs == [1, 2, 3]


def test_figures_that_are_no_numbers_leave_a_gap(tmp_path):
    rows = [row(1), row(2, bleu4=float("nan")), row(3, bleu4="much"), row(4, bleu4=True),
            row(5, bleu4=10**400), row(6, bleu4=None), row(7)]
    axes = panels(curves.draw_curves([read_log(tmp_path, rows)]))["BLEU-4 of validation"]
    axes.figure.canvas.draw()
    assert np.isnan(lines(axes)[0][1]).tolist() == [False] + [True] * 5 + [False]


@pytest.mark.parametrize("arguments, said", [
    ([], "the following arguments are required: log_NAME.jsonl; --help lists the options"),
    (["missing.jsonl"], "missing.jsonl not found"),
    (["empty"], "empty has no row of a training log"),
    (["other"], "other has no row of a training log"),
    (["binary"], "binary is not UTF-8 text"),
    (["."], ". cannot be read: Is a directory"),
    (["good", "-o", "c.abc"], "c.abc cannot be written: Format 'abc' is not supported"),
    (["good", "-o", "none/c.png"], "none/c.png cannot be written"),
    (["good", "empty"], "empty has no row of a training log"),
])
def test_mistakes_take_one_line(draw, tmp_path, arguments, said):
    write_log(tmp_path / "good", FIRST)
    write_log(tmp_path / "empty", [])
    write_log(tmp_path / "other", [3, [1], {"epoch": "1"}, {"epoch": True, "lr": 1}, {"epoch": 0},
                                   {"epoch": 2}, {"lr": 1.0}, None])
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    code, error = draw(*arguments)
    assert code == 2 and error.count("\n") == 1 and said in error
    assert not list(tmp_path.glob("c*"))
