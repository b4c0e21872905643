"""Encoder and decoder against torchvision's layers and one caption at a time, in float64."""

import pytest
import reference
import torch
from factories import make_captions, make_decoder
from torch import nn

from models import DecoderWithAttention, Encoder
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


def test_parameter_names_and_sizes_are_those_of_the_tutorial():
    decoder = DecoderWithAttention(512, 512, 512, 9490)
    sizes = {
        "attention.encoder_att": (512, 2048),
        "attention.decoder_att": (512, 512),
        "attention.full_att": (1, 512),
        "init_h": (512, 2048),
        "init_c": (512, 2048),
        "f_beta": (2048, 512),
        "fc": (9490, 512),
    }
    expected = {f"{name}.weight": size for name, size in sizes.items()}
    expected |= {f"{name}.bias": size[:1] for name, size in sizes.items()}
    expected |= {"embedding.weight": (9490, 512), "decode_step.weight_ih": (2048, 2560)}
    expected |= {"decode_step.weight_hh": (2048, 512), "decode_step.bias_ih": (2048,)}
    expected |= {"decode_step.bias_hh": (2048,)}
    assert {name: tuple(p.shape) for name, p in decoder.state_dict().items()} == expected


def test_resnet101_encoder_equals_torchvisions_own_layers_and_fine_tunes_blocks_2_to_4():
    from torchvision.models import resnet101

    encoder = Encoder(weights="none").double()
    model = resnet101().double()
    names = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    model.load_state_dict(
        {  # the tutorial's key resnet.5.x is layer2.x, and so on
            names[int(key.split(".")[1])] + "." + key.split(".", 2)[2]: value
            for key, value in encoder.state_dict().items()
        },
        strict=False,
    )
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    x = images
    for name in names:
        x = getattr(model.eval(), name)(x)
    with torch.no_grad():
        torch.testing.assert_close(encoder.cells(images), x.flatten(2).transpose(1, 2))
        pooled = nn.functional.adaptive_avg_pool2d(x, 14)  # the tutorial's encoding
        expected = pooled.permute(0, 2, 3, 1).flatten(1, 2)
        torch.testing.assert_close(encoder(images), expected)
    assert not any(p.requires_grad for p in encoder.parameters())
    encoder.fine_tune()
    trained = {name.split(".")[1] for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained == {"5", "6", "7"}


def test_vgg19_gives_the_papers_14_by_14_by_512_map():
    encoder = Encoder(name="vgg19", weights="none").train()
    assert encoder.cells(torch.zeros(1, 3, 224, 224)).shape == (1, 196, 512)
    assert not encoder.training  # a backbone keeps its ImageNet statistics


def test_uint8_images_are_normalised_like_imagenet():
    encoder = Encoder(name="mobilenet_v3_small", weights="none")
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(encoder(images), encoder(normal))
