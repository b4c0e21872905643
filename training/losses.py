"""
The training loss: `doubly_stochastic_loss`, and the criteria `TeacherForcing`, `HardAttention` and
`SelfCritical`, one of which train.py calls for each step, or part of a step:

    loss, total, correct = criterion(decoder, batch)

loss is a scalar to backpropagate; total and correct are summed over an epoch for `metrics`.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets import CaptionDataset
from evaluation.metrics import CiderD, top_k_correct
from modeling.beam_search import Search
from modeling.devices import Distributed
from modeling.evidence import find_batch_evidence
from modeling.sampling import sample_captions
from models import DecoderOutput

BASELINE_DECAY = 0.9  # hard attention: of the moving average of log-probabilities, section 4.1
MIN_ALPHA = 1e-30  # smaller attention weights are raised to this before the logarithm


class Batch(NamedTuple):
    """
    A batch on the device, or a part of one. The loss's sums are divided by num_tokens and
    num_captions: those of the whole step per process, since processes average their gradients.
    """

    features: Tensor  # (N, G, E)
    captions: Tensor  # (N, R, L) token ids
    lengths: Tensor  # (N, R) <start> and <end> counted, on the CPU
    indices: np.ndarray  # (N,) of the images or captions in the data set
    num_tokens: float
    num_captions: float


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each token in nats, in at least float32: logits (W, V), targets (W,) -> (W,)"""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="none")


def doubly_stochastic_loss(
    output: DecoderOutput,
    lengths: Tensor,
    alpha_c: float = 1.0,
    num_tokens: float | None = None,
    num_captions: float | None = None,
) -> Tensor:
    """
    Cross-entropy plus the doubly stochastic attention term, equation 14: the attention to each
    location should sum to 1 over the tokens of a caption. As in the tutorial, both terms are means,
    over tokens and over locations: the paper has sums, so its lambda is on another scale.

    lengths: (N, R) of the captions; num_tokens, num_captions: divisors instead of W and N * R where
    this batch is one part of a larger one. Returns a scalar in nats.
    """
    cross_entropy = token_losses(output.logits, output.targets).sum()
    cross_entropy = cross_entropy / (num_tokens or len(output.targets))
    penalty = doubly_stochastic_penalty(output.alphas, lengths).sum()
    return cross_entropy + alpha_c * penalty / (num_captions or lengths.numel())


def doubly_stochastic_penalty(alphas: Tensor, lengths: Tensor) -> Tensor:
    """
    alphas (N, R, T, P), lengths (N, R) -> (N, R): the mean over locations of (1 - sum over steps)
    squared; 0 for captions of length 1, which have no tokens to predict
    """
    penalty = (1 - alphas.sum(2)).square().mean(-1)
    return penalty * (lengths > 1).to(penalty.device, non_blocking=True)


def evidence_loss(alphas: Tensor, evidence: Tensor) -> Tensor:
    """
    Draws attention to where it was of use: the cross-entropy, in nats, of alphas (N, R, T, P)
    against a sharper evidence (N, R, T, P), the square of its means over 3 x 3 locations, scaled to
    a sum of 1. A word counts by its evidence, at most 1 nat. Summed over words, as a scalar. Not in
    the paper, whose attention learns from the words' probabilities alone.
    """
    side = math.isqrt(evidence.shape[-1])
    blocks = evidence.reshape(-1, 1, side, side)
    blocks = F.avg_pool2d(blocks, 3, stride=1, padding=1, count_include_pad=False).flatten(1)
    target = F.normalize(F.normalize(blocks, p=1).square(), p=1).view_as(evidence)
    log_alphas = alphas.clamp(min=MIN_ALPHA).log()
    return -(evidence.sum(3).clamp(max=1) * (target * log_alphas).sum(3)).sum()


class TeacherForcing:
    """
    Every token is predicted from the true ones before it, with soft attention (section 4.2).
    alpha_c: weight of the doubly stochastic term; evidence_c: of `evidence_loss`, a mean over words
    """

    dropout = True
    sampling_prob = 0.0  # scheduled sampling; train_one_epoch raises it from epoch to epoch
    hard_fraction = 0.0
    baseline = torch.zeros(())  # the only state of a criterion that is saved

    def __init__(self, alpha_c: float = 1.0, evidence_c: float = 0.0):
        self.alpha_c, self.evidence_c = alpha_c, evidence_c

    def __call__(self, decoder: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        output = decoder(
            batch.features, batch.captions, batch.lengths, self.sampling_prob, self.hard_fraction
        )
        loss = doubly_stochastic_loss(
            output, batch.lengths, self.alpha_c, batch.num_tokens, batch.num_captions
        )
        correct = top_k_correct(output.logits.detach(), output.targets)
        # The logged loss is without these two, so it compares with that of other runs.
        objective = self.objective(output, batch.lengths) / batch.num_tokens
        evidence_term = self.evidence_term(decoder, batch, output.alphas)
        return loss - objective + evidence_term, loss.detach() * batch.num_tokens, correct

    def evidence_term(self, decoder: nn.Module, batch: Batch, alphas: Tensor) -> Tensor | float:
        """
        alphas: of the true captions. Evidence takes a forward pass of its own, so only one caption
        of each image is used, drawn at random: the same expectation in less time.
        """
        if not self.evidence_c:
            return 0.0
        single = getattr(decoder, "module", decoder)  # not wrapped for several processes
        columns = (batch.lengths > 1).any(0).nonzero().flatten()  # others only fill up
        drawn = columns[torch.randint(len(columns), (1,))]
        true = batch.captions[:, drawn], batch.lengths[:, drawn]
        evidence = find_batch_evidence(single, batch.features, *true)
        loss = evidence_loss(alphas[:, drawn, : evidence.shape[2]], evidence)
        return self.evidence_c * len(columns) * loss / batch.num_tokens

    def objective(self, output: DecoderOutput, lengths: Tensor) -> Tensor | float:
        """What is maximised in addition, summed over captions and tokens."""
        return 0.0

    def count_captions(self, lengths: Tensor) -> int:
        """The number of captions that the criterion uses for lengths (N, R)."""
        return int((lengths > 1).sum())

    def after_step(self, processes: Distributed) -> None:
        """Called after each step of the optimizer."""

    def metrics(self, total: float, correct: int, tokens: int, captions: int) -> dict[str, float]:
        """An epoch's figures for the log, from its sums."""
        return {"train_loss": total / tokens, "train_top5": 100 * correct / tokens}


class HardAttention(TeacherForcing):
    """
    Stochastic hard attention, section 4.1: the decoder attends to one location, sampled from alpha.
    Sampling has no gradient, so it is rewarded with the log-probability of the caption (REINFORCE,
    equation 11), minus a moving average of earlier ones (`baseline`, nats). lambda_r and lambda_e
    are the weights of the reward and of alpha's entropy.
    """

    hard_fraction = 0.5  # of captions have sampled locations; the others use the expectation

    def __init__(self, alpha_c: float, lambda_r: float, lambda_e: float):
        super().__init__(alpha_c)
        self.lambda_r, self.lambda_e = lambda_r, lambda_e
        self._log_prob_sum: Tensor | float = 0.0  # of this step so far
        self._num_captions = 0

    def objective(self, output: DecoderOutput, lengths: Tensor) -> Tensor:
        log_probs = caption_log_probs(output, lengths)
        self._log_prob_sum = self._log_prob_sum + log_probs.sum()
        self._num_captions += self.count_captions(lengths)
        reward = self.lambda_r * (log_probs - self.baseline)
        return reinforce_attention(output.alphas, output.weights, reward, self.lambda_e)

    def after_step(self, processes: Distributed) -> None:
        log_prob, captions = processes.all_reduce(self._log_prob_sum, self._num_captions)
        self.baseline = BASELINE_DECAY * self.baseline + (1 - BASELINE_DECAY) * log_prob / captions
        self._log_prob_sum, self._num_captions = 0.0, 0


@torch.no_grad()
def caption_log_probs(output: DecoderOutput, lengths: Tensor) -> Tensor:
    """The log-probability of each caption in nats: lengths (N, R) -> (N, R)"""
    losses = token_losses(output.logits, output.targets)
    caption = torch.arange(lengths.numel()).repeat_interleave((lengths - 1).flatten().cpu())
    caption = caption.to(losses.device, non_blocking=True)
    return -losses.new_zeros(lengths.numel()).index_add_(0, caption, losses).view(lengths.shape)


def reinforce_attention(alphas: Tensor, weights: Tensor, reward: Tensor, lambda_e: float) -> Tensor:
    """
    The terms for the choice of locations in the learning rule after equation 12: reward (N, R)
    times log p(location) plus lambda_e times the entropy of alpha, summed over captions and tokens.

    alphas, weights (N, R, T, P): attention, and the context vector's weights, 1 at the sampled
    location. Where the weights are alpha itself, the sum of alpha d(log alpha) is 0: no gradient.
    """
    log_alphas = alphas.clamp(min=MIN_ALPHA).log()
    log_p = (weights.detach() * log_alphas).sum((2, 3))
    entropy = -(alphas * log_alphas).sum((2, 3))
    return (reward * log_p + lambda_e * entropy).sum()


class SelfCritical(TeacherForcing):
    """
    Self-critical sequence training (Rennie et al. 2017, arXiv 1612.00563): the model samples
    captions; each is rewarded by its CIDEr-D minus the mean of the image's other samples (Luo 2020,
    arXiv 2003.09971). Without dropout the model trains the same distribution that it samples from.

    data: the training images; samples: captions per image, 2 or more; cross_entropy_share: w in
    (1 - w) self-critical loss + w cross-entropy of the true captions, which keeps words in use that
    the reward alone would forget; evidence_c: also of the true captions, if there is such a share
    """

    dropout = False

    def __init__(
        self,
        data: CaptionDataset,
        alpha_c: float,
        samples: int = 5,
        cross_entropy_share: float = 0.0,
        evidence_c: float = 0.0,
    ):
        super().__init__(alpha_c, evidence_c)
        self.word_map, self.reward = data.word_map, Reward(data)
        self.cross_entropy_share = cross_entropy_share
        self.sampling = Search(n_best=samples, sample=True)

    def __call__(self, decoder: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        single = getattr(decoder, "module", decoder)  # not wrapped for several processes
        features, word_map = batch.features, self.word_map
        captions, lengths = sample_captions(single, features.detach(), word_map, self.sampling)
        on_cpu = captions.cpu()  # before the forward pass, which keeps a GPU busy ...
        output = decoder(features, captions, lengths)
        rewards = self.reward(batch.indices, on_cpu, lengths)  # ... while the CPU does this
        loss = self_critical_loss(output, lengths, rewards, batch.num_captions)
        penalty = doubly_stochastic_penalty(output.alphas, lengths).sum() / batch.num_captions
        if self.cross_entropy_share:
            output = decoder(features, batch.captions, batch.lengths)
            cross_entropy = token_losses(output.logits, output.targets).sum() / batch.num_tokens
            loss = torch.lerp(loss, cross_entropy, self.cross_entropy_share)
            loss = loss + self.evidence_term(decoder, batch, output.alphas)
        return loss + self.alpha_c * penalty, rewards.sum(), torch.zeros((), dtype=torch.long)

    def count_captions(self, lengths: Tensor) -> int:
        return len(lengths) * self.sampling.n_best

    def metrics(self, total: float, correct: int, tokens: int, captions: int) -> dict[str, float]:
        return {"train_reward": total / captions}


def self_critical_loss(
    output: DecoderOutput, lengths: Tensor, rewards: Tensor, num_captions: float
) -> Tensor:
    """
    A scalar whose gradient estimates that of minus the expected reward, as a mean over the samples,
    R > 1 captions per image. lengths, rewards: (N, R)
    """
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    weights = (rewards - others).flatten().repeat_interleave((lengths - 1).flatten())  # (W,)
    losses = token_losses(output.logits, output.targets)
    return (weights.to(losses, non_blocking=True) * losses).sum() / num_captions


class Reward:
    """
    CIDEr-D, 0..10, of sampled captions against all captions of the image, with the training
    captions' document frequencies. <end> counts as a word in both: otherwise incomplete captions
    are rewarded (arXiv 2305.12254).
    """

    def __init__(self, data: CaptionDataset):
        self.words = {i: word for word, i in data.word_map.items()}
        texts = [entry["references"] for entry in data.entries]
        self.references = [[[*words, "<end>"] for words in captions] for captions in texts]
        self.cider = CiderD(self.references)

    def __call__(self, images: np.ndarray, captions: Tensor, lengths: Tensor) -> Tensor:
        """N indices of images; captions (N, R, L), lengths (N, R) -> float32 (N, R)"""
        pairs = zip(captions.flatten(0, 1).tolist(), lengths.flatten().tolist())
        candidates = [[self.words[i] for i in caption[1:length]] for caption, length in pairs]
        references = [self.references[image] for image in images for _ in range(lengths.shape[1])]
        scores = self.cider.score(candidates, references)
        return torch.from_numpy(scores).float().view(lengths.shape)
