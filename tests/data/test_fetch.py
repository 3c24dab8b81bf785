import asyncio
import datetime
import ipaddress
import os
import pickle
import socket
import ssl
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gem_ray.config import ImageConfig
from gem_ray.data import fetch
from gem_ray.data.fetch import Fetcher, ImageError
from gem_ray.records import ProblemKind

FORBIDDEN, MISSING = ProblemKind.IMAGE_FORBIDDEN, ProblemKind.IMAGE_MISSING
UNREADABLE, TOO_LARGE = ProblemKind.IMAGE_UNREADABLE, ProblemKind.IMAGE_TOO_LARGE


def kind_of_failure(uri, **config):
    with pytest.raises(ImageError) as caught:
        Fetcher(ImageConfig(**config)).fetch(uri)
    return caught.value.kind


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.jpg").write_bytes(b"inside")
    (tmp_path / "images-secret").mkdir()
    (tmp_path / "images-secret" / "a.jpg").write_bytes(b"outside")
    (folder / "out.jpg").symlink_to(tmp_path / "images-secret" / "a.jpg")
    (folder / "in.jpg").symlink_to(folder / "sub" / "a.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    os.mkfifo(folder / "pipe.jpg")
    return folder


@pytest.mark.parametrize("path", ["sub/a.jpg", "./sub/../sub/a.jpg", "in.jpg", "{root}/sub/a.jpg"])
def test_paths_within_the_root_are_read(root, path):
    assert Fetcher(ImageConfig(root=root)).fetch(path.format(root=root)) == b"inside"


@pytest.mark.parametrize(
    "path", ["../images-secret/a.jpg", "out.jpg", "{root}/../images-secret/a.jpg", "/etc/passwd", "sub/../../x", ".."]
)
def test_paths_that_lead_out_of_the_root_are_forbidden(root, path):
    assert kind_of_failure(path.format(root=root), root=root) is FORBIDDEN


def test_without_a_root_no_path_is_read(root):
    assert kind_of_failure(f"{root}/sub/a.jpg") is FORBIDDEN


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("sub/b.jpg", MISSING),
        ("sub", MISSING),
        ("pipe.jpg", MISSING),
        ("sub/a.jpg/b", MISSING),
        ("a\0b", UNREADABLE),
        ("x" * 5000, UNREADABLE),
        ("loop.jpg", UNREADABLE),
    ],
)
def test_paths_that_are_no_files(root, path, kind):
    assert kind_of_failure(path, root=root) is kind


def test_files_over_the_limit_are_not_read(root):
    assert kind_of_failure("sub/a.jpg", root=root, max_bytes=5) is TOO_LARGE
    assert Fetcher(ImageConfig(root=root, max_bytes=6)).fetch("sub/a.jpg") == b"inside"


@pytest.mark.parametrize(
    "uri",
    [
        "http://example.org/a.jpg",
        "https://example.org/a.jpg",
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "ftp://example.org/a.jpg",
        "gs://bucket/a.jpg",
        "data:image/png;base64,AAAA",
        "javascript:alert(1)",
        "s3://",
        "s3://bucket",
        "s3://UPPER_case/key",
        "s3://user:password@bucket/key",
    ],
)
def test_other_addresses_are_forbidden(root, uri):
    assert kind_of_failure(uri, root=root) is FORBIDDEN


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "[::1]", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "0.0.0.0", "[::ffff:10.0.0.1]", "[fe80::1]", "[fd00::1]", "[2002:7f00:1::]", "224.0.0.1", "2130706433",
        "0x7f.1", "[64:ff9b::10.0.0.5]", "[64:ff9b:1::1]", "[fec0::1]", "[::127.0.0.1]", "[::ffff:0:10.0.0.1]",
    ],
)  # fmt: skip
def test_hosts_on_private_networks_are_refused_also_in_disguise(host):
    assert kind_of_failure(f"https://{host}/a.jpg", allow_http=True) is FORBIDDEN


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::8.8.8.8", "::ffff:8.8.8.8"])
def test_public_addresses_are_none_of_these(address):
    assert fetch._is_public(address)


def test_a_name_that_resolves_to_a_private_address_too_is_refused(monkeypatch):
    answers = [(0, 0, 0, "", (address, 443)) for address in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(fetch.socket, "getaddrinfo", lambda *_, **__: answers)
    assert kind_of_failure("https://example.org/a.jpg", allow_http=True) is FORBIDDEN


@pytest.mark.parametrize("uri", ["https://", "https:///a.jpg", "https://[::1", "https://a..b/", "https:a.jpg"])
def test_broken_addresses_fail_alone(uri):
    assert kind_of_failure(uri, allow_http=True) in (FORBIDDEN, UNREADABLE)


def test_messages_do_not_repeat_signatures():
    with pytest.raises(ImageError) as caught:
        Fetcher(ImageConfig()).fetch("https://example.org/a.jpg?X-Amz-Signature=abc")
    assert "a.jpg" in str(caught.value)
    assert "Signature" not in str(caught.value)


class _Site(BaseHTTPRequestHandler):
    hosts: list = []  # noqa: RUF012
    faults: list = []  # noqa: RUF012  # of the next requests: a status, with what to wait, or "reset"
    times: list = []  # noqa: RUF012

    def do_GET(self):
        self.hosts.append(self.headers["host"])
        self.times.append(time.monotonic())
        if self.faults:
            self._fail(self.faults.pop(0))
            return
        if self.path == "/moved":
            self._answer(302, b"", location="/a.jpg")
        elif self.path == "/to-the-inside":
            self._answer(302, b"", location="http://127.0.0.1/secret")
        elif self.path == "/for-ever":
            self._answer(302, b"", location="/for-ever")
        elif self.path in ("/a.jpg", "/large"):
            self._answer(200, b"pixels" if self.path == "/a.jpg" else b"x" * 100_000)
        elif self.path == "/drip":
            self._answer(200, b"")
            for _ in range(50):
                self.wfile.write(b"x")
                self.server.stopping.wait(0.1)
        elif self.path == "/drip-header":
            self.wfile.write(b"HTTP/1.0 200 OK\r\n")
            for number in range(50):
                self.wfile.write(b"x-%d: x\r\n" % number)
                self.server.stopping.wait(0.1)
        else:
            self._answer(404 if self.path == "/gone" else 503, b"")

    def _fail(self, fault):
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault == "cut":
            self._answer(200, b"pix", **{"content-length": "6"})
        elif fault == "stall":
            self.server.stopping.wait(2)
        else:
            status, wait = fault
            self._answer(status, b"", **{"retry-after": wait})

    def _answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate of `images.test`."""
    folder = tmp_path_factory.mktemp("certificate")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "images.test")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("images.test")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(signed.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(private)
    return folder


@pytest.fixture
def site(certificate, monkeypatch):
    """A real TLS server on this machine, which is declared public and to be what every name resolves to."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    server.stopping = threading.Event()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    resolved = [(0, 0, 0, "", ("127.0.0.1", server.server_port))]
    real = fetch.socket.getaddrinfo
    names = ("images.test", "other.test")
    monkeypatch.setattr(
        fetch.socket, "getaddrinfo", lambda host, *a, **k: resolved if host in names else real(host, *a, **k)
    )
    monkeypatch.setattr(fetch, "_is_public", lambda address: ipaddress.ip_address(address).is_loopback)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
    for told in (_Site.hosts, _Site.faults, _Site.times):
        told.clear()
    yield f"https://images.test:{server.server_port}"
    server.stopping.set()
    server.shutdown()
    server.server_close()


def test_https_images_are_fetched_by_name_from_the_address_that_was_checked(site):
    fetcher = Fetcher(ImageConfig(allow_http=True))
    assert fetcher.fetch(f"{site}/a.jpg") == b"pixels"
    assert fetcher.fetch(f"{site}/moved") == b"pixels"
    assert set(_Site.hosts) == {site.removeprefix("https://")}
    only = Fetcher(ImageConfig(allow_http=True, http_hosts=[site.removeprefix("https://").upper()]))
    assert only.fetch(f"{site}/a.jpg") == b"pixels"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("gone", MISSING),
        ("down", UNREADABLE),
        ("for-ever", UNREADABLE),
        ("to-the-inside", FORBIDDEN),
        ("large", TOO_LARGE),
    ],
)
@pytest.mark.usefixtures("hasty")
def test_https_failures(site, path, kind):
    assert kind_of_failure(f"{site}/{path}", allow_http=True, max_bytes=50_000) is kind


def test_a_certificate_of_another_host_is_refused(site):
    assert kind_of_failure(f"{site.replace('images', 'other')}/a.jpg", allow_http=True) is UNREADABLE


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("path", ["drip", "drip-header"])
def test_a_server_that_drips_is_given_up(site, path):
    with pytest.raises(ImageError, match=r"not received within 0\.5 s"):
        Fetcher(ImageConfig(allow_http=True, timeout_s=0.5)).fetch(f"{site}/{path}")


@pytest.mark.usefixtures("site", "hasty")
def test_a_server_that_does_not_shake_hands_is_given_up():
    fetcher = Fetcher(ImageConfig(allow_http=True, timeout_s=0.5))
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ImageError, match="not received within"):
        fetcher.fetch(f"https://images.test:{silent.getsockname()[1]}/a.jpg")


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("fault", [(503, "0"), (500, ""), (429, "0"), (408, "soon"), "reset", "cut", "stall"])
def test_https_images_arrive_though_two_requests_fail(site, fault):
    _Site.faults += [fault] * 2
    assert Fetcher(ImageConfig(allow_http=True, timeout_s=0.5)).fetch(f"{site}/a.jpg") == b"pixels"
    assert len(_Site.times) == 3


@pytest.mark.usefixtures("hasty")
def test_a_web_server_that_stays_down_is_asked_three_times(site):
    _Site.faults += [(503, "")] * 9
    with pytest.raises(ImageError, match="the server answered 503") as caught:
        Fetcher(ImageConfig(allow_http=True)).fetch(f"{site}/a.jpg")
    assert caught.value.kind is UNREADABLE
    assert len(_Site.times) == 3


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("fault", [(404, ""), (403, ""), (400, "9")])
def test_what_a_second_try_would_not_change_is_asked_once(site, fault):
    _Site.faults.append(fault)
    assert kind_of_failure(f"{site}/a.jpg", allow_http=True) in (MISSING, UNREADABLE)
    assert len(_Site.times) == 1


@pytest.mark.usefixtures("hasty")
def test_a_web_server_is_left_alone_as_long_as_it_asks_but_no_longer_than_a_try_may_take(site):
    for wait, limit, least, most in (("1", 10, 0.99, 5), ("3600", 0.3, 0.29, 2)):
        _Site.faults.append((429, wait))
        _Site.times.clear()
        assert Fetcher(ImageConfig(allow_http=True, timeout_s=limit)).fetch(f"{site}/a.jpg") == b"pixels"
        first, second = _Site.times
        assert least < second - first < most


def test_images_are_fetched_beside_a_running_event_loop_and_at_once(site):
    fetcher = Fetcher(ImageConfig(allow_http=True))

    async def in_a_notebook():
        return fetcher.fetch(f"{site}/a.jpg")

    assert asyncio.run(in_a_notebook()) == b"pixels"
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(fetcher.fetch, [f"{site}/a.jpg"] * 40)) == {b"pixels"}


def test_images_are_read_from_s3(s3):
    bucket = s3.bucket("photos")
    uri = s3.put(f"{bucket}/sub/a b?.jpg", b"pixels")
    assert Fetcher(ImageConfig(max_bytes=6)).fetch(uri) == b"pixels"
    assert kind_of_failure(uri, max_bytes=5) is TOO_LARGE
    assert kind_of_failure(f"{bucket}/none.jpg") is MISSING
    assert kind_of_failure("s3://no-such-bucket/none.jpg") is MISSING
    assert kind_of_failure(f"{bucket}/\ud800") is UNREADABLE


def test_one_request_is_made_for_an_image_in_s3(s3, faulty_s3):
    uri = s3.put(f"{s3.bucket('photos')}/a.jpg", b"pixels")
    fetcher = Fetcher(ImageConfig())
    fetcher.fetch(uri)
    assert faulty_s3.counts == {"passed": 1}
    assert fetcher.fetched == {"fetched": 1, "bytes": 6, "s3_requests": 1}


def test_every_request_to_s3_is_counted_also_those_that_fail(s3, faulty_s3):
    uri = s3.put(f"{s3.bucket('photos')}/a.jpg", b"pixels")
    fetcher = Fetcher(ImageConfig())
    faulty_s3.plan = ["slow_down", "passed", "cut"]
    fetcher.fetch(uri)
    fetcher.fetch(uri)
    with pytest.raises(ImageError):
        fetcher.fetch(uri.replace("a.jpg", "none.jpg"))
    assert fetcher.fetched["s3_requests"] == faulty_s3.counts.total() == 5


def test_a_uri_of_the_data_cannot_choose_the_server(s3, faulty_s3, monkeypatch):
    """Whoever can name the server is sent our signature."""
    uri = s3.put(f"{s3.bucket('photos')}/a.jpg", b"pixels")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    port = faulty_s3.endpoint.rpartition(":")[2]
    for query in (f"endpoint_override=127.0.0.1:{port}&scheme=http", f"endpoint={faulty_s3.endpoint}"):
        assert kind_of_failure(f"{uri}?{query}") is MISSING
    assert kind_of_failure(f"s3://127.0.0.1:{port}/photos/a.jpg") is FORBIDDEN
    assert faulty_s3.counts.total() == 0


def test_an_image_that_the_bucket_does_not_give_is_forbidden(s3):
    bucket = s3.bucket("photos")
    uri = s3.put(f"{bucket}/private/a.jpg", b"pixels")
    s3.forbid(f"{bucket}/private/*", "s3:GetObject")
    with pytest.raises(ImageError, match="S3 answered") as caught:
        Fetcher(ImageConfig()).fetch(uri)
    assert caught.value.kind is FORBIDDEN
    assert Fetcher(ImageConfig()).fetch(s3.put(f"{bucket}/public/a.jpg", b"public")) == b"public"


def test_without_credentials_only_what_is_public_is_read(s3, faulty_s3):
    uri = s3.put(f"{s3.bucket('photos')}/a.jpg", b"pixels")
    public = uri.replace("s3://", "s3://anonymous@")
    assert kind_of_failure(public) is FORBIDDEN
    bucket, key = uri.removeprefix("s3://").split("/")
    s3.client.put_object_acl(Bucket=bucket, Key=key, ACL="public-read")
    assert Fetcher(ImageConfig()).fetch(public) == b"pixels"
    assert (faulty_s3.unsigned, faulty_s3.counts.total()) == (2, 2)


def test_an_image_cannot_be_read_without_credentials_where_they_are_needed(s3, monkeypatch):
    uri = s3.put(f"{s3.bucket('photos')}/a.jpg", b"pixels")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ImageError, match="credentials") as caught:
        Fetcher(ImageConfig()).fetch(uri)
    assert caught.value.kind is UNREADABLE


@pytest.fixture
def hasty(monkeypatch):
    """Pauses of hundredths of a second."""
    monkeypatch.setattr(fetch, "_PAUSES_S", (0.01,) * 8)
    monkeypatch.setattr(fetch, "_HTTPS_PAUSES_S", (0.01,) * 2)


@pytest.mark.parametrize("fault", ["slow_down", "reset", "cut"])
def test_images_arrive_whole_whatever_happens_to_some_requests(s3, faulty_s3, hasty, fault):
    bucket = s3.bucket("photos")
    images = {s3.put(f"{bucket}/{i}", bytes([i]) * 300_000): bytes([i]) * 300_000 for i in range(20)}
    faulty_s3.share, faulty_s3.kinds = 0.3, [fault]
    fetcher = Fetcher(ImageConfig())
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fetcher.fetch, images)) == list(images.values())
    assert faulty_s3.counts[fault] >= 3


def test_a_stalled_image_is_asked_for_again(s3, faulty_s3, hasty):
    uri = s3.put(f"{s3.bucket('photos')}/a.jpg", b"pixels" * 100_000)
    faulty_s3.stall_s, faulty_s3.plan = 30, ["stall", "stall"]
    started = time.monotonic()
    assert Fetcher(ImageConfig(timeout_s=0.3)).fetch(uri) == b"pixels" * 100_000
    assert time.monotonic() - started < 15
    assert faulty_s3.counts == {"stall": 2, "passed": 1}


def test_an_image_that_never_arrives_is_unreadable_in_the_end(s3, faulty_s3, hasty):
    uri = s3.put(f"{s3.bucket('photos')}/a.jpg", b"pixels" * 1000)
    faulty_s3.share, faulty_s3.kinds = 1, ["cut"]
    assert kind_of_failure(uri) is UNREADABLE
    assert faulty_s3.counts["cut"] == 1 + len(fetch._PAUSES_S)


def test_a_fetcher_can_be_sent_to_another_process():
    fetcher = Fetcher(ImageConfig())
    assert fetcher._client  # connections that are open stay behind
    assert isinstance(pickle.loads(pickle.dumps(fetcher)), Fetcher)
