"""Data decoded once and then memory-mapped: folders of arrays, keyed by the hash of what they were made from.

An entry appears complete, by one rename, or not at all; a lock lets one process decode while the others wait for it.
Entries are under $SCORE_SDE_CACHE, or ~/.cache/score_sde, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Stored", "cached", "content", "digest", "hash_of", "mapped", "root", "stored"]


def root() -> Path:
    """The folder of all entries: $SCORE_SDE_CACHE, else ~/.cache/score_sde."""
    return Path(os.environ.get("SCORE_SDE_CACHE") or Path.home() / ".cache" / "score_sde")


def digest(made_of: Any) -> str:
    """The BLAKE2 hash of a JSON-serialisable value, as 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=16).hexdigest()


def cached(kind: str, made_of: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    """The folder <root>/<kind>/<digest of made_of>, filled by `write(folder)` if it does not exist.

    `made_of` holds everything that the content depends on, and is stored in the folder as made_of.json.
    Raises ValueError if the cache cannot be written. If `write` raises, no entry is made.
    """
    entry = root() / kind / digest(made_of)
    if entry.is_dir():
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = open(f"{entry}.lock", "w")  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"the cache {root()} cannot be written ({error.strerror}): set SCORE_SDE_CACHE") from error
    with lock, _locked(lock.fileno()):
        if not entry.is_dir():
            _fill(entry, made_of, write)
    return entry


class Stored(NamedTuple):
    """An array mapped from a file, and the hash of its content if it was taken when the file was written."""

    x: Tensor
    fingerprint: str | None


def stored(kind: str, made_of: Mapping[str, Any], write: Callable[[Path], None]) -> dict[str, Stored]:
    """The arrays that `write(folder)` saves as .npy files, by name; see `cached`.

    Their fingerprints depend on the arrays alone, not on the files or the format that they were made from.
    """

    def write_and_hash(folder: Path) -> None:
        write(folder)
        hashes = {file.stem: hash_of(mapped(file)) for file in folder.glob("*.npy")}
        (folder / "fingerprints.json").write_text(json.dumps(hashes) + "\n")

    entry = cached(kind, {**made_of, "version": 2}, write_and_hash)
    hashes = json.loads((entry / "fingerprints.json").read_text())
    return {name: Stored(mapped(entry / f"{name}.npy"), hashed) for name, hashed in hashes.items()}


def hash_of(x: Tensor) -> str:
    """The hash of the type, shape and values of an array."""
    hashed = hashlib.blake2b(repr((x.dtype, tuple(x.shape))).encode(), digest_size=16)
    for block in x.split(4096):
        hashed.update(block.contiguous().numpy().data)
    return hashed.hexdigest()


def _fill(entry: Path, made_of: Mapping[str, Any], write: Callable[[Path], None]) -> None:
    for left_behind in entry.parent.glob(f"{entry.name}.partial-*"):  # by a killed process
        shutil.rmtree(left_behind, ignore_errors=True)
    partial = entry.with_name(f"{entry.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        write(partial)
        (partial / "made_of.json").write_text(json.dumps(made_of, indent=2, sort_keys=True) + "\n")
        partial.rename(entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    """Holds an exclusive lock on an open file; the system releases it if the process dies."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks: two processes may both decode, and the first rename wins
        yield
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield


def content(files: Sequence[Path]) -> str:
    """The hash of the names and contents of files, in order, by which entries made from them are keyed.

    It is itself cached by paths, sizes and modification times, so that files are read again only if these differ.
    """
    found = [(os.path.abspath(file), os.stat(file)) for file in files]
    stamps = digest([[path, stat.st_size, stat.st_mtime_ns] for path, stat in found])

    def write(folder: Path) -> None:
        (folder / "content").write_text(digest([[file.name, _hash(file)] for file in files]))

    return (cached("contents", {"files": stamps}, write) / "content").read_text()


def _hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def mapped(path: Path) -> Tensor:
    """A .npy file as a tensor that reads it on demand; writes to the tensor do not reach the file."""
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
