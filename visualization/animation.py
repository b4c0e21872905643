"""GIF and MP4: attention moves over the photograph word by word, and the sentence grows below."""

import functools
import shutil
from contextlib import closing
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils import UserError, atomic_write, printable
from visualization.attention import resize_image
from visualization.figures import find_fonts, font_for
from visualization.overlay import DEFAULT, attention_overlays

TICK = 0.08  # seconds; GIF counts time in hundredths
FADE, HOLD, HOLD_END = 4, 4, 30  # ticks: from word to word, on a word, on the complete sentence
SIZE = 480  # pixels, the frame's width; the photograph fits into a square of it
FONT, LINE, SPACE, MARGIN = 20, 30, 10, 12  # pixels: letters, lines, between words, all around
BACKGROUND, TEXT, CURRENT_TEXT, CURRENT_BOX = "#111111", "#d0d0d0", "#000000", "#ffc53d"
# GIF has at most 256 colours. Others are mixed by a pattern that is the same in every frame
# (ordered dithering): pixels change only where something moves, which makes the file small. With
# error diffusion, the usual dithering, all pixels flicker.
DITHER = (np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) - 7.5) / 2
# A pixel keeps its colour unless the error exceeds this, of 255, in a fading frame or in one that
# is held. This more than halves the file.
FADE_TOLERANCE, HOLD_TOLERANCE = 22, 8


class Frame(NamedTuple):
    pixels: np.ndarray  # uint8 (H, SIZE, 3), H even
    ticks: int  # how long it is shown


def write_animation(path, image, words, alphas, drawing=DEFAULT):
    """
    Write a GIF or MP4, according to the path's suffix, with `atomic_write`.

    image, words, alphas, drawing: as in `attention.attention_grid`. The overlays are the same, and
    each word's fades into the next. The animation ends with the photograph and the complete
    sentence.

    Raises ValueError for another suffix, or unless there is one alpha per word on a square grid;
    UserError for an MP4 without the package imageio-ffmpeg; OSError if it can't be written.
    """
    write = {".gif": _write_gif, ".mp4": _write_mp4}.get(Path(path).suffix.lower())
    if write is None:
        raise ValueError(f"{path} must end in .gif or .mp4")
    with atomic_write(path) as temporary:
        write(temporary, make_frames(image, words, alphas, drawing))


def make_frames(image, words, alphas, drawing=DEFAULT):
    """
    Yield the animation's Frames, FADE of them for each word and for the end. The last frame of a
    word shows only its attention and is held; the others fade to it from the previous word.
    """
    scale = SIZE / max(image.shape[:2])
    plain = resize_image(image, round(image.shape[1] * scale), round(image.shape[0] * scale))
    photograph, sentence = plain / np.float32(255), Sentence(words)
    pictures = chain([photograph], attention_overlays(plain, words, alphas, drawing), [photograph])
    holds = [HOLD] * len(words) + [HOLD_END]
    for t, ((previous, current), hold) in enumerate(zip(pairwise(pictures), holds), 1):
        for step in range(1, FADE + 1):
            share = step / FADE
            share = np.float32(share * share * (3 - 2 * share))  # slow at both ends
            blend = 255 * ((1 - share) * previous + share * current)
            yield Frame(
                sentence.draw_below(blend.round().astype(np.uint8), t), 1 + hold * (step == FADE)
            )


class Sentence:
    """Words laid out in lines within the frame's width; their positions do not change."""

    def __init__(self, words):
        words = [printable(word) for word in words]
        available, fonts = SIZE - 2 * MARGIN, find_fonts(words)
        self.words, x, y = [], 0, 0
        for word in words:
            font = _load_font(font_for(word, fonts))
            width = font.getlength(word)
            word_font = (
                font if width <= available else font.font_variant(size=FONT * available / width)
            )
            width = min(width, available)
            if x + width > available:
                x, y = 0, y + LINE
            self.words.append((word, word_font, MARGIN + x, MARGIN + y, width))
            x += width + SPACE
        self.height = y + LINE + 2 * MARGIN

    def draw_below(self, picture, count):
        """
        The picture, uint8 (h, w, 3), and below it the first `count` words, the last one
        highlighted unless count exceeds the number of words. Returns uint8 (H, SIZE, 3).
        """
        height, width = picture.shape[:2]
        total = height + self.height
        total += total % 2  # MP4 stores one colour for each 2 x 2 pixels
        canvas = Image.new("RGB", (SIZE, total), BACKGROUND)
        canvas.paste(Image.fromarray(picture), ((SIZE - width) // 2, 0))
        draw = ImageDraw.Draw(canvas)
        for i, (word, font, x, y, word_width) in enumerate(self.words[:count], 1):
            y, colour = y + height, TEXT
            if i == count:
                box = (x - 4, y + 1, x + word_width + 4, y + LINE - 3)
                draw.rounded_rectangle(box, radius=6, fill=CURRENT_BOX)
                colour = CURRENT_TEXT
            draw.text((x, y + 0.7 * LINE), word, colour, font, anchor="ls")
        return np.asarray(canvas)


@functools.cache
def _load_font(path):
    return ImageFont.truetype(path, FONT)


def _write_gif(path, frames):
    frames = list(frames)
    indices, palette = _to_palette(frames)
    # Encoded in memory first: on a full disk imageio would try to write a second time.
    content = imageio.imwrite(
        "<bytes>",
        indices,
        plugin="pillow",
        extension=".gif",
        is_batch=True,
        duration=[round(1000 * TICK) * frame.ticks for frame in frames],
        loop=0,
        palette=palette.astype(np.uint8).tobytes(),
        optimize=True,
    )
    Path(path).write_bytes(content)


def _to_palette(frames):
    """
    Frames in GIF's colours: indices, uint8 (N, H, SIZE), into a palette, int16 (255, 3) at most.
    """
    held = [frame.pixels for frame in frames if frame.ticks > 1]
    sample = np.concatenate([held[-1], *held[: -1 : max(1, len(held) // 4)]])[::2, ::2]
    # The last of the 256 colours stands for a pixel that does not change.
    palette_image = Image.fromarray(sample).quantize(255, kmeans=1)
    palette = np.array(palette_image.getpalette(), dtype=np.int16).reshape(-1, 3)
    height, width = frames[0].pixels.shape[:2]
    dither = np.tile(DITHER, (-(-height // 4), -(-width // 4)))[:height, :width, None]
    indices = []
    for pixels, ticks in frames:
        dithered = (pixels + dither).clip(0, 255).astype(np.uint8)
        nearest = np.asarray(
            Image.fromarray(dithered).quantize(palette=palette_image, dither=Image.Dither.NONE)
        )
        if indices:
            error = np.abs(palette[indices[-1]] - dithered).max(2)
            tolerance = HOLD_TOLERANCE if ticks > 1 else FADE_TOLERANCE
            nearest = np.where(error > tolerance, nearest, indices[-1])
        indices.append(nearest)
    return np.stack(indices), palette


def _write_mp4(path, frames):
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):  # no package, or it contains no ffmpeg
        raise UserError("MP4 needs ffmpeg; run pip install imageio-ffmpeg") from None
    first = next(frames)
    # With "file:" a path is never mistaken for a URL. Every browser plays libx264 in yuv420p.
    file, ticks = f"file:{path}", 0
    writer = imageio_ffmpeg.write_frames(
        file,
        (SIZE, len(first.pixels)),
        fps=1 / TICK,
        codec="libx264",
        pix_fmt_out="yuv420p",
        macro_block_size=2,
        quality=None,
        ffmpeg_log_level="quiet",
        output_params=["-crf", "18", "-movflags", "+faststart", "-f", "mp4"],
    )
    try:
        with closing(writer):
            writer.send(None)  # starts ffmpeg
            for frame in chain([first], frames):
                writer.send(frame.pixels.tobytes() * frame.ticks)
                ticks += frame.ticks
        # The package ignores ffmpeg's exit code, so the file is read back.
        complete = imageio_ffmpeg.count_frames_and_secs(file)[0] == ticks
    except (OSError, RuntimeError):  # ffmpeg exited early, or the file cannot be read
        complete = False
    if not complete:
        free = shutil.disk_usage(Path(path).parent).free
        raise OSError(f"ffmpeg failed ({free / 1e9:.2f} GB of the disk are free)")
