"""Animations, as they are read back."""

import sys

import imageio.v3 as imageio
import numpy as np
import pytest

from utils import UserError
from visualization import animation
from visualization.animation import FADE, HOLD, HOLD_END, lay_out, make_frames, write_animation

LOCATIONS = [5, 0, 15, 6]  # attended for each word, on a grid of 4 x 4
ALPHAS = np.eye(16, dtype=np.float32)[LOCATIONS]
WORDS = ["a", "$5", "<unk>", "dog"]
GREY = np.full((60, 60, 3), 120, np.uint8)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(animation, "SIZE", 120)


def read(path):
    """Pictures by the tick of 0.1 s, (ticks, H, W, 3)"""
    if path.suffix == ".mp4":
        meta = imageio.immeta(path, plugin="FFMPEG")
        assert meta["codec"] == "h264" and "yuv420p" in meta["pix_fmt"]  # as every browser plays
        assert meta["fps"] == 10
        return imageio.imread(path, plugin="FFMPEG")
    pictures = imageio.imread(path, plugin="pillow")
    metas = [imageio.immeta(path, index=i, plugin="pillow") for i in range(len(pictures))]
    assert metas[0]["loop"] == 0  # for ever
    return pictures.repeat([round(meta["duration"] / 100) for meta in metas], 0)


def photograph(picture, shape):
    """The part of a frame where the photograph of this shape is"""
    height, width = (round(animation.SIZE * n / max(shape)) for n in shape)
    left = (animation.SIZE - width) // 2
    return picture[:height, left : left + width].astype(float)


def cells(picture, shape=(60, 60)):
    """Mean brightness of a frame's photograph on a grid of 4 x 4: (16,)"""
    rows = np.array_split(photograph(picture, shape).mean(2), 4)
    return np.array([part.mean() for row in rows for part in np.array_split(row, 4, axis=1)])


@pytest.mark.parametrize("kind", ["gif", pytest.param("mp4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape, smooth", [((30, 90), False), ((90, 30), True)])
def test_a_word_is_shown_while_its_location_is_the_brightest(tmp_path, kind, shape, smooth):
    path, image = tmp_path / f"-x:y.{kind}", np.full((*shape, 3), 120, np.uint8)
    write_animation(path, image, WORDS, ALPHAS, smooth)
    pictures, word = read(path), FADE + HOLD
    assert len(pictures) == word * len(WORDS) + FADE + HOLD_END and 5 < word < 7
    for t, place in enumerate(LOCATIONS):
        for picture in pictures[t * word + FADE : (t + 1) * word]:
            light = cells(picture, shape)
            assert light.argmax() == place and light[place] > 1.5 * np.median(light)
    for picture in pictures[-HOLD_END:]:
        assert np.abs(photograph(picture, shape) - 120).mean() < 12


def test_attention_fades_to_the_next_word_step_by_step():
    frames, ticks = make_frames(GREY, WORDS, ALPHAS, True, (0.0, 0.0))
    assert len(frames) == FADE * (len(WORDS) + 1)
    assert ticks == ([1] * (FADE - 1) + [1 + HOLD]) * len(WORDS) + [1] * (FADE - 1) + [1 + HOLD_END]
    light = [cells(frame) for frame in frames[FADE - 1 : 2 * FADE]]
    steps = np.diff([(new[LOCATIONS[1]], -new[LOCATIONS[0]]) for new in light], axis=0)
    assert (steps > 1).all()
    shifted, _ = make_frames(GREY, WORDS, ALPHAS, True, (0.25, 0.0))  # one location to the right
    assert cells(shifted[FADE - 1]).argmax() == LOCATIONS[0] + 1


def test_the_sentence_grows_below_photographs_of_any_shape_in_frames_of_even_size():
    for height, width in [(50, 50), (50, 25), (25, 77), (333, 100), (1, 60)]:
        image = np.full((height, width, 3), (255, 0, 0), dtype=np.uint8)
        frames, _ = make_frames(image, WORDS, ALPHAS)
        last = frames[-1].astype(int)
        assert last.shape[1] == animation.SIZE and last.shape[0] % 2 == 0
        red = np.argwhere(last[..., 0] - last[..., 1] > 150)
        scale = animation.SIZE / max(height, width)
        assert (abs(np.ptp(red, axis=0) + 1 - np.multiply((height, width), scale)) <= 1).all()
        below = [frame[round(height * scale) :] for frame in frames]
        ink = [(frame > 90).any(2).sum() for frame in below[FADE - 1 :: FADE]]
        assert ink[0] > 0 and (np.diff(ink)[:-1] > 0).all() and abs(ink[-1] - ink[-2]) < 20
        coloured = [(frame.max(2) - frame.min(2).astype(int) > 90).sum() for frame in below]
        assert min(coloured[: FADE * len(WORDS)]) > 0 == coloured[-1]  # the last word of each


def test_words_neither_leave_the_frame_nor_touch_each_other(monkeypatch):
    monkeypatch.setattr(animation, "SIZE", 400)
    words = (["a", "counterintuitively", "grey", "$", "犬", ""] * 9)[:50]
    layout, height = lay_out(words)
    assert [word for word, *_ in layout] == words
    boxes = [(x, x + font.getlength(word), y) for word, font, x, y in layout]
    assert all(12 <= x and right <= 388 and y + 28 <= height - 12 for x, right, y in boxes)
    for before, after in zip(boxes, boxes[1:]):
        assert after[2] > before[2] or after[2] == before[2] and after[0] >= before[1] + 8


def test_an_ffmpeg_that_fails_gives_its_own_reason_and_leaves_no_file(tmp_path, monkeypatch):
    program, reason = tmp_path / "ffmpeg", "Error closing file: No space left on device"
    program.write_text(f"#!/bin/sh\necho first >&2; echo {reason} >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    with pytest.raises(UserError, match=f"x.mp4 cannot be written: {program} failed: {reason}$"):
        write_animation(tmp_path / "x.mp4", GREY, WORDS, ALPHAS)
    program.chmod(0o644)
    with pytest.raises(OSError, match=f"{program}"):
        write_animation(tmp_path / "x.mp4", GREY, WORDS, ALPHAS)
    assert list(tmp_path.iterdir()) == [program]


def test_a_gif_needs_no_ffmpeg_and_an_mp4_without_it_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UserError, match="pip install imageio-ffmpeg"):
        write_animation(tmp_path / "x.mp4", GREY, WORDS, ALPHAS)
    with pytest.raises(ValueError, match="attention of shape"):
        write_animation(tmp_path / "x.gif", GREY, ["a"], ALPHAS)
    assert not list(tmp_path.iterdir())
    write_animation(tmp_path / "x.GIF", GREY, [], ALPHAS[:0])
    picture = imageio.imread(tmp_path / "x.GIF", mode="RGB")
    assert np.abs(photograph(picture, (60, 60)) - 120).mean() < 12
