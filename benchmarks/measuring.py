"""Time and memory of two functions, in turns."""

import statistics
import time

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile


def seconds(function, device):
    """What one call takes, until a GPU has finished too"""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    start = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - start


def compare(stage, textbook, ours, args, memory=True):
    """
    A row of the table: medians of args.repeats calls after a first one, in turns, so that other
    load affects both equally. textbook may be None; it is left out if the GPU lacks the memory.
    """
    ours()
    functions = {"textbook": textbook, "ours": ours} if textbook else {"ours": ours}
    try:
        functions.get("textbook", ours)()
    except torch.OutOfMemoryError:
        del functions["textbook"]
    calls = list(functions.values()) * args.repeats
    times = [seconds(function, args.device) for function in calls]
    row = {"stage": stage}
    for i, name in enumerate(functions):
        row[name] = statistics.median(times[i :: len(functions)])
    for name, function in functions.items() if memory else ():
        row[f"{name}_bytes"] = peak_memory(function, args.device)
    return row


def peak_memory(function, device):
    """The peak bytes of live tensors while the function runs, beyond those that existed before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiled.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    return int(np.cumsum([size for _, size in changes]).max(initial=0))
