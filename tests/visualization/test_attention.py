"""Figures: panels and words are laid out for every length, and bright where the attention is."""

import numpy as np
import pytest

from visualization.attention import attention_grid


def grid(words, shape=(60, 60), side=2, **options):
    words = [f"word{i}" for i in range(words)] if isinstance(words, int) else words
    image, alphas = np.zeros((*shape, 3), np.uint8), np.full((len(words), side * side), 0.25)
    return attention_grid(image, words, alphas, **options)


def brightness(axes, side):
    """Mean brightness of the panel's parts on a grid of side x side, as rendered"""
    axes.figure.canvas.draw()
    pixels = np.asarray(axes.figure.canvas.buffer_rgba())[..., :3].mean(2)
    box = axes.get_window_extent()
    top, bottom = round(pixels.shape[0] - box.y1) + 1, round(pixels.shape[0] - box.y0) - 1
    panel = pixels[top:bottom, round(box.x0) + 1 : round(box.x1) - 1]
    rows = [np.array_split(row, side, axis=1) for row in np.array_split(panel, side)]
    return np.array([[part.mean() for part in row] for row in rows])


@pytest.mark.parametrize("smooth, offset", [(True, (0.0, 0.0)), (False, (0.0, 1 / 14))])
def test_attention_is_brightest_where_alpha_is(smooth, offset):
    image = np.full((60, 120, 3), 255, np.uint8)
    image[:, :60] = 0  # black on the left: attention there must be brighter than white without
    for row, column in [(1, 2), (10, 1), (12, 12), (2, 9)]:
        alpha = np.zeros((14, 14))
        alpha[row, column] = 1
        figure = attention_grid(image, ["dog"], alpha.reshape(1, 196), smooth, offset)
        light = brightness(figure.axes[1], 14)
        expected = row + round(14 * offset[1]), column
        assert np.unravel_index(light.argmax(), light.shape) == expected


def test_the_photograph_comes_first_then_a_panel_per_word_row_by_row():
    for count in (0, 1, 2, 5, 12, 50):
        figure = grid(count, shape=(30, 40))
        titles = [axes.get_title() for axes in figure.axes]
        assert titles == ["<start>", *(f"word{i}" for i in range(count))]
        boxes = [axes.get_position() for axes in figure.axes]
        order = sorted(range(count + 1), key=lambda i: (round(-boxes[i].y0, 3), boxes[i].x0))
        assert order == list(range(count + 1))
        columns = len({round(box.x0, 3) for box in boxes})
        assert len({round(box.y0, 3) for box in boxes}) == -(-(count + 1) // columns)
        assert (figure.axes[0].images[0].get_array() == 0).all()


def test_words_do_not_overlap_and_are_readable():
    """Also not long ones over slim photographs, nor those that look like formulas."""
    words = ["a", "counterintuitively-long-word", "$x_", "\\frac", "on"] * 2
    for shape in [(40, 40), (90, 30), (30, 90), (600, 30), (2, 3)]:
        figure = grid(words, shape)
        figure.canvas.draw()
        boxes = [axes.title.get_window_extent() for axes in figure.axes]
        boxes += [axes.get_window_extent() for axes in figure.axes]
        inside = figure.bbox
        for i, box in enumerate(boxes):
            assert inside.x0 <= box.x0 and box.x1 <= inside.x1
            assert inside.y0 <= box.y0 and box.y1 <= inside.y1
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])
    figure = grid(["counterintuitively", "a"], (90, 30))
    assert min(axes.title.get_fontsize() for axes in figure.axes) > 8.99


@pytest.mark.parametrize("shape", [(60, 60), (90, 30), (30, 90), (2, 30)])
def test_photographs_keep_their_shape_in_a_figure_that_has_that_of_a_page(shape):
    for words, dpi in ((12, 60), (50, 120)):
        figure = grid(words, shape, dpi=dpi)
        width, height = figure.get_size_inches()
        assert 0.9 < width / height < 2.2 and 7 < width < 40 and figure.dpi == dpi
        for axes in figure.axes:
            box, pixels = axes.get_window_extent(), axes.images[0].get_array().shape
            assert box.width / box.height == pytest.approx(shape[1] / shape[0])
            assert abs(pixels[0] - box.height) < 1 and abs(pixels[1] - box.width) < 1
