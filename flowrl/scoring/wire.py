"""How batches and results travel to another process or machine: JSON, PNG and safetensors, and nothing that runs code.

A batch is a header, strict JSON (no NaN, no key twice, no unknown key), and a body that has its pictures, either PNGs one
after another (lossless; a video is one PNG of its frames from top to bottom) or one safetensors file, which may have
latents too. Processes exchange frames: ``FRW1``, the header's length (uint32), the body's (uint64), big-endian, header,
body. HTTP carries a batch as one JSON object with base64 PNGs, or as one safetensors file with the header in its
metadata. Sizes are checked before anything is decoded; nothing names a file or an address.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from flowrl.records import RewardBatch, RewardResult

PROTOCOL = 1
MAX_TEXT = 2000
"""Characters kept of an error or a detail that came from elsewhere."""
JSON_TYPE = "application/json"
SAFETENSORS_TYPE = "application/x-safetensors"
_PREFIX = struct.Struct(">4sIQ")
_MAGIC = b"FRW1"
_METADATA_KEY = "flowrl"
_KEYS = frozenset({"protocol", "prompts", "metadata", "group_ids", "media"})
_MEDIA_NAMES = ("images", "reference")
_RESULT_KEYS = frozenset({"scores", "valid", "errors", "components", "details"})


class WireError(ValueError):
    """A message that breaks the format, or a limit."""


@dataclass(frozen=True)
class Limits:
    """What a receiver takes. header_bytes: the JSON; body_bytes: all else; pixels: of a batch, references too."""

    header_bytes: int = 16 << 20
    body_bytes: int = 256 << 20
    pixels: int = 1 << 28
    samples: int = 4096


LOCAL_LIMITS = Limits(header_bytes=64 << 20, body_bytes=16 << 30, pixels=1 << 33, samples=1 << 20)
"""Between processes of one run, where a limit guards against garbage and not against an enemy."""


def dumps(value: Mapping[str, Any]) -> bytes:
    """Strict JSON. Raises WireError for what has no JSON form: NaN, arrays, objects."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"cannot be sent as JSON: {error}") from error


def loads(data: bytes) -> dict[str, Any]:
    """One JSON object. Raises WireError for anything else, NaN and keys that stand twice included."""
    try:
        value = json.loads(data, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise WireError(f"malformed JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise WireError(f"malformed message: expected a JSON object, got {type(value).__name__}")
    return value


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def frame_head(header: Mapping[str, Any], body_size: int) -> bytes:
    """What goes before the body of a frame. Raises WireError."""
    text = dumps(header)
    return _PREFIX.pack(_MAGIC, len(text), body_size) + text


def write_frame(stream: IO[bytes], header: Mapping[str, Any], body: bytes = b"") -> None:
    """Send one frame. Raises WireError before anything is sent."""
    stream.write(frame_head(header, len(body)))
    stream.write(body)
    stream.flush()


def read_frame(stream: IO[bytes], limits: Limits) -> tuple[dict[str, Any], bytes] | None:
    """Receive one frame: header and body; None where the stream ends before it. Raises WireError."""
    prefix = stream.read(_PREFIX.size)
    if not prefix:
        return None
    if len(prefix) < _PREFIX.size or prefix[:4] != _MAGIC:
        raise WireError(f"malformed frame: starts with {prefix[:8]!r}")
    _, header_size, body_size = _PREFIX.unpack(prefix)
    if header_size > limits.header_bytes or body_size > limits.body_bytes:
        raise WireError(
            f"frame of {header_size} + {body_size} bytes, at most {limits.header_bytes} + {limits.body_bytes} are taken"
        )
    header, body = stream.read(header_size), stream.read(body_size)
    if len(header) < header_size or len(body) < body_size:
        raise WireError("the stream ends within a frame")
    return loads(header), body


def pack(batch: RewardBatch, encoding: str) -> tuple[dict[str, Any], bytes]:
    """Header and body of a batch. encoding: "png" or "safetensors"; latents need safetensors. Raises WireError."""
    header = _header(batch)
    if batch.latents is not None or encoding == "safetensors":
        return header, _to_tensors(batch)
    pictures = []
    for name, array in _media(batch).items():
        own = [_to_png(picture) for picture in array]
        header["media"][name]["sizes"] = [len(data) for data in own]
        pictures += own
    return header, b"".join(pictures)


def pack_http(batch: RewardBatch, encoding: str) -> tuple[str, bytes]:
    """Content type and body of a request; encoding as in ``pack``. Raises WireError."""
    header = _header(batch)
    if batch.latents is not None or encoding == "safetensors":
        return SAFETENSORS_TYPE, _to_tensors(batch, dumps(header).decode())
    for name, array in _media(batch).items():
        header["media"][name]["png"] = [base64.b64encode(_to_png(picture)).decode() for picture in array]
    return JSON_TYPE, dumps(header)


def unpack_http(content_type: str, body: bytes, limits: Limits) -> RewardBatch:
    """The batch of a request. Raises WireError."""
    if content_type == SAFETENSORS_TYPE:
        metadata = _tensor_header(body, limits).get("__metadata__")
        note = metadata.get(_METADATA_KEY) if isinstance(metadata, dict) else None
        if not isinstance(note, str):
            raise WireError(f"malformed safetensors body: no text {_METADATA_KEY!r} in its metadata")
        return unpack(loads(note.encode()), body, limits)
    if content_type != JSON_TYPE:
        raise WireError(f"content type {content_type[:80]!r}; use {JSON_TYPE} or {SAFETENSORS_TYPE}")
    header = loads(body)
    pictures: list[bytes] = []
    media = header.get("media")
    for name, item in media.items() if isinstance(media, dict) else ():
        texts = item.pop("png", None) if isinstance(item, dict) else None
        if not isinstance(texts, list) or any(not isinstance(text, str) for text in texts) or "sizes" in item:
            raise WireError(f"malformed batch: media.{name[:40]} has no png, a list of base64 texts")
        try:
            own = [base64.b64decode(text, validate=True) for text in texts]
        except (binascii.Error, ValueError) as error:
            raise WireError(f"malformed batch: media.{name[:40]}.png: {error}") from error
        item["sizes"] = [len(data) for data in own]
        pictures += own
    return unpack(header, b"".join(pictures), limits)


def _media(batch: RewardBatch) -> dict[str, npt.NDArray[np.uint8]]:
    return {"images": batch.images} | ({} if batch.reference is None else {"reference": batch.reference})


def _header(batch: RewardBatch) -> dict[str, Any]:
    return {
        "protocol": PROTOCOL,
        "prompts": list(batch.prompts),
        "metadata": [dict(row) for row in batch.metadata],
        "group_ids": [int(group) for group in batch.group_ids],
        "media": {name: {"shape": list(array.shape)} for name, array in _media(batch).items()},
    }


def _to_tensors(batch: RewardBatch, note: str | None = None) -> bytes:
    metadata = None if note is None else {_METADATA_KEY: note}
    arrays = {name: np.ascontiguousarray(array) for name, array in _media(batch).items()}
    if batch.latents is None:
        from safetensors.numpy import save as save_numpy

        return save_numpy(arrays, metadata)
    import torch
    from safetensors.torch import save as save_torch

    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return save_torch(tensors | {"latents": batch.latents.detach().cpu().contiguous()}, metadata)


def _to_png(picture: npt.NDArray[np.uint8]) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    flat = np.ascontiguousarray(picture).reshape(-1, picture.shape[-2], 3)
    Image.fromarray(flat).save(out, "PNG", compress_level=1)
    return out.getvalue()


def unpack(header: Mapping[str, Any], body: bytes, limits: Limits) -> RewardBatch:
    """The batch of a header and a body. Raises WireError for a broken format, another protocol or a limit."""
    check_protocol(header)
    if set(header) != _KEYS:
        odd = sorted(set(header) ^ _KEYS)
        raise WireError(f"malformed batch: unknown or missing key {odd[0]!r}; the keys are {', '.join(sorted(_KEYS))}")
    prompts, metadata = _listed(header, "prompts", str), _listed(header, "metadata", dict)
    group_ids = _listed(header, "group_ids", int)
    shapes = _shapes(header["media"], len(prompts), limits)
    if len(metadata) != len(prompts) or len(group_ids) not in (0, len(prompts)):
        raise WireError(
            f"malformed batch: {len(prompts)} prompts, {len(metadata)} metadata, {len(group_ids)} group ids"
        )
    sizes = {name: item["sizes"] for name, item in header["media"].items() if "sizes" in item}
    if not sizes:
        arrays, latents = _from_tensors(body, shapes, limits)
    elif set(sizes) == set(shapes):
        arrays, latents = _from_pngs(body, shapes, sizes), None
    else:
        raise WireError("malformed batch: sizes for some media only")
    return RewardBatch(arrays["images"], prompts, metadata, group_ids, latents, arrays.get("reference"))


def check_protocol(header: Mapping[str, Any]) -> None:
    """Raise WireError where the other side speaks another version."""
    theirs = header.get("protocol")
    if type(theirs) is not int or theirs != PROTOCOL:
        raise WireError(
            f"the other side speaks protocol {theirs!r}, this one {PROTOCOL}; use one version of flowrl on both"
        )


def _listed(header: Mapping[str, Any], key: str, kind: type[Any]) -> list[Any]:
    values = header[key]
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise WireError(f"malformed batch: {key} is not a list of {kind.__name__}")
    return values


def _shapes(media: Any, count: int, limits: Limits) -> dict[str, tuple[int, ...]]:
    if not isinstance(media, dict) or "images" not in media or not set(media) <= set(_MEDIA_NAMES):
        raise WireError("malformed batch: media is images, and reference where there is one")
    found = {}
    for name, item in media.items():
        shape = item.get("shape") if isinstance(item, dict) and set(item) <= {"shape", "sizes"} else None
        if not isinstance(shape, list) or any(type(side) is not int or side < 1 for side in shape):
            raise WireError(f"malformed batch: media.{name} has no shape of whole numbers above 0")
        if len(shape) not in (4, 5) or shape[-1] != 3 or shape[0] != count:
            raise WireError(
                f"malformed batch: media.{name} has shape {shape[:6]}, expected [{count}, (frames,) H, W, 3]"
            )
        found[name] = tuple(shape)
    pixels = sum(math.prod(shape[:-1]) for shape in found.values())
    if count > limits.samples or pixels > limits.pixels:
        raise WireError(
            f"{count} samples of {pixels} pixels, at most {limits.samples} and {limits.pixels} are taken; send less at a time"
        )
    return found


def _from_tensors(
    body: bytes, shapes: Mapping[str, tuple[int, ...]], limits: Limits
) -> tuple[dict[str, npt.NDArray[np.uint8]], Any]:
    from safetensors import SafetensorError

    try:
        names = set(_tensor_header(body, limits)) - {"__metadata__"}
        if names - {"latents"} != set(shapes):
            raise WireError(f"malformed body: tensors {sorted(names)[:4]}, expected {', '.join(sorted(shapes))}")
        latents = None
        if "latents" in names:
            from safetensors.torch import load as load_torch

            tensors = load_torch(body)
            latents = tensors.pop("latents")
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        else:
            from safetensors.numpy import load as load_numpy

            arrays = load_numpy(body)
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise WireError(f"malformed safetensors body: {error}") from error
    for name, array in arrays.items():
        if array.dtype != np.uint8 or array.shape != shapes[name]:
            raise WireError(
                f"malformed body: {name} is {array.dtype} {list(array.shape)}, expected uint8 {list(shapes[name])}"
            )
    if latents is not None and len(latents) != shapes["images"][0]:
        raise WireError(f"malformed body: {len(latents)} latents for {shapes['images'][0]} pictures")
    return arrays, latents


def _tensor_header(body: bytes, limits: Limits) -> dict[str, Any]:
    size = int.from_bytes(body[:8], "little")
    if len(body) < 8 or size > min(len(body) - 8, limits.header_bytes):
        raise WireError(f"malformed safetensors body: {len(body)} bytes, a header of {size}")
    return loads(body[8 : 8 + size])


def _from_pngs(
    body: bytes, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, Any]
) -> dict[str, npt.NDArray[np.uint8]]:
    start = 0
    found = {}
    for name, shape in shapes.items():
        own = sizes[name]
        if not isinstance(own, list) or len(own) != shape[0] or any(type(size) is not int or size < 0 for size in own):
            raise WireError(f"malformed batch: media.{name}.sizes is not one whole number a picture")
        pictures = np.empty(shape, np.uint8)
        for row, size in enumerate(own):
            pictures[row] = _from_png(body[start : start + size], shape[1:], f"{name}[{row}]")
            start += size
        found[name] = pictures
    if start != len(body):
        raise WireError(f"malformed body: {len(body)} bytes, the header says {start}")
    return found


def _from_png(data: bytes, shape: tuple[int, ...], name: str) -> npt.NDArray[np.uint8]:
    from PIL import Image

    width, height = shape[-2], math.prod(shape[:-2])
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.size != (width, height) or picture.mode != "RGB":
                raise WireError(f"{name} is {picture.mode} {picture.size}, expected RGB {(width, height)}")
            return np.asarray(picture, np.uint8).reshape(shape)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise WireError(f"{name} is not a readable PNG: {error}") from error


def pack_result(result: RewardResult) -> dict[str, Any]:
    """A result as JSON values; numbers that are not finite become null."""
    return {
        "scores": _numbers(result.scores),
        "valid": [bool(value) for value in result.valid],
        "errors": list(result.errors),
        "components": {name: _numbers(values) for name, values in result.components.items()},
        "details": list(result.details),
    }


def _numbers(values: npt.NDArray[np.float32]) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]


def unpack_result(value: Any, count: int) -> RewardResult:
    """The result of ``count`` samples from JSON values: every list that long, a finite number where valid.

    Raises WireError.
    """
    if not isinstance(value, dict) or set(value) != _RESULT_KEYS:
        raise WireError(f"malformed result: expected an object with {', '.join(sorted(_RESULT_KEYS))}")
    scores = _floats(value["scores"], "scores", count)
    valid, errors = value["valid"], value["errors"]
    if not isinstance(valid, list) or len(valid) != count or any(type(item) is not bool for item in valid):
        raise WireError(f"malformed result: valid is not {count} of true or false")
    details = _texts(value["details"], "details", count) if value["details"] else ()
    components = value["components"]
    if not isinstance(components, dict):
        raise WireError("malformed result: components is not an object")
    mask = np.array(valid, np.bool_)
    if not np.isfinite(scores[mask]).all():
        raise WireError("malformed result: a valid sample has no finite score")
    return RewardResult(
        scores=np.where(mask, scores, np.float32(np.nan)).astype(np.float32),
        valid=mask,
        errors=_texts(errors, "errors", count),
        components={name: _floats(items, f"components.{name[:40]}", count) for name, items in components.items()},
        details=details,
    )


def _floats(values: Any, what: str, count: int) -> npt.NDArray[np.float32]:
    if not isinstance(values, list) or len(values) != count:
        found = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
        raise WireError(f"malformed result: {what} is {found}, expected {count} numbers or null")
    if any(value is not None and type(value) not in (int, float) for value in values):
        raise WireError(f"malformed result: {what} has something other than numbers and null")
    try:
        with np.errstate(over="ignore"):
            return np.array([math.nan if value is None else float(value) for value in values], np.float32)
    except OverflowError as error:
        raise WireError(f"malformed result: {what} has a number beyond float64") from error


def _texts(values: Any, what: str, count: int) -> list[str | None]:
    if not isinstance(values, list) or len(values) != count:
        raise WireError(f"malformed result: {what} is not a list of {count} texts or null")
    if any(value is not None and not isinstance(value, str) for value in values):
        raise WireError(f"malformed result: {what} has something other than texts and null")
    return [None if value is None else value[:MAX_TEXT] for value in values]
