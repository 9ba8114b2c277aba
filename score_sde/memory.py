"""What a loop over large tensors costs in memory traffic beside its arithmetic."""

from __future__ import annotations

from functools import cache

import torch

LARGEST = 31 * 2**20
"""Bytes; glibc follows blocks of up to 32 MiB (on 64-bit systems)."""


@cache
def keep_freed_memory() -> None:
    """Lets the C library keep the memory of freed tensors for the next ones, once a process.

    By default glibc hands a freed block of more than 128 KiB back to the system, which has to find and clear every page
    of it again at the next step: up to half of a small sampler's time, a quarter of a U-Net's. It raises that threshold
    to the size of the largest block freed so far, so one is allocated and freed here; its pages are never touched. Up to
    64 MiB may then stay with the process. Thresholds set in the environment (MALLOC_...) and other allocators stand.
    Source: mallopt(3), M_MMAP_THRESHOLD.
    """
    torch.empty(LARGEST, dtype=torch.uint8)
