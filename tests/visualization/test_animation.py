"""Animations, as they are read back."""

import io
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from PIL import Image

from utils import UserError
from visualization import animation
from visualization.animation import (
    FADE,
    HOLD,
    HOLD_END,
    TICK,
    lay_out,
    make_frames,
    write_animation,
)

LOCATIONS = [5, 0, 15, 6]  # attended for each word, on a grid of 4 x 4
WORDS = ["a", "$5", "<unk>", "dog"]
BOTH = pytest.mark.parametrize("kind", ["gif", pytest.param("mp4", marks=pytest.mark.slow)])


def one_hot(locations=LOCATIONS):
    return np.eye(16, dtype=np.float32)[locations]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(animation, "SIZE", 120)


def grey(height, width):
    return np.full((height, width, 3), 120, dtype=np.uint8)


def read(path):
    """Pictures by the tick, (ticks, H, W, 3), and the seconds that all of them take"""
    if path.suffix == ".mp4":
        meta = imageio.immeta(path, plugin="FFMPEG")
        pictures = imageio.imread(path, plugin="FFMPEG")
        return pictures, len(pictures) / meta["fps"]
    pictures = imageio.imread(path, plugin="pillow")
    metas = [imageio.immeta(path, index=i, plugin="pillow") for i in range(len(pictures))]
    seconds = np.array([meta["duration"] / 1000 for meta in metas])
    return pictures.repeat((seconds / TICK).round().astype(int), 0), seconds.sum()


def photograph(picture, image):
    """The part of a frame where the photograph is"""
    height, width = (round(animation.SIZE * n / max(image.shape)) for n in image.shape[:2])
    left = (animation.SIZE - width) // 2
    return picture[:height, left : left + width].astype(float)


def cells(picture, image):
    """Mean brightness of a frame's photograph on a grid of 4 x 4: (16,)"""
    rows = np.array_split(photograph(picture, image).mean(2), 4)
    return np.array([part.mean() for row in rows for part in np.array_split(row, 4, axis=1)])


@BOTH
@pytest.mark.parametrize("shape, smooth", [((60, 60), True), ((30, 90), False), ((90, 30), True)])
def test_a_word_is_shown_while_its_location_is_the_brightest(tmp_path, kind, shape, smooth):
    path, image = tmp_path / f"x.{kind}", grey(*shape)
    write_animation(path, image, WORDS, one_hot(), smooth)
    pictures, seconds = read(path)
    word, end = FADE + HOLD, FADE + HOLD_END
    assert len(pictures) == word * len(WORDS) + end
    assert seconds == pytest.approx(len(pictures) * TICK) and 0.5 < word * TICK < 0.7
    for t, place in enumerate(LOCATIONS):
        for picture in pictures[t * word + FADE : (t + 1) * word]:
            light = cells(picture, image)
            assert light.argmax() == place and light[place] > 1.5 * np.median(light)


def test_attention_fades_to_the_next_word_step_by_step():
    image = grey(60, 60)
    frames, ticks = make_frames(image, WORDS, one_hot())
    assert len(frames) == FADE * (len(WORDS) + 1)
    assert ticks == ([1] * (FADE - 1) + [1 + HOLD]) * len(WORDS) + [1] * (FADE - 1) + [1 + HOLD_END]
    light = [cells(frame, image) for frame in frames[FADE - 1 : 2 * FADE]]
    steps = np.diff([(new[LOCATIONS[1]], -new[LOCATIONS[0]]) for new in light], axis=0)
    assert (steps > 1).all()


@BOTH
def test_the_animation_ends_with_the_photograph_and_the_complete_sentence(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    write_animation(path, image, WORDS, one_hot())
    pictures, _ = read(path)
    expected = np.asarray(Image.fromarray(image).resize((120, 80)), dtype=float)
    for picture in pictures[-HOLD_END:]:
        assert np.abs(photograph(picture, image) - expected).mean() < 12
    blue = [(frame[80:].min(2) < 90) & (frame[80:].max(2) > 200) for frame in pictures]
    assert blue[-HOLD_END - FADE - 1].any()  # the last word is coloured, without blue,
    assert not blue[-1].any()  # and at the end none is


def test_photographs_keep_their_shape_and_frames_are_even():
    for height, width in [(50, 50), (50, 25), (25, 77), (333, 100), (1, 60)]:
        image = np.full((height, width, 3), (255, 0, 0), dtype=np.uint8)
        frames, _ = make_frames(image, ["dog"], np.ones((1, 4)))
        last = frames[-1].astype(int)
        assert last.shape[1] == animation.SIZE and last.shape[0] % 2 == 0
        red = np.argwhere(last[..., 0] - last[..., 1] > 150)
        found, scale = np.ptp(red, axis=0) + 1, animation.SIZE / max(height, width)
        assert (abs(found - np.multiply((height, width), scale)) <= 1).all()


def test_an_empty_caption_shows_the_photograph(tmp_path):
    path, image = tmp_path / "x.gif", grey(60, 60)
    write_animation(path, image, [], np.zeros((0, 16)))
    pictures, seconds = read(path)
    assert seconds == pytest.approx(TICK * (FADE + HOLD_END))
    assert np.abs(photograph(pictures[-1], image) - 120).max() < 5


def test_words_neither_leave_the_frame_nor_touch_each_other(monkeypatch):
    monkeypatch.setattr(animation, "SIZE", 400)
    words = (["a", "counterintuitively", "grey", "$", "犬", ""] * 9)[:50]
    layout, height = lay_out(words)
    assert [word for word, *_ in layout] == words
    boxes = [(x, x + font.getlength(word), y) for word, font, x, y in layout]
    assert all(12 <= x and right <= 388 and y + 28 <= height - 12 for x, right, y in boxes)
    for before, after in zip(boxes, boxes[1:]):
        assert after[2] > before[2] or after[2] == before[2] and after[0] >= before[1] + 8


def test_a_gif_of_twelve_words_stays_below_four_megabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(animation, "SIZE", 400)
    rng, image = np.random.default_rng(0), np.zeros((480, 480, 3))
    for size, share in [(6, 0.4), (30, 0.3), (120, 0.2), (480, 0.1)]:  # coarse and fine detail
        part = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        image += share * np.asarray(part.resize((480, 480)), dtype=float)
    alphas = rng.dirichlet(np.full(196, 0.1), 12)
    write_animation(tmp_path / "x.gif", image.astype(np.uint8), ["word"] * 12, alphas)
    assert 1e6 < (tmp_path / "x.gif").stat().st_size < 4e6


def test_other_formats_and_wrong_attention_are_refused_and_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match="x.avi"):
        write_animation(tmp_path / "x.avi", grey(4, 4), [], np.zeros((0, 4)))
    with pytest.raises(ValueError, match="attention of shape"):
        write_animation(tmp_path / "x.gif", grey(4, 4), ["a"], np.zeros((2, 4)))
    assert not list(tmp_path.iterdir())


def test_without_the_package_only_mp4_fails_and_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    write_animation(tmp_path / "x.GIF", grey(60, 60), WORDS, one_hot())
    with pytest.raises(UserError, match="pip install imageio-ffmpeg"):
        write_animation(tmp_path / "x.mp4", grey(60, 60), WORDS, one_hot())
    assert [file.name for file in tmp_path.iterdir()] == ["x.GIF"]


@BOTH
def test_animations_are_files_that_every_browser_plays(tmp_path, kind):
    path = tmp_path / f"-x:y.{kind}"  # neither an option nor an address
    write_animation(path, grey(60, 60), WORDS, one_hot())
    if kind == "gif":
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            assert picture.format == "GIF" and picture.info["loop"] == 0
        return
    from imageio_ffmpeg import get_ffmpeg_exe

    command = [get_ffmpeg_exe(), "-i", f"file:{Path(path)}"]
    info = subprocess.run(command, capture_output=True, text=True).stderr
    assert "h264" in info and "yuv420p" in info
