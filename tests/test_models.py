"""The decoder and the loss against the textbook version, in float64."""

import weakref
from functools import partial

import pytest
import reference
import torch
from factories import WORD_MAP, make_captions, make_decoder
from torch import nn

from modeling import autograd
from modeling.autograd import AttentionEnergy, CrossEntropy, DeferredLinear
from modeling.beam_search import beam_search
from modeling.devices import autocast
from models import DecoderWithAttention, Encoder, pooling_matrix
from training.losses import doubly_stochastic_loss


def textbook_loss(decoder, features, captions, lengths, alpha_c=1.0):
    r = captions.shape[1]
    encoded = reference.encode(features).repeat_interleave(r, 0)
    return reference.loss(
        *reference.decode(decoder, encoded, captions.flatten(0, 1), lengths.flatten())[:4], alpha_c
    )


@pytest.fixture(params=[autograd.CPU_CHUNK, 20_000, 1], ids=lambda size: f"chunks of {size} bytes")
def chunks(request, monkeypatch):
    """Large tensors are processed in chunks: here of the usual size, of some items, and of one."""
    monkeypatch.setattr(autograd, "CPU_CHUNK", request.param)


@pytest.mark.parametrize(
    "n, r, cells", [(1, 1, 64), (4, 1, 64), (4, 5, 64), (3, 2, 196), (2, 3, 1), (5, 5, 49)]
)
def test_loss_and_all_gradients_equal_the_textbook_version(n, r, cells, chunks):
    decoder, (captions, lengths) = make_decoder(seed=n), make_captions(n, r, seed=n)
    features = torch.randn(n, cells, 9, dtype=torch.float64, requires_grad=True)
    wanted = [features, *decoder.parameters()]

    ours = doubly_stochastic_loss(*decoder(features, captions, lengths), alpha_c=0.7)
    gradients = torch.autograd.grad(ours, wanted)
    textbook = textbook_loss(decoder, features, captions, lengths, alpha_c=0.7)
    expected = torch.autograd.grad(textbook, wanted, allow_unused=True)

    torch.testing.assert_close(ours, textbook, rtol=1e-12, atol=1e-12)
    if cells > 1:  # one cell leaves attention nothing to choose; the softmax eats one bias anyway
        assert sum(g.abs().sum() > 1e-6 for g in expected) >= len(wanted) - 1
    for ours, theirs in zip(gradients, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_scores_and_alphas_of_every_word_equal_the_textbook_version():
    decoder, (captions, lengths) = make_decoder(), make_captions(4, 3)
    features = torch.randn(4, 64, 9, dtype=torch.float64)
    scores, targets, alphas = decoder(features, captions, lengths)

    predictions, _, decode_lengths, expected_alphas, order = reference.decode(
        decoder,
        reference.encode(features).repeat_interleave(3, 0),
        captions.flatten(0, 1),
        lengths.flatten(),
    )
    back = order.argsort()
    expected = torch.cat([predictions[i, : decode_lengths[i]] for i in back])
    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(alphas.flatten(0, 1), expected_alphas[back], rtol=1e-10, atol=1e-10)
    words = [captions[i, j, 1 : lengths[i, j]] for i in range(4) for j in range(3)]
    assert targets.tolist() == torch.cat(words).tolist()


def test_alphas_sum_to_one_up_to_the_end_and_are_zero_after_it():
    decoder, (captions, lengths) = make_decoder(), make_captions(5, 2)
    _, _, alphas = decoder(torch.randn(5, 64, 9).double(), captions, lengths)
    sums, steps = alphas.sum(3), torch.arange(alphas.shape[2])
    expected = (steps < lengths.unsqueeze(2) - 1).double()
    torch.testing.assert_close(sums, expected)


def test_gradients_of_attention_energy_over_two_steps_equal_finite_differences():
    def two_steps(keys, first, second, weight):
        energy = AttentionEnergy(keys, weight)
        return energy(first), energy(second)

    inputs = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 6, 4), (3, 2, 4), (2, 1, 4), (4,))
    ]  # one image has ended
    assert torch.autograd.gradcheck(two_steps, inputs)


def test_gradients_of_deferred_linear_over_two_steps_equal_finite_differences():
    def two_steps(weight, bias, first, second):
        layer = DeferredLinear(weight, bias)
        return layer(second * layer(first))

    inputs = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 3), (3,), (4, 3), (4, 3))
    ]
    assert torch.autograd.gradcheck(two_steps, inputs)


def test_gradients_of_deferred_linear_without_bias_equal_finite_differences():
    inputs = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3), (4, 3))
    ]
    assert torch.autograd.gradcheck(lambda weight, x: DeferredLinear(weight)(x), inputs)


@pytest.mark.parametrize("rows", [(1,), (5, 40)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_deferred_linear_and_its_gradients_in_float32_equal_those_in_float64(rows, has_bias):
    """In a search, too, and for a slice of a weight, whose rows do not lie one after the other."""
    whole, bias = torch.randn(64, 100, requires_grad=True), torch.randn(64, requires_grad=True)
    inputs = [torch.randn(m, 60, requires_grad=True) for m in rows]
    leaves = [whole, *inputs, *([bias] if has_bias else [])]

    def run(layer_of, dtype):
        layer = layer_of(whole.to(dtype)[:, 40:], bias.to(dtype) if has_bias else None)
        outputs = [layer(x.to(dtype)) for x in inputs]
        return outputs, torch.autograd.grad(sum(y.sin().sum() for y in outputs), leaves)

    outputs, grads = run(DeferredLinear, torch.float32)
    exact = run(lambda weight, bias: lambda x: nn.functional.linear(x, weight, bias), torch.float64)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-4, check_dtype=False)
    close((outputs, grads), exact)
    with torch.no_grad():
        layer = DeferredLinear(whole[:, 40:], bias if has_bias else None)
        close([layer(x) for x in inputs], exact[0])


def test_frozen_inputs_of_deferred_linear_get_no_gradient():
    """Features of a frozen encoder: the product that would make theirs is a third of the layer."""
    weight, x = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5)
    layer = DeferredLinear(weight)
    layer(x).sum().backward()
    assert layer.packed_transpose is None and x.grad is None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(3, 5))


@pytest.mark.parametrize("words, vocab_size", [(1, 7), (300, 9490)])  # at once; in several parts
def test_cross_entropy_and_its_gradient_equal_torchs(words, vocab_size):
    scores = torch.randn(words, vocab_size, dtype=torch.float64).mul_(30).requires_grad_()
    targets, weights = torch.randint(vocab_size, (words,)), torch.randn(words, dtype=torch.float64)
    each = nn.functional.cross_entropy(scores, targets, reduction="none")
    for ours, expected in (
        (CrossEntropy.apply(scores, targets, None), each.sum()),
        (CrossEntropy.apply(scores, targets, weights), (weights * each).sum()),
    ):
        torch.testing.assert_close(
            *(
                [loss, *torch.autograd.grad(0.3 * loss, scores, retain_graph=True)]
                for loss in (ours, expected)
            )
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_of_half_precision_scores_keeps_the_gradient_of_likely_words(dtype):
    scores = torch.randn(64, 500, dtype=torch.float64).mul_(3)
    targets = torch.randint(500, (64,))
    scores[range(64), targets] += 20
    half = scores.to(dtype).requires_grad_()
    exact = half.detach().double().requires_grad_()
    [ours] = torch.autograd.grad(CrossEntropy.apply(half, targets, None), half)
    [expected] = torch.autograd.grad(
        nn.functional.cross_entropy(exact, targets, reduction="sum"), exact
    )
    ours, expected = (g[range(64), targets] for g in (ours.double(), expected))
    tiny = 6e-8 if dtype is torch.float16 else 0  # the smallest float16 number
    # In float32 a logarithm of about 25 is exact to 1e-6, and so is 1 - p.
    torch.testing.assert_close(ours, expected, rtol=0.01, atol=tiny + 3e-6)


@pytest.mark.parametrize("cells", [1, 49, 64, 100, 196, 256])
def test_pooling_matrix_equals_adaptive_average_pooling(cells):
    side = int(cells**0.5)
    grid = torch.randn(2, 3, side, side, dtype=torch.float64)
    pool = pooling_matrix(cells, 14, grid.device, grid.dtype)
    torch.testing.assert_close(
        nn.AdaptiveAvgPool2d(14)(grid).flatten(2), grid.flatten(2) @ pool.t()
    )
    torch.testing.assert_close(pool.sum(1), torch.ones(196, dtype=torch.float64))


def test_features_pooled_beforehand_give_the_same_captions_as_those_on_the_backbone_grid():
    decoder, (captions, lengths) = make_decoder(), make_captions(3, 2)
    features = torch.randn(3, 64, 9, dtype=torch.float64)
    pooled = reference.encode(features).view(3, 14, 14, 9)  # the tutorial's shape
    torch.testing.assert_close(
        decoder(features, captions, lengths), decoder(pooled, captions, lengths)
    )


def test_losses_of_parts_of_a_batch_add_up_to_that_of_the_batch():
    decoder, (captions, lengths) = make_decoder(), make_captions(6, 3)
    features = torch.randn(6, 64, 9, dtype=torch.float64)
    whole = doubly_stochastic_loss(*decoder(features, captions, lengths))
    words = int((lengths - 1).sum())
    shares = [
        doubly_stochastic_loss(
            *decoder(features[s], captions[s], lengths[s]), num_tokens=words, num_captions=18
        )
        for s in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(shares), whole)


def test_parameter_names_and_sizes_are_those_of_the_tutorial():
    decoder = DecoderWithAttention(512, 512, 512, 9490)
    assert {name: tuple(p.shape) for name, p in decoder.state_dict().items()} == {
        "attention.encoder_att.weight": (512, 2048),
        "attention.encoder_att.bias": (512,),
        "attention.decoder_att.weight": (512, 512),
        "attention.decoder_att.bias": (512,),
        "attention.full_att.weight": (1, 512),
        "attention.full_att.bias": (1,),
        "embedding.weight": (9490, 512),
        "decode_step.weight_ih": (2048, 2560),
        "decode_step.weight_hh": (2048, 512),
        "decode_step.bias_ih": (2048,),
        "decode_step.bias_hh": (2048,),
        "init_h.weight": (512, 2048),
        "init_h.bias": (512,),
        "init_c.weight": (512, 2048),
        "init_c.bias": (512,),
        "f_beta.weight": (2048, 512),
        "f_beta.bias": (2048,),
        "fc.weight": (9490, 512),
        "fc.bias": (9490,),
    }


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
        torch.testing.assert_close(encoder(images), x.flatten(2).transpose(1, 2))
    assert not any(p.requires_grad for p in encoder.parameters())
    encoder.fine_tune()
    trained = {name.split(".")[1] for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained == {"5", "6", "7"}


def test_vgg19_gives_the_papers_14_by_14_by_512_map():
    encoder = Encoder(name="vgg19", weights="none").train()
    assert encoder(torch.zeros(1, 3, 224, 224)).shape == (1, 196, 512)
    assert not encoder.training  # a backbone keeps its ImageNet statistics


def test_uint8_images_are_normalised_like_imagenet():
    encoder = Encoder(name="mobilenet_v3_small", weights="none")
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(encoder(images), encoder(normal))


def test_bfloat16_gradients_have_the_direction_of_float32_gradients(chunks):
    decoder, (captions, lengths) = make_decoder(scale=1.0).float(), make_captions(6, 3)
    features = torch.randn(6, 64, 9)
    gradients = []
    for amp in (None, "bf16"):
        with autocast(torch.device("cpu"), amp):
            loss = doubly_stochastic_loss(*decoder(features, captions, lengths))
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(decoder.parameters()))])
        )
    assert not torch.equal(*gradients)
    assert torch.nn.functional.cosine_similarity(*gradients, 0) > 0.999


def test_a_batch_without_backward_pass_keeps_no_memory():
    """Steps store what the gradients need; that must not outlive the batch."""
    decoder, (captions, lengths) = make_decoder(), make_captions(4, 2)
    keys = []
    for _ in range(2):
        image = decoder.encode_memory(torch.randn(4, 64, 9, dtype=torch.float64))
        keys.append(weakref.ref(image.keys))
        decoder(torch.randn(4, 64, 9, dtype=torch.float64), captions, lengths)
        del image
    assert [key() for key in keys] == [None, None]


@pytest.mark.parametrize("height, width", [(288, 512), (256, 320), (64, 448), (500, 96)])
def test_pictures_of_any_shape_give_the_numbers_of_the_tutorials_pooling(height, width):
    torch.manual_seed(0)
    encoder = Encoder(name="resnet18", weights="none").double()
    decoder = DecoderWithAttention(7, 5, 6, 23, encoder_dim=512, dropout=0.0).double()
    (captions, lengths), images = make_captions(2, 2), torch.randn(2, 3, height, width).double()
    with torch.no_grad():
        features = encoder(images)
        pooled = nn.functional.adaptive_avg_pool2d(encoder.resnet(images), 14)
        encoded = pooled.permute(0, 2, 3, 1).flatten(1, 2)  # the tutorial's encoder
        ours, _, alphas = decoder(features, captions, lengths)
        theirs, _, decode_lengths, expected_alphas, order = reference.decode(
            decoder, encoded.repeat_interleave(2, 0), captions.flatten(0, 1), lengths.flatten()
        )
    back = order.argsort()
    torch.testing.assert_close(ours, torch.cat([theirs[i, : decode_lengths[i]] for i in back]))
    torch.testing.assert_close(alphas.flatten(0, 1), expected_alphas[back])
    for found, image in zip(beam_search(decoder, features, WORD_MAP, 3), encoded.split(1)):
        words, _, score = reference.search(decoder, image, WORD_MAP, 3)[0]
        assert found.tokens == words[1 : len(words) - found.finished]
        assert found.score == pytest.approx(score)
