"""The wire: batches and results come back bit for bit; what breaks the format or a limit is refused before it is decoded."""

from __future__ import annotations

import base64
import io
import json
import struct
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save

from flowrl.records import RewardBatch, RewardResult
from flowrl.scoring import wire
from flowrl.scoring.wire import JSON_TYPE, SAFETENSORS_TYPE, Limits, WireError

RNG = np.random.default_rng(0)
LIMITS = Limits()


def pictures(*shape: int) -> Any:
    return RNG.integers(256, size=(*shape, 3), dtype=np.uint8)


def sample(**fields: Any) -> RewardBatch:
    metadata = [{"tag": "ünï", "boxes": [1, 2.5, None]}, {}]
    given = {"images": pictures(2, 5, 7), "prompts": ["a cat", "zwei Hünd☃"], "metadata": metadata, **fields}
    return RewardBatch(**given)


def equal(a: RewardBatch, b: RewardBatch) -> None:
    assert a.images.dtype == b.images.dtype == np.uint8
    assert np.array_equal(a.images, b.images)
    assert list(a.prompts) == list(b.prompts) and list(a.metadata) == list(b.metadata)
    assert list(a.group_ids) == list(b.group_ids)
    assert (a.reference is None) == (b.reference is None)
    assert a.reference is None or b.reference is None or np.array_equal(a.reference, b.reference)
    assert (a.latents is None) == (b.latents is None)
    if a.latents is not None and b.latents is not None:
        assert a.latents.dtype == b.latents.dtype and torch.equal(a.latents, b.latents)


BATCHES = {
    "pictures": sample(),
    "videos": sample(images=pictures(2, 3, 5, 7), group_ids=[4, -1]),
    "reference": sample(reference=pictures(2, 4, 4)),
    "one pixel": sample(images=pictures(2, 1, 1)),
    "not contiguous": sample(images=pictures(2, 7, 5).transpose(0, 2, 1, 3)),
    "latents": sample(latents=torch.randn(2, 4, 3, 3).bfloat16()),
}


@pytest.mark.parametrize("encoding", ["png", "safetensors"])
@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_comes_back(kind: str, encoding: str) -> None:
    batch = BATCHES[kind]
    header, body = wire.pack(batch, encoding)
    stream = io.BytesIO()
    wire.write_frame(stream, header, body)
    stream.seek(0)
    frame = wire.read_frame(stream, LIMITS)
    assert frame is not None and wire.read_frame(stream, LIMITS) is None
    equal(wire.unpack(*frame, LIMITS), batch)
    content_type, request = wire.pack_http(batch, encoding)
    assert content_type == (JSON_TYPE if encoding == "png" and batch.latents is None else SAFETENSORS_TYPE)
    equal(wire.unpack_http(content_type, request, LIMITS), batch)


def test_a_client_of_another_language_can_write_a_request() -> None:
    image = pictures(1, 2, 3)[0]
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    request = {
        "protocol": 1,
        "prompts": ["p"],
        "metadata": [{}],
        "group_ids": [],
        "media": {"images": {"shape": [1, 2, 3, 3], "png": [base64.b64encode(out.getvalue()).decode()]}},
    }
    batch = wire.unpack_http(JSON_TYPE, json.dumps(request).encode(), LIMITS)
    assert np.array_equal(batch.images[0], image)


def changed(path: str, value: Any) -> bytes:
    """A good JSON request with one value replaced (removed for None)."""
    request = json.loads(wire.pack_http(sample(group_ids=[1, 2]), "png")[1])
    node = request
    *parents, last = path.split(".")
    for key in parents:
        node = node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return json.dumps(request).encode()


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("protocol", 2, "the other side speaks protocol 2, this one 1; use one version"),
        ("protocol", True, "speaks protocol True"),
        ("protocol", None, "speaks protocol None"),
        ("prompts", None, "missing key 'prompts'"),
        ("prompts", "ab", "prompts is not a list of str"),
        ("prompts", ["a", 1], "prompts is not a list of str"),
        ("prompts", ["a"], "has shape [2, 5, 7, 3], expected [1,"),
        ("metadata", [{}], "2 prompts, 1 metadata, 2 group ids"),
        ("metadata", [{}, 3], "metadata is not a list of dict"),
        ("group_ids", [1], "2 prompts, 2 metadata, 1 group ids"),
        ("group_ids", [1, True], "group_ids is not a list of int"),
        ("path", "x.png", "unknown or missing key 'path'"),
        ("media.images.url", "http://x", "no shape of whole numbers"),
        ("media.video_path", {"shape": [2, 1, 1, 3], "png": []}, "media is images, and reference"),
        ("media", [], "media is images"),
        ("media.images", None, "media is images"),
        ("media.images.shape", [2, 5, 7], "has shape [2, 5, 7], expected [2, (frames,) H, W, 3]"),
        ("media.images.shape", [2, 5, 7, 4], "expected [2,"),
        ("media.images.shape", [2, 0, 7, 3], "no shape of whole numbers above 0"),
        ("media.images.shape", [2, 5.0, 7, 3], "no shape of whole numbers above 0"),
        ("media.images.shape", [2, 7, 5, 3], "is RGB (7, 5), expected RGB (5, 7)"),
        ("media.images.shape", [2, 10**6, 10**6, 3], "2000000000000 pixels, at most"),
        ("media.images.png", None, "has no png"),
        ("media.images.png", ["a"], "media.images.png: "),
        ("media.images.png", ["YQ==", "YQ=="], "images[0] is not a readable PNG"),
        ("media.images.png", ["YQ=="], "sizes is not one whole number a picture"),
        ("media.images.sizes", [1, 2], "has no png"),
    ],
)
def test_a_request_that_breaks_the_format_is_refused(path: str, value: Any, words: str) -> None:
    with pytest.raises(WireError) as caught:
        wire.unpack_http(JSON_TYPE, changed(path, value), LIMITS)
    assert words in str(caught.value)


def as_png(mode: str, size: tuple[int, int], kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (as_png("RGBA", (7, 5)), "images[0] is RGBA (7, 5), expected RGB (7, 5)"),
        (as_png("RGB", (8, 5)), "images[0] is RGB (8, 5)"),
        (as_png("RGB", (7, 5), "JPEG"), "images[0] is not a readable PNG"),
        (as_png("RGB", (7, 5))[:45], "images[0] is not a readable PNG"),
        # The header promises 60000 x 60000 pixels: it is compared before anything is unpacked.
        (as_png("RGB", (7, 5))[:16] + struct.pack(">II", 60000, 60000) + as_png("RGB", (7, 5))[24:], "images[0] is"),
    ],
)
def test_a_picture_of_another_kind_is_refused(data: bytes, words: str) -> None:
    texts = [base64.b64encode(data).decode()] * 2
    with pytest.raises(WireError) as caught:
        wire.unpack_http(JSON_TYPE, changed("media.images.png", texts), LIMITS)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(samples=1), "2 samples of 70 pixels, at most 1 and"),
        (Limits(pixels=69), "2 samples of 70 pixels, at most 4096 and 69 are taken"),
    ],
)
def test_limits_hold(limits: Limits, words: str) -> None:
    for encoding in ("png", "safetensors"):
        with pytest.raises(WireError, match=words):
            wire.unpack_http(*wire.pack_http(BATCHES["pictures"], encoding), limits)
    equal(wire.unpack_http(*wire.pack_http(BATCHES["pictures"], "png"), Limits(samples=2, pixels=70)), sample(
        images=BATCHES["pictures"].images))  # fmt: skip


def tensors(**arrays: Any) -> bytes:
    header = wire.pack_http(BATCHES["pictures"], "safetensors")[1]
    note = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]["flowrl"]
    return save(arrays, {"flowrl": note})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "malformed safetensors body: 0 bytes"),
        (b"\xff" * 16, "malformed safetensors body"),
        (save({"images": pictures(2, 5, 7)}), "no text 'flowrl' in its metadata"),
        (tensors(images=pictures(2, 5, 8)), "images is uint8 [2, 5, 8, 3], expected uint8 [2, 5, 7, 3]"),
        (tensors(images=np.zeros((2, 5, 7, 3), np.float32)), "images is float32"),
        (tensors(images=pictures(2, 5, 7), more=pictures(1, 1)), "tensors ['images', 'more'], expected images"),
        (tensors(images=pictures(2, 5, 7), latents=np.zeros((3, 1))), "3 latents for 2 pictures"),
        (tensors(images=pictures(2, 5, 7))[:-1], "malformed safetensors body"),
    ],
)
def test_a_tensor_body_that_breaks_the_format_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(WireError) as caught:
        wire.unpack_http(SAFETENSORS_TYPE, body, LIMITS)
    assert words in str(caught.value)


@pytest.mark.parametrize("content_type", ["application/octet-stream", "application/python-pickle", ""])
def test_other_content_is_refused(content_type: str) -> None:
    with pytest.raises(WireError, match="use application/json or application/x-safetensors"):
        wire.unpack_http(content_type, b"\x80\x04K\x01.", LIMITS)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": 1, "a": 2}', b"[1]", b"3", b"\xff", b"[" * 100_000,
     b'{"a": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_loose_json_is_refused(data: bytes) -> None:
    with pytest.raises(WireError, match="malformed"):
        wire.loads(data)


def test_frames_keep_to_their_limits_and_their_end() -> None:
    stream = io.BytesIO()
    wire.write_frame(stream, {"a": 1}, b"12345")
    data = stream.getvalue()
    for limits in (Limits(header_bytes=6, body_bytes=5), Limits(header_bytes=7, body_bytes=4)):
        with pytest.raises(WireError, match=r"frame of 7 \+ 5 bytes"):
            wire.read_frame(io.BytesIO(data), limits)
    assert wire.read_frame(io.BytesIO(data), Limits(header_bytes=7, body_bytes=5)) == ({"a": 1}, b"12345")
    for cut in range(1, len(data)):
        with pytest.raises(WireError):
            wire.read_frame(io.BytesIO(data[:cut]), LIMITS)
    with pytest.raises(WireError, match="malformed frame"):
        wire.read_frame(io.BytesIO(b"\x80\x04" + data), LIMITS)


def test_a_frame_that_cannot_be_sent_sends_nothing() -> None:
    stream = io.BytesIO()
    for bad in (float("nan"), np.float32(1), b"x", {1, 2}):
        with pytest.raises(WireError, match="cannot be sent as JSON"):
            wire.write_frame(stream, {"a": bad})
    assert stream.getvalue() == b""


def result(**fields: Any) -> RewardResult:
    good: dict[str, Any] = {
        "scores": np.array([0.1, np.nan, -3e38], np.float32),
        "valid": np.array([True, False, True]),
        "errors": [None, "it fell", None],
        "components": {"half": np.array([1e-45, np.nan, np.inf], np.float32)},
        "details": ["seen", None, "x"],
    }
    return RewardResult(**{**good, **fields})


def test_a_result_comes_back_bit_for_bit() -> None:
    own = result()
    back = wire.unpack_result(wire.loads(wire.dumps(wire.pack_result(own))), 3)
    assert back.scores.dtype == np.float32 and back.scores.tobytes() == own.scores.tobytes()
    assert back.valid.dtype == np.bool_ and back.valid.tolist() == own.valid.tolist()
    assert list(back.errors) == list(own.errors) and list(back.details) == list(own.details)
    assert back.components["half"].dtype == np.float32
    assert back.components["half"][0] == np.float32(1e-45) and np.isnan(back.components["half"][1:]).all()
    assert list(wire.unpack_result(wire.pack_result(result(details=())), 3).details) == []


def test_a_score_that_is_not_valid_is_no_number() -> None:
    value = wire.pack_result(result()) | {"scores": [1.0, 5.0, 2.0]}
    assert np.isnan(wire.unpack_result(value, 3).scores[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scores": [1.0, 2.0]}, "scores is 2 values, expected 3"),
        ({"scores": {"0": 1}}, "scores is dict, expected 3"),
        ({"scores": [1.0, None, None]}, "a valid sample has no finite score"),
        ({"scores": [1.0, None, 1e39]}, "a valid sample has no finite score"),
        ({"scores": [True, None, 1.0]}, "something other than numbers"),
        ({"scores": [1.0, None, 10**400]}, "beyond float64"),
        ({"valid": [1, 0, 1]}, "valid is not 3 of true or false"),
        ({"valid": [True, False]}, "valid is not 3"),
        ({"errors": [None]}, "errors is not a list of 3"),
        ({"errors": [None, 3, None]}, "errors has something other than texts"),
        ({"details": ["a"]}, "details is not a list of 3"),
        ({"components": {"a": [1.0]}}, "components.a is 1 values"),
        ({"components": []}, "components is not an object"),
        ({"more": 1}, "expected an object with components, details, errors, scores, valid"),
    ],
)
def test_a_result_that_breaks_the_format_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(WireError) as caught:
        wire.unpack_result(wire.pack_result(result()) | change, 3)
    assert words in str(caught.value)


def test_texts_from_elsewhere_are_cut() -> None:
    value = wire.pack_result(result(errors=[None, "x" * 5000, None]))
    assert len(wire.unpack_result(value, 3).errors[1] or "") == wire.MAX_TEXT
