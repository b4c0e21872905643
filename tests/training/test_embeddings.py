"""GloVe's rows for the words of a word map."""

import pytest
import torch

from training.embeddings import load_embeddings
from utils import UserError


def glove(tmp_path, text):
    path = tmp_path / "glove.txt"
    path.write_text(text)
    return load_embeddings(path, {"<pad>": 0, "dog": 1, "cat": 2})


@pytest.mark.parametrize("first", ["", "2 3\n"])  # of word2vec and fastText: how many, what size
def test_embedding_is_the_words_line_or_random_within_the_limit(tmp_path, capsys, first):
    text = first + "dog 1 -2 3\nat a.b@c 9 9 9\n<cow> 0 0 0\ncat 4 5 6e1\n"
    embeddings = glove(tmp_path, text)
    assert embeddings.shape == (3, 3) and embeddings.dtype == torch.float32
    assert embeddings[1:].tolist() == [[1, -2, 3], [4, 5, 60]]
    assert 0 < embeddings[0].abs().max() <= 1  # sqrt(3 / 3)
    assert "2 of 3 words" in capsys.readouterr().out


def test_broken_line_of_embeddings_is_named(tmp_path):
    for line in ("cow 1 2", "cow 1 2 3 4", "dog 1 2 x", "dog 1 2 nan", ""):
        with pytest.raises(UserError, match=r"glove\.txt, line 2"):
            glove(tmp_path, f"cat 1 2 3\n{line}\n")
