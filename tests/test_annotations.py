"""Whoever calls the public doors sees the types of what goes in and comes out."""

import inspect

import pytest

import caption
import datasets
import models
from evaluation import metrics
from modeling import beam_search
from training import losses

DOORS = [
    *(caption.Captioner, caption.Captioned, datasets.CaptionDataset),
    *(models.Encoder, models.Attention, models.DecoderWithAttention),
    *(beam_search.beam_search, beam_search.find_captions),
    *(losses.TeacherForcing, losses.HardAttention, losses.SelfCritical, losses.Reward),
    *(losses.doubly_stochastic_loss, losses.token_losses, losses.self_critical_loss),
    *(metrics.bleu, metrics.CiderD, metrics.cider_d, metrics.top_k_correct, metrics.attention_hits),
]


def signatures(door):
    """Of a function, or of a class's own public methods and properties"""
    if inspect.isfunction(door):
        yield door.__qualname__, inspect.signature(door)
        return
    for name, member in vars(door).items():
        function = getattr(member, "fget", None) or getattr(member, "func", member)
        if inspect.isfunction(function) and name in ("__init__", "__call__", "__getitem__"):
            yield function.__qualname__, inspect.signature(function)
        elif inspect.isfunction(function) and not name.startswith("_"):
            yield function.__qualname__, inspect.signature(function)


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_a_public_door_is_annotated(door):
    for name, signature in signatures(door):
        for parameter in signature.parameters.values():
            annotated = parameter.annotation is not inspect.Parameter.empty
            assert annotated or parameter.name == "self", f"{name}: {parameter.name}"
        returns = signature.return_annotation is not inspect.Signature.empty
        assert returns or name.endswith("__init__"), name
