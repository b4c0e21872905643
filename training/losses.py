"""
What training minimises: `doubly_stochastic_loss`, and the objectives of which train.py takes one,
`TeacherForcing`, `HardAttention` or `SelfCritical`.

An objective is called once per step, or once per part of it:

    loss, total, correct = objective(decoder, features, captions, lengths, images, share)

features (N, G, E), captions (N, R, L) and lengths (N, R) as `DecoderWithAttention.forward` takes
them; images (N,), which images of the data set they are; share, this process's `Share`. The loss is
a scalar to go backward from. total and correct are tensors to be added up over an epoch, which
`figures` turns into the log's figures.
"""

from typing import NamedTuple

import torch

from evaluation.metrics import CiderD, top_k_correct
from modeling.autograd import CrossEntropy, log_softmax_parts
from modeling.sampling import sample_captions

SAMPLED = 0.5  # hard attention: the share of captions whose places are drawn, section 4.1
MEMORY = 0.9  # hard attention: what the baseline keeps of itself at each step, section 4.1
SMALLEST = 1e-30  # attention below it counts as this where its logarithm is taken


class Share(NamedTuple):
    """
    What a step's sums are divided by: its words and captions, of all parts and all processes,
    over the number of processes, since these average their gradients.
    """
    words: float
    captions: float


def doubly_stochastic_loss(scores, targets, alphas, alpha_c=1.0, words=None, captions=None):
    """
    Cross-entropy plus doubly stochastic attention, equation 14: the attention that a
    caption pays to a pixel should come to 1 over all its words.

    scores (W, V), targets (W,), alphas (N, R, T, P) as the decoder's forward returns them

    Returns the loss, a scalar in nats: a mean over words plus alpha_c times a mean over
    captions and pixels. `words` and `captions` divide instead of W and N * R where this
    batch is one process's share of a larger one.
    """
    cross_entropy = CrossEntropy.apply(scores, targets, None) / (words or len(targets))
    captions = captions or alphas.shape[0] * alphas.shape[1]
    return cross_entropy + alpha_c * doubly_stochastic_penalty(alphas).sum() / captions


def doubly_stochastic_penalty(alphas):
    """(N, R, T, P) -> (N, R): how far each pixel's attention is from 1 over a caption, squared"""
    return ((1 - alphas.sum(2)) ** 2).mean(-1)


class Objective:
    """What all have; `baseline` is the only state of theirs."""

    dropout = True
    baseline = torch.zeros(())

    def captions(self, lengths):
        """How many captions it makes of lengths (N, R)."""
        return lengths.numel()

    def step_done(self, processes):
        pass


class TeacherForcing(Objective):
    """
    Every word is predicted from the true ones before it, on soft attention (section 4.2).

    own: scheduled sampling, the probability that it is predicted from a word of the model's own
    instead; train.py raises it from epoch to epoch.
    """

    def __init__(self, alpha_c=1.0):
        self.alpha_c, self.own = alpha_c, 0.0

    def __call__(self, decoder, features, captions, lengths, images, share):
        scores, targets, alphas = decoder(features, captions, lengths, self.own)
        loss = doubly_stochastic_loss(scores, targets, alphas, self.alpha_c, *share)
        return loss, loss.detach() * share.words, top_k_correct(scores.detach(), targets)

    @staticmethod
    def figures(total, correct, words, captions):
        return {"train_loss": total / words, "train_top5": 100 * correct / words}


class HardAttention(TeacherForcing):
    """
    Stochastic hard attention, section 4.1: the decoder looks at one place, drawn from alpha. The
    place has no gradient, so the log-probability of the caption rewards the choice (REINFORCE,
    equation 11), less a moving average of those before (`baseline`, nats).

    lambda_r, lambda_e: the weights of reward and of alpha's entropy, as in the paper
    """

    def __init__(self, alpha_c, lambda_r, lambda_e, sampled=SAMPLED):
        super().__init__(alpha_c)
        self.lambda_r, self.lambda_e, self.sampled = lambda_r, lambda_e, sampled
        self.log_p, self.count = 0.0, 0  # of this step so far

    def __call__(self, decoder, features, captions, lengths, images, share):
        scores, targets, alphas, seen = decoder(features, captions, lengths, self.own, self.sampled)
        loss = doubly_stochastic_loss(scores, targets, alphas, self.alpha_c, *share)
        log_p = caption_log_probs(scores.detach(), targets, lengths)
        reward = self.lambda_r * (log_p - self.baseline)
        places = choice(alphas, seen, reward, self.lambda_e) / share.words
        self.log_p, self.count = self.log_p + log_p.sum(), self.count + log_p.numel()
        # The log's loss leaves the places out, as soft attention's does.
        return loss - places, loss.detach() * share.words, top_k_correct(scores.detach(), targets)

    def step_done(self, processes):
        log_p, count = processes.all_reduce(self.log_p, self.count)
        self.baseline = MEMORY * self.baseline + (1 - MEMORY) * log_p / count
        self.log_p, self.count = 0.0, 0


def caption_log_probs(scores, targets, lengths):
    """(N, R): the log-probability of each caption in nats; the arguments are forward's"""
    chosen, totals = log_softmax_parts(scores, targets)
    caption = torch.arange(lengths.numel()).repeat_interleave((lengths - 1).flatten().cpu())
    return chosen.new_zeros(lengths.numel()).index_add_(
        0, caption.to(chosen.device, non_blocking=True), chosen - totals).view(lengths.shape)


def choice(alphas, seen, reward, lambda_e):
    """
    What of the paper's equation 12 is about choosing places: reward times log p(place) plus
    lambda_e times the entropy of alpha, summed over captions and words.

    alphas, seen (N, R, T, P): attention, and what the decoder saw, a 1 at the place drawn. Where
    it saw alpha itself, the expected context, the sum of alpha d(log alpha) is 0: no gradient.
    reward: (N, R)
    """
    log_alphas = alphas.clamp(min=SMALLEST).log()
    log_p = (seen.detach() * log_alphas).sum((2, 3))
    entropy = -(alphas * log_alphas).sum((2, 3))
    return (reward * log_p + lambda_e * entropy).sum()


class SelfCritical(Objective):
    """
    Self-critical sequence training (Rennie et al. 2017, arXiv 1612.00563): the model draws its own
    captions; each is rewarded by its CIDEr-D less the mean of the others of the image (Luo 2020,
    arXiv 2003.09971). There is no dropout, so that what is drawn is what is trained.

    data: the training images' CaptionDataset; samples: captions per image, at least 2
    """

    dropout = False

    def __init__(self, data, alpha_c, samples=5, max_len=50):
        self.word_map, self.reward = data.word_map, Reward(data)
        self.alpha_c, self.samples, self.max_len = alpha_c, samples, max_len

    def __call__(self, decoder, features, captions, lengths, images, share):
        captions, lengths = sample_captions(getattr(decoder, "module", decoder), features.detach(),
                                   self.word_map, self.samples, self.max_len)
        drawn = captions.cpu()  # before the forward pass: a GPU is busy with that ...
        scores, targets, alphas = decoder(features, captions, lengths)
        rewards = self.reward(images, drawn, lengths)  # ... while the CPU does this
        loss = self_critical_loss(scores, targets, lengths, rewards.to(scores.device),
                                  share.captions)
        loss = loss + self.alpha_c * doubly_stochastic_penalty(alphas).sum() / share.captions
        return loss, rewards.sum(), torch.zeros((), dtype=torch.long)

    def captions(self, lengths):
        return len(lengths) * self.samples

    @staticmethod
    def figures(total, correct, words, captions):
        return {"train_reward": total / captions}


def self_critical_loss(scores, targets, lengths, rewards, captions=None):
    """
    A scalar whose gradient is, in the mean over what is drawn, that of the expected reward, with
    the other sign.

    scores (W, V), targets (W,), lengths (N, R) of the R captions drawn for each image, R > 1
    rewards: (N, R); captions divides instead of N * R
    """
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    advantage = (rewards - others).flatten()
    ends = (lengths - 1).flatten().to(advantage.device)
    weights = advantage.repeat_interleave(ends, output_size=len(targets))
    return CrossEntropy.apply(scores, targets, weights) / (captions or rewards.numel())


class Reward:
    """
    CIDEr-D, 0..10, of captions drawn for training images. They are compared as words with all the
    captions of the image, and <end> is one of the words, in the document frequencies too: without
    it, fragments that end anywhere are rewarded (arXiv 2305.12254).
    """

    END = "<end>"

    def __init__(self, data):
        self.words = {i: word for word, i in data.word_map.items()}
        self.references = [[[*words, self.END] for words in entry["references"]]
                           for entry in data.entries]
        self.cider = CiderD(self.references)

    def __call__(self, images, captions, lengths):
        """images: (N,); captions (N, R, L) and lengths (N, R) as `sample` gives them: (N, R)"""
        candidates = [[self.words[i] for i in caption[1:length]]
                      for caption, length in zip(captions.flatten(0, 1).tolist(),
                                                 lengths.flatten().tolist())]
        references = [self.references[image] for image in images for _ in range(lengths.shape[1])]
        scores = self.cider.score(candidates, references)
        return torch.from_numpy(scores).float().view(lengths.shape)
