"""Whatever is sent, the service answers as its OpenAPI says and stays up: requests by schemathesis, and bad images."""

from __future__ import annotations

import io
import struct
import zlib

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi import checks

POOL = "tag-rerank-ground"
TEXT = "Taylor Swift is in Paris tonight"
# Not `positive_data_acceptance`: a schema cannot say that the tokens are the text's, or that bytes are an image.
CHECKS = (
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
)


OPERATIONS = [
    ("POST", "/v1/annotate"), ("POST", "/v1/annotate/batch"), ("GET", "/v1/taxonomy"), ("GET", "/v1/limits"),
    ("GET", "/v1/models"), ("GET", "/version"),
    ("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/metrics"),
]  # fmt: skip


# What has a body can be wrong.
CASES = [(*operation, GenerationMode.POSITIVE) for operation in OPERATIONS]
CASES += [(*operation, GenerationMode.NEGATIVE) for operation in OPERATIONS if operation[0] == "POST"]


def test_the_openapi_describes_every_route(service):
    paths = service.client.get("/openapi.json").json()["paths"]
    assert {(method.upper(), path) for path, methods in paths.items() for method in methods} == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_every_answer_is_one_that_the_openapi_describes(service, method, path, mode):
    # Limits are looked at before the body is parsed: a wrong body that is also too large gets 413.
    refused = {"negative_data_rejection": {"expected-statuses": [400, 413, 415, 422]}}
    config = SchemathesisConfig.from_dict({"checks": refused})
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json", config=config)

    @settings(
        max_examples=40 if method == "POST" else 3,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def ask(case):
        case.call_and_validate(checks=CHECKS, timeout=60)

    ask()


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG that claims a size and holds one byte of pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"\0"))
    parts = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")
BAD = {
    "no image": b"\0" * 100,
    "html": b"\n<!DOCTYPE html><html><body>404",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "xml": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "json": b'{"error": "not found"}',
    "pdf": b"%PDF-1.7\n",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "heic": b"\0\0\0\x18ftypheic\0\0\0\0",
    "mp4": b"\0\0\0\x18ftypmp42\0\0\0\0",
    "zip": b"PK\x03\x04\x14\0",
    "jpeg header": b"\xff\xd8\xff\xe0",
    "png header": b"\x89PNG\r\n\x1a\n",
    "bomb": png_header(20_000, 20_000),
    "largest bomb": png_header(2**31 - 1, 2**31 - 1),
    "too many pixels": png_header(4000, 4000),
    "eps": encoded(NOISE, "EPS"),
    "ppm": encoded(NOISE, "PPM"),
} | {f"half a {kind}": encoded(NOISE, kind)[: len(encoded(NOISE, kind)) // 2] for kind in KINDS[:-1]}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_leaves_the_text_annotated(service, name):
    answer = service.client.post("/v1/annotate", data={"text": TEXT}, files={"image": (name, BAD[name])})
    assert answer.status_code == 200, answer.text
    row = answer.json()
    assert row["status"] == "degraded"
    (problem,) = row["problems"]
    assert problem["stage"] == "load_image"
    assert problem["kind"] == ("image_too_large" if "bomb" in name or "pixels" in name else "image_unreadable")
    assert {entity["text"] for entity in row["entities"]} >= {"Taylor Swift", "Paris"}


def test_damaged_images_never_fail_the_service(service):
    """Bytes changed at random: pixels or a problem, and the same processes afterwards."""
    processes = {name: service.replicas(name) for name in ("ingress", POOL)}
    assert [*map(len, processes.values())] == [1, 2]
    rng = np.random.default_rng(1)
    statuses = set()
    with httpx.Client(base_url=service.url, timeout=60) as client:
        for kind in KINDS:
            data = np.frombuffer(encoded(NOISE, kind), np.uint8)
            for _ in range(8):
                damaged = data.copy()
                damaged[rng.integers(0, len(data), 6)] = rng.integers(0, 256, 6)
                answer = client.post("/v1/annotate", data={"text": TEXT}, files={"image": ("x", damaged.tobytes())})
                statuses.add((answer.status_code, answer.json()["status"]))
    assert statuses <= {(200, "ok"), (200, "degraded")}
    assert {name: service.replicas(name) for name in processes} == processes
