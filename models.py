"""
The captioning model of Xu et al. 2015, Show, Attend and Tell (arXiv 1502.03044):
`Encoder`, soft `Attention`, `DecoderWithAttention` and the doubly stochastic loss.

# N images   R captions per image   P pixels (paper: L)   E encoder size (paper: D)
# H decoder size   A attention size   V vocabulary (paper: K)   T words (paper: C)   K beams
# G cells of the backbone's own grid: 8 x 8 at 256 x 256 pixels, where P is 14 x 14

Captions that share an image (the R captions of a batch, the K beams of a search) stand
side by side in dimension 1, so whatever depends on the image alone is computed once.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from backbones import load_backbone

ENCODED_IMAGE_SIZE = 14  # the paper's annotation vectors stand on a 14 x 14 grid (section 4.3)


class Encoder(nn.Module):
    """
    A convolutional classifier without its head: images -> annotation vectors (N, P, E).

    name: any convolutional classifier of torchvision or timm
    weights: "imagenet", "none" (random), a state-dict file with the classifier's own keys, or
    None where a checkpoint will be loaded into it

    A feature map coarser than 14 x 14 is left on its own grid: the decoder spreads it
    (see `Annotations`), which gives the same numbers for less work.
    """

    def __init__(self, encoded_image_size=ENCODED_IMAGE_SIZE, name="resnet101",
                 weights="imagenet"):
        super().__init__()
        self.args = {"encoded_image_size": encoded_image_size, "name": name}
        backbone = load_backbone(name, weights)
        self.resnet = backbone.body
        self.adaptive_pool = nn.AdaptiveAvgPool2d(encoded_image_size)
        self.encoder_dim = backbone.channels
        self._fine_tuned = backbone.fine_tuned
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)
        self.fine_tune(False)

    def forward(self, images):
        """
        images: (N, 3, S, S), uint8 as CaptionDataset gives them, or floats normalised already

        Returns annotation vectors (N, P, E), row by row of the map: P = 64 for the usual
        backbones at S = 256, at most 14 x 14.
        """
        if images.dtype == torch.uint8:
            images = (images.float() / 255 - self.mean) / self.std
        x = self.resnet(images.contiguous(memory_format=torch.channels_last))  # (N, E, h, w)
        if x.shape[2] * x.shape[3] > self.adaptive_pool.output_size ** 2:
            x = self.adaptive_pool(x)
        return x.flatten(2).transpose(1, 2)

    def fine_tune(self, fine_tune=True):
        """Switch training of blocks 2-4, all that lies beyond stride 4, on or off."""
        for p in self.resnet.parameters():
            p.requires_grad = False
        for module in self._fine_tuned:
            for p in module.parameters():
                p.requires_grad = fine_tune

    def train(self, mode=True):
        """
        The backbone stays in evaluation mode, fine-tuned or not: BatchNorm keeps its ImageNet
        statistics, which are better than those of a batch of 16 and the same in every process.
        """
        return super().train(False)


class Annotations(NamedTuple):
    """
    What the decoder needs to know of N images, computed once per image.

    Pooling from the backbone's grid to 14 x 14 is a fixed linear map, so it commutes with
    every other one: attention is projected on G cells and pooled only for the ReLU, and the
    context vector is a sum over G cells instead of P.
    """
    features: torch.Tensor  # (N, G, E) annotation vectors on the backbone's grid
    keys: torch.Tensor  # (N, P, A) their projection for attention, pooled to P pixels
    pool: torch.Tensor  # (P, G) pooling weights; each row sums to 1

    def __getitem__(self, images):
        """The same for some of the images: a slice, or a tensor of indices."""
        return Annotations(self.features[images], self.keys[images], self.pool)


@lru_cache(maxsize=8)
def pooling_matrix(cells, size, device, dtype):
    """AdaptiveAvgPool2d(size) on a square grid of `cells` cells, as a matrix (size^2, cells)"""
    side = round(cells ** 0.5)
    if side * side != cells:
        raise ValueError(f"{cells} annotation vectors do not form a square grid")
    with torch.inference_mode(False):
        one_hot = torch.eye(cells, device=device, dtype=dtype).view(cells, 1, side, side)
        return F.adaptive_avg_pool2d(one_hot, size).view(cells, size * size).t().contiguous()


class AttentionEnergy(torch.autograd.Function):
    """
    energy[n, r, p] = sum_a weight[a] * relu(keys[n, p, a] + query[n, r, a])

    The sum over (N, R, P, A) is the decoder's largest tensor by far. It is never stored:
    some images at a time, small enough for the processor's cache, it is made, used and made
    again in the backward pass. Same numbers as the plain expression, several times faster.
    """

    @staticmethod
    def _blocks(keys, query):
        per_image = query.shape[1] * keys.shape[1] * keys.shape[2] * keys.element_size()
        budget = 4 << 20 if keys.device.type == "cpu" else 1 << 30
        step = max(1, budget // max(1, per_image))
        for i in range(0, len(keys), step):
            block = slice(i, i + step)
            yield block, (keys[block, None] + query[block, :, None]).relu_()  # (n, R, P, A)

    @staticmethod
    def forward(ctx, keys, query, weight):
        ctx.save_for_backward(keys, query, weight)
        energy = keys.new_empty(query.shape[0], query.shape[1], keys.shape[1])
        for block, hidden in AttentionEnergy._blocks(keys, query):
            torch.matmul(hidden, weight, out=energy[block])
        return energy

    @staticmethod
    def backward(ctx, grad):
        keys, query, weight = ctx.saved_tensors
        grad = grad.contiguous()
        d_keys, d_query = torch.empty_like(keys), torch.empty_like(query)
        d_weight = torch.zeros_like(weight)
        for block, hidden in AttentionEnergy._blocks(keys, query):
            g = grad[block]
            d_weight += g.reshape(-1) @ hidden.view(-1, len(weight))
            active = hidden.sign_()  # 1 where the ReLU is open, 0 elsewhere
            d_query[block] = (g.unsqueeze(2) @ active).squeeze(2)
            torch.sum(active.mul_(g.unsqueeze(3)), 1, out=d_keys[block])
        return d_keys * weight, d_query * weight, d_weight


class Attention(nn.Module):
    """Soft attention, paper section 4.2: a small network scores each pixel against h."""

    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)

    def annotate(self, features, pool):
        """features (N, G, E), pool (P, G) -> Annotations"""
        # The rows of pool sum to 1, so the bias passes through it unchanged.
        return Annotations(features, pool @ self.encoder_att(features), pool)

    def forward(self, image, h):
        """
        image: Annotations of N images, h: (N, R, H) hidden states

        Returns context (N, R, E), the expected annotation vector (equation 13),
        and alpha (N, R, P), whose rows sum to 1 (equations 4 and 5).
        """
        weight, bias = self.full_att.weight.squeeze(0), self.full_att.bias
        energy = AttentionEnergy.apply(image.keys, self.decoder_att(h), weight) + bias
        alpha = energy.softmax(-1)
        return (alpha @ image.pool) @ image.features, alpha


class DecoderWithAttention(nn.Module):
    """
    An LSTM that looks at the image anew for every word (paper section 3.1.2).

    `encoded_image_size` is the side of the attention grid: P = encoded_image_size ** 2.
    """

    def __init__(self, attention_dim, embed_dim, decoder_dim, vocab_size, encoder_dim=2048,
                 dropout=0.5, encoded_image_size=ENCODED_IMAGE_SIZE):
        super().__init__()
        self.args = {"attention_dim": attention_dim, "embed_dim": embed_dim,
                     "decoder_dim": decoder_dim, "vocab_size": vocab_size,
                     "encoder_dim": encoder_dim, "dropout": dropout,
                     "encoded_image_size": encoded_image_size}
        self.attention = Attention(encoder_dim, decoder_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)
        self.fc = nn.Linear(decoder_dim, vocab_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.fc.weight, -0.1, 0.1)
        nn.init.zeros_(self.fc.bias)

    def load_pretrained_embeddings(self, embeddings):
        """embeddings: (V, embed_dim)"""
        if embeddings.shape != self.embedding.weight.shape:
            raise ValueError(f"embeddings are {tuple(embeddings.shape)}, the decoder needs "
                             f"{tuple(self.embedding.weight.shape)}")
        with torch.no_grad():
            self.embedding.weight.copy_(embeddings)

    def fine_tune_embeddings(self, fine_tune=True):
        self.embedding.weight.requires_grad = fine_tune

    def annotate(self, features):
        """
        All that depends on the images alone.

        features: (N, G, E) annotation vectors on a square grid, or (N, h, w, E)
        """
        features = features.reshape(len(features), -1, features.shape[-1])
        pool = pooling_matrix(features.shape[1], self.args["encoded_image_size"],
                              features.device, features.dtype)
        return self.attention.annotate(features, pool)

    def init_hidden_state(self, image):
        """h and c from the mean annotation vector, section 3.1.2: two of (N, 1, H)"""
        mean = image.pool.mean(0) @ image.features  # (N, E)
        return self.init_h(mean).unsqueeze(1), self.init_c(mean).unsqueeze(1)

    def step(self, words, state, image):
        """
        Read one word and look once: equations 1 to 3 of the paper.

        words: (N, R) ids, state: h and c, each (N, R, H), image: Annotations of N images

        Returns the new state and alpha (N, R, P), where the model looked for the next word.
        """
        h, c = state
        context, alpha = self.attention(image, h)
        context = self.f_beta(h).sigmoid() * context  # beta * z_hat, section 4.2.1
        inputs = torch.cat([self.embedding(words), context], 2)
        state = self.decode_step(inputs.flatten(0, 1), (h.flatten(0, 1), c.flatten(0, 1)))
        return tuple(x.view(h.shape) for x in state), alpha

    def scores(self, h):
        """(..., H) hidden states -> (..., V) scores of the next word, before the softmax"""
        return self.fc(self.dropout(h))

    def forward(self, features, captions, lengths):
        """
        Teacher forcing: every word is predicted from the true ones before it.

        features: (N, G, E) annotation vectors
        captions: (N, R, L) word ids, <start> ... <end> <pad>
        lengths: (N, R) true lengths, <start> and <end> counted

        Returns, for the W words to predict (all but <start>), image by image, caption by
        caption: scores (W, V) and targets (W,); and alphas (N, R, T, P), zero after the end.
        """
        # Longest first, the images and the captions of each: the batch shrinks as they end.
        sorted_lengths, by_length = lengths.sort(1, descending=True)
        order = sorted_lengths[:, 0].argsort(descending=True)
        unsort = order.argsort().unsqueeze(1), by_length.argsort(1)
        inputs = captions.gather(1, by_length.unsqueeze(2).expand_as(captions))[order]
        goes_on = (sorted_lengths[order] - 1).cpu()  # one host sync for the batch, none per word
        image = self.annotate(features)[order]
        state = tuple(x.expand(-1, captions.shape[1], -1) for x in self.init_hidden_state(image))
        hidden, alphas = [], []
        for t in range(int(goes_on.max())):
            n, r = int((goes_on[:, 0] > t).sum()), int((goes_on > t).any(0).sum())
            if state[0].shape[:2] != (n, r):
                state, image = tuple(x[:n, :r] for x in state), image[:n]
            state, alpha = self.step(inputs[:n, :r, t], state, image)
            hidden.append(_pad(state[0], captions.shape))
            alphas.append(_pad(alpha, captions.shape))

        hidden, alphas = torch.stack(hidden, 2)[unsort], torch.stack(alphas, 2)[unsort]
        steps = torch.arange(hidden.shape[2], device=lengths.device)
        predicted = steps < lengths.unsqueeze(2) - 1  # (N, R, T)
        targets = captions[:, :, 1:hidden.shape[2] + 1][predicted]
        alphas = alphas * predicted.unsqueeze(3)
        return self.scores(hidden[predicted]), targets, alphas


def _pad(x, shape):
    """Zeros for the captions that have ended: (n, r, ...) -> (N, R, ...)"""
    n, r = shape[0] - x.shape[0], shape[1] - x.shape[1]
    return F.pad(x, (0, 0, 0, r, 0, n)) if n or r else x


def doubly_stochastic_loss(scores, targets, alphas, alpha_c=1.0, words=None, captions=None):
    """
    Cross-entropy plus doubly stochastic attention, equation 14: the attention that a
    caption pays to a pixel should come to 1 over all its words.

    scores (W, V), targets (W,), alphas (N, R, T, P) as the decoder's forward returns them

    Returns the loss, a scalar in nats: a mean over words plus alpha_c times a mean over
    captions and pixels. `words` and `captions` divide instead of W and N * R where this
    batch is one process's share of a larger one.
    """
    cross_entropy = F.cross_entropy(scores, targets, reduction="sum") / (words or len(targets))
    unbalance = ((1 - alphas.sum(2)) ** 2).mean(-1)  # (N, R)
    return cross_entropy + alpha_c * unbalance.sum() / (captions or unbalance.numel())
