"""A long computation split into cells, each stored under a hash of everything that determines its result.

Values are hashed, not identities: settings, tensors, the code of functions; of an object its attributes, the source files of
its class and base classes, and their plain constants. Where there is no source file, as in a notebook, the code of the
methods and the globals that it uses are hashed instead. Caches (CACHES and cached properties) are left out, so that using an
object does not change its hash.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CACHES = {"_levels", "_copies", "_orders", "_ladders", "_written"}
# Modules whose source is not hashed: another release of them changes a result by rounding at most.
STEADY = {*sys.stdlib_module_names, "torch", "numpy", "scipy"}


def fingerprint(*things: Any) -> str:
    """32 hexadecimal digits, equal for equal values in any process."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _describe(things, ()):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _describe(thing: Any, path: tuple[int, ...]) -> Iterator[bytes]:
    kind = type(thing)
    yield f"{kind.__module__}.{kind.__qualname__}".encode()
    if thing is None or isinstance(thing, (bool, int, float, complex, str, bytes, Path, torch.dtype, torch.device)):
        yield repr(thing).encode()
    elif id(thing) in path:
        yield b"itself"
    else:
        for part in _parts(thing):
            yield from [part] if isinstance(part, bytes) else _describe(part, (*path, id(thing)))


@functools.singledispatch
def _parts(thing: Any) -> Iterator[Any]:
    """The parts of a compound value: bytes, or values to be described in turn."""
    yield from (type(thing), _attributes(thing))


@_parts.register
def _of_tensor(thing: Tensor) -> Iterator[Any]:
    yield from (thing.dtype, tuple(thing.shape))
    plain = thing.detach().cpu().to_dense().resolve_conj().resolve_neg()
    yield plain.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@_parts.register
def _of_array(thing: np.ndarray) -> Iterator[Any]:
    yield from (thing.dtype.str, thing.shape, np.ascontiguousarray(thing).tobytes())


@_parts.register
def _of_generator(thing: torch.Generator) -> Iterator[Any]:
    yield thing.get_state()


@_parts.register(Mapping)
@_parts.register(set)
@_parts.register(frozenset)
@_parts.register(list)
@_parts.register(tuple)
def _of_collection(thing: Any) -> Iterator[Any]:
    yield from _elements(thing)
    if getattr(thing, "__dict__", None):  # of a subclass
        yield _attributes(thing)


@_parts.register
def _of_partial(thing: functools.partial) -> Iterator[Any]:
    yield from (thing.func, thing.args, thing.keywords)


@_parts.register
def _of_method(thing: MethodType) -> Iterator[Any]:
    yield from (thing.__self__, thing.__func__)


@_parts.register
def _of_function(thing: FunctionType) -> Iterator[Any]:
    cells = [cell.cell_contents for cell in thing.__closure__ or ()]
    yield from (thing.__qualname__, thing.__code__, cells, thing.__defaults__, thing.__kwdefaults__)
    source = _source(thing.__module__)
    yield source
    if not source and not _is_steady(thing.__module__):
        known = {name: thing.__globals__.get(name) for name in sorted(_names(thing.__code__))}
        yield from ((name, value) for name, value in known.items() if _is_relevant(value))


@_parts.register
def _of_code(thing: CodeType) -> Iterator[Any]:
    yield from (thing.co_code, thing.co_names, thing.co_consts)


@_parts.register
def _of_type(thing: type) -> Iterator[Any]:
    yield from (thing.__module__, thing.__qualname__)
    for base in thing.__mro__:
        yield _source(base.__module__)
        yield from _own(base)


@_parts.register
def _of_builtin(thing: BuiltinFunctionType) -> Iterator[Any]:
    yield from (thing.__module__, thing.__qualname__)


def _elements(thing: Any) -> Any:
    """The elements of a collection, in its own order if it has one, else sorted."""
    if isinstance(thing, Mapping):
        return sorted(thing.items(), key=lambda item: repr(item[0]))
    return thing if isinstance(thing, (list, tuple)) else sorted(thing, key=repr)


def _attributes(thing: Any) -> Any:
    if not hasattr(thing, "__dict__"):
        try:
            return thing.__reduce_ex__(4)[1:]  # what a copy would be made of: the values of slots, a generator's state
        except TypeError:
            return repr(thing)
    held = {name: value for name, value in vars(thing).items() if name not in CACHES and not _is_cached(thing, name)}
    if isinstance(thing, nn.Module):  # of torch's registers only the hooks count, without their numbers
        hooks = [[*held[name].values()] for name in sorted(_REGISTERS) if name.endswith("_hooks") and held.get(name)]
        held = {name: value for name, value in held.items() if name not in _REGISTERS} | {"hooks": hooks}
    return held


_REGISTERS = {*vars(nn.Module())} - {"_parameters", "_buffers", "_modules", "training"} | {"_compiled_call_impl"}


def _own(kind: type) -> Iterator[Any]:
    """A class's own constants, which a program may change, and the code of its methods if it has no source file."""
    if _is_steady(kind.__module__):
        return
    bare = not _source(kind.__module__)
    for name, value in sorted(vars(kind).items()):
        value = getattr(value, "__func__", getattr(value, "fget", value))  # unwraps methods and properties
        if (_is_constant(value) and not name.startswith("__")) or (bare and isinstance(value, FunctionType)):
            yield (name, value)


def _is_constant(value: Any) -> bool:
    return isinstance(value, (bool, int, float, complex, str)) or (
        isinstance(value, tuple) and all(map(_is_constant, value))
    )


def _names(code: CodeType) -> set[str]:
    """The global names that code may use, inner functions included."""
    return {*code.co_names}.union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _is_relevant(value: Any) -> bool:
    """Whether a global that a function uses can affect its result: values, arrays, the user's own code and its objects."""
    if isinstance(value, (type, FunctionType)):
        return not _is_steady(value.__module__)
    plain = isinstance(value, (Tensor, np.ndarray, nn.Module, Mapping, list, tuple, functools.partial)) or _is_constant(
        value
    )
    return plain or type(value).__module__.split(".")[0] in ("__main__", "score_sde")


def _is_cached(thing: Any, name: str) -> bool:
    return isinstance(inspect.getattr_static(type(thing), name, None), functools.cached_property)


def _is_steady(module: str) -> bool:
    return module.split(".")[0] in STEADY - {"__main__"}


def _source(module: str) -> bytes:
    """Digest of a module's source file, for this package of all its files; empty without a file and for those in STEADY."""
    if module.split(".")[0] == "score_sde":
        return _package()
    file = getattr(sys.modules.get(module), "__file__", None)
    if _is_steady(module) or file is None or not Path(file).is_file():
        return b""
    return _digest(file, os.stat(file).st_mtime_ns)


@functools.cache
def _package() -> bytes:
    """Digest of all source files of this package but those of plotting, since a result may depend on any of them."""
    root = Path(__file__).resolve().parent.parent
    files = sorted(file for file in root.rglob("*.py") if file.parent.name != "plotting")
    return hashlib.blake2b(b"".join(map(Path.read_bytes, files)), digest_size=16).digest()


@functools.cache
def _digest(file: str, written: int) -> bytes:
    return hashlib.blake2b(Path(file).read_bytes(), digest_size=16).digest()


class Journal:
    """Finished cells, one JSON object per line: {"key": ..., ...}; a line left half-written by a kill is ignored.

    Args:
        path: the file, read if it exists; None keeps the cells in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        text = path.read_text(errors="replace") if path is not None and path.exists() else ""
        self._broken = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            row = _parsed(line)
            if "key" in row:
                self.rows[row["key"]] = {name: value for name, value in row.items() if name != "key"}

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.rows[key]

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Stores a cell; its line is written in one call, and is on the disk when this returns."""
        self.rows[key] = dict(row)
        if self.path is None:
            return
        line = ("\n" if self._broken else "") + json.dumps({"key": key, **row}) + "\n"
        self._broken = False
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _parsed(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return row if isinstance(row, dict) else {}
