"""Beam search as a picture: what each step considered, kept and dropped."""

import math
from dataclasses import dataclass
from itertools import chain

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from modeling.beam_search import find_captions
from utils import printable
from visualization.figures import default_style, font_families, save

COLUMN, ROW = 1.9, 0.3  # inches, of a step and of a candidate
BOX = 0.75  # of a column's width
SHOWN = 3  # candidates of a step for each beam; those kept are among them
# Border and fill of nodes by their kind; "best" is on the path of the caption that was found
COLOURS = {
    "dropped": ("#dddddd", "#ffffff"),
    "kept": ("#8fa9c9", "#e9f0f9"),
    "finished": ("#3f8a4a", "#dcefdc"),
    "best": ("#c26a00", "#ffe7b0"),
}


@dataclass(eq=False)
class Node:
    """A candidate word that continues a beam."""

    word: str
    total: float  # log-probability in nats of the caption up to this word
    parent: "Node | None"  # a node kept in the previous step; None for <start>
    kind: str = "dropped"  # a key of COLOURS

    def path(self):
        """The nodes from the first word up to this one."""
        return [*(self.parent.path() if self.parent else []), self]


@dataclass
class Tree:
    beam_size: int
    steps: list  # per step a list of Nodes, the best total first
    words: list  # of the best caption
    score: float  # its total log-probability in nats, <end> included


def build_tree(decoder, features, word_map, search):
    """
    Search for the caption of one image and record what it considers: at each step the beam_size
    best continuations of each open beam, since no others can be kept. Returns a Tree.

    features: (1, G, E); search: a `modeling.beam_search.Search`
    """
    words = {i: word for word, i in word_map.items()}
    steps, beams = [], [None] * search.beam_size  # beams: the last Node of each beam

    def record_step(totals, tokens, scores, kept_tokens, parents):
        nodes = {
            (parent, token): Node(words[token], total, beams[parent])
            for parent, row in enumerate(zip(totals[0].tolist(), tokens[0].tolist()))
            for total, token in zip(*row)
            if total > -math.inf
        }
        kept = zip(parents[0].tolist(), kept_tokens[0].tolist())
        for beam, (key, score) in enumerate(zip(kept, scores[0].tolist())):
            if score > -math.inf:
                beams[beam] = node = nodes[key]
                node.kind = "finished" if node.word == "<end>" else "kept"
        order = sorted(nodes.values(), key=lambda node: (-node.total, node.kind == "dropped"))
        steps.append(order)

    [best] = find_captions(decoder, features, word_map, search, callback=record_step)
    tree = Tree(search.beam_size, steps, [words[i] for i in best.tokens], best.score)
    best_words = tree.words + ["<end>"] * best.finished
    for last in chain(*steps):
        path, left_out = last.path(), ("<pad>", "<start>")  # of a caption's words
        if last.total == best.score and last.kind != "dropped":
            if [node.word for node in path if node.word not in left_out] == best_words:
                for node in path:
                    node.kind = "best"
    return tree


@default_style
def draw_tree(tree, path):
    """
    Write the tree as a picture in the format of the path's suffix: a column for each step with its
    candidates and their totals, the best first, and lines to their parents. Raises ValueError for a
    suffix that matplotlib does not support.
    """
    columns = [nodes[: SHOWN * tree.beam_size] for nodes in tree.steps]
    words = [printable(node.word) for nodes in columns for node in nodes]
    width = max(COLUMN, 0.11 * max(map(len, words)) + 1)
    count, rows = max(5, len(columns) + 1), max(map(len, columns))
    figure = Figure(figsize=(width * count, ROW * (rows + 3)))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.05, count - 0.05), ylim=(rows, -3))
    axes.set_axis_off()
    caption = printable(" ".join(tree.words)) or "(no words)"
    style = {"fontfamily": font_families(words), "va": "center", "parse_math": False}
    axes.text(0, -2.55, f"{caption}   {tree.score:.2f} nats", weight="bold", **style)
    for x, kind in enumerate(COLOURS):
        _draw_node(axes, kind, x, -1.75, kind, style)
    _draw_node(axes, "<start>", 0, 0, "best", style)
    places = {None: (0, 0)}  # None is <start>
    for x, (nodes, shown) in enumerate(zip(tree.steps, columns), 1):
        kept = sum(node.kind != "dropped" for node in nodes)
        axes.text(x, -0.75, f"step {x}: {kept} of {len(nodes)} kept", fontsize=8, **style)
        for y, node in enumerate(shown):
            _draw_node(axes, f"{printable(node.word)}   {node.total:.2f}", x, y, node.kind, style)
            places[node] = x, y
            from_x, from_y = places[node.parent]
            order = list(COLOURS).index(node.kind)  # later kinds lie on top
            axes.plot((from_x + BOX, x), (from_y, y), color=COLOURS[node.kind][0], zorder=order)
    save(figure, path, {"svg.fonttype": "none"})  # text that can be searched


def _draw_node(axes, text, x, y, kind, style):
    """A line of text in a box with the middle of its left edge at x, y"""
    edge, fill = COLOURS[kind]
    axes.add_patch(Rectangle((x, y - 0.4), BOX, 0.8, facecolor=fill, edgecolor=edge, zorder=5))
    colour = "0.5" if kind == "dropped" else "black"
    axes.text(x + 0.03, y, text, fontsize=9, color=colour, zorder=6, **style)
