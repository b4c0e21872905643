"""The heat map lies where the attention is, as opaque as its square root, over a dim photograph."""

import matplotlib
import numpy as np
import pytest
from skimage.transform import pyramid_expand

from visualization.overlay import attention_overlays, spread

SIDE = 14
SMOOTH = pytest.mark.parametrize("smooth", [True, False])


def random_alphas(count=4, side=SIDE):
    return np.random.default_rng(0).dirichlet(np.full(side * side, 0.3), count).astype(np.float32)


@SMOOTH
def test_overlays_are_the_formula_of_the_design(smooth):
    photograph = np.random.default_rng(1).integers(0, 256, (60, 80, 3), np.uint8)
    alphas, offset = random_alphas(), (0.03, -0.02)
    grey = (photograph @ [0.299, 0.587, 0.114] / 255)[..., None]
    pictures = list(attention_overlays(photograph, ["dog"] * 4, alphas, smooth, offset))
    assert len(pictures) == 4
    for picture, alpha in zip(pictures, alphas):
        a = spread(alpha.reshape(SIDE, SIDE), (80, 60), smooth, offset)
        opacity = np.sqrt(a)[..., None]
        colour = matplotlib.colormaps["inferno"](a)[..., :3]
        expected = (0.1 + 0.3 * grey) * (1 - 0.8 * opacity) + 0.8 * opacity * colour
        assert picture.dtype == np.uint8 and picture.shape == photograph.shape
        assert abs(picture / 255 - expected).max() < 0.015
        assert abs(picture / 255 - expected).mean() < 0.003


def test_attention_is_spread_as_in_the_tutorial():
    for alpha in random_alphas(side=SIDE - 4):
        alpha = np.pad(alpha.reshape(SIDE - 4, SIDE - 4), 2)  # where its edges are treated alike
        expected = pyramid_expand(alpha, upscale=24, sigma=8)
        found = spread(alpha, (24 * SIDE, 24 * SIDE))
        assert abs(found - expected / expected.max()).max() < 0.01


@SMOOTH
@pytest.mark.parametrize("offset", [(0.05, 0.0), (0.0, 0.05), (-0.1, -0.03)])
def test_attention_is_drawn_as_far_from_the_grid_as_the_encoders_cells_look(offset, smooth):
    row, column = 6, 8
    alpha = np.zeros((SIDE, SIDE), np.float32)
    alpha[row, column] = 1

    def centre(offset):
        found = spread(alpha, (280, 140), smooth, offset)
        assert found.shape == (140, 280) and found.max() == 1
        places = [(np.arange(n) + 0.5) / n for n in (280, 140)]
        return [found.sum(axis) @ places[axis] / found.sum() for axis in (0, 1)]

    at = centre((0.0, 0.0))
    np.testing.assert_allclose(at, [(column + 0.5) / SIDE, (row + 0.5) / SIDE], atol=2e-3)
    np.testing.assert_allclose(np.subtract(centre(offset), at), offset, atol=2e-3)


@pytest.mark.parametrize("side", [2, 14])
def test_overlays_without_smoothing_are_blocks_and_values_continue_beyond_the_grid(side):
    alpha = random_alphas(1, side).reshape(side, side)
    found = spread(alpha, (5 * side, 6 * side), smooth=False)
    np.testing.assert_allclose(found, (alpha / alpha.max()).repeat(6, 0).repeat(5, 1), atol=1e-6)
    shifted = spread(alpha, (5 * side, 6 * side), False, (1 / side, 0.0))  # one to the right
    np.testing.assert_allclose(shifted[:, 5:], found[:, :-5] / found[:, :-5].max(), atol=1e-6)
    np.testing.assert_allclose(shifted[:, :5], shifted[:, 5:10])


@SMOOTH
def test_overlays_of_any_size_are_pictures_and_no_attention_leaves_the_dim_photograph(smooth):
    rng = np.random.default_rng(0)
    for shape, side in [((1, 60), 14), ((60, 1), 1), ((5, 3), 2), ((200, 300), 14)]:
        photograph = rng.integers(0, 256, (*shape, 3), np.uint8)
        alphas = np.stack([rng.random(side * side), np.zeros(side * side)])
        drawn = list(attention_overlays(photograph, ["a"] * 2, alphas, smooth, (0.2, -0.2)))
        assert [picture.shape for picture in drawn] == [(*shape, 3)] * 2
        dim = np.rint(25.5 + 0.3 * (photograph @ [0.299, 0.587, 0.114]))[..., None]
        assert abs(drawn[1] - dim).max() < 2


def test_attention_must_be_square_with_one_row_per_word():
    for words, shape in [("a", (2, 4)), ("a", (1, 5)), ("a", (1, 2, 2)), ("", (0,)), ("a", (4,))]:
        with pytest.raises(ValueError, match="attention of shape"):
            list(attention_overlays(np.zeros((4, 4, 3), np.uint8), list(words), np.ones(shape)))
