"""
Where the locations of an encoder look.

A location is drawn at its place in the grid, but its field of view may lie beside it. A layer
of stride 2 whose window is not centred on the pixels it replaces shifts the field by half a pixel
of its input. Five such layers shift it by half a cell: to the upper left with PyTorch's usual
padding, to the lower right with TensorFlow's "same"; training moves it further. So it is measured,
when attention is drawn or compared with boxes.
"""

import math

import torch

NOISE_IMAGES = 8  # with 8, the error is about 0.01 of the image


def known_offset(encoder):
    """
    The offset of a `models.Encoder` as measured before or stored with a checkpoint; None if there
    is none, or while the encoder is trained, which moves its fields of view.
    """
    trained = any(weight.requires_grad for weight in encoder.parameters())
    return None if trained else getattr(encoder, "offset", None)


def find_offset(encoder):
    """
    `known_offset`, or else `measure_offset`, which is kept as `encoder.offset`. Code that changes
    a frozen encoder's weights or its image size must set that to None.
    """
    if known_offset(encoder) is None:
        encoder.offset = measure_offset(encoder, encoder.args["image_size"])
    return encoder.offset


def measure_offset(encoder, side):
    """
    How far the field of view of a central location lies to the right of and below the place at
    which the location is drawn: (x, y) as fractions of the image.

    encoder: normalised images (N, 3, side, side) -> features (N, P, E), row by row of a square grid

    The field is measured by the squared gradient, with respect to the pixels of noise images, of
    random projections of the location's features. Its centroid is its place.
    """
    weight = next(encoder.parameters())
    # A generator of its own: measuring changes no random number of a training run.
    generator, training = torch.Generator().manual_seed(0), encoder.training
    encoder.eval()
    with torch.inference_mode(False), torch.enable_grad():
        energy = torch.zeros(side, side, dtype=torch.float64)
        for _ in range(NOISE_IMAGES):  # one at a time, to save memory
            image = torch.randn(1, 3, side, side, generator=generator).to(weight).requires_grad_()
            features = encoder(image)
            grid = math.isqrt(features.shape[1])
            # The two rows and columns in the middle, or the only ones: they lie around the centre.
            middle = slice((grid - 1) // 2, grid // 2 + 1)
            central = features.unflatten(1, (grid, grid))[:, middle, middle]
            projection = torch.randn(central.shape, generator=generator).to(weight)
            [gradient] = torch.autograd.grad((central * projection).sum(), image)
            squared = gradient.double().square().sum((0, 1)).nan_to_num(0, 0, 0).cpu()
            energy += squared / squared.sum().clamp_min(1e-300)  # all images count the same
    encoder.train(training)
    centres = (torch.arange(side, dtype=torch.float64) + 0.5) / side - 0.5
    total = energy.sum().clamp_min(1e-300)
    return (energy.sum(0) @ centres / total).item(), (energy.sum(1) @ centres / total).item()
