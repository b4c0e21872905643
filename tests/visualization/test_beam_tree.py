"""The tree is what the search did; its drawing shows all of it."""

import math
import xml.etree.ElementTree as ET

import pytest
import reference
import torch
from factories import make_case

from modeling.beam_search import Search, beam_search, find_captions
from visualization import beam_tree
from visualization.beam_tree import build_tree, draw_tree

WORDS = ["<pad>", "a", "dog", "&", "<b>", "running", "on", "sand", "<unk>", "<start>", "<end>"]
WORD_MAP = {word: i for i, word in enumerate(WORDS)}
CASES = [(seed, k) for seed in range(8) for k in (1, 2, 3, 5)]
SVG = "{http://www.w3.org/2000/svg}"


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
                assert node.log_prob == pytest.approx(log_prob, abs=1e-9)


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


def draw(tree, folder):
    draw_tree(tree, folder / "tree.svg")
    return ET.parse(folder / "tree.svg").getroot()


def nodes_of(root):
    """(word, score, its box or None) of each node drawn"""
    return [
        (*(text.text for text in group.iter(f"{SVG}text")), group.find(f"{SVG}rect"))
        for group in root.iter(f"{SVG}g")
    ]


@pytest.mark.parametrize("seed, beam_size", [(0, 3), (1, 1), (3, 3), (2, 5), (6, 9)])
def test_the_drawing_boxes_every_kept_word_and_greys_the_dropped(tmp_path, seed, beam_size):
    tree, *_ = make_tree(seed, beam_size)
    root = draw(tree, tmp_path)
    boxes = [(word, score) for word, score, box in nodes_of(root) if box is not None]
    kept = [(node.word, f"{node.total:.2f}") for nodes in tree.steps for node in nodes if node.kept]
    assert boxes == kept
    plain = [(word, score) for word, score, box in nodes_of(root) if box is None]
    dropped = [
        [(node.word, f"{node.total:.2f}") for node in nodes if not node.kept]
        for nodes in tree.steps
    ]
    assert plain == [node for nodes in dropped for node in nodes[: 2 * beam_size]]
    for group in root.iter(f"{SVG}g"):
        grey = group.find(f"{SVG}rect") is None
        assert {text.get("fill") for text in group.iter(f"{SVG}text")} == {
            beam_tree.FAINT_TEXT if grey else beam_tree.TEXT
        }
    caption = " ".join(tree.words)
    assert any(text.text.startswith(caption) for text in root.iter(f"{SVG}text"))


def test_kept_words_are_linked_to_their_parents_and_the_best_path_is_highlighted(tmp_path):
    tree, *_ = make_tree(2, 3)
    root = draw(tree, tmp_path)
    rects = [group.find(f"{SVG}rect") for group in root.iter(f"{SVG}g")]
    boxes = [r for r in root.iter(f"{SVG}rect") if r.get("height") == str(beam_tree.BOX)]
    assert [r for r in rects if r is not None] == boxes[1:]  # the first is <start>
    kept = [node for nodes in tree.steps for node in nodes if node.kept]
    box_of = {None: boxes[0]} | dict(zip(kept, boxes[1:]))

    def edge(box, right):
        middle = float(box.get("y")) + float(box.get("height")) / 2
        return float(box.get("x")) + right * float(box.get("width")), middle

    drawn = []
    for path in root.iter(f"{SVG}path"):
        numbers = path.get("d").replace("M", "").replace("C", "").replace(",", " ").split()
        if path.get("stroke") != beam_tree.DROPPED_LINK:
            drawn.append((path.get("stroke"), *map(float, numbers[:2] + numbers[-2:])))
    expected = [
        (
            beam_tree.BEST[1] if node.is_best else beam_tree.LINK,
            *edge(box_of[node.parent], True),
            *edge(box_of[node], False),
        )
        for node in kept
    ]
    assert len(drawn) == len(expected)
    for ours, wanted in zip(sorted(drawn), sorted(expected)):
        assert ours[0] == wanted[0] and ours[1:] == pytest.approx(wanted[1:], abs=0.11)
    winners = [box for node, box in box_of.items() if node is None or node.is_best]
    assert {box.get("fill") for box in winners} == {beam_tree.BEST[0]}
    assert len(winners) == len(tree.words) + 1 + tree.finished
    finished = [box for node, box in box_of.items() if node and node.finished and not node.is_best]
    assert finished and {box.get("fill") for box in finished} == {beam_tree.FINISHED[0]}


@pytest.mark.parametrize("seed, beam_size", [(1, 3), (3, 1), (2, 5), (0, 9)])
def test_nothing_is_clipped_or_overlaps(tmp_path, seed, beam_size):
    tree, *_ = make_tree(seed, beam_size)
    tree.words = tree.words or ["nothing"] * 40
    root = draw(tree, tmp_path)
    width, height = float(root.get("width")), float(root.get("height"))
    boxes = [rectangle(r) for r in root.iter(f"{SVG}rect") if r.get("height") == "21"]
    words, headings = [], []  # those within the boxes or without any, those outside
    for text in root.iter(f"{SVG}text"):
        size, x, y = (float(text.get(name)) for name in ("font-size", "x", "y"))
        wide = beam_tree._width(text.text, size)
        x -= wide * (text.get("text-anchor") == "end")
        inside = text not in root[:] or text.text == "<start>"
        (words if inside else headings).append((x, y - 0.75 * size, x + wide, y + 0.22 * size))
    for x, y, right, bottom in boxes + words + headings:
        assert 0 <= x and right <= width and 0 <= y and bottom <= height
    assert len(boxes) >= 4 and len(words) >= 7
    for group in (boxes + headings, words + headings):
        for i, (x, y, right, bottom) in enumerate(group):
            assert not any(
                x < b and a < right and y < d and c < bottom for a, c, b, d in group[i + 1 :]
            )


def rectangle(rect):
    """left, top, right, bottom"""
    x, y, width, height = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def test_words_with_xml_characters_are_escaped(tmp_path):
    strange = [
        "<pad>",
        "a&b",
        '"<i>"',
        "]]>",
        "\x00\x1b",
        "\ud800",
        "𝛼 é 犬",
        "'",
        "<unk>",
        "<start>",
        "<end>",
    ]
    decoder, features = make_case(0, end_bias=-9)
    tree = build_tree(
        decoder, features[:1], {word: i for i, word in enumerate(strange)}, Search(11, 6)
    )
    root = draw(tree, tmp_path)
    drawn = {word for word, *_ in nodes_of(root)}
    assert {"a&b", '"<i>"', "]]>", "𝛼 é 犬", "'", "<unk>", "\ufffd\ufffd"} <= drawn


def test_an_empty_caption_has_a_tree_too(tmp_path):
    decoder, features = make_case(0, end_bias=1e4)
    tree = build_tree(decoder, features[:1], WORD_MAP, Search(3))
    assert tree.words == [] and tree.finished and len(tree.steps) == 1
    assert "(no words)" in "".join(draw(tree, tmp_path).itertext())


def test_a_beam_wider_than_the_vocabulary_keeps_what_there_is():
    decoder, features = make_case(1, end_bias=-9)
    tree = build_tree(decoder, features[:1], WORD_MAP, Search(20, 3))
    assert [sum(node.kept for node in nodes) for nodes in tree.steps][:2] == [11, 10]
    assert all(math.isfinite(node.total) for nodes in tree.steps for node in nodes)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tree.svg"
    path.write_text("old")
    tree, *_ = make_tree(0, 3)
    monkeypatch.setattr(beam_tree, "open", lambda *_, **__: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        draw_tree(tree, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
