"""State to files and back: tensors as safetensors, everything else as one JSON document that names them.

JSON has no tuples, no whole-number keys, no infinities and no tensors; they are written as objects with the key ``$``:
``{"$": "tuple", "items": [...]}``, ``{"$": "dict", "items": [[key, value], ...]}``, ``{"$": "float", "value": "inf"}``,
``{"$": "tensor", "file": ..., "name": ...}``. Floats are written by ``repr``, which gives back the same double.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors

from flowrl.checkpoint.manifest import DamagedCheckpoint

# Names of the safetensors format (https://github.com/huggingface/safetensors, "Format").
DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: position for position, dtype in enumerate(DTYPES)}
_OWN_FILE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_MARK = "$"
_DEPTH = 100

TensorFiles = dict[str, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Encoded:
    """document: the bytes of state.json; files: for each safetensors file, its tensors by name."""

    document: bytes
    files: TensorFiles

    @property
    def nbytes(self) -> int:
        """Bytes that the files will take, headers aside."""
        tensors = (tensor for file in self.files.values() for tensor in file.values())
        return len(self.document) + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def encode(state: Mapping[str, Any]) -> Encoded:
    """Split a state into a JSON document and tensor files, one file a top-level key.

    state: nested mappings (keys text or int), lists, tuples, text, int, float, bool, None and dense tensors of the
    types in ``DTYPES``. A mapping comes back as a dict, a parameter as a tensor without gradient, tensors that share
    memory as separate ones.

    Raises TypeError, with the path, for anything else (arrays, sets, objects), so that nothing needs pickle.
    """
    files: TensorFiles = {}
    document: dict[str, Any] = {}
    for key, value in state.items():
        if type(key) is not str:
            raise TypeError(f"state: top-level keys must be text, not {key!r}")
        file = f"{key}.safetensors" if _OWN_FILE.fullmatch(key) else "other.safetensors"
        document[key] = _Encoder(file, files).encode(value, (key,))
    text = json.dumps({"state": document}, allow_nan=False, indent=None, separators=(",", ":"))
    return Encoded(text.encode("ascii"), files)


def decode(document: bytes, files: TensorFiles) -> dict[str, Any]:
    """Put a state together again. Raises DamagedCheckpoint where the document and the tensors do not fit."""
    used: set[tuple[str, str]] = set()
    try:
        body = json.loads(document)["state"]
        state = {key: _decode(value, files, used) for key, value in body.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"state.json: cannot be understood ({type(error).__name__}: {error})") from error
    unused = {(file, name) for file, tensors in files.items() for name in tensors} - used
    for file, name in sorted(unused):
        raise DamagedCheckpoint(f"{file}: holds {name!r}, which state.json does not name")
    return state


def safetensors_chunks(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file piece by piece, so that one tensor at a time is copied to the host.

    Layout: u64 little-endian header length; JSON header padded with spaces to 8 bytes; the data without gaps, widest
    types first so that each tensor is aligned.
    """
    ordered = sorted(tensors.items(), key=lambda item: _ORDER[item[1].dtype])
    header, offset = {}, 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, tensor in ordered:
        if tensor.numel():
            host = tensor.detach().to("cpu").resolve_neg().contiguous()
            yield host.reshape(-1).view(torch.uint8).numpy().data


def read_safetensors(name: str, raw: bytes) -> dict[str, torch.Tensor]:
    """Parse a safetensors file held in memory; its tensors own their memory. Raises DamagedCheckpoint."""
    try:
        return parse_safetensors(raw)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise DamagedCheckpoint(f"{name}: is not a safetensors file ({error})") from error


class _Encoder:
    def __init__(self, file: str, files: TensorFiles) -> None:
        self._file = file
        self._files = files

    def encode(self, value: Any, path: tuple[Any, ...]) -> Any:
        if len(path) > _DEPTH:
            raise TypeError(f"{_where(path[:8])}...: is nested deeper than {_DEPTH} levels (does it hold itself?)")
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {_MARK: "float", "value": repr(value)}
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        if type(value) in (list, tuple):
            items = [self.encode(item, (*path, index)) for index, item in enumerate(value)]
            return items if type(value) is list else {_MARK: "tuple", "items": items}
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(
            f"{_where(path)}: a checkpoint cannot hold a {kind}; use tensors, numbers, text, None, dict, list, tuple"
        )

    def _mapping(self, value: Mapping[Any, Any], path: tuple[Any, ...]) -> Any:
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{_where(path)}: key {key!r} must be text or a whole number")
        items = [(key, self.encode(item, (*path, key))) for key, item in value.items()]
        if all(type(key) is str and key != _MARK for key in value):
            return dict(items)
        return {_MARK: "dict", "items": [list(item) for item in items]}

    def _tensor(self, value: torch.Tensor, path: tuple[Any, ...]) -> dict[str, str]:
        if value.layout is not torch.strided or value.is_quantized or value.is_meta or value.dtype not in DTYPES:
            raise TypeError(
                f"{_where(path)}: a checkpoint cannot hold a tensor of type {value.dtype}, layout {value.layout}, "
                f"device {value.device}; dense tensors with data of {', '.join(DTYPES.values())} only"
            )
        tensors = self._files.setdefault(self._file, {})
        stem = name = "/".join(str(part) for part in path[1:]) or str(path[0])
        count = 1
        while name in tensors or name == "__metadata__":
            count += 1
            name = f"{stem}#{count}"
        tensors[name] = value
        return {_MARK: "tensor", "file": self._file, "name": name}


def _decode(value: Any, files: TensorFiles, used: set[tuple[str, str]]) -> Any:
    if isinstance(value, list):
        return [_decode(item, files, used) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_MARK)
    if kind is None:
        return {key: _decode(item, files, used) for key, item in value.items()}
    if kind == "tuple":
        return tuple(_decode(item, files, used) for item in value["items"])
    if kind == "dict":
        return {key: _decode(item, files, used) for key, item in value["items"]}
    if kind == "float":
        return float(value["value"])
    if kind == "tensor":
        used.add((value["file"], value["name"]))
        return files[value["file"]][value["name"]]
    raise ValueError(f"unknown mark {kind!r}")


def _where(path: tuple[Any, ...]) -> str:
    return "state" + "".join(f"[{part!r}]" for part in path)
