"""
The captioning model of Xu et al. 2015, Show, Attend and Tell (arXiv 1502.03044). Shapes:
N images   R captions per image   M captions in progress   P locations, 14 x 14 (paper: L)
E encoder size (paper: D)   H decoder size   A attention size   V vocabulary (paper: K)
T time steps (paper: C)   L padded caption length   W tokens to predict, all but <start>
G cells of the backbone's own grid, 8 x 8 at 256 x 256 pixels

`Attention.forward` and `DecoderWithAttention.step` are the paper's equations; --plain runs them as
they stand. Otherwise modeling/decoding.py computes the same numbers faster, unless you change or
override these lines: then yours run as written (docs/extending.md).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets import IMAGE_SIZE
from modeling.backbones import load_backbone
from modeling.decoding import FastSteps, HardAttention, PlainSteps, State, make_steps
from modeling.longest_first import LongestFirst
from modeling.sampling import locations_sampler, scheduled_sampling

ENCODED_IMAGE_SIZE = 14  # the annotation vectors form a 14 x 14 grid (section 4.3)


class Encoder(nn.Module):
    """
    A convolutional classifier without its head: images -> annotation vectors (section 3.1.1).

    name: any convolutional classifier of torchvision or timm
    weights, stride: see `load_backbone`; at stride 16 the grid is twice as fine
    image_size: S, width and height in pixels of the images that it is trained on
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoded_image_size: int = ENCODED_IMAGE_SIZE,
        name: str = "resnet101",
        weights: str | None = "imagenet",
        stride: int = 32,
        image_size: int = IMAGE_SIZE,
    ):
        super().__init__()
        self.args: dict = {"encoded_image_size": encoded_image_size, "name": name}
        self.args |= {"stride": stride, "image_size": image_size}
        backbone = load_backbone(name, weights, stride)
        self.resnet = backbone.body  # of any architecture; old checkpoints have this name
        self.adaptive_pool = nn.AdaptiveAvgPool2d(encoded_image_size)
        self.encoder_dim = backbone.channels
        self._fine_tuned = backbone.fine_tuned
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last).eval().fine_tune(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images as in `feature_map` -> annotation vectors (N, P, E), row by row of their grid"""
        return self.adaptive_pool(self.feature_map(images)).flatten(2).transpose(1, 2)

    def feature_map(self, images: Tensor) -> Tensor:
        """images (N, 3, S, S), uint8 or floats already normalised -> (N, E, h, w)"""
        images = images.contiguous(memory_format=torch.channels_last)
        if images.dtype == torch.uint8:
            images = (images / 255 - self.mean) / self.std
        return self.resnet(images)

    def cells(self, images: Tensor) -> Tensor:
        """(N, G, E), pooled by the decoder; as `forward` where the map is finer or not square"""
        x = self.feature_map(images)
        coarse = x.shape[2] == x.shape[3] <= self.args["encoded_image_size"]
        return (x if coarse else self.adaptive_pool(x)).flatten(2).transpose(1, 2)

    def fine_tune(self, fine_tune: bool = True) -> None:
        """Switch training of blocks 2-4, all layers beyond stride 4, on or off."""
        self.resnet.requires_grad_(False)
        for module in self._fine_tuned:
            module.requires_grad_(fine_tune)

    def train(self, mode: bool = True) -> "Encoder":
        """Always in evaluation mode: BatchNorm keeps its ImageNet statistics."""
        return super().train(False)


class Attention(nn.Module):
    """f_att and the context vector (sections 3.1.2 and 4)"""

    def __init__(self, encoder_dim: int, decoder_dim: int, attention_dim: int):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)

    def forward(
        self, annotations: Tensor, h: Tensor, hard: HardAttention | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        annotations: (M, P, E); h: (M, H); hard: turns alpha into the weights of hard attention
        Returns the context vector (M, E), alpha (M, P) and the context vector's weights (M, P).
        """
        hidden = F.relu(self.encoder_att(annotations) + self.decoder_att(h).unsqueeze(1))
        energy = self.full_att(hidden).squeeze(2)  # (M, P), equation 4
        alpha = energy.softmax(1)  # equation 5
        weights = alpha if hard is None else hard(alpha)  # equation 8, if hard
        context = (weights.unsqueeze(2) * annotations).sum(1)  # equation 13, or 9
        return context, alpha, weights


class DecoderOutput(NamedTuple):
    """What teacher forcing returns, with the W tokens image by image, caption by caption"""

    logits: Tensor  # (W, V)
    targets: Tensor  # (W,) token ids
    alphas: Tensor  # (N, R, T, P), zero after a caption's end
    weights: Tensor  # (N, R, T, P) of the context vectors: alphas, unless attention is hard


class DecoderWithAttention(nn.Module):
    """An LSTM that attends to the image again for every token (section 3.1.2)."""

    def __init__(
        self,
        attention_dim: int,
        embed_dim: int,
        decoder_dim: int,
        vocab_size: int,
        encoder_dim: int = 2048,
        dropout: float = 0.5,
        encoded_image_size: int = ENCODED_IMAGE_SIZE,
        attention: str = "soft",
    ):
        args = {name: x for name, x in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.args, self.plain = args, False  # plain: run the lines of `step` as they are
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

    def init_hidden_state(self, annotations: Tensor) -> State:
        """h and c of the mean annotation vector (3.1.2, there by an MLP each); (N, P, E) given"""
        mean = annotations.mean(1)
        return self.init_h(mean), self.init_c(mean)

    def step(
        self, tokens: Tensor, state: State, annotations: Tensor, hard: HardAttention | None = None
    ) -> tuple[State, Tensor, Tensor]:
        """
        Attend to the image and read one token: tokens (M,) ids, annotations (M, P, E), hard as in
        `Attention`. Returns the new state, alpha (M, P) and the context vector's weights (M, P).
        """
        h, _ = state
        context, alpha, weights = self.attention(annotations, h, hard)
        context = self.f_beta(h).sigmoid() * context  # the gate (4.2.1, there a scalar)
        inputs = torch.cat([self.embedding(tokens), context], 1)
        return self.decode_step(inputs, state), alpha, weights  # equations 1 to 3

    def logits(self, h: Tensor) -> Tensor:
        """h (M, H) -> logits (M, V) of the next token (equation 7, here of h alone)"""
        return self.fc(h)

    def steps(self, features: Tensor, per_image: int | None = None) -> PlainSteps | FastSteps:
        """
        `step` and `logits` for a batch of images; features: (N, P, E), (N, h, w, E) or an encoder's
        `cells`; per_image: maximum captions per image; without it, steps on a GPU wait for a count
        """
        return make_steps(self, features, per_image)

    def forward(
        self,
        features: Tensor,
        captions: Tensor,
        lengths: Tensor,
        sampling_prob: float = 0.0,
        hard_fraction: float = 0.0,
    ) -> DecoderOutput:
        """
        Teacher forcing: each token is predicted from the true ones before it.

        features: as in `steps`; captions: (N, R, L) token ids, <start> ... <end> <pad>
        lengths: (N, R), <start> and <end> counted, preferably on the CPU, where they are used
        sampling_prob: of an input being a token sampled from the model (scheduled sampling)
        hard_fraction: the share of captions that attend to one sampled location (section 4.1)
        """
        order = LongestFirst(lengths, features.device)
        steps = self.steps(features.index_select(0, order.images), captions.shape[1])
        inputs, state = order.inputs(captions), steps.initial_state(order.rows)
        hard = locations_sampler(len(inputs), hard_fraction, inputs.device)
        history = []
        for t, m in enumerate(order.batch_sizes):  # the first m captions have not ended
            tokens, state = inputs[:m, t], tuple(x[:m] for x in state)
            if sampling_prob and t > 0:
                tokens = scheduled_sampling(tokens, state[0], steps.logits, sampling_prob)
            state, alpha, weight = steps.step(tokens, state, order.rows[:m], hard)
            history.append((state[0], alpha, weight))
        hidden, alphas, weights = zip(*history)
        logits = steps.logits(self.dropout(order.by_caption(hidden)))
        padded = [order.padded(values) for values in (alphas, weights)]
        return DecoderOutput(logits, order.targets(captions), *padded)

    def load_pretrained_embeddings(self, embeddings: Tensor) -> None:
        """embeddings: (V, embed_dim); RuntimeError for any other size"""
        self.embedding.load_state_dict({"weight": embeddings})

    def fine_tune_embeddings(self, fine_tune: bool = True) -> None:
        self.embedding.requires_grad_(fine_tune)


# The values of --attention; soft and hard are two ways to train the same decoder.
DECODERS = {"soft": DecoderWithAttention, "hard": DecoderWithAttention}
