"""The decoder against one caption at a time, in float64, and the encoder's pooling."""

import pytest
import reference
import torch
from factories import make_captions, make_decoder

from models import Encoder
from training.losses import doubly_stochastic_loss


@pytest.mark.parametrize("is_plain", [True, False])
@pytest.mark.parametrize("n, r, cells", [(1, 1, 64), (4, 5, 64), (3, 2, 196), (5, 5, 49)])
def test_a_batch_equals_its_captions_one_by_one(is_plain, n, r, cells):
    """Logits, alphas, loss and the gradient of every parameter."""
    decoder, (captions, lengths) = make_decoder(seed=n), make_captions(n, r, seed=n)
    decoder.plain = is_plain
    features = torch.randn(n, cells, 9, dtype=torch.float64, requires_grad=True)
    wanted = [features, *decoder.parameters()]

    output = decoder(features, captions, lengths)
    loss = doubly_stochastic_loss(output, lengths, alpha_c=0.7)
    gradients = torch.autograd.grad(loss, wanted)
    expected_loss = reference.loss(decoder, features, captions, lengths, alpha_c=0.7)
    expected = torch.autograd.grad(expected_loss, wanted)

    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    assert sum(g.abs().sum() > 1e-6 for g in expected) >= len(wanted) - 1
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)
    logits, alphas = reference.decode_all(decoder, features, captions, lengths)
    torch.testing.assert_close(output.logits, torch.cat(logits), rtol=1e-10, atol=1e-10)
    words = [captions[i, j, 1 : lengths[i, j]] for i in range(n) for j in range(r)]
    assert output.targets.tolist() == torch.cat(words).tolist()
    for found, alpha in zip(output.alphas.flatten(0, 1), alphas):
        torch.testing.assert_close(found[: len(alpha)], alpha, rtol=1e-10, atol=1e-10)
        assert not found[len(alpha) :].any()


def test_resnet101_is_pooled_as_in_the_tutorial_and_blocks_2_to_4_are_fine_tuned():
    encoder, images = Encoder(2, weights="none"), torch.randn(1, 3, 96, 96)
    assert encoder.args["name"] == "resnet101"
    with torch.no_grad():
        cells = encoder.feature_map(images).flatten(2).transpose(1, 2)  # 3 x 3
        torch.testing.assert_close(encoder(images), reference.encode(cells, 2))
    assert not any(p.requires_grad for p in encoder.parameters())
    encoder.fine_tune()
    trained = {name.split(".")[1] for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained == {"5", "6", "7"}  # of conv1, bn1, relu, maxpool, layer1, ..., layer4
    assert all(p.requires_grad for block in encoder.resnet[5:] for p in block.parameters())
