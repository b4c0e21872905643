"""Time and memory of two functions, in turns."""

import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch.profiler import DeviceType, ProfilerActivity, profile
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


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
    load affects both alike. textbook may be None, and is left out where a GPU lacks the memory.
    """
    functions = {"textbook": textbook, "ours": ours} if textbook else {"ours": ours}
    try:
        functions.get("textbook", ours)()
    except torch.OutOfMemoryError:
        del functions["textbook"]
    ours()
    times = [
        [seconds(function, args.device) for function in functions.values()]
        for _ in tqdm(range(args.repeats), stage, disable=None, leave=False)
    ]
    row = {"stage": stage} | dict(zip(functions, map(statistics.median, zip(*times))))
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


def busy_seconds(function, device):
    """How long a GPU computes during a call, the sum over its kernels; None on a CPU"""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        seconds(function, device)
    kernels = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    return sum(event.time_range.elapsed_us() for event in kernels) / 1e6
