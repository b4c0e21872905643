"""Measures time and memory, of two functions in turns or of a separate process."""

import json
import statistics
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from modeling.autograd import linear

ROOT = Path(__file__).resolve().parent.parent


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function, device):
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def compare(stage, textbook, ours, args, memory=True):
    """A row of the table; both versions run in turns, so that other load affects them equally."""
    textbook(), ours()
    times = [
        [seconds(function, args.device) for function in (textbook, ours)]
        for _ in tqdm(range(args.repeats), stage, disable=None, leave=False)
    ]
    row = {"stage": stage} | dict(zip(("textbook", "ours"), map(statistics.median, zip(*times))))
    if memory:
        row |= {
            "textbook_bytes": peak_memory(textbook, args.device),
            "ours_bytes": peak_memory(ours, args.device),
        }
    return row


def peak_memory(function, device):
    """The peak bytes of live tensors while the function runs, beyond those that existed before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    return int(np.cumsum([size for _, size in changes]).max(initial=0))


def matmul_rate(device):
    """
    FLOP/s of a float32 matrix product that is large enough to reach the machine's full speed, by
    the faster of PyTorch's library and `linear`'s.
    """
    a = torch.rand(2048, 2048, device=device)
    times = [
        seconds(partial(product, a, a), device)
        for product in (torch.matmul, linear)
        for _ in range(20)
    ]
    return 2 * 2048**3 / min(times)


def exponent(sizes, times):
    """The slope of log time over log size: 1 is linear."""
    return np.polyfit(np.log(sizes), np.log(times), 1)[0]


def measure_process(code):
    """
    Run Python code in a separate process (on Linux only, which reports peak memory). Returns a
    dictionary: `seconds` after the imports, `bytes`, the peak of the process plus that of its
    largest child, `bytes_beyond_imports`, and whatever the code adds to its variable `result`.
    """
    imports, code = [], textwrap.dedent(code).strip().split("\n")
    while code and code[0].startswith(("from ", "import ")):
        imports.append(code.pop(0))
    program = "\n".join(
        [
            "import json, resource, sys, time",
            *imports,
            "status = lambda: open('/proc/self/status').read()",
            "peak = lambda: 1024 * int(status().split('VmHWM:')[1].split()[0])",
            "result, before = {}, peak()",
            "start = time.perf_counter()",
            *code,
            "result['seconds'] = time.perf_counter() - start",
            "children = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss",
            "result |= {'bytes': peak() + children, 'bytes_beyond_imports': peak() - before}",
            "print(json.dumps(result))",
        ]
    )
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(process.stdout.splitlines()[-1])
