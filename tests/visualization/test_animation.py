"""Animations, as they are read back."""

import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from PIL import Image

from utils import UserError
from visualization import animation
from visualization.animation import FADE, HOLD, HOLD_END, TICK, Sentence, write_animation
from visualization.overlay import Drawing

LOCATIONS = [5, 0, 15, 6]  # attended for each word, on a grid of 4 x 4
WORDS = ["a", "$5", "<unk>", "dog"]
BOTH = pytest.mark.parametrize("kind", ["gif", "mp4"])


def one_hot(locations=LOCATIONS, cells=16):
    return np.eye(cells, dtype=np.float32)[locations]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(animation, "SIZE", 120)


def grey(height, width):
    return np.full((height, width, 3), 120, dtype=np.uint8)


def read(path):
    """Pictures by the tick, (ticks, H, W, 3), and the seconds that all of them take"""
    if path.suffix == ".mp4":
        meta = imageio.immeta(path, plugin="FFMPEG")
        pictures = imageio.imread(path, plugin="FFMPEG")
        assert meta["fps"] == pytest.approx(1 / TICK)
        return pictures, len(pictures) / meta["fps"]
    pictures = imageio.imread(path, plugin="pillow")
    seconds = np.array(
        [
            imageio.immeta(path, index=i, plugin="pillow")["duration"] / 1000
            for i in range(len(pictures))
        ]
    )
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
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("shape", [(60, 60), (30, 90), (90, 30)])
def test_a_word_is_shown_while_its_location_is_the_brightest(tmp_path, small, kind, shape, smooth):
    path, image = tmp_path / f"x.{kind}", grey(*shape)
    write_animation(path, image, WORDS, one_hot(), Drawing(smooth))
    pictures, seconds = read(path)
    word, end = FADE + HOLD, FADE + HOLD_END
    assert len(pictures) == word * len(WORDS) + end
    assert seconds == pytest.approx(len(pictures) * TICK) and 0.5 < word * TICK < 0.7
    for t, place in enumerate(LOCATIONS):
        for picture in pictures[t * word + FADE : (t + 1) * word]:
            light = cells(picture, image)
            assert light.argmax() == place and light[place] > 2 * np.median(light)


@BOTH
def test_attention_fades_to_the_next_word_step_by_step(tmp_path, small, kind):
    path, image = tmp_path / f"x.{kind}", grey(60, 60)
    write_animation(path, image, WORDS, one_hot())
    pictures, _ = read(path)
    word = FADE + HOLD
    light = [cells(picture, image) for picture in pictures[word - 1 : word + FADE]]
    steps = np.diff([(new[LOCATIONS[1]], -new[LOCATIONS[0]]) for new in light], axis=0)
    assert (steps > 1).all()


@BOTH
def test_the_animation_ends_with_the_photograph_and_the_complete_sentence(tmp_path, small, kind):
    path = tmp_path / f"x.{kind}"
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    write_animation(path, image, WORDS, one_hot())
    pictures, _ = read(path)
    expected = np.asarray(Image.fromarray(image).resize((120, 80)), dtype=float)
    for picture in pictures[-HOLD_END:]:
        assert np.abs(photograph(picture, image) - expected).mean() < 12
    strip = Sentence(WORDS).draw_below(grey(80, 120), 99)[80:].astype(float)
    assert np.abs(pictures[-1][80:] - strip).mean() < 4
    assert np.abs(pictures[-HOLD_END - 8][80:] - strip).mean() > 5  # the last word is highlighted


@BOTH
@pytest.mark.parametrize("height, width", [(50, 50), (50, 25), (25, 77), (333, 100), (1, 60)])
def test_photographs_keep_their_shape_and_frames_are_even(tmp_path, small, kind, height, width):
    path, image = tmp_path / f"x.{kind}", np.full((height, width, 3), (255, 0, 0), dtype=np.uint8)
    write_animation(path, image, ["dog"], np.ones((1, 4)))
    pictures, _ = read(path)
    assert pictures.shape[2] == animation.SIZE and pictures.shape[1] % 2 == 0
    last = pictures[-1].astype(int)
    red = np.argwhere(last[..., 0] - last[..., 1] > 150)
    found_height, found_width = np.ptp(red, axis=0) + 1
    scale = animation.SIZE / max(height, width)
    assert abs(found_height - height * scale) <= 1 and abs(found_width - width * scale) <= 1


@BOTH
def test_an_empty_caption_shows_the_photograph(tmp_path, small, kind):
    path, image = tmp_path / f"x.{kind}", grey(60, 60)
    write_animation(path, image, [], np.zeros((0, 16)))
    pictures, seconds = read(path)
    assert seconds == pytest.approx(TICK * (FADE + HOLD_END))
    assert np.abs(photograph(pictures, image[None])[0] - 120).max() < 10
    assert np.abs(cells(pictures[-1], image) - 120).max() < 5


LONG = (["a", "counterintuitively", "grey", "x" * 120, "$", "犬", ""] * 8)[:50]


@pytest.mark.parametrize("words", [LONG, ["dog"], ["W" * 30, "i"] * 6])
def test_words_neither_leave_the_frame_nor_touch_each_other(words):
    frame = Sentence(words).draw_below(grey(100, animation.SIZE), len(words))
    ground = frame[-1, 0]
    for edge in (frame[100:, :6], frame[100:, -6:], frame[100:104], frame[-6:]):
        assert (edge == ground).all()
    boxes = [(x, x + wide, y) for _, _, x, y, wide in Sentence(words).words]
    for before, after in zip(boxes, boxes[1:]):
        assert after[2] > before[2] or after[0] >= before[1] + 8


def test_the_sentence_grows_and_its_last_word_is_highlighted():
    words = "a dog runs over the green grass towards a ball".split()
    sentence, yellow = Sentence(words), np.array([255, 197, 61])
    whole = sentence.draw_below(grey(100, 480), 99)
    for count in range(1, len(words) + 1):
        frame = sentence.draw_below(grey(100, 480), count)
        for i, (_, _, x, y, wide) in enumerate(sentence.words, 1):
            place = np.s_[100 + y : 100 + y + animation.LINE, int(x) : int(x + wide)]
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
    near = np.exp(-((np.arange(14) + 0.5 - places) ** 2) / 8)  # (12, 2, 14)
    alphas = (near[:, 0, :, None] * near[:, 1, None]).reshape(12, 196)
    write_animation(tmp_path / "x.gif", image.astype(np.uint8), ["word"] * 12, alphas)
    assert 1e6 < (tmp_path / "x.gif").stat().st_size < 3e6


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match="x.avi must end in .gif or .mp4"):
        write_animation(tmp_path / "x.avi", grey(4, 4), [], np.zeros((0, 4)))


@pytest.fixture
def failing_ffmpeg(tmp_path, monkeypatch):
    """A program in ffmpeg's place that writes half a file and fails."""
    program = tmp_path / "ffmpeg"
    program.write_text(
        "#!/bin/sh\nfor file; do :; done\n"
        "case $file in file:*) echo half > ${file#file:};; esac\nexit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))


def test_a_failing_ffmpeg_is_an_error_of_one_line_and_leaves_the_old_file(
    tmp_path, small, failing_ffmpeg
):
    path = tmp_path / "-x:y.mp4"
    path.write_text("old")
    with pytest.raises(OSError, match=r"^ffmpeg failed \(\d+\.\d\d GB of the disk are free\)$"):
        write_animation(path, grey(60, 60), WORDS, one_hot())
    assert path.read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["-x:y.mp4", "ffmpeg"]


def test_a_truncated_mp4_is_an_error(tmp_path, small, monkeypatch):
    import imageio_ffmpeg

    count = imageio_ffmpeg.count_frames_and_secs

    def cut_off(file):
        whole = Path(file.removeprefix("file:"))
        whole.write_bytes(whole.read_bytes()[:-200])
        return count(file)

    monkeypatch.setattr(imageio_ffmpeg, "count_frames_and_secs", cut_off)
    with pytest.raises(OSError, match="ffmpeg failed"):
        write_animation(tmp_path / "x.mp4", grey(60, 60), WORDS, one_hot())
    assert not list(tmp_path.iterdir())


@BOTH
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_is_an_error_of_one_line_and_leaves_the_old_file(tmp_path, small, kind, capfd):
    path = tmp_path / f"x.{kind}"
    path.write_text("old")
    (tmp_path / f".x.{kind}.tmp").symlink_to("/dev/full")  # the name that atomic_write uses
    with pytest.raises(OSError, match="ffmpeg failed|No space left on device") as error:
        write_animation(path, grey(60, 60), WORDS, one_hot())
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_without_the_package_only_mp4_fails_and_says_what_to_install(tmp_path, small, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    write_animation(tmp_path / "x.GIF", grey(60, 60), WORDS, one_hot())
    with pytest.raises(UserError, match="pip install imageio-ffmpeg"):
        write_animation(tmp_path / "x.mp4", grey(60, 60), WORDS, one_hot())
    assert [file.name for file in tmp_path.iterdir()] == ["x.GIF"]


def test_animations_are_valid_files_of_their_format(tmp_path, small, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, start, found in [("gif", b"GIF89a", 0), ("mp4", b"ftyp", 4)]:
        path = Path(f"-x:y.{kind}")  # neither an option nor an address
        write_animation(path, grey(60, 60), WORDS, one_hot())
        assert path.read_bytes()[found:].startswith(start)
    from imageio_ffmpeg import get_ffmpeg_exe

    info = subprocess.run([get_ffmpeg_exe(), "-i", f"file:{path}"], capture_output=True, text=True)
    assert "h264" in info.stderr and "yuv420p" in info.stderr  # what every browser plays
