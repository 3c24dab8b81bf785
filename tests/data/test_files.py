import errno
import hashlib
import json
import os
import pickle
import ssl
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from boto3.session import Session
from botocore.credentials import CredentialResolver
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pyarrow import fs

import gem_ray.s3
from gem_ray.config import load_config
from gem_ray.data.files import list_files, open_filesystem, whole_text
from gem_ray.data.shards import read_posts, write_posts
from gem_ray.data.storage import open_storage
from gem_ray.pipeline.run import annotate_dataset
from gem_ray.records import Post
from gem_ray.s3 import RetryingFileSystem, S3Uri, list_objects

CONTENT = bytes(range(256)) * 8000


def read(location):
    filesystem, path = open_filesystem(location)
    with filesystem.open_input_file(path) as stream:
        return stream.read()


def bucket_of(uri):
    return uri.removeprefix("s3://").partition("/")[0]


def test_a_path_is_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b?.txt").write_bytes(b"here")
    assert read("a b?.txt") == read(tmp_path / "a b?.txt") == read(f"file://{tmp_path}/a%20b%3F.txt") == b"here"
    assert open_filesystem(f"file://{tmp_path}//posts/.")[1] == str(tmp_path / "posts")


@pytest.mark.parametrize(("key", "path"), [("", ""), ("/", ""), ("/posts/", "/posts"), ("/a b%20+", "/a b%20+")])
def test_a_path_in_s3_is_the_bucket_and_the_key_as_written(s3, key, path):
    bucket = s3.bucket("data")
    assert open_filesystem(f"{bucket}{key}")[1] == f"{bucket_of(bucket)}{path}"


@pytest.mark.parametrize("key", ["a//b", "a/../b", "./b", "b/.."])
def test_a_location_that_arrow_takes_for_another_is_refused_by_name(key):
    with pytest.raises(ValueError, match=rf"s3://bucket/{key}: .*empty"):
        open_filesystem(f"s3://bucket/{key}/")


@pytest.mark.parametrize(
    "uri", ["s3://", "s3:///key", "s3://UPPER/key", "s3://key:secret@bucket/key", "nonsense://a", "gs://bucket/key"]
)
def test_what_is_no_location_is_refused_without_repeating_secrets(uri):
    with pytest.raises(ValueError, match=r"s3://bucket/") as caught:
        open_filesystem(uri)
    assert "secret" not in str(caught.value)


def test_a_path_that_arrow_cannot_open_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"^{tmp_path}/a\\xff: its name is not UTF-8"):
        open_filesystem(f"{tmp_path}/" + os.fsdecode(b"a\xff"))


def test_a_location_cannot_choose_the_server():
    with pytest.raises(ValueError, match="AWS_ENDPOINT_URL") as caught:
        open_filesystem("s3://bucket/key?endpoint_override=evil.test&secret_key=secret")
    assert "secret" not in str(caught.value)


def test_files_are_written_and_read_whole_whatever_happens_to_some_requests(s3, faulty_s3):
    bucket = s3.bucket("data")
    filesystem, root = open_filesystem(f"{bucket}/files")
    faulty_s3.share, faulty_s3.kinds = 0.3, ["slow_down", "reset", "cut"]
    for index in range(6):
        with filesystem.open_output_stream(f"{root}/{index}") as stream:
            stream.write(CONTENT[index:])
    assert all(read(f"{bucket}/files/{index}") == CONTENT[index:] for index in range(6))
    assert len(filesystem.get_file_info(fs.FileSelector(root))) == 6
    assert faulty_s3.faults >= 5


def test_a_stalled_request_is_made_again(s3, faulty_s3, monkeypatch):
    monkeypatch.setattr(gem_ray.s3, "SILENCE_TIMEOUT_S", 1.0)
    filesystem, path = open_filesystem(s3.put(f"{s3.bucket('data')}/file", CONTENT))
    faulty_s3.stall_s = 120
    with filesystem.open_input_file(path) as stream:
        faulty_s3.plan = ["stall"]
        started = time.monotonic()
        assert stream.read() == CONTENT
    assert time.monotonic() - started < 60
    assert faulty_s3.counts["stall"] == 1


def test_patience_survives_the_way_to_another_process(s3, faulty_s3):
    """Arrow's own file system is back at three attempts when it arrives there."""
    opened, path = open_filesystem(s3.put(f"{s3.bucket('data')}/file", CONTENT))
    filesystem = pickle.loads(pickle.dumps(opened))
    assert filesystem == opened
    faulty_s3.plan = ["slow_down"] * 3
    assert filesystem.get_file_info(path).size == len(CONTENT)
    assert faulty_s3.counts["slow_down"] == 3


def test_a_missing_bucket_is_said_to_be_missing(s3):
    with pytest.raises(FileNotFoundError, match="there is no bucket s3://no-such-bucket"):
        open_filesystem("s3://no-such-bucket/posts")


def test_a_forbidden_bucket_is_said_to_be_forbidden(s3, faulty_s3):
    bucket = s3.bucket("data")
    faulty_s3.plan = ["forbidden"]
    with pytest.raises(PermissionError, match=rf"{bucket}/posts/ may not be listed \(AccessDenied\)"):
        open_filesystem(f"{bucket}/posts")


def test_missing_credentials_are_said_to_be_missing(s3, monkeypatch):
    bucket = s3.bucket("data")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(PermissionError, match="set AWS_ACCESS_KEY_ID"):
        open_filesystem(bucket)


def test_an_unknown_profile_is_named(s3, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConnectionError, match="nobody"):
        open_filesystem("s3://data")


def test_a_server_that_is_not_there_is_named(s3, monkeypatch):
    monkeypatch.setattr(gem_ray.s3, "_OBJECT_ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"s3://data cannot be reached: .*127\.0\.0\.1:9"):
        open_filesystem("s3://data")


def test_what_is_public_is_read_without_credentials(s3, faulty_s3):
    uri = s3.put(f"{s3.bucket('data')}/file", CONTENT)
    public = uri.replace("s3://", "s3://anonymous@")
    s3.client.put_object_acl(Bucket=bucket_of(uri), Key="file", ACL="public-read")
    assert read(public) == CONTENT
    assert faulty_s3.unsigned == faulty_s3.counts.total()


def test_a_profile_gives_server_and_credentials(s3, tmp_path):
    uri = s3.put(f"{s3.bucket('data')}/file", b"content")
    (tmp_path / "config").write_text(f"[profile posts]\nregion = us-east-1\nendpoint_url = {s3.endpoint}\n")
    (tmp_path / "credentials").write_text("[posts]\naws_access_key_id = testing\naws_secret_access_key = testing\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | {
        "AWS_PROFILE": "posts",
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    code = (
        "import sys; from gem_ray.data.files import open_filesystem; f, path = open_filesystem(sys.argv[1]);"
        "sys.stdout.write(f.open_input_file(path).read().decode())"
    )
    answer = subprocess.run([sys.executable, "-c", code, uri], env=environment, capture_output=True, text=True)
    assert (answer.stdout, answer.returncode) == ("content", 0), answer.stderr


def test_a_profile_that_arrow_does_not_understand_is_refused_with_one_that_it_does(s3, tmp_path, monkeypatch):
    """Arrow sends requests without credentials where a profile assumes a role, and is told `No response body`."""
    uri = s3.put(f"{s3.bucket('data')}/file", CONTENT)
    keys = {"Version": 1, "AccessKeyId": "testing", "SecretAccessKey": "testing"}
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    (tmp_path / "config").write_text(
        "[profile role]\nrole_arn = arn:aws:iam::123456789012:role/posts\nsource_profile = base\n"
        f"[profile process]\ncredential_process = cat {tmp_path}/keys.json\n"
    )
    (tmp_path / "credentials").write_text("[base]\naws_access_key_id = testing\naws_secret_access_key = testing\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "role")
    with pytest.raises(PermissionError, match=r"profile role \(assume-role\).*\n.*export-credentials --profile role"):
        open_filesystem(uri)
    monkeypatch.setenv("AWS_PROFILE", "process")
    assert read(uri) == CONTENT


def test_credentials_are_looked_for_once(s3, monkeypatch):
    """Some ask a person for a code, and all take a process or a request."""
    looked: list[object] = []
    load = CredentialResolver.load_credentials
    monkeypatch.setattr(CredentialResolver, "load_credentials", lambda self: (looked.append(self), load(self))[1])
    open_filesystem(f"{s3.bucket('data')}/file")
    assert len(looked) == 1


def test_an_expired_token_is_said_to_be_refused(s3, faulty_s3):
    bucket = s3.bucket("data")
    storage = open_storage(bucket)
    attempts = {
        "may not be listed \\(ExpiredToken\\)": lambda: open_filesystem(bucket),
        "cannot be listed.*ExpiredToken": lambda: list(list_objects(S3Uri.parse(bucket), is_file=False)),
        "ExpiredToken for PutObject.*check the credentials": lambda: storage.swap("name", b"content", None),
        "400 for HeadObject.*check the credentials": lambda: storage.version("name"),
    }
    for message, attempt in attempts.items():
        faulty_s3.plan = ["expired"] * 2  # where HEAD is refused, boto3 asks for the bucket's region
        with pytest.raises(PermissionError, match=message):
            attempt()


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_both_libraries_ask_the_server_that_the_environment_names(s3, faulty_s3, monkeypatch, name):
    uri = s3.put(f"{s3.bucket('data')}/file", CONTENT)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv(name, faulty_s3.endpoint)
    assert read(uri) == CONTENT
    assert faulty_s3.counts["passed"] >= 3  # a listing, the size, the content


@pytest.fixture
def asked(monkeypatch):
    """A server that has nothing, and knows what it was asked for."""

    paths = []

    class Asked(BaseHTTPRequestHandler):
        def answer(self):
            paths.append(self.path)
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET = answer  # noqa: N815

        def log_message(self, *_):
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Asked)
    server.paths = paths
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    yield server
    server.shutdown()
    server.server_close()


def paths_at(server, endpoint):
    """What an Arrow that was pickled on the way asks of a server: what it looks for is the machine's own."""
    filesystem = pickle.loads(pickle.dumps(RetryingFileSystem("us-east-1", endpoint, anonymous=True)))
    server.paths.clear()
    assert filesystem.get_file_info("bucket/key").type is fs.FileType.NotFound
    return server.paths


def test_a_server_below_a_path_is_asked_there(asked):
    """As a storage behind a gateway."""
    endpoint = f"http://127.0.0.1:{asked.server_port}/storage/v1/s3/"
    assert paths_at(asked, endpoint)[0] == "/storage/v1/s3/bucket/key"


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_a_proxy_of_the_environment_is_used_where_boto3_would(asked, monkeypatch, scheme):
    monkeypatch.setenv("http_proxy", f"{scheme}127.0.0.1:{asked.server_port}")
    assert paths_at(asked, "http://s3.test")[0] == "http://s3.test/bucket/key"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert paths_at(asked, f"http://127.0.0.1:{asked.server_port}")[0] == "/bucket/key"


def test_a_certificate_that_the_environment_names_is_trusted(asked, tmp_path, monkeypatch):
    """A storage of one's own has often a certificate of one's own."""
    certificate, key = self_signed("localhost")
    (tmp_path / "certificate.pem").write_bytes(certificate)
    (tmp_path / "both.pem").write_bytes(certificate + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    asked.socket = context.wrap_socket(asked.socket, server_side=True)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "certificate.pem"))
    assert paths_at(asked, f"https://localhost:{asked.server_port}")[0] == "/bucket/key"


def self_signed(host):
    """A certificate and its key, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    begin = datetime.now(UTC) - timedelta(days=1)
    built = x509.CertificateBuilder(name, name, key.public_key(), 1, begin, begin + timedelta(days=2))
    built = built.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
    built = built.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    pem = serialization.Encoding.PEM
    form = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return built.sign(key, hashes.SHA256()).public_bytes(pem), key.private_bytes(pem, *form)


def test_without_a_server_of_our_own_the_bucket_says_in_which_region_it_is(s3, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setattr(gem_ray.s3, "_client_of", lambda _: (gem_ray.s3.client(), Session()))  # without asking AWS
    monkeypatch.setattr(fs, "resolve_s3_region", {"there": "eu-west-3"}.__getitem__)
    assert open_filesystem("s3://there")[0].region == "eu-west-3"


def test_aws_is_not_asked_about_a_bucket_that_is_elsewhere(s3, monkeypatch):
    monkeypatch.setattr(fs, "resolve_s3_region", {}.__getitem__)
    assert open_filesystem(s3.bucket("data"))[0].region == "us-east-1"


def test_a_listing_tells_what_a_file_is(s3, tmp_path):
    bucket = s3.bucket("data")
    for place in ("a.bin", "sub/b.bin"):
        s3.put(f"{bucket}/files/{place}", CONTENT)
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(CONTENT)
    s3.put(f"{bucket}/files/sub/", b"")  # what consoles write for a folder
    s3.put(f"{bucket}/files-of-others/c.bin", b"")
    tag = hashlib.md5(CONTENT).hexdigest()
    for location, etag in ((tmp_path, None), (f"{bucket}/files", tag)):
        _, root, files, _ = list_files(f"{location}/")
        assert [file.path for file in files] == [f"{root}/a.bin", f"{root}/sub/b.bin"]
        assert {(file.size, file.etag) for file in files} == {(len(CONTENT), etag)}
        assert all(0 <= time.time() - file.mtime_ns / 1e9 < 600 for file in files)
        one = list_files(f"{location}/a.bin")[2]
        assert one == files[:1]
        with pytest.raises(FileNotFoundError, match="there is nothing at"):
            list_files(f"{location}/none")


def test_a_listing_of_many_objects_survives_faults(s3, faulty_s3):
    bucket = s3.bucket("data")
    for number in range(1203):
        s3.put(f"{bucket}/files/{number:04}", b"")
    faulty_s3.plan = ["passed", "passed", "passed", "cut", "slow_down", "reset"]
    files = list_files(f"{bucket}/files")[2]
    assert [file.path[-4:] for file in files] == [f"{number:04}" for number in range(1203)]
    assert faulty_s3.faults == 3


FULL = OSError(errno.ENOSPC, "Error writing bytes to file")  # as Arrow says it: without the path


def write_text(folder):
    with whole_text(folder / "x.parquet") as file:
        file.write("half")
        raise OSError(*FULL.args)


def write_in_storage(folder):
    with open_storage(str(folder)).writing("x.parquet") as path:
        Path(path).write_text("half")
        raise OSError(*FULL.args)


def write_shards(folder):
    def posts():
        yield Post("1", "Lyon")
        raise OSError(*FULL.args)

    write_posts(posts(), folder)


@pytest.mark.parametrize("write", [write_text, write_in_storage, write_shards])
def test_a_full_disk_is_named_and_nothing_half_written_stays(tmp_path, write):
    with pytest.raises(OSError, match=rf"^{tmp_path}/out/.*\.parquet cannot be written: No space left on device"):
        write(tmp_path / "out")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_errors_of_what_is_read_keep_their_own_file(tmp_path):
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '/other'"), whole_text(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device", "/other")


def test_credentials_that_may_only_read_are_said_to(s3):
    bucket = s3.bucket("read-only")
    write_posts([Post("1", "Lyon")], f"{bucket}/posts")
    s3.forbid(f"{bucket}/*", "s3:PutObject")
    with pytest.raises(PermissionError, match=rf"^{bucket}/out.* may not be written: check the credentials"):
        write_posts([Post("1", "Lyon")], f"{bucket}/out")
    # Before a model is loaded, and before the rows are counted.
    with pytest.raises(PermissionError, match=rf"{bucket}/out/_run/lease.json may not be .*PutObject.*credentials"):
        annotate_dataset(f"{bucket}/posts", f"{bucket}/out", load_config())
    assert [post.text for post in read_posts(f"{bucket}/posts")] == ["Lyon"]


def test_a_place_has_one_path_from_wherever_it_is_named(tmp_path, monkeypatch):
    """By which a run that is resumed from another folder knows its files; `..` after a link leads elsewhere."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/b")
    monkeypatch.chdir(tmp_path / "a")
    for named in ("../posts", tmp_path / "posts", f"{tmp_path}/a/../posts/", "../link/../../posts"):
        assert Path(os.path.realpath(open_filesystem(named)[1])) == tmp_path / "posts"
    assert open_filesystem("../posts")[1] == f"{tmp_path}/posts"
    assert Path(os.path.realpath(open_filesystem("../link/../posts")[1])) == tmp_path / "a" / "posts"
