"""
The captioning model of Xu et al. 2015, Show, Attend and Tell (arXiv 1502.03044):
`Encoder`, `Attention`, soft or hard, and `DecoderWithAttention`. tests/reference.py has the same
equations as plainly as they can be written; here they are arranged for speed.

# N images   R captions per image   P locations (paper: L)   E encoder size (paper: D)
# H decoder size   A attention size   V vocabulary (paper: K)   T time steps (paper: C)   K beams
# G cells of the backbone's own grid: 8 x 8 at 256 x 256 pixels, where P is 14 x 14

Captions that share an image (the R captions of a batch, the K beams of a search) lie along
dimension 1, so what depends on the image alone is computed once.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from datasets import IMAGE_SIZE
from modeling.autograd import AttentionEnergy, DeferredLinear
from modeling.backbones import load_backbone
from modeling.fused import fuse
from modeling.packed_captions import PackedCaptions
from modeling.sampling import sample_categorical, sample_location

ENCODED_IMAGE_SIZE = 14  # the paper's annotation vectors stand on a 14 x 14 grid (section 4.3)


class Encoder(nn.Module):
    """
    A convolutional classifier without its head: images -> annotation vectors (N, G, E).

    name: any convolutional classifier of torchvision or timm
    weights: "imagenet", "none" (random), a file (a state dict with the classifier's own keys, or
    one of our checkpoints), or None where a checkpoint will be loaded into it
    stride: 16 for a grid twice as fine; see `load_backbone`
    image_size: S of the images that it is trained on, and captions

    A square feature map coarser than 14 x 14 stays on its own grid: the decoder pools it to 14 x 14
    later (see `Annotations`), which gives the same numbers for less work.
    """

    def __init__(
        self,
        encoded_image_size=ENCODED_IMAGE_SIZE,
        name="resnet101",
        weights="imagenet",
        stride=32,
        image_size=IMAGE_SIZE,
    ):
        super().__init__()
        self.args = {
            "encoded_image_size": encoded_image_size,
            "name": name,
            "stride": stride,
            "image_size": image_size,
        }
        backbone = load_backbone(name, weights, stride)
        self.resnet = backbone.body  # the tutorial's name, whatever the backbone
        self._fused = (None, None)  # see `_body`
        self.adaptive_pool = nn.AdaptiveAvgPool2d(encoded_image_size)
        self.encoder_dim = backbone.channels
        self._fine_tuned = backbone.fine_tuned
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)
        self.fine_tune(False)

    def forward(self, images):
        """
        images: (N, 3, S, S), uint8 as CaptionDataset returns them, or floats already normalised;
        any other height and width will do, as in the tutorial

        Returns annotation vectors (N, G, E), row by row of the feature map: G = 64 for the usual
        backbones at S = 256, at most 14 x 14. A map that is not square comes pooled to 14 x 14.
        """
        images = images.contiguous(memory_format=torch.channels_last)
        if images.dtype == torch.uint8:
            images = images.float().div_(255).sub_(self.mean).div_(self.std)
        x = self._body(images)  # (N, E, h, w)
        height, width = x.shape[2:]
        if height != width or height > self.adaptive_pool.output_size:
            x = self.adaptive_pool(x)
        return x.flatten(2).transpose(1, 2)

    @property
    def _body(self):
        """`resnet` with fused convolutions; in a tuple, or its weights would be saved twice."""
        if self._fused[0] is not self.resnet:
            self._fused = (self.resnet, fuse(self.resnet))
        return self._fused[1]

    def fine_tune(self, fine_tune=True):
        """Switch training of blocks 2-4, all layers beyond stride 4, on or off."""
        for p in self.resnet.parameters():
            p.requires_grad = False
        for module in self._fine_tuned:
            for p in module.parameters():
                p.requires_grad = fine_tune

    def train(self, mode=True):
        """
        The backbone stays in evaluation mode, fine-tuned or not: BatchNorm keeps its ImageNet
        statistics, which are better than those of a batch of 16 and equal in all processes.
        """
        return super().train(False)


class Annotations(NamedTuple):
    """
    What the decoder needs from N images, computed once per batch.

    Pooling from the backbone's grid to 14 x 14 is a fixed linear map over the cells, so it commutes
    with linear layers: keys are projected on G cells and pooled only for the ReLU, and the
    context vector is a sum over G cells instead of P locations.
    """

    features: torch.Tensor  # (N, G, E) annotation vectors on the backbone's grid
    pool: torch.Tensor  # (P, G) pooling weights; each row sums to 1
    keys: torch.Tensor  # (N, P, A) encoder_att of the features, pooled to P locations
    energy: AttentionEnergy  # the attention scores, from these keys
    hidden_projections: DeferredLinear  # H -> A + E + 4 H: decoder_att, f_beta, weight_hh stacked
    context_to_gates: DeferredLinear  # E -> 4 H: the context's columns of weight_ih
    embedding_to_gates: DeferredLinear  # embed_dim -> 4 H: the embedding's columns of weight_ih

    def __getitem__(self, images):
        """The annotations of some of the images, without gradients."""
        keys = self.keys[images]
        return self._replace(
            features=self.features[images],
            keys=keys,
            energy=AttentionEnergy(keys, self.energy.weight),
        )


@lru_cache(maxsize=8)
def pooling_matrix(cells, size, device, dtype):
    """AdaptiveAvgPool2d(size) on a square grid of `cells` cells, as a matrix (size^2, cells)"""
    side = round(cells**0.5)
    if side * side != cells:
        raise ValueError(f"{cells} annotation vectors do not form a square grid")
    with torch.inference_mode(False):
        one_hot = torch.eye(cells, device=device, dtype=dtype).view(cells, 1, side, side)
        return F.adaptive_avg_pool2d(one_hot, size).view(cells, size * size).t().contiguous()


class Attention(nn.Module):
    """
    Soft attention, paper section 4.2: a small network scores each location a_p against the state h,

        e_p = full_att(relu(encoder_att(a_p) + decoder_att(h)))     alpha = softmax(e)

    and the context vector is the sum of alpha_p a_p. encoder_att is applied in `encode_memory`,
    once per image, and decoder_att in `step`; `modeling.autograd.AttentionEnergy` is full_att of
    the ReLU.
    """

    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)

    def forward(self, annotations, query, hard_attention=None):
        """
        annotations: Annotations; query: (n, R, A), decoder_att(h) of R captions of its first n
        images
        hard_attention: a function that turns alpha into the weights of the context vector, such
        as `modeling.sampling.most_likely_location`; without it the weights are alpha itself

        Returns the context (n, R, E), the annotation vectors' weighted sum, which under the weights
        alpha is their expectation (equation 13); alpha (n, R, P), whose rows sum to 1 (equations
        4 and 5); and the weights (n, R, P).
        """
        alpha = (annotations.energy(query) + self.full_att.bias).softmax(-1)
        weights = alpha if hard_attention is None else hard_attention(alpha)
        return (weights @ annotations.pool) @ annotations.features[: len(query)], alpha, weights


class DecoderWithAttention(nn.Module):
    """
    An LSTM that attends to the image again for every token (paper section 3.1.2).

    `encoded_image_size` is the side of the attention grid: P = encoded_image_size ** 2.
    """

    def __init__(
        self,
        attention_dim,
        embed_dim,
        decoder_dim,
        vocab_size,
        encoder_dim=2048,
        dropout=0.5,
        encoded_image_size=ENCODED_IMAGE_SIZE,
    ):
        super().__init__()
        self.args = {
            "attention_dim": attention_dim,
            "embed_dim": embed_dim,
            "decoder_dim": decoder_dim,
            "vocab_size": vocab_size,
            "encoder_dim": encoder_dim,
            "dropout": dropout,
            "encoded_image_size": encoded_image_size,
        }
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
            raise ValueError(
                f"embeddings are {tuple(embeddings.shape)}, the decoder needs "
                f"{tuple(self.embedding.weight.shape)}"
            )
        with torch.no_grad():
            self.embedding.weight.copy_(embeddings)

    def fine_tune_embeddings(self, fine_tune=True):
        self.embedding.weight.requires_grad = fine_tune

    def encode_memory(self, features):
        """
        Everything that is computed once per batch of images, as `Annotations`.

        features: (N, G, E) annotation vectors on a square grid, or (N, h, w, E)
        """
        features = features.reshape(len(features), -1, features.shape[-1])
        pool = pooling_matrix(
            features.shape[1], self.args["encoded_image_size"], features.device, features.dtype
        )
        attention, lstm = self.attention, self.decode_step
        encoder_att = DeferredLinear(attention.encoder_att.weight, attention.encoder_att.bias)
        keys = encoder_att(features.flatten(0, 1)).view(*features.shape[:2], -1)
        if len(pool) != features.shape[1]:  # else each cell is a location
            # The rows of pool sum to 1, so the bias passes through it unchanged.
            keys = pool @ keys
        layers = attention.decoder_att, self.f_beta
        hidden_projections = DeferredLinear(
            torch.cat([layer.weight for layer in layers] + [lstm.weight_hh]),
            torch.cat([layer.bias for layer in layers] + [lstm.bias_hh]),
        )
        embedding_to_gates, context_to_gates = lstm.weight_ih.split(
            (self.args["embed_dim"], self.args["encoder_dim"]), 1
        )
        return Annotations(
            features,
            pool,
            keys,
            AttentionEnergy(keys, attention.full_att.weight.squeeze(0)),
            hidden_projections,
            DeferredLinear(context_to_gates, lstm.bias_ih),
            DeferredLinear(embedding_to_gates),
        )

    def init_hidden_state(self, annotations):
        """h and c, each (N, H), from the mean annotation vector (section 3.1.2)"""
        mean = annotations.pool.mean(0) @ annotations.features  # (N, E)
        # c is a sum over many steps, so it is never in half precision.
        return tuple(init(mean).to(init.weight.dtype) for init in (self.init_h, self.init_c))

    def embed_to_gates(self, tokens, annotations):
        """What the tokens' embeddings add to the LSTM's gates: ids (...) -> (..., 4 H)"""
        return annotations.embedding_to_gates(self.embedding(tokens))

    def step(self, token_gates, state, annotations, grid, slots=None, hard_attention=None):
        """
        Attend once and read one token, for M captions: equations 1 to 3 of the paper.

        token_gates: (M, 4 H), from `embed_to_gates`; state: h and c, each (M, H)
        grid: (n, R), the captions belong to the first n images, at most R to each
        slots: (M,), the index of each caption in the flattened grid; without it the M captions
        fill the grid in order
        hard_attention: as in `Attention`

        Returns the new state; alpha (M, P), the attention for the next token; and the weights
        (M, P) of the context vector, which are alpha unless hard_attention is given.
        """
        h, c = state
        sizes = self.args["attention_dim"], self.args["encoder_dim"], 4 * h.shape[1]
        query, beta, gates = annotations.hidden_projections(h).split(sizes, 1)
        if slots is not None:
            query = query.new_zeros(grid[0] * grid[1], sizes[0]).index_copy(0, slots, query)
        context, alpha, weights = self.attention(annotations, query.view(*grid, -1), hard_attention)
        outputs = (context, alpha) if hard_attention is None else (context, alpha, weights)
        outputs = [x.flatten(0, 1) for x in outputs]
        if slots is not None:
            outputs = [x.index_select(0, slots) for x in outputs]
        context, alpha, weights = outputs[0], outputs[1], outputs[-1]
        context = beta.sigmoid() * context  # beta * z_hat, section 4.2.1
        gates = gates.to(c.dtype) + token_gates + annotations.context_to_gates(context)
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return (o.sigmoid() * c.tanh(), c), alpha, weights

    def logits(self, h):
        """Hidden states (M, H) -> logits of the next token (M, V)"""
        return self.to_logits()(self.dropout(h))

    def to_logits(self):
        """`logits` without dropout, as a function for all steps of a search"""
        return DeferredLinear(self.fc.weight, self.fc.bias)

    def _scheduled_sampling(self, token_gates, h, annotations, sampling_prob):
        """
        Scheduled sampling (Bengio et al. 2015, arXiv 1506.03099): with probability sampling_prob,
        a caption's input is a token sampled from the model instead of the true one.

        token_gates: (M, 4 H) of the true tokens; h: (M, H)
        Returns (M, 4 H).
        """
        with torch.no_grad():
            sampled = sample_categorical(self.fc(h).softmax(-1))
        use_sampled = torch.rand(len(h), device=h.device) < sampling_prob
        return torch.where(
            use_sampled.unsqueeze(1), self.embed_to_gates(sampled, annotations), token_gates
        )

    def forward(self, features, captions, lengths, sampling_prob=0.0, hard_fraction=0.0):
        """
        Teacher forcing: every token is predicted from the true ones before it.

        features: (N, G, E) annotation vectors
        captions: (N, R, L) token ids, <start> ... <end> <pad>
        lengths: (N, R) true lengths, <start> and <end> counted; they are needed on the CPU
        sampling_prob: the probability of scheduled sampling, see `_scheduled_sampling`
        hard_fraction: the share of captions with hard attention, that is with sampled locations

        Returns, for the W tokens to predict (all but <start>), image by image, caption by
        caption: logits (W, V) and targets (W,); and alphas (N, R, T, P), zero after the end. With
        hard attention, also the weights of the context vectors, (N, R, T, P) too.
        """
        packed = PackedCaptions.of(lengths.cpu(), captions.shape[2], features.device)
        annotations = self.encode_memory(features.index_select(0, packed.images))
        state = tuple(
            x.index_select(0, packed.image_of) for x in self.init_hidden_state(annotations)
        )
        tokens = captions.flatten()
        token_gates = self.embed_to_gates(tokens[packed.tokens], annotations)
        token_gates = token_gates.split(packed.batch_sizes)
        slots = packed.slots.split(packed.batch_sizes)
        hard_attention = None
        if hard_fraction:
            hard = torch.rand(lengths.shape, device=features.device) < hard_fraction
            hard_attention = partial(sample_location, hard=hard)
        hidden, alphas, weights = [], [], []
        for t, m in enumerate(packed.batch_sizes):
            state, gates = tuple(x[:m] for x in state), token_gates[t]
            if sampling_prob and t > 0:
                gates = self._scheduled_sampling(gates, state[0], annotations, sampling_prob)
            # With one caption per image the grid is full and in order.
            state, alpha, weight = self.step(
                gates,
                state,
                annotations,
                packed.grids[t],
                slots[t] if captions.shape[1] > 1 else None,
                hard_attention,
            )
            hidden.append(state[0])
            alphas.append(alpha)
            weights.append(weight)
        hidden = torch.cat(hidden)  # (W, H), step by step
        logits = self.logits(hidden.index_select(0, packed.by_caption))
        targets = tokens[packed.tokens[packed.by_caption] + 1]
        shape = *lengths.shape, len(packed.batch_sizes), -1
        attention = [
            x.new_zeros(lengths.numel() * shape[2], x.shape[1])
            .index_copy(0, packed.steps, x)
            .view(shape)
            for x in map(torch.cat, (alphas, weights) if hard_fraction else (alphas,))
        ]
        return logits, targets, *attention
