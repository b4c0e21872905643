"""Animations, as they are read back."""

import sys

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
ALPHAS = np.eye(16, dtype=np.float32)[LOCATIONS]
WORDS = ["a", "$5", "<unk>", "dog"]
BOTH = pytest.mark.parametrize("kind", ["gif", pytest.param("mp4", marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(animation, "SIZE", 120)


def grey(height, width):
    return np.full((height, width, 3), 120, dtype=np.uint8)


def read(path):
    """Pictures by the tick, (ticks, H, W, 3), and the seconds that all of them take"""
    if path.suffix == ".mp4":
        meta = imageio.immeta(path, plugin="FFMPEG")
        assert meta["codec"] == "h264" and "yuv420p" in meta["pix_fmt"]  # as every browser plays
        pictures = imageio.imread(path, plugin="FFMPEG")
        return pictures, len(pictures) / meta["fps"]
    pictures = imageio.imread(path, plugin="pillow")
    metas = [imageio.immeta(path, index=i, plugin="pillow") for i in range(len(pictures))]
    assert metas[0]["loop"] == 0  # for ever
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
@pytest.mark.parametrize("shape, smooth", [((30, 90), False), ((90, 30), True)])
def test_a_word_is_shown_while_its_location_is_the_brightest(tmp_path, kind, shape, smooth):
    path, image = tmp_path / f"-x:y.{kind}", grey(*shape)  # neither an option nor an address
    write_animation(path, image, WORDS, ALPHAS, smooth)
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
    frames, ticks = make_frames(image, WORDS, ALPHAS, True, (0.0, 0.0))
    assert len(frames) == FADE * (len(WORDS) + 1)
    assert ticks == ([1] * (FADE - 1) + [1 + HOLD]) * len(WORDS) + [1] * (FADE - 1) + [1 + HOLD_END]
    light = [cells(frame, image) for frame in frames[FADE - 1 : 2 * FADE]]
    steps = np.diff([(new[LOCATIONS[1]], -new[LOCATIONS[0]]) for new in light], axis=0)
    assert (steps > 1).all()
    shifted, _ = make_frames(image, WORDS, ALPHAS, True, (0.25, 0.0))  # one location to the right
    assert cells(shifted[FADE - 1], image).argmax() == LOCATIONS[0] + 1


def test_the_sentence_grows_and_the_animation_ends_with_the_photograph(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((120, 80)), dtype=float)
    for words in (WORDS, []):
        write_animation(tmp_path / "x.gif", image, words, ALPHAS[: len(words)])
        pictures, _ = read(tmp_path / "x.gif")
        for picture in pictures[-HOLD_END:]:
            assert np.abs(photograph(picture, image) - expected).mean() < 12
    frames, _ = make_frames(image, WORDS, ALPHAS)
    ink = [(frame[80:] > 90).any(2).sum() for frame in frames[FADE - 1 :: FADE]]
    assert ink[0] > 0 and (np.diff(ink)[:-1] > 0).all() and abs(ink[-1] - ink[-2]) < 20
    coloured = [(frame[80:].max(2) - frame[80:].min(2).astype(int) > 90).sum() for frame in frames]
    assert min(coloured[: FADE * len(WORDS)]) > 0 == coloured[-1]  # the last word of each


def test_photographs_keep_their_shape_and_frames_are_even():
    for height, width in [(50, 50), (50, 25), (25, 77), (333, 100), (1, 60)]:
        image = np.full((height, width, 3), (255, 0, 0), dtype=np.uint8)
        frames, _ = make_frames(image, ["dog"], np.ones((1, 4)))
        last = frames[-1].astype(int)
        assert last.shape[1] == animation.SIZE and last.shape[0] % 2 == 0
        red = np.argwhere(last[..., 0] - last[..., 1] > 150)
        found, scale = np.ptp(red, axis=0) + 1, animation.SIZE / max(height, width)
        assert (abs(found - np.multiply((height, width), scale)) <= 1).all()


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


def test_what_cannot_be_written_is_refused_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    for name, words, error in [
        ("x.avi", WORDS, pytest.raises(ValueError, match="x.avi")),
        ("x.gif", ["a"], pytest.raises(ValueError, match="attention of shape")),
        ("x.mp4", WORDS, pytest.raises(UserError, match="pip install imageio-ffmpeg")),
    ]:
        with error:
            write_animation(tmp_path / name, grey(60, 60), words, ALPHAS)
    assert not list(tmp_path.iterdir())
    write_animation(tmp_path / "x.GIF", grey(60, 60), WORDS, ALPHAS)  # needs no ffmpeg
    assert len(list(tmp_path.iterdir())) == 1
