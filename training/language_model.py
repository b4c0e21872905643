"""Before phase 1: pretraining of the decoder as a language model, on captions without images."""

import copy

import torch
from torch import nn
from torch.nn.utils import clip_grad_value_

from modeling.devices import autocast
from training.engine import progress_bar
from training.losses import token_losses

BATCH = 1280  # captions
LR = 2e-3
LONGEST = 30  # words; few captions are longer, and they would pad their batches


def pretrain(decoder, captions, word_map, epochs, processes, amp=None):
    """
    Train a decoder as a language model, in place: teacher forcing's cross-entropy for a blank image
    of one location, whose annotation vector is zero. So the context vector is zero at each step,
    and weights that only read it do not change. All processes do the same.

    captions: lists of words, of which those that are not in word_map count as <unk>
    Returns the mean loss of the last epoch, in nats per token.
    """
    texts = [["<start>", *words, "<end>"] for words in captions]
    ids = [[word_map.get(word, word_map["<unk>"]) for word in words] for words in texts]
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, LR, fused=True)
    batches = -(-len(ids) // BATCH)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    decoder.train()
    for epoch in range(1, epochs + 1):
        total = tokens = 0
        shown = {"desc": f"text, epoch {epoch}", "total": batches}
        for batch in progress_bar(_batches(ids, batches), processes, **shown):
            with autocast(processes.device, amp):
                loss = language_model_loss(decoder, batch)
            count = sum(map(len, batch)) - len(batch)
            optimizer.zero_grad(set_to_none=True)
            (loss / count).backward()
            clip_grad_value_(parameters, 5.0)
            optimizer.step()
            scheduler.step()
            total, tokens = total + loss.detach(), tokens + count
    return float(total) / tokens


def _batches(ids, count):
    """An epoch's batches, in random order, each of captions of about the same length."""
    lengths = torch.tensor([len(caption) for caption in ids])
    order = (lengths + 3 * torch.rand(len(ids))).argsort()
    parts = order.tensor_split(count)
    for i in torch.randperm(count).tolist():
        yield [ids[j] for j in parts[i].tolist()]


def language_model_loss(decoder, captions):
    """The cross-entropy, summed over the tokens, of captions given as lists of ids."""
    blank = copy.copy(decoder)  # with the same weights
    blank.args = decoder.args | {"encoded_image_size": 1}
    weight = decoder.fc.weight
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in captions], True)
    lengths = torch.tensor([len(ids) for ids in captions])
    features = weight.new_zeros(1, 1, decoder.args["encoder_dim"])
    output = blank(features, tokens.unsqueeze(0).to(weight.device), lengths.unsqueeze(0))
    return token_losses(output.logits, output.targets).sum()
