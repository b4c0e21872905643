"""
Before phase 1: the decoder learns to write from captions without images, of which there are more.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_value_
from torch.nn.utils.rnn import pack_padded_sequence
from tqdm import tqdm

from modeling.devices import autocast
from training.state import half_cosine

BATCH = 1280  # captions
LR = 2e-3
LONGEST = 30  # words; few captions are longer, and they would pad their batches


def pretrain(decoder, captions, word_map, epochs, amp=None, show_progress=True):
    """
    Train a DecoderWithAttention as a language model, in place: on teacher forcing's cross-entropy
    for annotation vectors of zeros. Then the context is zero at each step, so what is left of the
    decoder is a plain LSTM, and only embedding, LSTM, output and the biases of h and c are trained,
    the embedding only if it is to be (`fine_tune_embeddings`).

    captions: lists of words, not empty; those that are not in word_map count as <unk>
    amp: as in `modeling.devices.autocast`

    Returns the mean loss of the last epoch, in nats per token.
    """
    device = decoder.fc.weight.device
    ids = [
        [
            word_map["<start>"],
            *(word_map.get(word, word_map["<unk>"]) for word in words),
            word_map["<end>"],
        ]
        for words in captions
    ]
    cell, size = decoder.decode_step, decoder.args["embed_dim"]
    lstm = nn.LSTM(size, decoder.args["decoder_dim"], batch_first=True, device=device)
    pairs = (
        (lstm.weight_ih_l0, cell.weight_ih[:, :size]),
        (lstm.weight_hh_l0, cell.weight_hh),
        (lstm.bias_ih_l0, cell.bias_ih),
        (lstm.bias_hh_l0, cell.bias_hh),
    )
    with torch.no_grad():
        for ours, theirs in pairs:
            ours.copy_(theirs)
    parameters = [
        *lstm.parameters(),
        *decoder.embedding.parameters(),
        *decoder.fc.parameters(),
        decoder.init_h.bias,
        decoder.init_c.bias,
    ]
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, LR, fused=True)
    batches = -(-len(ids) // BATCH)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: half_cosine(step, epochs * batches)
    )
    decoder.train()
    for epoch in range(1, epochs + 1):
        total = tokens = 0
        bar = tqdm(
            _batches(ids, batches),
            desc=f"text, epoch {epoch}",
            unit="batch",
            total=batches,
            disable=None if show_progress else True,
        )
        for batch in bar:
            with autocast(device, amp):
                loss = language_model_loss(decoder, lstm, batch)
            count = sum(map(len, batch)) - len(batch)
            optimizer.zero_grad(set_to_none=True)
            (loss / count).backward()
            clip_grad_value_(parameters, 5.0)
            optimizer.step()
            scheduler.step()
            total, tokens = total + loss.detach(), tokens + count
    with torch.no_grad():
        for ours, theirs in pairs:
            theirs.copy_(ours)
    return float(total) / tokens


def _batches(ids, count):
    """An epoch's batches, in random order, each of captions of about the same length."""
    lengths = torch.tensor([len(caption) for caption in ids])
    order = (lengths + 3 * torch.rand(len(ids))).argsort()
    parts = order.tensor_split(count)
    for i in torch.randperm(count).tolist():
        yield [ids[j] for j in parts[i].tolist()]


def language_model_loss(decoder, lstm, captions):
    """
    The cross-entropy, summed over the tokens, of captions given as lists of ids; lstm: an nn.LSTM
    with the decoder's weights but for the context's.
    """
    device = decoder.fc.weight.device
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in captions], True)
    lengths = torch.tensor([len(ids) - 1 for ids in captions])
    state = tuple(
        layer.bias.expand(1, len(captions), -1).contiguous()
        for layer in (decoder.init_h, decoder.init_c)
    )
    inputs, targets = (
        pack_padded_sequence(part.to(device), lengths, True, enforce_sorted=False)
        for part in (tokens[:, :-1], tokens[:, 1:])
    )
    embedded = inputs._replace(data=decoder.embedding(inputs.data))
    hidden = lstm(embedded, state)[0].data
    return F.cross_entropy(decoder.logits(hidden), targets.data, reduction="sum")
