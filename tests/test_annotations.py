"""Whoever calls the public doors sees the types of what goes in and comes out."""

import inspect
import pkgutil

DOORS = {
    "caption": "Captioner Captioned",
    "datasets": "CaptionDataset",
    "models": "Encoder Attention DecoderWithAttention",
    "modeling.beam_search": "beam_search find_captions",
    "training.losses": "TeacherForcing HardAttention SelfCritical Reward doubly_stochastic_loss "
    "token_losses self_critical_loss",
    "evaluation.metrics": "bleu CiderD cider_d top_k_correct",
    "modeling.evidence": "find_evidence",
    "evaluation.objects": "find_things read_boxes in_boxes",
}


def test_public_doors_are_annotated():
    names = [f"{module}:{name}" for module, names in DOORS.items() for name in names.split()]
    for door in map(pkgutil.resolve_name, names):
        members = [door] if inspect.isfunction(door) else vars(door).values()
        for member in members:
            function = getattr(member, "fget", None) or getattr(member, "func", member)
            name = getattr(function, "__name__", "")
            public = not name.startswith("_") or name in ("__init__", "__call__", "__getitem__")
            if inspect.isfunction(function) and public:
                wanted = {*inspect.signature(function).parameters, "return"} - {"self"}
                wanted -= {"return"} if name == "__init__" else set()
                assert wanted <= function.__annotations__.keys(), f"{door.__name__}: {name}"
