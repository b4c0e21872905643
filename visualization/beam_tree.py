"""Beam search as a picture: what each step considered, kept and dropped."""

import math
import re
from dataclasses import dataclass
from functools import cache
from xml.sax.saxutils import escape

from PIL import ImageFont

from modeling.beam_search import find_captions
from utils import atomic_write
from visualization.figures import FONT_FILE

SIZE, SMALL = 13, 10.5  # pixels, the letters of words and of scores
ROW, BOX, GAP, MARGIN = 26, 21, 36, 18  # pixels: lines, nodes, between columns, around
HEADER = 104  # pixels, down to the middle of the first node
TEXT, FAINT_TEXT, BACKGROUND = "#1b1b1b", "#6f6f6f", "#ffffff"
LINK, DROPPED_LINK = "#8fa9c9", "#e4e4e4"
# Fill and outline of nodes that are kept, finished, and on the path of the best caption.
KEPT, FINISHED, BEST = ("#e9f0f9", "#8fa9c9"), ("#dcefdc", "#3f8a4a"), ("#ffe7b0", "#c26a00")


@dataclass(eq=False)
class Node:
    """A candidate word that continues a beam."""

    word: str
    total: float  # log-probability in nats of the caption up to this word
    parent: "Node | None"  # a node kept in the previous step; None for <start>
    kept: bool
    finished: bool  # kept, and the word is <end>
    is_best: bool = False  # on the path of the caption that the search returned

    @property
    def log_prob(self):
        return self.total - (self.parent.total if self.parent else 0)

    def path(self):
        """The nodes from the first word up to this one."""
        return [*(self.parent.path() if self.parent else []), self]


@dataclass
class Tree:
    beam_size: int
    steps: list  # per step a list of Nodes, the best total first
    words: list  # of the best caption
    score: float  # its total log-probability in nats, <end> included
    finished: bool  # whether it has reached <end>


def build_tree(decoder, features, word_map, search):
    """
    Search for the caption of one image and record what it considers: at each step the beam_size
    best continuations of each open beam, since no others can be kept. Returns a Tree.

    features: (1, G, E); search: a `modeling.beam_search.Search`
    """
    words = {i: word for word, i in word_map.items()}
    steps, beams = [], [None] * search.beam_size  # beams: the last Node of each beam

    def record_step(totals, tokens, *kept):
        beam_of = {
            (parent, token): beam
            for beam, (score, token, parent) in enumerate(zip(*(x[0].tolist() for x in kept)))
            if score > -math.inf
        }
        parents, nodes = beams.copy(), []
        for parent, row in enumerate(zip(totals[0].tolist(), tokens[0].tolist())):
            for total, token in zip(*row):
                if total > -math.inf:
                    beam = beam_of.get((parent, token))
                    nodes.append(
                        Node(
                            words[token],
                            total,
                            parents[parent],
                            beam is not None,
                            beam is not None and token == word_map["<end>"],
                        )
                    )
                    if beam is not None:
                        beams[beam] = nodes[-1]
        steps.append(sorted(nodes, key=lambda node: (-node.total, not node.kept)))

    [best] = find_captions(decoder, features, word_map, search, callback=record_step)
    tree = Tree(search.beam_size, steps, [words[i] for i in best.tokens], best.score, best.finished)
    best_words = tree.words + ["<end>"] * best.finished
    for node in steps[len(best_words) - 1]:
        path = node.path()
        if node.kept and [n.word for n in path] == best_words:
            for n in path:
                n.is_best = True
    return tree


def draw_tree(tree, path):
    """
    Write an SVG with `atomic_write`: a column for each step with the candidates, the best total
    first; the kept ones are in boxes and linked to their parents. Of the dropped ones it shows two
    for each beam.
    """
    shown = [_nodes_to_draw(nodes, tree.beam_size) for nodes in tree.steps]
    x = MARGIN + _width("<start>", SIZE) + 16
    columns = [f"{_box(MARGIN, HEADER, x - MARGIN, BEST)}{_text(MARGIN + 8, HEADER, '<start>')}"]
    # For each node the middle of its left edge, and the x of its right edge; None is <start>.
    positions, right, links = {None: (MARGIN, HEADER)}, {None: x}, []
    for number, (nodes, all_nodes) in enumerate(zip(shown, tree.steps), 1):
        left = x + GAP
        x = left + 24 + max(_width(n.word, SIZE) + _width(_score(n), SMALL) for n in nodes)
        kept = sum(node.kept for node in all_nodes)
        columns.append(
            _text(left, 64, f"step {number}", weight="bold")
            + _text(left, 80, f"{kept} of {len(all_nodes)} kept", SMALL, FAINT_TEXT)
        )
        for row, node in enumerate(nodes):
            positions[node], right[node] = (left, HEADER + row * ROW), x
            links.append(_link(node, positions, right))
            columns.append(_node(node, *positions[node], x - left))
        if len(all_nodes) > len(nodes):
            columns.append(
                _text(
                    left + 8,
                    HEADER + len(nodes) * ROW,
                    f"and {len(all_nodes) - len(nodes)} more",
                    SMALL,
                    FAINT_TEXT,
                )
            )
    header, header_width = _header(tree)
    width = max(x, header_width) + MARGIN
    height = HEADER + ROW * max(len(nodes) for nodes in shown) + MARGIN
    links = "\n".join(link for _, link in sorted(links))  # those drawn first are below
    svg = f"""<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" \
viewBox="0 0 {width:.0f} {height:.0f}" font-family="DejaVu Sans, Verdana, sans-serif" \
style="color-scheme: light">
<title>Beam search with {tree.beam_size} beams</title>
<rect width="100%" height="100%" fill="{BACKGROUND}"/>
{header}
{links}
{chr(10).join(columns)}
</svg>
"""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(svg)


def _nodes_to_draw(nodes, beam_size):
    """The kept nodes and the best of the dropped ones"""
    dropped = [node for node in nodes if not node.kept][: 2 * beam_size]
    return [node for node in nodes if node.kept or node in dropped]


def _header(tree):
    """Two lines: the caption with its score, and the legend. Returns SVG and its width."""
    caption = f"{' '.join(tree.words) or '(no words)'} ({tree.score:.2f})"
    parts, x = [_text(MARGIN, 18, caption, SIZE + 2, weight="bold")], MARGIN
    width = x + _width(caption, (SIZE + 2) * 1.15)  # bold letters are wider
    for name, colours in [
        ("kept", KEPT),
        ("finished, set aside", FINISHED),
        ("the best finished" if tree.finished else "the best, unfinished", BEST),
        ("dropped", None),
    ]:
        if colours:
            parts.append(_box(x, 40, 16, colours, 12, colours is FINISHED))
            x += 22
        parts.append(_text(x, 40, name, SMALL, TEXT if colours else FAINT_TEXT))
        x += _width(name, SMALL) + 18
    note = "numbers: log-probability in nats, up to this word"
    parts.append(_text(x, 40, note, SMALL, FAINT_TEXT))
    return "\n".join(parts), max(width, x + _width(note, SMALL))


def _node(node, x, y, width):
    """A word and its score on one line, in a box if it is kept; its path as a tooltip."""
    words = " ".join(n.word for n in node.path())
    tooltip = f"{words}\nlog-probability {node.log_prob:.3f}, total {node.total:.3f}"
    colour, box = FAINT_TEXT, ""
    if node.kept:
        outline = BEST if node.is_best else FINISHED if node.finished else KEPT
        colour, box = TEXT, _box(x, y, width, outline, BOX, node.finished)
    return (
        f"<g><title>{_escape(tooltip)}</title>{box}{_text(x + 8, y, node.word, SIZE, colour)}"
        f"{_text(x + width - 8, y, _score(node), SMALL, colour, anchor='end')}</g>"
    )


def _link(node, positions, right):
    """
    The line from a node's parent: its drawing order (0, 1 or 2, the last in front), and its SVG.
    """
    (x1, y1), (x2, y2) = (right[node.parent], positions[node.parent][1]), positions[node]
    middle, order = (x1 + x2) / 2, node.kept + node.is_best
    colour, line_width = [(DROPPED_LINK, 1), (LINK, 1.5), (BEST[1], 3)][order]
    return order, (
        f'<path d="M{x1:.1f},{y1} C{middle:.1f},{y1} {middle:.1f},{y2} {x2:.1f},{y2}" '
        f'fill="none" stroke="{colour}" stroke-width="{line_width}"/>'
    )


def _box(x, y, width, colours, height=BOX, rounded=False):
    """A box that is vertically centred at y"""
    fill, stroke = colours
    return (
        f'<rect x="{x:.1f}" y="{y - height / 2}" width="{width:.1f}" height="{height}" '
        f'rx="{height / 2 if rounded else 3}" fill="{fill}" stroke="{stroke}" '
        f'stroke-width="1.3"/>'
    )


def _text(x, y, text, size=SIZE, colour=TEXT, weight="normal", anchor="start"):
    """A line of text that is vertically centred at y"""
    return (
        f'<text x="{x:.1f}" y="{y + 0.35 * size:.1f}" font-size="{size}" fill="{colour}" '
        f'font-weight="{weight}" text-anchor="{anchor}">{_escape(text)}</text>'
    )


def _score(node):
    return f"{node.total:.2f}"


def _escape(text):
    """Text escaped for XML; characters that XML does not allow are replaced."""
    return escape(re.sub(r"[^\t\n -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))


@cache
def _font():
    return ImageFont.truetype(FONT_FILE, 100)


def _width(text, size):
    """The width of a text in DejaVu Sans, a wide font; East Asian letters count as squares."""
    return sum(max(_font().getlength(c), 100 * (c > "\u2e80")) for c in text) * size / 100
