"""The tree is what the search did; its drawing shows all of it."""

import math
import xml.etree.ElementTree as ET

import pytest
import reference
import torch
from factories import make_case
from matplotlib.colors import to_hex

from modeling.beam_search import Search, beam_search
from visualization import beam_tree
from visualization.beam_tree import COLOURS, build_tree, draw_tree

WORDS = ["<pad>", "a", "dog", "&", "<b>", "running", "on", "sand", "<unk>", "<start>", "<end>"]
WORD_MAP = {word: i for i, word in enumerate(WORDS)}
CASES = [(seed, k) for seed in range(8) for k in (1, 2, 5)]


def make_tree(seed, beam_size, **options):
    """A tree of 12 steps at most, with its decoder and image"""
    decoder, features = make_case(seed, end_bias=(-9, -4, -1, 1)[seed % 4])
    image = features[seed : seed + 1]
    return build_tree(decoder, image, WORD_MAP, Search(beam_size, 12, **options)), decoder, image


def kept(node):
    return node.kind != "dropped"


@pytest.mark.parametrize("options", [{}, {"length_penalty": 2}, {"no_unk": True}])
def test_the_winning_path_is_the_caption_of_the_search(options):
    finished = 0
    for seed, k in CASES:
        tree, decoder, image = make_tree(seed, k, **options)
        [best] = beam_search(decoder, image, WORD_MAP, k, max_len=12, **options)
        path = [node for nodes in tree.steps for node in nodes if node.kind == "best"]
        best_words = [WORDS[i] for i in best.tokens] + ["<end>"] * best.finished
        words = [node.word for node in path if node.word not in ("<pad>", "<start>")]
        assert words == best_words and path[-1].path() == path
        assert all(node in nodes for node, nodes in zip(path, tree.steps))
        assert path[-1].total == tree.score == best.score
        assert tree.words == best_words[: len(best.tokens)]
        finished += best.finished
    assert 3 < finished < len(CASES)


def test_the_candidates_are_the_best_of_each_open_beam_with_their_totals():
    for seed, k in CASES[::3]:
        tree, decoder, image = make_tree(seed, k)
        for before, nodes in zip([[None], *tree.steps], tree.steps):  # None is <start>
            beams = [node for node in before if not node or kept(node) and node.word != "<end>"]
            assert {node.parent for node in nodes} == set(beams)
            for beam in beams:
                path = [WORD_MAP[node.word] for node in (beam.path() if beam else [])]
                tokens = torch.tensor([WORD_MAP["<start>"], *path, WORD_MAP["<end>"]])
                logits, _ = reference.decode(decoder, reference.encode(image), tokens)
                best = logits[-1].log_softmax(0).topk(k)
                found = [node for node in nodes if node.parent is beam]
                assert [node.word for node in found] == [WORDS[i] for i in best.indices]
                totals = best.values + (beam.total if beam else 0)
                assert [node.total for node in found] == pytest.approx(totals.tolist(), abs=1e-9)


def test_the_best_candidates_are_kept_and_a_finished_one_narrows_the_beam():
    shrunk = 0
    for seed, k in CASES:
        decoder, features = make_case(seed, end_bias=0)
        with torch.no_grad():
            decoder.fc.weight[WORD_MAP["<end>"], 0] = 0  # no clock: <end> comes up now and then
        # Searching for all k of them it continues to the end.
        tree, width = build_tree(decoder, features[:1], WORD_MAP, Search(k, 12, n_best=k)), k
        for nodes in tree.steps:
            assert list(filter(kept, nodes)) == nodes[:width] and len(nodes) >= width
            assert [n.total for n in nodes] == sorted((n.total for n in nodes), reverse=True)
            assert all(n.kind in ("finished", "best") for n in nodes[:width] if n.word == "<end>")
            width -= sum(node.word == "<end>" for node in nodes[:width])
            shrunk += 0 < width < k
    assert shrunk > 10


@pytest.mark.parametrize("seed, beam_size", [(0, 3), (1, 1), (6, 9)])
def test_the_drawing_shows_each_steps_best_candidates_linked_to_their_parents(
    seed, beam_size, monkeypatch, tmp_path
):
    tree, figures = make_tree(seed, beam_size)[0], []
    monkeypatch.setattr(beam_tree, "save", lambda figure, *_: figures.append(figure))
    draw_tree(tree, tmp_path / "tree.svg")
    [axes] = figures[0].axes
    boxes = {box.get_xy(): to_hex(box.get_facecolor()) for box in axes.patches if box.get_y() > -1}
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    row_of = {node: y for nodes in tree.steps for y, node in enumerate(nodes)} | {None: 0}
    expected, links = {(0, -0.4): COLOURS["best"][1]}, []  # <start>
    for x, nodes in enumerate(tree.steps, 1):
        for y, node in enumerate(nodes[: 3 * beam_size]):
            expected[x, y - 0.4] = COLOURS[node.kind][1]
            links.append((x - 0.25, row_of[node.parent], x, y, COLOURS[node.kind][0]))
            assert texts[x + 0.03, y].split() == [node.word, f"{node.total:.2f}"]
        assert f"step {x}: {sum(map(kept, nodes))} of {len(nodes)} kept" in texts.values()
    assert boxes == expected
    assert f"{' '.join(tree.words) or '(no words)'}   {tree.score:.2f} nats" in texts.values()
    drawn = [(*zip(*line.get_xydata()), line.get_color()) for line in axes.lines]
    assert [(x1, y1, x2, y2, colour) for (x1, x2), (y1, y2), colour in drawn] == links
    axes.figure.canvas.draw()
    for artists in (axes.texts, axes.patches):  # nothing is clipped or overlaps
        extents = [artist.get_window_extent() for artist in artists]
        for i, box in enumerate(extents):
            assert 0 <= box.x0 and box.x1 <= axes.figure.bbox.x1
            assert 0 <= box.y0 and box.y1 <= axes.figure.bbox.y1
            assert not any(box.overlaps(other) for other in extents[i + 1 :])


def test_strange_words_empty_captions_and_beams_wider_than_the_vocabulary_are_drawn(tmp_path):
    strange = ["<pad>", "a&b", '"<i>"', "]]>", "\x00\x1b", "\ud800", "$é_", "dog", "<unk>"]
    word_map = {word: i for i, word in enumerate([*strange, "<start>", "<end>"])}
    decoder, features = make_case(0, end_bias=-9)
    tree = build_tree(decoder, features[:1], word_map, Search(20, 3))
    assert [sum(map(kept, nodes)) for nodes in tree.steps][:2] == [11, 10]
    assert all(math.isfinite(node.total) for nodes in tree.steps for node in nodes)
    draw_tree(tree, tmp_path / "x.svg")
    drawn = " ".join(ET.parse(tmp_path / "x.svg").getroot().itertext())  # it can be searched
    assert all(word in drawn for word in ("a&b", '"<i>"', "]]>", "\\x00", "\\ud800", "$é_", "dog"))
    decoder, features = make_case(0, end_bias=1e4)
    tree = build_tree(decoder, features[:1], WORD_MAP, Search(3))
    assert tree.words == [] and len(tree.steps) == 1
    draw_tree(tree, tmp_path / "x.PDF")
    assert (tmp_path / "x.PDF").read_bytes().startswith(b"%PDF")
