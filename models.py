"""
The captioning model of Xu et al. 2015, Show, Attend and Tell (arXiv 1502.03044):
`Encoder`, `Attention`, soft or hard, and `DecoderWithAttention`.

# N images   R captions per image   P pixels (paper: L)   E encoder size (paper: D)
# H decoder size   A attention size   V vocabulary (paper: K)   T words (paper: C)   K beams
# G cells of the backbone's own grid: 8 x 8 at 256 x 256 pixels, where P is 14 x 14

Captions that share an image (the R captions of a batch, the K beams of a search) stand
side by side in dimension 1, so whatever depends on the image alone is computed once.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from modeling.autograd import AttentionEnergy, LinearPerWord
from modeling.backbones import load_backbone

ENCODED_IMAGE_SIZE = 14  # the paper's annotation vectors stand on a 14 x 14 grid (section 4.3)


class Encoder(nn.Module):
    """
    A convolutional classifier without its head: images -> annotation vectors (N, P, E).

    name: any convolutional classifier of torchvision or timm
    weights: "imagenet", "none" (random), a file (a state dict with the classifier's own keys, or
    one of our checkpoints), or None where a checkpoint will be loaded into it

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
    What the decoder needs to know of N images, computed once per batch.

    Pooling from the backbone's grid to 14 x 14 is a fixed linear map, so it commutes with
    every other one: attention is projected on G cells and pooled only for the ReLU, and the
    context vector is a sum over G cells instead of P.
    """
    features: torch.Tensor  # (N, G, E) annotation vectors on the backbone's grid
    pool: torch.Tensor  # (P, G) pooling weights; each row sums to 1
    keys: torch.Tensor  # (N, P, A) the features' projection for attention, pooled to P pixels
    energy: AttentionEnergy  # of those keys
    from_h: LinearPerWord  # H -> A + E + 4 H: all that a step wants to know of h, stacked
    from_context: LinearPerWord  # E -> 4 H: what the context adds to the LSTM's gates
    from_word: torch.Tensor  # (4 H, embed_dim): the same for a word's embedding

    def __getitem__(self, images):
        """The same for some of the images, without gradients."""
        keys = self.keys[images]
        return self._replace(features=self.features[images], keys=keys,
                             energy=AttentionEnergy(keys, self.energy.weight))


@lru_cache(maxsize=8)
def pooling_matrix(cells, size, device, dtype):
    """AdaptiveAvgPool2d(size) on a square grid of `cells` cells, as a matrix (size^2, cells)"""
    side = round(cells ** 0.5)
    if side * side != cells:
        raise ValueError(f"{cells} annotation vectors do not form a square grid")
    with torch.inference_mode(False):
        one_hot = torch.eye(cells, device=device, dtype=dtype).view(cells, 1, side, side)
        return F.adaptive_avg_pool2d(one_hot, size).view(cells, size * size).t().contiguous()


class Attention(nn.Module):
    """Soft attention, paper section 4.2: a small network scores each pixel against h."""

    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)

    def forward(self, image, query, look=None):
        """
        image: Annotations; query: (n, R, A), decoder_att(h) of R captions of its first n images
        look: hard attention, a function that makes of alpha what is seen of each pixel; without
        it that is alpha itself

        Returns context (n, R, E), the annotation vectors weighted by what is seen: with alpha their
        expectation (equation 13); alpha (n, R, P), whose rows sum to 1 (equations 4 and 5); and
        what is seen (n, R, P).
        """
        alpha = (image.energy(query) + self.full_att.bias).softmax(-1)
        seen = alpha if look is None else look(alpha)
        return (seen @ image.pool) @ image.features[:len(query)], alpha, seen


def look_at_one_place(alpha, places):
    """(..., P) of zeros and a 1 where the places (...) are: paper section 4.1, equation 9"""
    return torch.zeros_like(alpha).scatter(-1, places.unsqueeze(-1), 1)


def look_at_likeliest(alpha):
    """Hard attention at test time: all that is seen is the most attended place."""
    return look_at_one_place(alpha, alpha.argmax(-1))


def look_at_random(alpha, hard):
    """
    Hard attention in training: a place drawn from alpha (n, R, P), equation 8, for the captions
    for which hard (N, R) is true; the others see the expectation.
    """
    n, r, _ = alpha.shape
    return torch.where(hard[:n, :r, None], look_at_one_place(alpha, draw(alpha.detach())), alpha)


def draw(probabilities):
    """
    One place of each row (..., K), as often as its probability: (...) ids. The first to come of K
    waiting times of these rates; of what is not finite any, for the loss to tell.
    """
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


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
        All that a batch of images needs computing once.

        features: (N, G, E) annotation vectors on a square grid, or (N, h, w, E)
        """
        features = features.reshape(len(features), -1, features.shape[-1])
        pool = pooling_matrix(features.shape[1], self.args["encoded_image_size"],
                              features.device, features.dtype)
        attention, lstm = self.attention, self.decode_step
        # The rows of pool sum to 1, so the bias passes through it unchanged.
        keys = pool @ attention.encoder_att(features)
        read_h = attention.decoder_att, self.f_beta
        from_h = LinearPerWord(torch.cat([layer.weight for layer in read_h] + [lstm.weight_hh]),
                               torch.cat([layer.bias for layer in read_h] + [lstm.bias_hh]))
        from_word, from_context = lstm.weight_ih.split(
            (self.args["embed_dim"], self.args["encoder_dim"]), 1)
        return Annotations(
            features, pool, keys, AttentionEnergy(keys, attention.full_att.weight.squeeze(0)),
            from_h, LinearPerWord(from_context, lstm.bias_ih), from_word)

    def init_hidden_state(self, image):
        """h and c from the mean annotation vector, section 3.1.2: two of (N, H)"""
        mean = image.pool.mean(0) @ image.features  # (N, E)
        # The LSTM's memory is a sum over many words: never in half precision.
        return tuple(init(mean).to(init.weight.dtype) for init in (self.init_h, self.init_c))

    def read(self, words, image):
        """What the words' embeddings add to the LSTM's gates: (...) ids -> (..., 4 H)"""
        return F.linear(self.embedding(words), image.from_word)

    def step(self, read, state, image, grid, slots=None, look=None):
        """
        Read one word and look once, for M captions: equations 1 to 3 of the paper.

        read: (M, 4 H), their words as `read` gives them; state: h and c, each (M, H)
        grid: (n, R), they are captions of the first n images, R at most of each
        slots: (M,), the place of each in the grid, image by image; without it all are there,
        in this order
        look: of hard attention, see `Attention`

        Returns the new state, alpha (M, P), where the model looked for the next word, and what it
        saw (M, P), which is alpha too unless a look says otherwise.
        """
        h, c = state
        sizes = self.args["attention_dim"], self.args["encoder_dim"], 4 * h.shape[1]
        query, beta, gates = image.from_h(h).split(sizes, 1)
        if slots is not None:
            query = query.new_zeros(grid[0] * grid[1], sizes[0]).index_copy(0, slots, query)
        context, alpha, seen = self.attention(image, query.view(*grid, -1), look)
        looks = (context, alpha) if look is None else (context, alpha, seen)
        looks = [x.flatten(0, 1) for x in looks]
        if slots is not None:
            looks = [x.index_select(0, slots) for x in looks]
        context, alpha, seen = looks[0], looks[1], looks[-1]
        context = beta.sigmoid() * context  # beta * z_hat, section 4.2.1
        gates = gates.to(c.dtype) + read + image.from_context(context)
        write, keep, new, show = gates.chunk(4, 1)  # the LSTM's i, f, g, o
        c = keep.sigmoid() * c + write.sigmoid() * new.tanh()
        return (show.sigmoid() * c.tanh(), c), alpha, seen

    def scores(self, h):
        """(..., H) hidden states -> (..., V) scores of the next word, before the softmax"""
        return self.fc(self.dropout(h))

    def _read_own(self, read, h, image, probability):
        """
        Scheduled sampling (Bengio et al. 2015, arXiv 1506.03099): with this probability a caption
        goes on from a word drawn by the model itself. read (M, 4 H), of the true words; h (M, H)
        """
        with torch.no_grad():
            drawn = draw(self.fc(h).softmax(-1))
        own = torch.rand(len(h), device=h.device) < probability
        return torch.where(own.unsqueeze(1), self.read(drawn, image), read)

    def forward(self, features, captions, lengths, own=0.0, hard=0.0):
        """
        Teacher forcing: every word is predicted from the true ones before it.

        features: (N, G, E) annotation vectors
        captions: (N, R, L) word ids, <start> ... <end> <pad>
        lengths: (N, R) true lengths, <start> and <end> counted; best on the CPU, which needs them
        own: scheduled sampling, the probability of a word of the model's own in place of the true
        hard: hard attention, the share of captions that see places drawn from alpha

        Returns, for the W words to predict (all but <start>), image by image, caption by
        caption: scores (W, V) and targets (W,); and alphas (N, R, T, P), zero after the end. With
        hard attention also what was seen, likewise (N, R, T, P).
        """
        plan = Plan.of(lengths.cpu(), captions.shape[2], features.device)
        image = self.annotate(features.index_select(0, plan.images))
        state = tuple(x.index_select(0, plan.image_of) for x in self.init_hidden_state(image))
        words = captions.flatten()
        read = self.read(words[plan.words], image).split(plan.captions)
        slots = plan.slots.split(plan.captions)
        look = hard and partial(look_at_random, hard=torch.rand(
            lengths.shape, device=features.device) < hard) or None
        hidden, alphas, seen = [], [], []
        for t, m in enumerate(plan.captions):
            state, true = tuple(x[:m] for x in state), read[t]
            if own and t > 0:
                true = self._read_own(true, state[0], image, own)
            # One caption an image: the grid is full, and everything in its place.
            state, *looks = self.step(true, state, image, plan.grids[t],
                                      slots[t] if captions.shape[1] > 1 else None, look)
            hidden.append(state[0])
            alphas.append(looks[0])
            seen.append(looks[1])
        hidden = torch.cat(hidden)  # (W, H), word by word
        shape = *lengths.shape, len(plan.captions), -1
        looks = [x.new_zeros(lengths.numel() * shape[2], x.shape[1]).index_copy(
            0, plan.cells, x).view(shape) for x in map(torch.cat, (alphas, seen)[:1 + bool(hard)])]
        scores = self.scores(hidden.index_select(0, plan.by_caption))
        return scores, words[plan.words[plan.by_caption] + 1], *looks


class Plan(NamedTuple):
    """
    The way through a batch of captions, word by word, the longest first: the captions that go
    on after t words are a prefix of all, and their images one of all images. Made on the CPU,
    so that the loop never waits for a GPU's answer.
    """
    images: torch.Tensor  # (N,) the images, longest first
    image_of: torch.Tensor  # (N R,) for each caption, longest first, the place of its image there
    captions: list  # T numbers M: the captions that go on
    grids: list  # T pairs (n, R), what `step` wants to know
    # Word by word, (W,) each:
    slots: torch.Tensor  # a caption's place in the grid of its step
    words: torch.Tensor  # where in captions (N, R, L) the word is that is read
    cells: torch.Tensor  # its place (image, caption, step) in a tensor (N, R, T)
    by_caption: torch.Tensor  # the order that turns word by word into caption by caption

    @staticmethod
    def of(lengths, width, device):
        """lengths: (N, R) on the CPU; width: L"""
        ends = lengths - 1  # words to predict
        longest_first = dict(descending=True, stable=True)
        images = ends.max(1).values.argsort(dim=0, **longest_first)
        captions = ends.flatten().argsort(dim=0, **longest_first)
        image_of = images.argsort()[captions // ends.shape[1]]
        rank = ends.argsort(dim=1, **longest_first).argsort(1).flatten()[captions]  # in its image
        steps = torch.arange(int(ends.max())).unsqueeze(1)
        goes_on = ends.flatten()[captions] > steps  # (T, N R)
        n, r = ((goes_on * (x + 1)).max(1).values for x in (image_of, rank))
        step, caption = goes_on.nonzero(as_tuple=True)
        cells = captions[caption] * len(steps) + step
        slots = image_of[caption] * r[step] + rank[caption]
        per_word = torch.stack([slots, captions[caption] * width + step, cells, cells.argsort()])
        to_device = partial(torch.Tensor.to, device=device, non_blocking=True)
        return Plan(to_device(images), to_device(image_of), goes_on.sum(1).tolist(),
                    list(zip(n.tolist(), r.tolist())), *to_device(per_word))
