"""Pretraining on text: the decoder without images."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from factories import NAME, load_checkpoint, log_rows, make_decoder, same, train_args
from torch import nn

import train
from models import DecoderWithAttention
from training.language_model import language_model_loss, pretrain
from utils import UserError

WORD_MAP = {
    word: i for i, word in enumerate(["<pad>", *"abcdefghijklmnopqrs", "<unk>", "<start>", "<end>"])
}
CAPTIONS = [list(words) for words in itertools.product("abc", "de", "fghi", "jk")]


def as_ids(captions):
    return [
        [
            WORD_MAP["<start>"],
            *(WORD_MAP.get(word, WORD_MAP["<unk>"]) for word in words),
            WORD_MAP["<end>"],
        ]
        for words in captions
    ]


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


@pytest.mark.parametrize("is_plain", [True, False])
def test_loss_is_that_of_a_plain_lstm(is_plain):
    decoder = make_decoder()
    decoder.plain = is_plain
    ids = as_ids([["a"], ["b", "a", "x"], ["a", "b", "c", "d", "e"], ["c"]])
    torch.testing.assert_close(language_model_loss(decoder, ids), lstm_loss(decoder, ids))


def test_pretrained_decoder_knows_the_text_and_keeps_its_attention():
    torch.manual_seed(0)
    decoder = DecoderWithAttention(7, 16, 32, len(WORD_MAP), encoder_dim=9, dropout=0.0)
    before, ids = copy.deepcopy(decoder.state_dict()), as_ids(CAPTIONS)
    pretrain(decoder, CAPTIONS, WORD_MAP, epochs=400, show_progress=False)
    # Each first, second, third and fourth word is drawn from 3, 2, 4 and 2 with equal probability.
    expected = math.log(3 * 2 * 4 * 2) * len(ids)
    assert lstm_loss(decoder.eval(), ids).item() == pytest.approx(expected, rel=0.1)
    after = decoder.state_dict()
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {
        "init_h.weight",
        "init_c.weight",
        "f_beta.weight",
        "f_beta.bias",
        *(name for name in before if name.startswith("attention.")),
    }
    of_context = [state["decode_step.weight_ih"][:, 16:] for state in (before, after)]
    assert torch.equal(*of_context)


def test_a_run_begins_with_the_text(data, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i % 9}\ta red circle is above a blue square\n" for i in range(99)))
    common = ["--pretrain_text", str(text), "--epochs", "1"]
    train.main(train_args(data, tmp_path / "a", *common))
    assert "99 captions of text, 5 epochs" in capsys.readouterr().out
    train.main(train_args(data, tmp_path / "plain", "--epochs", "1"))
    with_text, without = (log_rows(tmp_path / name)[0]["train_loss"] for name in ("a", "plain"))
    assert with_text < without
    train.main(["--checkpoint_folder", str(tmp_path / "a"), "--resume", "--epochs", "2"])
    train.main(train_args(data, tmp_path / "b", *common[:2], "--epochs", "2"))
    assert same(*(load_checkpoint(tmp_path / name)["decoder"] for name in "ab"))
    with pytest.raises(UserError, match="has a decoder of its own; leave --pretrain_text out"):
        train.main(
            [
                "--data_folder",
                str(data),
                "--checkpoint",
                str(tmp_path / f"a/BEST_checkpoint_{NAME}.pth.tar"),
                *common,
                "--checkpoint_folder",
                str(tmp_path / "c"),
            ]
        )


def test_fixed_embeddings_stay_fixed():
    decoder = make_decoder(len(WORD_MAP)).float()
    decoder.fine_tune_embeddings(False)
    before = copy.deepcopy(decoder.state_dict())
    pretrain(decoder, CAPTIONS, WORD_MAP, epochs=1, show_progress=False)
    assert torch.equal(decoder.embedding.weight, before["embedding.weight"])
    assert not torch.equal(decoder.fc.weight, before["fc.weight"])


def test_text_without_a_caption_is_a_line(data, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("word " * 31 + "\n")
    with pytest.raises(UserError, match="text.txt: no caption of at most 30 words; pass a file"):
        train.main(train_args(data, tmp_path, "--pretrain_text", str(text)))
