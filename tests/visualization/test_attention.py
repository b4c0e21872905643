"""Figures: panels and words are laid out for every length, and bright where the attention is."""

import numpy as np
import pytest

from visualization import animation
from visualization.attention import attention_grid
from visualization.overlay import Drawing


def brightness(axes, rows, columns):
    """Mean brightness of the panel's parts on a grid of rows x columns, as rendered."""
    figure = axes.figure
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].mean(2)
    box = axes.get_window_extent()
    top, bottom = round(pixels.shape[0] - box.y1) + 1, round(pixels.shape[0] - box.y0) - 1
    panel = pixels[top:bottom, round(box.x0) + 1 : round(box.x1) - 1]
    return np.array(
        [
            [part.mean() for part in np.array_split(row, columns, axis=1)]
            for row in np.array_split(panel, rows)
        ]
    )


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("shape", [(60, 60), (60, 120), (120, 60)])
def test_attention_is_brightest_where_alpha_is(shape, smooth):
    image = np.full((*shape, 3), 255, dtype=np.uint8)
    half = [slice(0, shape[0]), slice(0, shape[1] // 2)]
    image[tuple(half)] = 0  # black on the left: attention there must be brighter than white without
    for cell in [(1, 2), (10, 1), (12, 12), (0, 9)]:
        alpha = np.zeros((14, 14))
        alpha[cell] = 1
        figure = attention_grid(image, ["dog"], alpha.reshape(1, 196), Drawing(smooth))
        light = brightness(figure.axes[1], 14, 14)
        assert np.unravel_index(light.argmax(), light.shape) == cell


@pytest.mark.parametrize("overlay, least", [("light", 180), ("heat", 140)])
def test_even_attention_leaves_the_whole_photograph_bright(overlay, least):
    image = np.full((60, 60, 3), 200, dtype=np.uint8)
    figure = attention_grid(image, ["a"], np.full((1, 196), 1 / 196), Drawing(overlay=overlay))
    light = brightness(figure.axes[1], 5, 5)
    assert light.min() > least and np.ptp(light) < 2


# The panels


def test_overlay_has_a_panel_per_word():
    image = np.zeros((30, 40, 3), dtype=np.uint8)
    for count in (0, 1, 4, 5, 50):
        words = [f"word{i}" for i in range(count)]
        figure = attention_grid(image, words, np.full((count, 196), 1 / 196))
        titles = [axes.get_title() for axes in figure.axes]
        assert titles == ["<start>", *words]


def test_words_do_not_overlap():
    """Also not long ones over slim photographs, nor those that look like formulas."""
    words = ["a", "counterintuitively-long-word", "$x_", "\\frac", "on"] * 2
    alphas = np.full((len(words), 4), 0.25)
    for shape in [(40, 40, 3), (90, 30, 3), (30, 90, 3), (600, 30, 3), (2, 3, 3)]:
        figure = attention_grid(np.zeros(shape, dtype=np.uint8), words, alphas)
        figure.canvas.draw()
        boxes = [axes.title.get_window_extent() for axes in figure.axes]
        boxes += [axes.get_window_extent() for axes in figure.axes]
        inside = figure.bbox
        for i, box in enumerate(boxes):
            assert inside.x0 <= box.x0 and box.x1 <= inside.x1
            assert inside.y0 <= box.y0 and box.y1 <= inside.y1
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_photographs_keep_their_shape():
    for shape in [(60, 60), (60, 180), (50, 30)]:
        figure = attention_grid(np.zeros((*shape, 3), np.uint8), ["a"], np.ones((1, 4)))
        for axes in figure.axes:
            box = axes.get_window_extent()
            assert box.width / box.height == pytest.approx(shape[1] / shape[0])


@pytest.mark.parametrize("words", [12, 50])
@pytest.mark.parametrize("shape", [(60, 60, 3), (90, 30, 3), (30, 90, 3), (2, 30, 3)])
def test_figures_have_the_aspect_ratio_of_a_page_for_any_caption(words, shape):
    figure = attention_grid(np.zeros(shape, np.uint8), ["dog"] * words, np.ones((words, 4)))
    width, height = figure.get_size_inches()
    assert 0.9 < width / height < 2.2


@pytest.mark.parametrize("words", [1, 2, 3, 12, 50])
def test_words_follow_each_other_row_by_row_without_gaps(words):
    figure = attention_grid(
        np.zeros((60, 60, 3), np.uint8), [f"word{i}" for i in range(words)], np.ones((words, 4))
    )
    boxes = [axes.get_position() for axes in figure.axes]
    order = sorted(range(words + 1), key=lambda i: (round(-boxes[i].y0, 3), boxes[i].x0))
    assert order == list(range(words + 1))
    columns = len({round(box.x0, 3) for box in boxes})
    assert len({round(box.y0, 3) for box in boxes}) == -(-(words + 1) // columns)


def test_photographs_are_not_stretched_among_fifty_words():
    for shape in [(90, 30, 3), (30, 90, 3)]:
        figure = attention_grid(np.zeros(shape, np.uint8), ["dog"] * 50, np.ones((50, 4)))
        for axes in figure.axes:
            box = axes.get_window_extent()
            assert box.width / box.height == pytest.approx(shape[1] / shape[0])


def test_long_words_over_slim_photographs_are_no_smaller_than_nine_points():
    figure = attention_grid(
        np.zeros((90, 30, 3), np.uint8), ["counterintuitively", "a"], np.ones((2, 4))
    )
    assert min(axes.title.get_fontsize() for axes in figure.axes) > 8.99


@pytest.mark.parametrize(
    "words, alphas",
    [
        (["a"], np.ones((2, 4))),
        (["a"], np.ones((1, 5))),
        (["a"], np.ones((1, 2, 2))),
        ([], []),
        (["a"], np.ones(4)),
    ],
)
def test_attention_must_be_square_with_one_row_per_word(words, alphas, tmp_path):
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="attention of shape"):
        attention_grid(image, words, alphas)
    with pytest.raises(ValueError, match="attention of shape"):
        animation.write_animation(tmp_path / "x.gif", image, words, alphas)
    assert not list(tmp_path.iterdir())
