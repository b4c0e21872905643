"""The gaze moving over the photograph, word by word, the sentence growing underneath."""

import subprocess
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils import UserError, atomic_write
from visualization.attention import FONT_FILE, attention_overlays, resized

TICK = 0.08  # seconds; GIF counts time in hundredths
GLIDE, STAY, END = 4, 4, 30  # ticks from word to word, on a word, on the whole sentence
SIZE = 480  # pixels, the frame's width; the photograph fits into a square of it
FONT, LINE, SPACE, MARGIN = 20, 30, 10, 12  # pixels: letters, lines, between words, all around
GROUND, SAID, NOW, PILL = "#111111", "#d0d0d0", "#000000", "#ffc53d"
# GIF's few colours are mixed by a pattern that is the same in every frame: where nothing moves no
# pixel changes, and costs nothing. Diffused errors, the usual dithering, flicker everywhere.
PATTERN = (np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) - 7.5) / 2
# How far, of 255, a pixel may be from its colour before a frame that is only passed through, or
# one that stays, corrects it. This more than halves the file.
PASSING, STAYING = 20, 8


class Frame(NamedTuple):
    pixels: np.ndarray  # uint8 (H, SIZE, 3), H even
    ticks: int  # how long it is seen


def write_movie(path, image, words, alphas, smooth=True):
    """
    Write a GIF or MP4, by the suffix of the path; the file is there whole or not at all.

    image, words, alphas, smooth: as in `visualize.attention_grid`; the photograph is lit up as
    there, and the light of one word fades into that of the next. At the end the photograph and
    the whole sentence stand still.

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
    Yield the movie's Frames, as many as GLIDE for each word and for the end. The last of a word
    shows its attention alone and stays; the others lie between it and the look before.
    """
    scale = SIZE / max(image.shape[:2])
    plain = resized(image, round(image.shape[1] * scale), round(image.shape[0] * scale))
    still, sentence = plain / np.float32(255), Sentence(words)
    looks = chain([still], attention_overlays(plain, words, alphas, smooth), [still])
    stays = [STAY] * len(words) + [END]
    for t, ((before, now), stay) in enumerate(zip(pairwise(looks), stays), 1):
        for step in range(1, GLIDE + 1):
            share = step / GLIDE
            share = np.float32(share * share * (3 - 2 * share))  # slow at both ends
            blend = 255 * ((1 - share) * before + share * now)
            yield Frame(sentence.under(blend.round().astype(np.uint8), t),
                        1 + stay * (step == GLIDE))


class Sentence:
    """Words laid out in lines within the frame's width, where each stays as the sentence grows."""

    def __init__(self, words):
        font, room = ImageFont.truetype(FONT_FILE, FONT), SIZE - 2 * MARGIN
        self.words, x, y = [], 0, 0
        for word in words:
            wide = font.getlength(word)
            fitting = font if wide <= room else font.font_variant(size=FONT * room / wide)
            wide = min(wide, room)
            if x + wide > room:
                x, y = 0, y + LINE
            self.words.append((word, fitting, MARGIN + x, MARGIN + y, wide))
            x += wide + SPACE
        self.height = y + LINE + 2 * MARGIN

    def under(self, picture, count):
        """
        The picture, uint8 (h, w, 3), above the first `count` words, the last of them emphasised;
        with a count above all words, none is. Returns uint8 (H, SIZE, 3).
        """
        height, width = picture.shape[:2]
        total = height + self.height
        canvas = Image.new("RGB", (SIZE, total + total % 2), GROUND)  # MP4's colours go by twos
        canvas.paste(Image.fromarray(picture), ((SIZE - width) // 2, 0))
        draw = ImageDraw.Draw(canvas)
        for i, (word, font, x, y, wide) in enumerate(self.words[:count], 1):
            y, colour = y + height, SAID
            if i == count:
                draw.rounded_rectangle((x - 4, y + 1, x + wide + 4, y + LINE - 3), 6, PILL)
                colour = NOW
            draw.text((x, y + 0.7 * LINE), word, colour, font, anchor="ls")
        return np.asarray(canvas)


def _write_gif(path, frames):
    frames = list(frames)
    stay = [frame.pixels for frame in frames if frame.ticks > 1]
    sample = np.concatenate([stay[-1], *stay[:-1:max(1, len(stay) // 4)]])[::2, ::2]
    palette = Image.fromarray(sample).quantize(255, kmeans=1)  # and one for "as it was before"
    colours = np.array(palette.getpalette(), dtype=np.int16).reshape(-1, 3)
    table = np.zeros((256, 3), dtype=np.uint8)
    table[:len(colours)] = colours
    height, width = frames[0].pixels.shape[:2]
    pattern = np.tile(PATTERN, (-(-height // 4), -(-width // 4)))[:height, :width, None]
    images, now = [], None
    for pixels, ticks in frames:
        wanted = (pixels + pattern).clip(0, 255).astype(np.uint8)
        best = Image.fromarray(wanted).quantize(palette=palette, dither=Image.Dither.NONE)
        best = np.asarray(best)
        if now is not None:
            error = np.abs(colours[now] - wanted).max(2)
            best = np.where(error > (STAYING if ticks > 1 else PASSING), best, now)
        now = best
        images.append(Image.fromarray(now))
        images[-1].putpalette(table.tobytes())
    images[0].save(path, format="GIF", save_all=True, append_images=images[1:], loop=0,
                   duration=[round(1000 * TICK) * frame.ticks for frame in frames],
                   optimize=True)


def _write_mp4(path, frames):
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
        program = get_ffmpeg_exe()
    except (ImportError, RuntimeError):  # no package, or one that brings no program
        raise UserError("MP4 needs ffmpeg; run pip install imageio-ffmpeg") from None
    first = next(frames)
    # The program is called directly: through imageio, what it fails at would go unnoticed.
    command = [program, "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24",
               "-s", f"{SIZE}x{len(first.pixels)}", "-r", str(1 / TICK), "-i", "-",
               "-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p",
               "-movflags", "+faststart", "-f", "mp4", f"file:{path}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as ffmpeg:
        try:
            for frame in chain([first], frames):
                ffmpeg.stdin.write(frame.pixels.tobytes() * frame.ticks)
        except BrokenPipeError:
            pass  # it has ended, and says why
        _, error = ffmpeg.communicate()
    if ffmpeg.returncode:
        first_line = error.decode(errors="replace").strip().partition("\n")[0]
        reason = first_line.rpartition("] ")[2]  # without the part of ffmpeg that says so
        raise OSError(reason or f"ffmpeg has ended with {ffmpeg.returncode}")
