"""Random numbers that depend on names alone: generator(seed, "noise", 17) is the same wherever and whenever it is made.

No iterator or generator state has to be saved, therefore: what step n draws is a function of (seed, n).
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["generator", "key"]


def key(seed: int, *words: int | str) -> int:
    """A 63-bit seed, the BLAKE2 hash of (seed, *words)."""
    digest = hashlib.blake2b(repr((int(seed), *words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *words: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device`, seeded with `key(seed, *words)`."""
    return torch.Generator(device).manual_seed(key(seed, *words))
