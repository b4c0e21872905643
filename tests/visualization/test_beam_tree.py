"""The tree is what the search did; its drawing shows all of it."""

import math
import xml.etree.ElementTree as ET
from collections import Counter

import pytest
import reference
import torch
from factories import make_case
from matplotlib.colors import to_hex

from modeling.beam_search import Search, beam_search, find_captions
from visualization import beam_tree
from visualization.beam_tree import COLOURS, build_tree, draw_tree

WORDS = ["<pad>", "a", "dog", "&", "<b>", "running", "on", "sand", "<unk>", "<start>", "<end>"]
WORD_MAP = {word: i for i, word in enumerate(WORDS)}
CASES = [(seed, k) for seed in range(8) for k in (1, 2, 3, 5)]


def make_tree(seed, beam_size, **options):
    """A tree of 12 steps at most, with its decoder and image"""
    decoder, features = make_case(seed, end_bias=(-9, -4, -1, 1)[seed % 4])
    image = features[seed : seed + 1]
    return build_tree(decoder, image, WORD_MAP, Search(beam_size, 12, **options)), decoder, image


def textbook(decoder, image, path):
    """log-probabilities (V,) of the word after <start> and this path of nodes"""
    caption = [WORD_MAP["<start>"], *(WORD_MAP[node.word] for node in path), WORD_MAP["<end>"]]
    logits, _ = reference.decode(decoder, reference.encode(image), torch.tensor(caption))
    return logits[-1].log_softmax(0)


@pytest.mark.parametrize("options", [{}, {"length_penalty": 2}, {"no_unk": True}])
def test_the_winning_path_is_the_caption_of_the_search(options):
    finished = 0
    for seed, k in CASES:
        tree, decoder, image = make_tree(seed, k, **options)
        [best] = beam_search(decoder, image, WORD_MAP, k, max_len=12, **options)
        on_path = [[node for node in nodes if node.is_best] for nodes in tree.steps]
        path = [node for nodes in on_path for node in nodes]
        best_words = [WORDS[i] for i in best.tokens] + ["<end>"] * best.finished
        assert [node.word for node in path] == best_words and path[-1].path() == path
        assert [len(nodes) for nodes in on_path[: len(best_words)]] == [1] * len(best_words)
        assert all(node.kept for node in path)
        assert path[-1].total == tree.score == best.score
        assert path[-1].finished == tree.finished == best.finished
        finished += best.finished
    assert 3 < finished < len(CASES)


def test_every_total_is_the_parents_plus_the_words_log_probability():
    for seed, k in CASES[::3]:
        tree, decoder, image = make_tree(seed, k)
        for nodes in tree.steps:
            for node in nodes:
                *before, last = node.path()
                assert last is node
                log_prob = textbook(decoder, image, before)[WORD_MAP[node.word]].item()
                total = (before[-1].total if before else 0) + log_prob
                assert node.total == pytest.approx(total, abs=1e-9)


def test_the_candidates_are_the_best_of_each_open_beam():
    for seed, k in CASES[::3]:
        tree, decoder, image = make_tree(seed, k)
        for before, nodes in zip([[None], *tree.steps], tree.steps):
            # None is <start>
            beams = [node for node in before if node is None or node.kept and not node.finished]
            assert {node.parent for node in nodes} == set(beams)
            for beam in beams:
                log_probs = textbook(decoder, image, beam.path() if beam else [])
                expected = [WORDS[i] for i in log_probs.topk(k).indices.tolist()]
                assert [node.word for node in nodes if node.parent is beam] == expected


def test_the_best_candidates_are_kept_and_a_finished_one_narrows_the_beam():
    shrunk = 0
    for seed, k in CASES:
        decoder, features = make_case(seed, end_bias=0)
        with torch.no_grad():
            decoder.fc.weight[WORD_MAP["<end>"], 0] = 0  # no clock: <end> comes up now and then
        # Searching for all k of them it continues to the end.
        tree, width = build_tree(decoder, features[:1], WORD_MAP, Search(k, 12, n_best=k)), k
        for nodes in tree.steps:
            kept = [node for node in nodes if node.kept]
            assert nodes[:width] == kept and len(kept) == width
            assert [n.total for n in nodes] == sorted((n.total for n in nodes), reverse=True)
            assert [n for n in nodes if n.finished] == [n for n in kept if n.word == "<end>"]
            width -= sum(node.finished for node in kept)
            shrunk += 0 < width < k
    assert shrunk > 10


def test_a_callback_changes_nothing():
    decoder, features = make_case(2, end_bias=-3)
    calls = []
    plain = find_captions(decoder, features, WORD_MAP, Search(3, 12))
    recorded = find_captions(
        decoder, features, WORD_MAP, Search(3, 12), callback=lambda *x: calls.append(x)
    )
    assert [(c.tokens, c.score) for c in plain] == [(c.tokens, c.score) for c in recorded]
    assert max(len(c.tokens) for c in plain) <= len(calls) <= 13  # <end> may follow


def test_an_empty_caption_and_a_beam_wider_than_the_vocabulary_have_trees_too(tmp_path):
    decoder, features = make_case(0, end_bias=1e4)
    tree = build_tree(decoder, features[:1], WORD_MAP, Search(3))
    assert tree.words == [] and tree.finished and len(tree.steps) == 1
    draw_tree(tree, tmp_path / "tree.svg")
    assert "(no words)" in (tmp_path / "tree.svg").read_text()
    decoder, features = make_case(1, end_bias=-9)
    tree = build_tree(decoder, features[:1], WORD_MAP, Search(20, 3))
    assert [sum(node.kept for node in nodes) for nodes in tree.steps][:2] == [11, 10]
    assert all(math.isfinite(node.total) for nodes in tree.steps for node in nodes)


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """`draw(tree)`: the axes that were drawn and written to tree.svg"""
    figures, save = [], beam_tree.save
    monkeypatch.setattr(beam_tree, "save", lambda figure, path: figures.append(figure))

    def draw(tree):
        draw_tree(tree, tmp_path / "tree.svg")
        save(figures[-1], tmp_path / "tree.svg")
        return figures[-1].axes[0]

    return draw


def boxes_of(axes):
    """The colour of the box at each place (column, row), below the legend"""
    return {
        (box.get_x(), round(box.get_y() + 0.4, 6)): to_hex(box.get_facecolor())
        for box in axes.patches
        if box.get_y() > -1
    }


@pytest.mark.parametrize("seed, beam_size", [(0, 3), (1, 1), (3, 3), (6, 9)])
def test_the_drawing_shows_each_step_s_best_candidates_and_how_they_ended(draw, seed, beam_size):
    tree, *_ = make_tree(seed, beam_size)
    axes = draw(tree)
    boxes, texts = boxes_of(axes), {text.get_position(): text.get_text() for text in axes.texts}
    expected = {(0, 0): COLOURS["best"][1]}
    for x, nodes in enumerate(tree.steps, 1):
        for y, node in enumerate(nodes[: 3 * beam_size]):
            kind = "finished" if node.finished else "kept" if node.kept else "dropped"
            expected[x, y] = COLOURS["best" if node.is_best else kind][1]
            word, score = texts[x + 0.03, y].rsplit(maxsplit=1)
            assert word == node.word and score == f"{node.total:.2f}"
        kept = sum(node.kept for node in nodes)
        assert kept <= 3 * beam_size and texts[x, -0.75].startswith(f"step {x}: {kept} of")
    assert boxes == expected
    assert texts[0, -2.55] == f"{' '.join(tree.words) or '(no words)'}   {tree.score:.2f} nats"


def test_every_word_is_linked_to_its_parent_and_the_best_path_stands_out(draw):
    tree, *_ = make_tree(2, 3)
    axes = draw(tree)
    row_of = {node: y for nodes in tree.steps for y, node in enumerate(nodes)} | {None: 0}
    expected = Counter(
        (x - 1 + 0.75, row_of[node.parent], x, row_of[node], COLOURS[node.kind][0])
        for x, nodes in enumerate(tree.steps, 1)
        for node in nodes[:9]
    )
    links = Counter()
    for line in axes.lines:
        (x1, x2), (y1, y2) = line.get_xdata(), line.get_ydata()
        links[x1, y1, x2, y2, line.get_color()] += 1
    assert links == expected
    best = [line.get_zorder() for line in axes.lines if line.get_color() == COLOURS["best"][0]]
    assert len(best) == len(tree.words) + tree.finished
    assert min(best) >= max(line.get_zorder() for line in axes.lines)


@pytest.mark.parametrize("seed, beam_size", [(1, 3), (2, 5)])
def test_nothing_is_clipped_or_overlaps(draw, seed, beam_size):
    tree, *_ = make_tree(seed, beam_size)
    axes = draw(tree)
    axes.figure.canvas.draw()
    page = axes.figure.bbox
    texts = [text.get_window_extent() for text in axes.texts]
    boxes = [box.get_window_extent() for box in axes.patches]
    for group in (texts, boxes):
        for i, box in enumerate(group):
            assert page.x0 <= box.x0 and box.x1 <= page.x1
            assert page.y0 <= box.y0 and box.y1 <= page.y1
            assert not any(box.overlaps(other) for other in group[i + 1 :])


def test_the_suffix_says_the_format_and_svg_has_words_that_can_be_searched(tmp_path):
    strange = ["<pad>", "a&b", '"<i>"', "]]>", "\x00\x1b", "\ud800", "$é_", "犬", "<unk>"]
    word_map = {word: i for i, word in enumerate([*strange, "<start>", "<end>"])}
    decoder, features = make_case(0, end_bias=-9)
    tree = build_tree(decoder, features[:1], word_map, Search(11, 6))
    for name, start in [("x.svg", b"<?xml"), ("x.png", b"\x89PNG"), ("x.PDF", b"%PDF")]:
        draw_tree(tree, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    drawn = " ".join(ET.parse(tmp_path / "x.svg").getroot().itertext())
    assert all(word in drawn for word in ("a&b", '"<i>"', "]]>", "\\x00", "\\ud800", "$é_", "犬"))
    with pytest.raises(ValueError, match="abc"):
        draw_tree(tree, tmp_path / "x.abc")
    assert len(list(tmp_path.iterdir())) == 3
