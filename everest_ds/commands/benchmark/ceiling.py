"""The fastest that this device multiplies matrices: what a model's speed is held against."""

import statistics

import torch

from everest_ds.commands.benchmark.timing import Marks

# Edges of the square matrices that are tried on a GPU: large enough to fill one, small beside its memory.
EDGES = (4096, 8192, 16384)
ROUNDS, WARMUP = 20, 5


def matmul_tflops(device: torch.device, dtype: torch.dtype, edge: int, rounds: int = ROUNDS) -> float:
    """Return the rate of one square product, in 10^12 operations a second; two for a multiply-accumulate.

    Args:
        device: Where.
        dtype: Of both factors, which are random: a GPU multiplies zeros faster, because they cost less power.
        edge: Rows and columns.
        rounds: Products of which the median counts.
    """
    generator = torch.Generator(device).manual_seed(0)
    first, second = (torch.randn(edge, edge, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(first)
    for _ in range(WARMUP):
        torch.mm(first, second, out=out)
    marks = Marks(device)
    marks.mark()
    for _ in range(rounds):
        torch.mm(first, second, out=out)
        marks.mark()
    return 2 * edge**3 / statistics.median(marks.seconds()) / 1e12


def measure_ceiling(device: torch.device) -> float | None:
    """Return the best bfloat16 rate of a GPU over some sizes, in TFLOP/s; None for a CPU."""
    if device.type != "cuda":
        return None
    best = max(matmul_tflops(device, torch.bfloat16, edge) for edge in EDGES)
    torch.cuda.empty_cache()
    return best
