"""Image URLs: off by default; when on, nothing on a private network is reached through them."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gem_ray.config import load_config
from gem_ray.data import fetch
from gem_ray.data.generated import generate
from gem_ray.data.images import ImageLoader
from gem_ray.records import Entity
from gem_ray.serving.api import create_api
from gem_ray.serving.calls import Answer
from gem_ray.serving.guard import Guard
from gem_ray.serving.service import Service

TEXT = "Taylor Swift is in Paris tonight"
IMAGE = next(iter(generate(1, seed=1))).image_bytes


class TagAndLoad:
    """Stands in for the deployment of tagger and image loader: finds one entity, so that the image is looked at."""

    def __init__(self, config):
        self._load = ImageLoader.from_config(config)

    async def remote(self, posts, settings, only):
        for post in posts:
            post.entities = [Entity("Paris", 19, 24, 4, 5, "location", "city", 0.9)]
        return [Answer(post, {"tagger": "stand-in"}, {"tag": 0.1}, {"tag": 0.0}) for post in self._load(posts)]


@pytest.fixture
def ask(listening):
    """Ask a service over HTTP, whose settings are given, with an image URL."""

    def ask(url, hosts, batch=False, **image):
        text_only = {"reranker": {"enabled": False}, "grounder": {"enabled": False}}
        config = load_config(serving={"image_hosts": hosts}, image={"timeout_s": 1} | image, **text_only)
        service = Service(config, {"tag": TagAndLoad(config)}, "run")
        with listening(Guard(create_api(service), service.keys, config.serving)) as port:
            post = {"text": TEXT, "image_url": url}
            path, body = ("/v1/annotate/batch", {"posts": [post]}) if batch else ("/v1/annotate", post)
            return httpx.post(f"http://127.0.0.1:{port}{path}", json=body, timeout=30)

    return ask


def test_image_urls_are_off_unless_hosts_are_named(ask, assert_problem):
    assert "fetches no image URLs" in assert_problem(ask("https://images.test/a.jpg", []), 403)["detail"]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.jpg",
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "/etc/passwd",
        "s3://bucket/a.jpg",
        "ftp://127.0.0.1/a.jpg",
        "gopher://127.0.0.1/",
        "https://example.org/a.jpg",
        "https://example.org@127.0.0.1/a.jpg",
        "https://127.0.0.1/a.jpg",
        "https://localhost/a.jpg",
        "https://[::1]/a.jpg",
        "https://[::ffff:127.0.0.1]/a.jpg",
        "https://169.254.169.254/latest/meta-data/",
        "https://10.0.0.1/a.jpg",
        "https://0x7f.1/a.jpg",
    ],
)
def test_the_running_service_refuses_every_address_that_is_not_public(service, assert_problem, url):
    """Those hosts are allowed in its configuration: the address decides."""
    assert_problem(service.client.post("/v1/annotate", json={"text": TEXT, "image_url": url}), 403)
    batch = service.client.post("/v1/annotate/batch", json={"posts": [{"text": TEXT, "image_url": url}]}).json()
    (row,) = batch["annotations"]
    assert row["status"] == "degraded"
    assert [problem["kind"] for problem in row["problems"]] == ["image_forbidden"]


class Site(BaseHTTPRequestHandler):
    def do_GET(self):
        moved = {
            "/moved": "/a.jpg",
            "/to-the-inside": "https://127.0.0.1/secret",
            "/to-http": "http://images.test/a.jpg",
            "/to-a-file": "file:///etc/passwd",
            "/elsewhere": f"https://other.test:{self.server.server_port}/a.jpg",
            "/for-ever": "/for-ever",
        }
        self.server.asked.append((self.headers["host"], self.path))
        if self.path in moved:
            self._answer(302, b"", Location=moved[self.path])
        elif self.path == "/a.jpg":
            self._answer(200, IMAGE)
        elif self.path == "/large":
            self._answer(200, b"x" * 300_000)
        elif self.path == "/endless":
            self._answer(200, b"")
            while not self.server.stopping.wait(0.001):
                self.wfile.write(b"x" * 10_000)
        elif self.path == "/drip":
            self._answer(200, b"")
            while not self.server.stopping.wait(0.1):
                self.wfile.write(b"x")
        elif self.path == "/silent":
            self.server.stopping.wait(5)
        else:
            self._answer(404, b"")

    def _answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class SiteServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Clients that hang up are what is tested."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificate")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "images.test")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("images.test"), x509.DNSName("other.test")]), False)
        .sign(key, hashes.SHA256())
    )
    pem, no_password = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "cert.pem").write_bytes(signed.public_bytes(pem))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, no_password))
    return folder


@pytest.fixture
def site(certificate, monkeypatch):
    """A real TLS server; the names of the tests resolve to it, and to private addresses."""
    server = SiteServer(("127.0.0.1", 0), Site)
    server.asked, server.stopping = [], threading.Event()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    addresses = {
        "images.test": ["127.0.0.1"],
        "other.test": ["127.0.0.1"],
        "inside.test": ["10.1.2.3"],
        "both.test": ["127.0.0.1", "192.168.0.1"],
        "mapped.test": ["::ffff:10.0.0.1"],
        "link-local.test": ["fe80::1"],
    }
    real = fetch.socket.getaddrinfo

    def resolve(host, *arguments, **options):
        if host not in addresses:
            return real(host, *arguments, **options)
        return [(0, 0, 0, "", (address, server.server_port)) for address in addresses[host]]

    def is_public(address):  # this machine stands for the public internet
        return ipaddress.ip_address(address).is_loopback or public(address)

    public = fetch._is_public
    monkeypatch.setattr(fetch.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(fetch, "_is_public", is_public)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
    yield server
    server.stopping.set()
    server.shutdown()
    server.server_close()


def at(site, path, host="images.test"):
    return f"https://{host}:{site.server_port}{path}"


def hosts(site, *names):
    return [f"{name}:{site.server_port}" for name in names]


@pytest.mark.parametrize("path", ["/a.jpg", "/moved"])
def test_an_image_on_an_allowed_host_is_fetched(ask, site, path):
    answer = ask(at(site, path), hosts(site, "images.test"))
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "ok"
    assert answer.json()["image_width"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/gone", 422),
        ("/to-the-inside", 403),
        ("/to-http", 403),
        ("/to-a-file", 403),
        ("/elsewhere", 403),
        ("/for-ever", 422),
        ("/large", 413),
        ("/endless", 413),
        ("/drip", 504),
        ("/silent", 504),
    ],
)
def test_what_an_allowed_host_leads_to_is_refused_with_its_status(ask, site, assert_problem, path, status):
    allowed = hosts(site, "images.test")
    assert_problem(ask(at(site, path), allowed, max_bytes=200_000), status)
    assert not any(path == "/a.jpg" for _, path in site.asked)
    (row,) = ask(at(site, path), allowed, batch=True, max_bytes=200_000).json()["annotations"]
    assert row["status"] == "degraded"
    assert row["entities"]


@pytest.mark.parametrize("name", ["inside.test", "both.test", "mapped.test", "link-local.test"])
def test_names_that_resolve_to_private_addresses_are_refused(ask, site, assert_problem, name):
    assert_problem(ask(at(site, "/a.jpg", name), hosts(site, name)), 403)
    assert site.asked == []


def test_the_address_that_was_checked_is_the_one_that_is_asked(ask, site, monkeypatch, assert_problem):
    """A name that resolves to another address the second time gains nothing."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    resolve = fetch.socket.getaddrinfo
    asked = []

    def rebinding(host, *arguments, **options):
        if host != "images.test":
            return resolve(host, *arguments, **options)
        asked.append(host)
        return [(0, 0, 0, "", (address, site.server_port)) for address in next(answers)]

    monkeypatch.setattr(fetch.socket, "getaddrinfo", rebinding)
    assert ask(at(site, "/a.jpg"), hosts(site, "images.test")).status_code == 200
    assert asked == ["images.test"]
