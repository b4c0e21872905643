"""How bright a location is drawn says how much attention it has, whatever the photograph shows."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr

from visualization.overlay import LUMA, Drawing, attention_overlays

SIDE, HEIGHT, WIDTH = 14, 168, 224  # pixels: whole ones for each location
OVERLAYS = pytest.mark.parametrize("overlay", ["light", "heat"])
SMOOTH = pytest.mark.parametrize("smooth", [True, False])


def photographs():
    """A bright sky over a dark object, a checkerboard, noise that grows brighter, black, white."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:HEIGHT, :WIDTH]
    sky = np.where((y < HEIGHT // 2)[..., None], (190, 220, 255), (60, 90, 40)).astype(np.uint8)
    sky[80:150, 60:140] = rng.integers(0, 45, (70, 80, 3))
    checkers = 255 * ((y // 17 + x // 17) % 2)[..., None].repeat(3, 2)
    noise = rng.random((HEIGHT, WIDTH, 3)) * 255 * x[..., None] / WIDTH
    return {
        "sky": sky,
        "checkerboard": checkers.astype(np.uint8),
        "noise": noise.astype(np.uint8),
        "black": np.zeros_like(sky),
        "white": np.full_like(sky, 255),
    }


PHOTOGRAPHS = photographs()
EACH_PHOTOGRAPH = pytest.mark.parametrize("name", PHOTOGRAPHS)


def blobs(count=8, seed=1):
    """(count, P): attention like that of a model: smooth, more or less concentrated"""
    rng = np.random.default_rng(seed)
    scores = np.stack([gaussian_filter(rng.normal(size=(SIDE, SIDE)), 1.2) for _ in range(count)])
    scores *= rng.uniform(0.5, 1.5, (count, 1, 1)) / scores.std((1, 2), keepdims=True)
    alphas = np.exp(scores).reshape(count, -1)
    return alphas / alphas.sum(1, keepdims=True)


def draw(photograph, alphas, *drawing):
    return list(attention_overlays(photograph, ["dog"] * len(alphas), alphas, Drawing(*drawing)))


def brightness(picture, side=SIDE):
    """Mean brightness of each location, (P,), of a picture in 256 steps as files hold it"""
    height, width = picture.shape[:2]
    blocks = (np.rint(255 * picture) @ LUMA).reshape(side, height // side, side, width // side)
    return blocks.mean((1, 3)).ravel()


@SMOOTH
@OVERLAYS
@EACH_PHOTOGRAPH
def test_the_more_attention_a_location_has_the_brighter_it_is(name, overlay, smooth):
    for alpha, picture in zip(blobs(), draw(PHOTOGRAPHS[name], blobs(), smooth, overlay)):
        found = brightness(picture)
        assert found.argmax() == alpha.argmax()
        assert spearmanr(found, alpha)[0] >= 0.95


@OVERLAYS
def test_a_dark_object_with_attention_outshines_a_bright_sky_with_half_of_it(overlay):
    alpha = np.full((SIDE, SIDE), 0.1)
    alpha[:5], alpha[8:11, 5:8] = 0.5, 1
    [picture] = draw(PHOTOGRAPHS["sky"], alpha.reshape(1, -1), True, overlay)
    found = brightness(picture).reshape(SIDE, SIDE)
    assert found[9, 6] > 1.3 * found[:4].max()


@OVERLAYS
@EACH_PHOTOGRAPH
def test_even_attention_draws_every_location_equally_bright(name, overlay):
    [picture] = draw(PHOTOGRAPHS[name], np.full((1, 196), 1 / 196), True, overlay)
    found = brightness(picture)
    assert np.ptp(found) < 10 and found.min() > 175


def test_edges_and_colours_stay_where_the_light_is_and_shapes_stay_in_the_dark():
    alpha = np.full((SIDE, SIDE), 1e-3)
    alpha[:, :7] = 1  # light on the left half
    [picture] = draw(PHOTOGRAPHS["checkerboard"] // 2 + [30, 60, 0], alpha.reshape(1, -1))
    left, right = picture[:, :80], picture[:, -80:]
    assert left.std(axis=(0, 1)).min() > 0.1 and right.std(axis=(0, 1)).min() > 0.02
    saturation = [np.ptp(half, axis=2).mean() / half.mean() for half in (left, right)]
    assert saturation[0] > 2 * saturation[1] > 0


def test_heat_has_the_colours_of_inferno_on_a_grey_photograph():
    import matplotlib

    inferno = matplotlib.colormaps["inferno"](np.arange(256))[:, :3]
    grey, alpha = np.full((HEIGHT, WIDTH, 3), 120, np.uint8), np.linspace(0.5, 1, 196)[None]
    [picture] = draw(grey, alpha, True, "heat")
    distance = abs(picture[::7, ::7, None] - inferno).max(3).min(2)
    assert distance.max() < 0.05


@SMOOTH
@pytest.mark.parametrize("offset", [(0.05, 0.0), (0.0, 0.05), (-0.05, -0.03)])
def test_light_is_drawn_as_far_from_the_grid_as_the_encoders_cells_look(offset, smooth):
    grey, alpha = np.full((280, 280, 3), 120, np.uint8), np.zeros((1, 196))
    alpha[0, 6 * SIDE + 7] = 1

    def centre(offset):
        [picture] = draw(grey, alpha, smooth, "light", offset)
        light = (picture @ LUMA - 0.18).clip(0)
        return [light.sum(axis) @ ((np.arange(280) + 0.5) / 280) / light.sum() for axis in (0, 1)]

    np.testing.assert_allclose(np.subtract(centre(offset), centre((0.0, 0.0))), offset, atol=2e-3)


@pytest.mark.parametrize("side", [1, 2, 14])
def test_overlays_without_smoothing_are_blocks(side):
    alpha = np.random.default_rng(0).random((side, side))
    [picture] = draw(np.full((6 * side, 5 * side, 3), 99, np.uint8), alpha.reshape(1, -1), False)
    blocks = picture.reshape(side, 6, side, 5, 3)
    assert np.ptp(blocks, axis=(1, 3)).max() < 1e-5
    assert ((blocks.mean((1, 3)) @ LUMA).ravel().argsort() == alpha.ravel().argsort()).all()


@SMOOTH
@OVERLAYS
@pytest.mark.parametrize("shape", [(1, 60), (60, 1), (5, 3), (200, 300)])
@pytest.mark.parametrize("side", [1, 2, 14])
def test_overlays_of_any_size_are_pictures(side, shape, overlay, smooth):
    photograph = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    alphas = np.random.default_rng(0).random((3, side * side))
    alphas[1], alphas[2, 1:] = 0, 0  # no attention at all; on one location only
    for offset in ((0.0, 0.0), (0.2, -0.2)):
        for picture in draw(photograph, alphas, smooth, overlay, offset):
            assert picture.shape == (*shape, 3) and picture.dtype == np.float32
            assert picture.min() >= 0 and picture.max() <= 1 and np.isfinite(picture).all()
