"""
What the scripts share: seeds, errors of the user, half precision and pretrained embeddings. Also
create_input_files(), whose own module is preparation.py.
"""

import math
import os
import random
import sys

import numpy as np
import torch

from files import UserError
from preprocessing.input_files import create_input_files  # noqa: F401, `from utils import` is its old place

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run(main):
    """Call a script's main(); a mistake of the user ends it with one line and exit code 2."""
    try:
        main()
    except BrokenPipeError:  # `| head` has seen enough; Python's last flush shall not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError, KeyboardInterrupt) as error:  # OSError: a full disk, for one
        stopped = isinstance(error, KeyboardInterrupt)
        message = str(error) or "interrupted"
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
        sys.exit(getattr(error, "code", 130) if stopped else 2)


def autocast(device, amp):
    """
    A context that multiplies matrices in half precision on this device: amp is "bf16", "fp16"
    or None, which leaves everything as it is. Weights stay float32 all the same.
    """
    return torch.autocast(device.type, AMP.get(amp), enabled=amp is not None)


def set_seed(seed):
    """Seed every generator that we draw from: Python's, NumPy's and torch's on all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def init_embedding(embeddings):
    """Fill a (V, D) tensor in place from U(-sqrt(3/D), sqrt(3/D)), whose variance is 1/D."""
    limit = math.sqrt(3 / embeddings.size(1))
    torch.nn.init.uniform_(embeddings, -limit, limit)


def _numbers(texts):
    """The float32 array of some texts, None unless all are finite numbers."""
    try:
        numbers = np.array(texts, dtype=np.float32)
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None


def load_embeddings(emb_file, word_map):
    """
    Pretrained word vectors from a file in GloVe's text format: a word and D numbers per line.

    Words are compared as they stand: ours and those of glove.6B are lower-case. A word that the
    file lacks gets init_embedding's random vector.

    Returns the (V, D) float32 embeddings, row i for word id i, and D.
    Raises UserError, with the line number, for a line without exactly D finite numbers.
    """
    vectors, size = {}, None
    try:
        with open(emb_file, encoding="utf-8") as file:
            for line_number, line in enumerate(file, 1):
                word, *values = line.rstrip().split(" ")
                size = size or len(values)
                if len(values) > size and _numbers(values[:1]) is None:
                    continue  # glove.840B has words with spaces inside, like "at name@domain.com"
                if not size or len(values) != size:
                    where = f"{emb_file}, line {line_number}"
                    there = f", as many as line 1 has: {size}" if size else ""
                    raise UserError(f"{where}: {len(values)} numbers; it should be a word and its "
                                    f"numbers{there}")
                if word in word_map:
                    vectors[word] = _numbers(values)
                    if vectors[word] is None:
                        raise UserError(f"{emb_file}, line {line_number}: not a finite number")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{emb_file} cannot be read: {reason}") from None
    if not size:
        raise UserError(f"{emb_file} is empty")
    embeddings = torch.empty(len(word_map), size)
    init_embedding(embeddings)
    for word, vector in vectors.items():
        embeddings[word_map[word]] = torch.from_numpy(vector)
    print(f"{len(vectors)} of {len(word_map)} words have a vector in {emb_file}")
    return embeddings, size
