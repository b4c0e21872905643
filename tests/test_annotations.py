"""Whoever calls the public doors sees the types of what goes in and comes out."""

import inspect

import caption
import datasets
import models
from evaluation import metrics, objects
from modeling import beam_search, evidence
from training import losses

DOORS = [
    *(caption.Captioner, caption.Captioned, datasets.CaptionDataset),
    *(models.Encoder, models.Attention, models.DecoderWithAttention),
    *(beam_search.beam_search, beam_search.find_captions),
    *(losses.TeacherForcing, losses.HardAttention, losses.SelfCritical, losses.Reward),
    *(losses.doubly_stochastic_loss, losses.token_losses, losses.self_critical_loss),
    *(metrics.bleu, metrics.CiderD, metrics.cider_d, metrics.top_k_correct),
    *(evidence.find_evidence, objects.find_things, objects.read_boxes, objects.in_boxes),
]


def test_public_doors_are_annotated():
    for door in DOORS:
        members = [door] if inspect.isfunction(door) else vars(door).values()
        for member in members:
            function = getattr(member, "fget", None) or getattr(member, "func", member)
            name = getattr(function, "__name__", "")
            public = not name.startswith("_") or name in ("__init__", "__call__", "__getitem__")
            if inspect.isfunction(function) and public:
                wanted = {*inspect.signature(function).parameters, "return"} - {"self"}
                wanted -= {"return"} if name == "__init__" else set()
                assert wanted <= function.__annotations__.keys(), f"{door.__name__}: {name}"
