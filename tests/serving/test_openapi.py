"""The OpenAPI document, as generators of clients read it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from gem_ray.serving.problems import MEDIA_TYPE


@pytest.fixture(scope="module")
def api(endpoint):
    with endpoint() as api:
        yield api


@pytest.fixture(scope="module")
def document(api):
    return api.client.get("/openapi.json").json()


def operations(document):
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def test_it_is_valid(document):
    OpenAPIV31SpecValidator(document).validate()


def test_operations_have_names_and_tags_and_say_whether_they_want_a_key(document):
    names = {operation["operationId"] for _, _, operation in operations(document)}
    assert names == {
        "annotate", "annotate_batch", "get_taxonomy", "get_limits", "get_models", "get_version", "get_health",
        "get_readiness", "get_metrics",
    }  # fmt: skip
    known = {tag["name"] for tag in document["tags"]}
    for _, path, operation in operations(document):
        assert set(operation["tags"]) <= known
        assert bool(operation["security"]) == (path.startswith("/v1/") or path == "/metrics")
    assert document["components"]["securitySchemes"]["ApiKey"]["scheme"] == "bearer"


def test_every_refusal_is_the_one_problem(document):
    answers = document["components"]["responses"]
    schemas = {str(answer["content"][MEDIA_TYPE]["schema"]) for answer in answers.values()}
    assert schemas == {"{'$ref': '#/components/schemas/Problem'}"}
    assert [name for name, answer in answers.items() if "headers" in answer] == [
        "Problem429", "Problem503", "Problem504",
    ]  # fmt: skip
    for _, _, operation in operations(document):
        for status, answer in operation["responses"].items():
            assert status == "200" or answer["$ref"].endswith(f"Problem{status}")


def test_every_body_and_field_says_what_it_is(document):
    schemas = document["components"]["schemas"]
    assert [name for name, schema in schemas.items() if not schema.get("description")] == []
    fields = [(name, field, each) for name in schemas for field, each in schemas[name].get("properties", {}).items()]
    assert [(name, field) for name, field, each in fields if not each.get("description")] == []


def test_a_form_is_a_post_whose_fields_are_never_null(document):
    post, form = (document["components"]["schemas"][name]["properties"] for name in ("PostIn", "PostForm"))
    assert form.keys() == post.keys()
    assert "null" in str(post)
    assert "null" not in str(form)
    assert {name for name, field in form.items() if not field.get("default", True)} == form.keys() - {"text", "image"}


def test_what_is_sent_has_an_example_that_is_answered(api, document):
    for method, path, operation in operations(document):
        if method == "post":
            name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            for example in document["components"]["schemas"][name]["examples"]:
                assert api.client.post(path, json=example).status_code == 200


def test_a_line_of_a_stream_has_a_type(document):
    content = document["paths"]["/v1/annotate/batch"]["post"]["responses"]["200"]["content"]
    names = [each["$ref"].rpartition("/")[2] for each in content["application/x-ndjson"]["schema"]["anyOf"]]
    assert names == ["AnnotationLine", "ProblemLine"]
    assert document["components"]["schemas"]["AnnotationLine"]["properties"]["index"]["type"] == "integer"


def test_a_python_client_is_generated_without_a_warning(api, tmp_path):
    # `make install` gives it an environment of its own: it holds back libraries of ours.
    folder = Path(sys.prefix) / "generators" / "bin"
    if not (generator := folder / "openapi-python-client").exists():
        pytest.skip("openapi-python-client is not installed")
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"  # where it finds ruff
    url = f"{api.client.base_url}/openapi.json"
    command = [generator, "generate", "--url", url, "--output-path", tmp_path / "client", "--fail-on-warning"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path}, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()
    used = f"""
from gem_ray_client import Client
from gem_ray_client.api.annotate import annotate
from gem_ray_client.models import AnnotationOut, PostIn, Problem
client = Client(base_url={str(api.client.base_url)!r})
answer = annotate.sync(client=client, body=PostIn(text="Paris tonight"))
assert isinstance(answer, AnnotationOut) and answer.entities[0].text == "Paris", answer
assert isinstance(annotate.sync(client=client, body=PostIn(text=" ")), Problem)
"""
    subprocess.run([sys.executable, "-c", used], check=True, cwd=tmp_path / "client", timeout=60)


def test_types_for_typescript_are_generated_without_a_warning(document, tmp_path):
    npx = shutil.which("npx")
    if npx is None or os.environ.get("CI"):
        pytest.skip("npx is not here, or would fetch the generator in every run")
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    command = [npx, "--yes", "openapi-typescript@7", "openapi.json", "-o", "types.ts"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    if "npm error" in done.stderr.lower():
        pytest.skip("the generator cannot be fetched")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "⚠" not in done.stdout + done.stderr
    assert "AnnotationLine" in (tmp_path / "types.ts").read_text()
