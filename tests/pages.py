"""Captioned photographs for the tests of pages."""

from types import SimpleNamespace

import numpy as np

from visualization import page

SIDE = 14  # locations of the attention grid along an edge
SENTENCE = "a brown dog runs over the snow with a red ball &"
NASTY = ["<unk>", "\"&'", "</script>", "<img src=x onerror='window.hacked=1'>"]
NASTY += ["</style><script>window.hacked=1</script>", "&lt;", "naïve", "雪", "{{x}}"]


def one_hot(*cells):
    """(T, P): for each word all attention at one location (row, column)"""
    return np.eye(SIDE * SIDE, dtype=np.float32)[[row * SIDE + column for row, column in cells]]


def captioned(words=None, attention=None, shape=(240, 320), **fields):
    """A captioned photograph: mid-grey, random attention"""
    words = SENTENCE.split() if words is None else words
    if attention is None:
        attention = np.random.default_rng(0).dirichlet(np.full(SIDE * SIDE, 0.3), len(words))
    usual = {"name": "photos/dog.jpg", "image": np.full((*shape, 3), 128, dtype=np.uint8)}
    usual |= {"score": -12.3456, "n_best": [(" ".join(words), -12.3456)]}
    return SimpleNamespace(words=words, attention=attention, **usual | fields)


def document(*captioned):
    return page.document("dogs", page.HINT, [page.view(one, "h2") for one in captioned])
