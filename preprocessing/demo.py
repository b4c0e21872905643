"""
Draw small captioned scenes: a data set made in minutes, with the true position of each object.

    python -m preprocessing.demo FOLDER        # 1600 training, 100 validation, 200 test scenes
    python -m preprocessing.demo FOLDER --train 3000 --seed 1

A scene is one shape at a place, or two shapes in a relation. Each gets five true captions, and the
box of each object, so that attention can be scored and not only shown.
"""

import json
import os
from itertools import product
from math import cos, pi, radians, sin
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from preprocessing.processes import open_pool
from utils import (
    Parser,
    UserError,
    atomic_write,
    exclusive_lock,
    non_negative_int,
    run_script,
    write_json,
)

DRAWING_VERSION = 1  # increase it when scenes are drawn differently, so that old ones are redrawn
SIDE = 256  # pixels, width and height of a picture
MARGIN, GAP = 3, 6  # pixels, least distance to the edge and between two objects
SIZES = {"small": (90, 98), "large": (114, 122)}  # pixels, longer side of the object's box
# Each shape is drawn three times, one copy inside the other, so that its form shows throughout its
# box and not only at its edge: (scale, brightness).
COPIES = (1, 1), (0.72, 0.55), (0.44, 1)
COLOURS = {
    "red": (214, 40, 40), "yellow": (238, 212, 30), "green": (38, 150, 62),
    "blue": (35, 86, 205), "purple": (136, 52, 168), "black": (35, 35, 38),
}  # fmt: skip
PLACES = {  # (column, row) of a 3×3 grid
    (0, 0): "in the upper left corner", (2, 0): "in the upper right corner",
    (0, 2): "in the lower left corner", (2, 2): "in the lower right corner",
    (0, 1): "on the left side", (1, 1): "in the middle", (2, 1): "on the right side",
    (1, 0): "at the top", (1, 2): "at the bottom",
}  # fmt: skip
RELATIONS = {"above": "below", "to the left of": "to the right of"}  # and their inverses


def circle_points(radii):
    """The points at these radii, evenly spread around the origin, the first one at the top."""
    angles = [2 * pi * i / len(radii) for i in range(len(radii))]
    return [(r * sin(t), -r * cos(t)) for r, t in zip(radii, angles, strict=True)]


SHAPES = {  # polygons of any scale, y downwards
    "circle": circle_points([1] * 72),
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": circle_points([1] * 3),
    "star": circle_points([1, 0.42] * 5),
    "cross": [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1),
              (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)],
    "heart": [(16 * sin(t) ** 3, 5 * cos(2 * t) + 2 * cos(3 * t) + cos(4 * t) - 13 * cos(t))
              for t in [2 * pi * i / 72 for i in range(72)]],
}  # fmt: skip

ALL_OBJECTS = list(product(SIZES, COLOURS, SHAPES))
ONE_OBJECT = [([obj], place) for obj, place in product(ALL_OBJECTS, PLACES)]
TWO_OBJECTS = [([a, b], relation) for a, b, relation in product(ALL_OBJECTS, ALL_OBJECTS, RELATIONS)
       if a[1] != b[1] and a[2] != b[2]]  # fmt: skip


def choose_scenes(n, rng):
    """
    n different scenes in random order, one in eight of a single object.

    A scene is (objects, where): an object is (size, colour, shape), and where is a key of PLACES
    for one object, of RELATIONS for two; the upper or left one of two comes first.
    Raises UserError if fewer than n exist.
    """
    if n > len(ONE_OBJECT) + len(TWO_OBJECTS):
        raise UserError(
            f"{n} scenes requested; only {len(ONE_OBJECT) + len(TWO_OBJECTS)} different ones exist"
        )
    single = max(min(n // 8, len(ONE_OBJECT)), n - len(TWO_OBJECTS))
    scenes = rng.sample(ONE_OBJECT, single) + rng.sample(TWO_OBJECTS, n - single)
    rng.shuffle(scenes)
    return scenes


def describe(scene):
    """The five captions of a scene; all true, all different, in lower case, without full stop."""
    objects, where = scene
    # Only two of the five give the size: a model attends most to an object at the first word about
    # it, and attention is scored at colours and shapes, which distinguish the objects.
    full = ["a " + " ".join(obj) for obj in objects]
    short = [f"a {colour} {shape}" for _, colour, shape in objects]
    if len(objects) == 1:
        [sized_a], [a], place = full, short, PLACES[where]
        return [f"{sized_a} {place}", f"there is {a} {place}", f"{a} is {place}",
                f"{place} is {a}", f"the picture shows {sized_a} {place}"]  # fmt: skip
    (sized_a, sized_b), (a, b), inverse = full, short, RELATIONS[where]
    return [f"{sized_a} {where} {sized_b}", f"there is {a} {where} {b}", f"{a} is {where} {b}",
            f"{b} is {inverse} {a}",
            f"the picture shows {sized_b} {inverse} {sized_a}"]  # fmt: skip


def box(points):
    """[x0, y0, x1, y1] of the points."""
    xs, ys = zip(*points, strict=True)
    return [min(xs), min(ys), max(xs), max(ys)]


def outline(shape, size, centre, tilt):
    """Corners (x, y) in pixels; tilt: radians; size: pixels, the longer side of the box."""
    points = [(x * cos(tilt) - y * sin(tilt), x * sin(tilt) + y * cos(tilt))
              for x, y in SHAPES[shape]]  # fmt: skip
    x0, y0, x1, y1 = box(points)
    scale = size / max(x1 - x0, y1 - y0)
    return [(centre[0] + scale * (x - (x0 + x1) / 2), centre[1] + scale * (y - (y0 + y1) / 2))
            for x, y in points]  # fmt: skip


def choose_centres(sizes, where, rng):
    """Centres (x, y) in pixels for objects of these sizes, so that where is clearly true."""
    lows = [MARGIN + size / 2 for size in sizes]
    highs = [SIDE - low for low in lows]
    if len(sizes) == 1:
        ranges = (lows[0], lows[0] + 12), (SIDE / 2 - 10, SIDE / 2 + 10), (highs[0] - 12, highs[0])
        return [[rng.uniform(*ranges[cell]) for cell in where]]
    min_distance = sum(sizes) / 2 + GAP
    slack = highs[1] - lows[0] - min_distance
    start, end = sorted(rng.uniform(0, slack) for _ in range(2))
    along = [lows[0] + start, lows[0] + min_distance + end]
    while True:  # along the relation's axis, the distance must be more than twice that across it
        across = [rng.uniform(low, high) for low, high in zip(lows, highs, strict=True)]
        if abs(across[0] - across[1]) < (along[1] - along[0]) / 2:
            pairs = (across, along) if where == "above" else (along, across)
            return list(zip(*pairs, strict=True))


def compose(scene, rng):
    """A light, textured background, and the polygons to draw on it: [(outline, RGB colour)]."""
    # On a plain background every cell of a deep feature map reveals what the objects are, and a
    # model need not attend to them. A texture of several scales keeps features local.
    background = np.full((SIDE, SIDE, 3), [rng.randint(193, 220) for _ in range(3)], np.float32)
    for side in (3, 8, 32, 128):
        noise = Image.frombytes("RGB", (side, side), rng.randbytes(side * side * 3))
        background += np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) * 0.2 - 26
    background = Image.fromarray(background.clip(0, 255).astype(np.uint8))

    objects, where = scene
    sizes = [rng.uniform(*SIZES[size]) for size, _, _ in objects]
    polygons = []
    centres = choose_centres(sizes, where, rng)
    for (_, colour, shape), size, centre in zip(objects, sizes, centres, strict=True):
        tilt = radians(rng.uniform(-8, 8))
        rgb = tuple(min(max(c + rng.randint(-14, 14), 0), 255) for c in COLOURS[colour])
        polygons.append((outline(shape, size, centre, tilt), rgb))
    return background, polygons


def draw(background, polygons, factor=4):
    """The picture of these polygons, antialiased by drawing `factor` times larger."""
    picture = background.copy()
    for points, rgb in polygons:
        x0, y0, x1, y1 = box(points)
        middle = (x0 + x1) / 2, (y0 + y1) / 2
        corner = int(x0) - 1, int(y0) - 1
        size = int(x1) + 2 - corner[0], int(y1) + 2 - corner[1]
        for scale, brightness in COPIES:
            # In pixels of the finer picture, whose centres are at half a pixel.
            polygon = [
                tuple(
                    factor * (m + scale * (v - m) - c) - 0.5
                    for v, m, c in zip(point, middle, corner)
                )
                for point in points
            ]
            mask = Image.new("L", (size[0] * factor, size[1] * factor))
            ImageDraw.Draw(mask).polygon(polygon, fill=255)
            picture.paste(tuple(round(brightness * c) for c in rgb), corner, mask.reduce(factor))
    return picture


def draw_scene(scene, seed, path):
    """
    Write the scene's picture; returns the box of each object, in fractions of the side. The PNG
    file contains both as text, so a picture that has been drawn before is not drawn again.
    """
    description = json.dumps([DRAWING_VERSION, scene, seed])
    try:
        with Image.open(path) as image:
            if image.info.get("scene") == description:
                return json.loads(image.info["boxes"])
    except (OSError, KeyError, ValueError):  # no file, or not one of our pictures
        pass
    background, polygons = compose(scene, Random(seed))
    boxes = [[round(v / SIDE, 5) for v in box(points)] for points, _ in polygons]
    info = PngInfo()
    info.add_text("scene", description)
    info.add_text("boxes", json.dumps(boxes))
    with atomic_write(path) as temporary:  # level 1 is enough: noise hardly compresses
        draw(background, polygons).save(temporary, "png", compress_level=1, pnginfo=info)
    return boxes


def make_demo(folder, train=1600, val=100, test=200, seed=0):
    """
    Draw train + val + test different scenes as 256×256 PNG files, captioned in Karpathy's format.

    Every image has, besides "filename", "imgid", "split", "sentids" and five "sentences",
    "objects": [{"box": [x0, y0, x1, y1], "words": [...]}], the tight box in fractions of the width
    and height, and the words that name this object and no other of the scene: its colour and
    its shape.

    Returns the path of folder/dataset_demo.json. It is written last: if it exists, the data set
    is complete. The same arguments give the same files; existing pictures are not drawn again.
    Raises UserError if another process is drawing into the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder / ".lock", f"another process is drawing into {folder}; wait for it"):
        return _make_demo(folder, train, val, test, seed)


def _make_demo(folder, train, val, test, seed):
    path = folder / "dataset_demo.json"
    path.unlink(missing_ok=True)
    splits = ["train"] * train + ["val"] * val + ["test"] * test
    scenes = choose_scenes(len(splits), Random(str(seed)))
    names = [folder / f"demo_{i:05d}.png" for i in range(len(splits))]
    images = []
    with open_pool(os.cpu_count()) as pool:
        seeds = [f"{seed} {i}" for i in range(len(scenes))]
        drawn = pool.map(draw_scene, scenes, seeds, names, chunksize=16)
        for i, boxes in enumerate(tqdm(drawn, "Drawing", len(scenes), delay=2, disable=None)):
            captions = describe(scenes[i])
            sentids = list(range(i * len(captions), (i + 1) * len(captions)))
            images.append({
                "filename": names[i].name, "imgid": i, "split": splits[i], "sentids": sentids,
                "sentences": [{"tokens": text.split(), "raw": f"{text.capitalize()}.", "sentid": k}
                              for text, k in zip(captions, sentids, strict=True)],
                "objects": [{"box": box, "words": [colour, shape]} for box, (_, colour, shape)
                            in zip(boxes, scenes[i][0], strict=True)],
            })  # fmt: skip
    write_json(path, {"dataset": "demo", "images": images})
    return path


if __name__ == "__main__":
    parser = Parser(
        prog="python -m preprocessing.demo", description="Draw a captioned demo data set."
    )
    parser.add_argument("folder", help="where to write the pictures and dataset_demo.json")
    for split, n in [("train", 1600), ("val", 100), ("test", 200)]:
        parser.add_argument(f"--{split}", type=non_negative_int, default=n, help="number of scenes")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the random generator")
    run_script(lambda: print(make_demo(**vars(parser.parse_args()))))
