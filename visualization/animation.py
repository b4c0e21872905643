"""Attention moving over the photograph word by word, with the sentence growing below: GIF, MP4."""

import shutil
from contextlib import closing
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils import UserError, atomic_write
from visualization.attention import attention_overlays, resized
from visualization.figures import FONT_FILE

TICK = 0.08  # seconds; GIF counts time in hundredths
FADE, HOLD, HOLD_END = 4, 4, 30  # ticks: from word to word, on a word, on the whole sentence
SIZE = 480  # pixels, the frame's width; the photograph fits into a square of it
FONT, LINE, SPACE, MARGIN = 20, 30, 10, 12  # pixels: letters, lines, between words, all around
BACKGROUND, TEXT, CURRENT_TEXT, CURRENT_BOX = "#111111", "#d0d0d0", "#000000", "#ffc53d"
# GIF has 256 colours at most. Others are mixed by a pattern that is the same in every frame
# (ordered dithering): where nothing moves no pixel changes, which makes the file small. Error
# diffusion, the usual dithering, flickers everywhere.
DITHER = (np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) - 7.5) / 2
# A pixel is left as it was unless it is off by more than this, of 255, in a frame that fades or in
# one that is held. This more than halves the file.
FADE_TOLERANCE, HOLD_TOLERANCE = 20, 8


class Frame(NamedTuple):
    pixels: np.ndarray  # uint8 (H, SIZE, 3), H even
    ticks: int  # how long it is shown


def write_animation(path, image, words, alphas, smooth=True):
    """
    Write a GIF or MP4, by the suffix of the path; the file is there whole or not at all.

    image, words, alphas, smooth: as in `attention.attention_grid`; the overlays are the same, and
    that of one word fades into that of the next. At the end stand the photograph and the whole
    sentence.

    Raises ValueError for another suffix, or unless there is one alpha per word on a square grid;
    UserError for an MP4 without the package imageio-ffmpeg; OSError if it can't be written.
    """
    write = {".gif": _write_gif, ".mp4": _write_mp4}.get(Path(path).suffix.lower())
    if write is None:
        raise ValueError(f"{path} ends neither in .gif nor in .mp4")
    with atomic_write(path) as temporary:
        write(temporary, make_frames(image, words, alphas, smooth))


def make_frames(image, words, alphas, smooth=True):
    """
    Yield the animation's Frames, FADE of them for each word and for the end. The last one of a word
    shows its attention alone and is held; the others lead there from the word before.
    """
    scale = SIZE / max(image.shape[:2])
    plain = resized(image, round(image.shape[1] * scale), round(image.shape[0] * scale))
    photograph, sentence = plain / np.float32(255), Sentence(words)
    pictures = chain([photograph], attention_overlays(plain, words, alphas, smooth), [photograph])
    holds = [HOLD] * len(words) + [HOLD_END]
    for t, ((before, now), hold) in enumerate(zip(pairwise(pictures), holds), 1):
        for step in range(1, FADE + 1):
            share = step / FADE
            share = np.float32(share * share * (3 - 2 * share))  # slow at both ends
            blend = 255 * ((1 - share) * before + share * now)
            yield Frame(sentence.draw_below(blend.round().astype(np.uint8), t),
                        1 + hold * (step == FADE))


class Sentence:
    """Words laid out in lines within the frame's width; each keeps its place from the start."""

    def __init__(self, words):
        font, available = ImageFont.truetype(FONT_FILE, FONT), SIZE - 2 * MARGIN
        self.words, x, y = [], 0, 0
        for word in words:
            width = font.getlength(word)
            fitting = (font if width <= available else
                       font.font_variant(size=FONT * available / width))
            width = min(width, available)
            if x + width > available:
                x, y = 0, y + LINE
            self.words.append((word, fitting, MARGIN + x, MARGIN + y, width))
            x += width + SPACE
        self.height = y + LINE + 2 * MARGIN

    def draw_below(self, picture, count):
        """
        The picture, uint8 (h, w, 3), and below it the first `count` words, the last of them
        emphasised; none is if count exceeds the number of words. Returns uint8 (H, SIZE, 3).
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


def _write_gif(path, frames):
    frames = list(frames)
    indices, palette = _to_palette(frames)
    # Made in memory: imageio would try a second time to write what the disk has no room for.
    content = imageio.imwrite("<bytes>", indices, plugin="pillow", extension=".gif", is_batch=True,
                              duration=[round(1000 * TICK) * frame.ticks for frame in frames],
                              loop=0, palette=palette.astype(np.uint8).tobytes(), optimize=True)
    Path(path).write_bytes(content)


def _to_palette(frames):
    """
    Frames in GIF's colours: indices, uint8 (N, H, SIZE), into a palette, int16 (255, 3) at most.
    """
    held = [frame.pixels for frame in frames if frame.ticks > 1]
    sample = np.concatenate([held[-1], *held[:-1:max(1, len(held) // 4)]])[::2, ::2]
    # The last of the 256 colours stands for a pixel that stays as it was.
    palette_image = Image.fromarray(sample).quantize(255, kmeans=1)
    palette = np.array(palette_image.getpalette(), dtype=np.int16).reshape(-1, 3)
    height, width = frames[0].pixels.shape[:2]
    dither = np.tile(DITHER, (-(-height // 4), -(-width // 4)))[:height, :width, None]
    indices = []
    for pixels, ticks in frames:
        wanted = (pixels + dither).clip(0, 255).astype(np.uint8)
        nearest = np.asarray(Image.fromarray(wanted).quantize(
            palette=palette_image, dither=Image.Dither.NONE))
        if indices:
            error = np.abs(palette[indices[-1]] - wanted).max(2)
            tolerance = HOLD_TOLERANCE if ticks > 1 else FADE_TOLERANCE
            nearest = np.where(error > tolerance, nearest, indices[-1])
        indices.append(nearest)
    return np.stack(indices), palette


def _write_mp4(path, frames):
    try:
        import imageio_ffmpeg
        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):  # no package, or one that brings no program
        raise UserError("MP4 needs ffmpeg; run pip install imageio-ffmpeg") from None
    first = next(frames)
    # With "file:" no path is taken for an address. libx264 in yuv420p plays in every browser.
    file, ticks = f"file:{path}", 0
    writer = imageio_ffmpeg.write_frames(
        file, (SIZE, len(first.pixels)), fps=1 / TICK, codec="libx264", pix_fmt_out="yuv420p",
        macro_block_size=2, quality=None, ffmpeg_log_level="quiet",
        output_params=["-crf", "18", "-movflags", "+faststart", "-f", "mp4"])
    try:
        with closing(writer):
            writer.send(None)  # starts ffmpeg
            for frame in chain([first], frames):
                writer.send(frame.pixels.tobytes() * frame.ticks)
                ticks += frame.ticks
        # The package does not look at how ffmpeg has ended, so the file is read back.
        whole = imageio_ffmpeg.count_frames_and_secs(file)[0] == ticks
    except (OSError, RuntimeError):  # ffmpeg has ended early; the file cannot be read
        whole = False
    if not whole:
        free = shutil.disk_usage(Path(path).parent).free
        raise OSError(f"ffmpeg has failed ({free / 1e9:.2f} GB of the disk are free)")
