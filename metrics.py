"""How good captions are: BLEU, top-5 accuracy, and where the attention fell."""

import warnings

import numpy as np
from nltk.translate.bleu_score import corpus_bleu

WEIGHTS = [(1,), (1 / 2,) * 2, (1 / 3,) * 3, (1 / 4,) * 4]


def bleu(references, hypotheses):
    """
    Corpus BLEU-1 to BLEU-4 by NLTK, unsmoothed, 0..100.

    references: per image a list of captions, hypotheses: per image one caption; a caption is
    a list of words (or ids). Empty references count for nothing and are left out.
    """
    # [[]] where no reference is left: nothing matches it, and NLTK fails without any.
    references = [[caption for caption in captions if caption] or [[]] for captions in references]
    if not any(hypotheses):
        return [0.0] * 4  # NLTK divides by the length of all hypotheses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NLTK warns where no n-gram matches; the 0 says it
        return [100 * value for value in corpus_bleu(references, hypotheses, weights=WEIGHTS)]


def top_k_correct(scores, targets, k=5):
    """How many of the targets (W,) are among the k best scores (W, V), as a 0-dim tensor."""
    return (scores.topk(min(k, scores.shape[1])).indices == targets.unsqueeze(1)).any(1).sum()


def attention_hits(words, alphas, objects, nouns):
    """
    Attention accuracy of one caption: at each word that names an object, does the most
    attended place lie in that object's box?

    words: T words, alphas: (T, P) on a square grid over the image
    objects: [{"box": [left, top, right, bottom] as fractions of the image, "words": [...]}]
    nouns: all words that name objects in the data set; one that names nothing in this
    image is a miss.

    Returns hits and object words, two counts.
    """
    hits = total = 0
    for word, alpha in zip(words, alphas):
        if word not in nouns:
            continue
        total += 1
        side = round(len(alpha) ** 0.5)
        row, column = divmod(int(np.argmax(alpha)), side)
        x, y = (column + 0.5) / side, (row + 0.5) / side
        hits += any(word in thing["words"]
                    and thing["box"][0] <= x <= thing["box"][2]
                    and thing["box"][1] <= y <= thing["box"][3] for thing in objects)
    return hits, total
