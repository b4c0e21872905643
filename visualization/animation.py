"""GIF and MP4: attention moves over the photograph word by word, and the sentence grows below."""

import os
import subprocess
from itertools import pairwise
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils import UserError, atomic_write, printable
from visualization.attention import resize_image
from visualization.figures import find_font
from visualization.overlay import attention_overlays

MP4 = "-f mp4 -c:v h264 -pix_fmt yuv420p -crf 20 -v error -y".split()  # as every browser plays
TICK = 0.1  # seconds
FADE, HOLD, HOLD_END = 2, 4, 24  # ticks: from word to word, on a word, on the complete sentence
SIZE = 400  # pixels, the frame's width; the photograph fits into a square of it
FONT, LINE, SPACE, MARGIN = 18, 28, 10, 12  # pixels: letters, lines, between words, all around
BACKGROUND, TEXT, CURRENT_TEXT = "#111111", "#9a9a9a", "#ffc53d"


def write_animation(path, image, words, alphas, smooth=True, offset=(0.0, 0.0)):
    """
    Write a GIF or MP4, according to the path's suffix, with `atomic_write`: the overlays of
    `attention.attention_grid`, with its arguments, each fading into the next, and at the end
    the photograph with the complete sentence.

    Raises ValueError for alphas as there, UserError for an MP4 without the package imageio-ffmpeg.
    """
    frames, ticks = make_frames(image, words, alphas, smooth, offset)
    if os.fspath(path).lower().endswith(".gif"):
        durations = [round(1000 * TICK) * count for count in ticks]
        options = {"plugin": "pillow", "duration": durations, "loop": 0}
        content = imageio.imwrite("<bytes>", frames, extension=".gif", is_batch=True, **options)
        with atomic_write(path) as temporary:
            Path(temporary).write_bytes(content)
        return
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        ffmpeg = get_ffmpeg_exe()
    except (ImportError, RuntimeError):  # no package, or it contains no ffmpeg
        raise UserError("MP4 needs ffmpeg; run pip install imageio-ffmpeg") from None
    height, width, _ = frames[0].shape
    source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {1 / TICK} -i -".split()
    pixels = b"".join(frame.tobytes() * count for frame, count in zip(frames, ticks))
    with atomic_write(path) as temporary:
        # Not by imageio, which hides why ffmpeg fails, and that its file is cut off on a full disk.
        command = [ffmpeg, *source, *MP4, f"file:{temporary}"]
        done = subprocess.run(command, input=pixels, capture_output=True)
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise UserError(f"{path} cannot be written: {ffmpeg} failed: {reason}")


def make_frames(image, words, alphas, smooth=True, offset=(0.0, 0.0)):
    """
    The frames, a list of uint8 (H, SIZE, 3) with H even, and for how many ticks each is shown:
    FADE of them for each word and for the end, of which the last is held.
    """
    scale = SIZE / max(image.shape[:2])
    plain = resize_image(image, round(image.shape[1] * scale), round(image.shape[0] * scale))
    pictures = [plain, *attention_overlays(plain, words, alphas, smooth, offset), plain]
    layout, height = lay_out([printable(word) for word in words])
    frames, ticks = [], []
    for count, (previous, current) in enumerate(pairwise(map(Image.fromarray, pictures)), 1):
        for step in range(1, FADE + 1):
            picture = Image.blend(previous, current, step / FADE)
            frames.append(_draw_below(picture, layout, height, count))
            ticks.append(1)
        ticks[-1] += HOLD if count <= len(words) else HOLD_END
    return frames, ticks


def lay_out(words):
    """For each word (word, font, x, y), in lines within SIZE pixels, and the height of these."""
    layout, x, y = [], MARGIN, MARGIN
    for word in words:
        font = ImageFont.truetype(find_font(word), FONT)
        if x > MARGIN and x + font.getlength(word) > SIZE - MARGIN:
            x, y = MARGIN, y + LINE
        layout.append((word, font, x, y))
        x += font.getlength(word) + SPACE
    return layout, y + LINE + MARGIN


def _draw_below(picture, layout, height, count):
    """A frame: the picture, and below it the first `count` words, of which the last is coloured."""
    total = picture.height + height
    canvas = Image.new("RGB", (SIZE, total + total % 2), BACKGROUND)  # MP4 needs even sizes
    canvas.paste(picture, ((SIZE - picture.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    for i, (word, font, x, y) in enumerate(layout[:count], 1):
        colour = CURRENT_TEXT if i == count else TEXT
        draw.text((x, picture.height + y + 0.7 * LINE), word, colour, font, anchor="ls")
    return np.asarray(canvas)
