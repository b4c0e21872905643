"""Pretraining on text: the decoder without images."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from factories import load_checkpoint, log_rows, make_decoder, resume_args, same, train_args
from torch import nn

import train
from modeling.devices import Distributed
from models import DecoderWithAttention
from training.language_model import language_model_loss, pretrain
from utils import UserError

WORDS = ["<pad>", *"abcdefghijklmnopqrs", "<unk>", "<start>", "<end>"]
WORD_MAP = {word: i for i, word in enumerate(WORDS)}
CAPTIONS = [list(words) for words in itertools.product("abc", "de", "fghi", "jk")]
PROCESSES = Distributed(torch.device("cpu"))


def as_ids(captions):
    start, unknown, end = (WORD_MAP[word] for word in ("<start>", "<unk>", "<end>"))
    return [[start, *(WORD_MAP.get(word, unknown) for word in words), end] for words in captions]


def lstm_loss(decoder, ids):
    """What is left of the decoder where the context vector is zero: torch's LSTM."""
    cell, size = decoder.decode_step, decoder.args["embed_dim"]
    lstm = nn.LSTM(size, decoder.args["decoder_dim"], batch_first=True).to(cell.weight_hh)
    with torch.no_grad():
        for name in ("weight_hh", "bias_ih", "bias_hh"):
            getattr(lstm, f"{name}_l0").copy_(getattr(cell, name))
        lstm.weight_ih_l0.copy_(cell.weight_ih[:, :size])
    total = 0.0
    for caption in ids:
        caption = torch.tensor(caption)
        state = tuple(layer.bias.view(1, 1, -1) for layer in (decoder.init_h, decoder.init_c))
        hidden, _ = lstm(decoder.embedding(caption[None, :-1]), state)
        total += F.cross_entropy(decoder.fc(hidden[0]), caption[1:], reduction="sum")
    return total


def test_loss_is_that_of_a_plain_lstm():
    decoder, ids = make_decoder(), as_ids([["a"], ["b", "a", "x"], list("abcde"), ["c"]])
    for decoder.plain in (True, False):
        torch.testing.assert_close(language_model_loss(decoder, ids), lstm_loss(decoder, ids))


def test_pretrained_decoder_knows_the_text_and_keeps_its_attention_and_fixed_embeddings():
    torch.manual_seed(0)
    decoder = DecoderWithAttention(7, 16, 32, len(WORD_MAP), encoder_dim=9, dropout=0.0)
    decoder.fine_tune_embeddings(False)
    before, ids = copy.deepcopy(decoder.state_dict()), as_ids(CAPTIONS)
    loss = pretrain(decoder, CAPTIONS, WORD_MAP, 400, PROCESSES)
    # Each first, second, third and fourth word is drawn from 3, 2, 4 and 2 with equal probability.
    expected = math.log(3 * 2 * 4 * 2)
    assert lstm_loss(decoder.eval(), ids).item() == pytest.approx(expected * len(ids), rel=0.1)
    assert loss == pytest.approx(expected / 5, rel=0.1)  # per token
    after = decoder.state_dict()
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    kept = {"init_h.weight", "init_c.weight", "f_beta.weight", "f_beta.bias", "embedding.weight"}
    assert unchanged == kept | {name for name in before if name.startswith("attention.")}
    of_context = [state["decode_step.weight_ih"][:, 16:] for state in (before, after)]
    assert torch.equal(*of_context)
    decoder.fine_tune_embeddings(True)
    pretrain(decoder, CAPTIONS, WORD_MAP, 1, PROCESSES)
    assert not torch.equal(decoder.embedding.weight, before["embedding.weight"])


def test_a_run_begins_with_the_text(data, tmp_path, capsys, best, finished):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i % 9}\ta red circle is above a blue square\n" for i in range(99)))
    options = f"--pretrain_text {text} --batch_size 30"
    train.main(train_args(data, tmp_path / "a", options, "--epochs 1"))
    phase = "training on 99 captions of text, 5 epochs"
    assert f"{phase} ...\n{phase} took " in capsys.readouterr().out
    assert log_rows(tmp_path / "a")[0]["train_loss"] < log_rows(finished)[0]["train_loss"]
    train.main(resume_args(tmp_path / "a", "--epochs 2"))
    train.main(train_args(data, tmp_path / "b", options, "--epochs 2"))
    assert same(*(load_checkpoint(tmp_path / name)["decoder"] for name in "ab"))
    with pytest.raises(UserError, match="has a decoder of its own; leave --pretrain_text out"):
        train.main(train_args(data, tmp_path / "c", options, "--checkpoint", best))
    text.write_text("word " * 31 + "\n")
    with pytest.raises(UserError, match="text.txt: no caption of at most 30 words"):
        train.main(train_args(data, tmp_path / "c", options))
