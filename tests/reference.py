"""
The textbook version: what the paper and the tutorial describe, written as plainly as possible, and
therefore slow. It shares the parameters of our modules but none of their code, so that the two can
be compared.

Attention is projected at every step from all 14 x 14 pixels, the context is
(features * alpha).sum, logits are written step by step to a padded (N, T, V) tensor, and the
search processes one image at a time.
"""

import torch
import torch.nn.functional as F


def encode(features, size=14):
    """(N, G, E) on the backbone's square grid -> (N, size^2, E), the tutorial's encoding"""
    n, g, e = features.shape
    side = int(g**0.5)
    grid = features.reshape(n, side, side, e).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(grid, size).permute(0, 2, 3, 1).reshape(n, size * size, e)


def attend(attention, encoded, h):
    """encoded (N, P, E), h (N, H) -> context (N, E), alpha (N, P)"""
    att1 = attention.encoder_att(encoded)  # (N, P, A)
    att2 = attention.decoder_att(h)  # (N, A)
    att = attention.full_att(torch.relu(att1 + att2.unsqueeze(1))).squeeze(2)  # (N, P)
    alpha = torch.softmax(att, dim=1)
    return (encoded * alpha.unsqueeze(2)).sum(dim=1), alpha


def init_hidden_state(decoder, encoded):
    mean = encoded.mean(dim=1)
    return decoder.init_h(mean), decoder.init_c(mean)


def decode_step(decoder, encoded, words, h, c):
    """One token for each row: logits (N, V), h, c, alpha (N, P)"""
    context, alpha = attend(decoder.attention, encoded, h)
    context = torch.sigmoid(decoder.f_beta(h)) * context
    h, c = decoder.decode_step(torch.cat([decoder.embedding(words), context], dim=1), (h, c))
    return decoder.fc(decoder.dropout(h)), h, c, alpha


def decode(decoder, encoded, captions, lengths):
    """
    Teacher forcing over captions sorted by falling length, the batch shrinking as they end.

    encoded (N, P, E), captions (N, L), lengths (N,)
    Returns predictions (N, T, V), sorted captions, decode lengths, alphas (N, T, P), the order.
    """
    lengths, order = lengths.sort(dim=0, descending=True)
    encoded, captions = encoded[order], captions[order]
    h, c = init_hidden_state(decoder, encoded)
    decode_lengths = (lengths - 1).tolist()
    steps = max(decode_lengths)
    predictions = encoded.new_zeros(len(encoded), steps, decoder.fc.out_features)
    alphas = encoded.new_zeros(len(encoded), steps, encoded.shape[1])
    for t in range(steps):
        n = sum(length > t for length in decode_lengths)
        scores, h, c, alpha = decode_step(decoder, encoded[:n], captions[:n, t], h[:n], c[:n])
        predictions[:n, t] = scores
        alphas[:n, t] = alpha
    return predictions, captions, decode_lengths, alphas, order


def loss(predictions, captions, decode_lengths, alphas, alpha_c=1.0):
    """Cross-entropy over the words plus the doubly stochastic term, equation 14."""
    scores = torch.cat([p[:n] for p, n in zip(predictions, decode_lengths)])
    targets = torch.cat([c[1 : n + 1] for c, n in zip(captions, decode_lengths)])
    return F.cross_entropy(scores, targets) + alpha_c * ((1.0 - alphas.sum(dim=1)) ** 2).mean()


@torch.no_grad()
def search(
    decoder,
    encoded,
    word_map,
    beam_size,
    max_len=50,
    length_penalty=0,
    no_unk=False,
    no_repeat_ngram=0,
):
    """
    Beam search for one image; its beams are a batch that shrinks as they end. encoded (1, P, E)

    Returns all finished beams, or the unfinished ones if there are none, best first by
    score / length ** length_penalty: (words with <start> and <end>, alphas, score).
    """
    start, end = word_map["<start>"], word_map["<end>"]
    h, c = init_hidden_state(decoder, encoded)
    beams, total = [([start], [])], encoded.new_zeros(1)  # words and alphas, log-probabilities
    complete, unfinished, k = [], [], beam_size
    for step in range(1, max_len + 2):  # the tutorial's `if step > 50: break` comes after step 51
        words = torch.tensor([words[-1] for words, _ in beams], device=encoded.device)
        scores, h, c, alpha = decode_step(decoder, encoded.expand(len(beams), -1, -1), words, h, c)
        scores = total.unsqueeze(1) + torch.log_softmax(scores, dim=1)  # (k, V)
        if no_unk:
            scores[:, word_map["<unk>"]] = -torch.inf
        for row, (path, _) in zip(scores, beams):
            for word in range(len(row)) if no_repeat_ngram else ():
                longer = [*path[1:], word]
                found = [
                    tuple(longer[i : i + no_repeat_ngram])
                    for i in range(len(longer) - no_repeat_ngram + 1)
                ]
                if len(found) > len(set(found)):
                    row[word] = -torch.inf
        total, best = scores.flatten().topk(min(k, scores.numel()))
        parents, words = best // scores.shape[1], (best % scores.shape[1]).tolist()
        beams = [
            (beams[parent][0] + [word], beams[parent][1] + [alpha[parent]])
            for parent, word in zip(parents.tolist(), words)
        ]
        complete += [
            (*beam, score) for beam, score in zip(beams, total.tolist()) if beam[0][-1] == end
        ]
        active = [i for i, beam in enumerate(beams) if beam[0][-1] != end]
        k = len(active)
        if step == max_len:
            unfinished = [(*beams[i], total[i].item()) for i in active]
        if k == 0:
            break
        beams, total = [beams[i] for i in active], total[active]
        h, c = h[parents[active]], c[parents[active]]
    return sorted(
        complete or unfinished, key=lambda beam: -beam[2] / (len(beam[0]) - 1) ** length_penalty
    )
