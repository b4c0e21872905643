"""
Draw small captioned scenes: a data set made in minutes, with the true position of each object.

A scene is one shape at a place, or two shapes in a relation. Each gets five true captions, and the
box of each object, so that attention can be scored and not only shown.
"""

import os
from functools import cache
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image
from tqdm import tqdm

from modeling.workers import map_in_processes
from utils import UserError, write_json

SIDE = 256  # pixels, width and height of a picture
MARGIN, GAP = 3, 6  # pixels, minimum distance to the edge and between two objects
SIZES = {"small": (90, 98), "large": (114, 122)}  # pixels, longer side of the object's box
STAMP, STAMP_SIDE = 136, 124  # pixels a side of a shape drawn once, and of its box in that
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


def ring(radii):
    """Points at these radii, evenly spread around the origin, the first one at the top."""
    angles = 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.array(radii) * (np.sin(angles) - 1j * np.cos(angles))


T = 2 * np.pi * np.arange(72) / 72
SHAPES = {  # polygons of any scale; a point is x + 1j * y, y downwards
    "circle": ring([1] * 72),
    "square": np.array([-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j]),
    "triangle": ring([1] * 3),
    "star": ring([1, 0.42] * 5),
    "cross": np.array([-1 - 3j, 1 - 3j, 1 - 1j, 3 - 1j, 3 + 1j, 1 + 1j,
                       1 + 3j, -1 + 3j, -1 + 1j, -3 + 1j, -3 - 1j, -1 - 1j]),
    "heart": 16 * np.sin(T) ** 3
    + 1j * (5 * np.cos(2 * T) + 2 * np.cos(3 * T) + np.cos(4 * T) - 13 * np.cos(T)),
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
    """
    number = len(ONE_OBJECT) + len(TWO_OBJECTS)
    if n > number:
        raise UserError(f"{n} scenes requested; only {number} different ones exist")
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
    return [points.real.min(), points.imag.min(), points.real.max(), points.imag.max()]


def fit(points, side, centre):
    """Scale and move points so that their box has this longer side and centre, x + 1j * y."""
    x0, y0, x1, y1 = box(points)
    return centre + side / max(x1 - x0, y1 - y0) * (points - (x0 + x1 + 1j * (y0 + y1)) / 2)


def choose_centres(sizes, where, rng):
    """Centres (x, y) in pixels for objects of these sizes, so that `where` is clearly true."""
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
        across = [rng.uniform(low, high) for low, high in zip(lows, highs)]
        if abs(across[0] - across[1]) < (along[1] - along[0]) / 2:
            return list(zip(across, along) if where == "above" else zip(along, across))


def compose(scene, rng):
    """A light, textured background, and the objects to draw on it: [(shape, polygon, rgb)]."""
    # On a plain background every cell of a deep feature map reveals what the objects are, and a
    # model need not attend to them. A texture of several scales keeps features local.
    background = np.full((SIDE, SIDE, 3), [rng.randint(193, 220) for _ in range(3)], np.float32)
    for side in (3, 8, 32, 128):
        noise = Image.frombytes("RGB", (side, side), rng.randbytes(side * side * 3))
        background += np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) * 0.2 - 26
    background = Image.fromarray(background.clip(0, 255).astype(np.uint8))

    objects, where = scene
    sides = [rng.uniform(*SIZES[size]) for size, _, _ in objects]
    centres = choose_centres(sides, where, rng)
    polygons = []
    for (_, colour, shape), side, centre in zip(objects, sides, centres):
        turned = SHAPES[shape] * np.exp(1j * np.radians(rng.uniform(-8, 8)))
        rgb = [min(max(c + rng.randint(-14, 14), 0), 255) for c in COLOURS[colour]]
        polygons.append((shape, fit(turned, side, complex(*centre)), rgb))
    return background, polygons


def stamp_outline(shape, scale=1):
    return fit(SHAPES[shape], scale * STAMP_SIDE, (1 + 1j) * STAMP / 2)


@cache
def stamp(shape):
    """
    The three copies of a shape as a picture of brightness and opacity, antialiased by drawing it
    larger and reducing it. It is drawn once, since skimage takes a moment for many corners.
    """
    from skimage.draw import polygon  # only here: only the demo needs it

    larger = 3
    pixels = np.zeros((larger * STAMP, larger * STAMP, 2), np.uint8)
    for scale, brightness in COPIES:
        points = larger * stamp_outline(shape, scale) - (0.5 + 0.5j)  # pixels' centres are integers
        pixels[polygon(points.imag, points.real)] = 255 * brightness, 255
    return Image.fromarray(pixels).reduce(larger)


def draw(background, polygons):
    """The picture of these polygons: their stamps turned, scaled and moved to their place"""
    picture = background.copy()
    for shape, points, rgb in polygons:
        (a, b), (stamp_a, stamp_b) = points[:2], stamp_outline(shape)[:2]
        factor = (stamp_b - stamp_a) / (b - a)  # point z of the picture is factor * z + offset of
        offset = stamp_a - factor * a  # the stamp
        matrix = (factor.real, -factor.imag, offset.real, factor.imag, factor.real, offset.imag)
        placed = stamp(shape).transform(
            picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
        )
        brightness, opacity = placed.split()
        colour = Image.merge("RGB", [brightness.point(lambda v, c=c: v * c / 255) for c in rgb])
        picture.paste(colour, mask=opacity)
    return picture


def draw_scene(item):
    """item: scene, seed, path. Writes the picture; returns each object's box, as side fractions."""
    scene, seed, path = item
    background, polygons = compose(scene, Random(seed))
    draw(background, polygons).save(path, compress_level=1)  # enough: noise hardly compresses
    return [[round(float(v) / SIDE, 5) for v in box(points)] for _, points, _ in polygons]


def make_demo(folder, train=1600, val=100, test=200, seed=0, workers=None):
    """
    Draw train + val + test different scenes as 256×256 PNG files, captioned in Karpathy's format.

    Every image has "objects": [{"box": [x0, y0, x1, y1], "words": [colour, shape]}], the tight box
    in fractions of the width and height, and the words that name this object and no other there.
    Returns the path of folder/dataset_demo.json, written last. The same arguments give the same
    files. workers: processes that draw; None: one per CPU
    """
    path = Path(folder) / "dataset_demo.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    scenes = choose_scenes(train + val + test, Random(str(seed)))
    splits = ["train"] * train + ["val"] * val + ["test"] * test
    names = [f"demo_{i:05d}.png" for i in range(len(scenes))]
    items = [(scene, f"{seed} {i}", path.parent / names[i]) for i, scene in enumerate(scenes)]
    for shape in SHAPES:
        stamp(shape)  # before processes are forked, which then have them too
    workers = (os.cpu_count() if workers is None else workers) if len(items) > 100 else 1
    drawn = map_in_processes(draw_scene, items, workers)
    images = []
    for i, boxes in enumerate(tqdm(drawn, "Drawing", len(scenes), delay=2, disable=None)):
        sentences = [
            {"tokens": text.split(), "raw": f"{text.capitalize()}.", "sentid": 5 * i + k}
            for k, text in enumerate(describe(scenes[i]))
        ]
        objects = [
            {"box": box, "words": [colour, shape]}
            for box, (_, colour, shape) in zip(boxes, scenes[i][0])
        ]
        images.append({
            "filename": names[i], "imgid": i, "split": splits[i],
            "sentids": [sentence["sentid"] for sentence in sentences],
            "sentences": sentences, "objects": objects,
        })  # fmt: skip
    write_json(path, {"dataset": "demo", "images": images})
    return path
