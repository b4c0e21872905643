"""Pretrained word embeddings: `load_embeddings` reads GloVe's text format."""

import math

import numpy as np
import torch

from utils import UserError, check_is_file


def load_embeddings(emb_file, word_map):
    """
    Pretrained word vectors, (V, D) float32, from a file in the text format of GloVe, word2vec or
    fastText: a word and D numbers per line. Words must match exactly: ours and those of glove.6B
    are lower-case. A word that is not in the file gets a random vector.
    Raises UserError, with the line number, for a line without exactly D finite numbers.
    """
    vectors, size = {}, None
    check_is_file(emb_file)
    try:
        with open(emb_file, encoding="utf-8") as file:
            for line_number, line in enumerate(file, 1):
                word, *values = line.rstrip().split(" ")
                if line_number == 1 and len(values) == 1 and word.isdigit():
                    continue  # the header of word2vec and fastText: number and size of the vectors
                size = size or len(values)
                if len(values) > size and _to_floats(values[:1]) is None:
                    continue  # glove.840B has words with spaces inside, like "at name@domain.com"
                wanted = word in word_map
                vector = _to_floats(values) if wanted else None
                if not size or len(values) != size or wanted and vector is None:
                    raise UserError(
                        f"{emb_file}, line {line_number}: not a word and "
                        f"{size or 'its'} finite numbers"
                    )
                if wanted:
                    vectors[word] = vector
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{emb_file} cannot be read: {reason}") from None
    if not size:
        raise UserError(f"{emb_file} is empty")
    limit = math.sqrt(3 / size)  # so that a random number's variance is 1 / D
    embeddings = torch.empty(len(word_map), size).uniform_(-limit, limit)
    for word, vector in vectors.items():
        embeddings[word_map[word]] = torch.from_numpy(vector)
    print(f"{len(vectors)} of {len(word_map)} words have a vector in {emb_file}")
    return embeddings


def _to_floats(texts):
    """Texts as a float32 array; None unless all are finite numbers."""
    try:
        numbers = np.array(texts, dtype=np.float32)
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None
