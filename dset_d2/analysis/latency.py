"""Latencies that can be compared: interleaved in one process, and set against each other pair by
pair, so that a machine that slows down slows all of them."""

import platform
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import trange


@dataclass(frozen=True)
class Latency:
    """Times of one callable, in seconds, and relative to the first one's of the same round.

    Attributes:
        quartiles: 25 % and 75 % of the rounds took no longer.
        ratio: median over the rounds of time / time of the first; below 1 is faster.
        ratio_quartiles: its quartiles.
    """

    median: float
    quartiles: tuple[float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]


def device_name(device: str) -> str:
    """The processor that times are of."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"


def cpu_name() -> str:
    """What the system calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def synchronised_time() -> float:
    """Seconds, once the GPU has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def sample_times(callables: Sequence[Callable[[], object]], rounds: int, warmup: int) -> np.ndarray:
    """Seconds (rounds, N) of N callables, which take turns (A B C A B C ...).

    Args:
        rounds: how often each of them is timed.
        warmup: rounds before these that are not timed.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds={rounds} must be positive and warmup={warmup} not negative")
    times = np.empty((rounds, len(callables)))
    for index in trange(-warmup, rounds, desc="timing", leave=False, disable=None):
        for column, call in enumerate(callables):
            start = synchronised_time()
            call()
            elapsed = synchronised_time() - start
            if index >= 0:
                times[index, column] = elapsed
    return times


def measure(
    callables: Mapping[str, Callable[[], object]], rounds: int, warmup: int
) -> dict[str, Latency]:
    """Time callables in turn: :func:`sample_times`."""
    times = sample_times(list(callables.values()), rounds, warmup)
    ratios = times / times[:, :1]
    return {
        name: Latency(*median_and_quartiles(seconds), *median_and_quartiles(ratio))
        for name, seconds, ratio in zip(callables, times.T, ratios.T)
    }


def median_and_quartiles(values: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The median of (n,) values, and their (lower, upper) quartiles."""
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return median, (low, high)


def measure_modules(
    call: Callable[[], object], modules: Mapping[str, nn.Module], rounds: int
) -> dict[str, float]:
    """Median time that modules take within a call, in seconds, over all their calls in it.

    A GPU is waited for at the modules' bounds, so that the parts may exceed the whole. A list of
    modules takes the time of its members; modules that are not called have no entry.
    """
    times: dict[str, list[float]] = defaultdict(list)
    handles = []
    for name, module in modules.items():
        for part in called_parts(module):
            timer = ModuleTimer(times[name])
            handles.append(part.register_forward_pre_hook(timer.start))
            handles.append(part.register_forward_hook(timer.stop))
    try:
        for _ in range(rounds):
            for row in times.values():
                row.append(0.0)
            call()
    finally:
        for handle in handles:
            handle.remove()
    return {name: float(np.median(row)) for name, row in times.items() if any(row)}


def called_parts(module: nn.Module) -> list[nn.Module]:
    """The module, or what it holds if it is only a container that cannot be called."""
    if type(module).forward is not nn.Module.forward:
        return [module]
    return [part for child in module.children() for part in called_parts(child)]


class ModuleTimer:
    """Adds the time between a module's hooks to the last entry of a list."""

    def __init__(self, times: list[float]) -> None:
        self.times = times

    def start(self, module, args) -> None:
        self.started = synchronised_time()

    def stop(self, module, args, output) -> None:
        self.times[-1] += synchronised_time() - self.started
