"""Connections to S3 that outlast throttling, resets and stalls: Arrow's for files, boto3's for single objects."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pyarrow import fs

# A server that is silent for so long is asked again. Arrow measures it over about five seconds more.
CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 10.0
# Pauses between attempts double, up to 20 s. boto3 is used where callers try again themselves, or wait for an answer.
_FILE_ATTEMPTS = 10
_OBJECT_ATTEMPTS = 5

_ANONYMOUS = "anonymous@"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_BAD_TOKENS = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "400")  # the last: HEAD has no code
_UNKNOWN_TO_ARROW = ("assume-role", "login")  # botocore's names for ways to credentials
_AWS_HOST = re.compile(r"s3[a-z0-9.-]*\.amazonaws\.com(\.cn)?")


@dataclass(frozen=True)
class S3Uri:
    """`s3://bucket/key`, or `s3://anonymous@bucket/key` to read what is public without credentials."""

    bucket: str
    key: str
    anonymous: bool

    @classmethod
    def parse(cls, uri: str) -> S3Uri:
        """Take a URI apart. The key is everything behind the bucket, as it stands: nothing is decoded.

        Raises:
            ValueError: no bucket, or credentials in the URI.
        """
        place = uri.partition("://")[2]
        bucket, _, key = place.removeprefix(_ANONYMOUS).partition("/")
        if not _BUCKET.fullmatch(bucket):
            shown = place.rpartition("@")[2]  # nobody's password
            raise ValueError(f"s3://{shown} is not s3://bucket/key; credentials come from the environment or a profile")
        return cls(bucket, key, place.startswith(_ANONYMOUS))

    @property
    def path(self) -> str:
        """Bucket and key, as Arrow names files."""
        return f"{self.bucket}/{self.key}".rstrip("/")


class RetryingFileSystem(fs.S3FileSystem):
    """Arrow's file system with patience, which connects as boto3 does on the machine that it is on.

    Args:
        region: where the bucket is.
        endpoint: URL of the server; `None` means AWS.
        anonymous: send no credentials.
    """

    def __init__(self, region: str, endpoint: str | None, anonymous: bool) -> None:
        self._arguments = (region, endpoint, anonymous)
        server = {}
        if endpoint:
            parts = urlsplit(endpoint)
            server = {"scheme": parts.scheme, "endpoint_override": parts.netloc + parts.path.rstrip("/")}
        super().__init__(
            region=region,
            anonymous=anonymous,
            connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=SILENCE_TIMEOUT_S,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_FILE_ATTEMPTS),
            **server,
            **_way_to(endpoint or f"https://s3.{region}.amazonaws.com"),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Arrow's own forgets the retry strategy on the way to another process.
        return type(self), self._arguments


def _way_to(url: str) -> dict[str, str]:
    """The proxy and the file of certificates with which boto3 would ask a server; Arrow itself looks for neither."""
    import botocore.session
    from botocore.utils import get_environ_proxies

    way = {}
    if certificates := botocore.session.get_session().get_config_variable("ca_bundle"):
        way["tls_ca_file_path"] = certificates
    if proxy := get_environ_proxies(url).get(urlsplit(url).scheme):
        way["proxy_options"] = proxy if "://" in proxy else f"http://{proxy}"
    return way


def open_bucket(uri: S3Uri) -> RetryingFileSystem:
    """The file system that a bucket is on, asked once whether the bucket is there.

    Raises:
        FileNotFoundError: there is no such bucket.
        PermissionError: it may not be listed, or Arrow does not understand the profile.
        ConnectionError: S3 cannot be asked.
    """
    s3, session = _client_of(uri)
    if not uri.anonymous:
        _check_profile(session, uri.bucket)
    url = s3.meta.endpoint_url
    endpoint = None if _AWS_HOST.fullmatch(urlsplit(url).hostname or "") else url
    region = s3.meta.region_name or "us-east-1"
    if endpoint is None:
        with suppress(OSError):  # what is not found that way, as in China, has to be configured
            region = fs.resolve_s3_region(uri.bucket)
    return RetryingFileSystem(region, endpoint, uri.anonymous)


def client(
    anonymous: bool = False,
    silence_timeout_s: float | None = None,
    connections: int = 10,
    sent: Callable[[], None] | None = None,
    session: Any = None,
) -> Any:
    """A boto3 client, which threads may share.

    Args:
        anonymous: send no credentials.
        silence_timeout_s: how long to wait for a server that says nothing; default: `SILENCE_TIMEOUT_S`.
        connections: kept open at once.
        sent: called for every request, also for those that boto3 makes again.
        session: of boto3, with the credentials that it has found; default: a new one.
    """
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=silence_timeout_s or SILENCE_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": _OBJECT_ATTEMPTS},
        max_pool_connections=connections,
        signature_version=UNSIGNED if anonymous else None,
    )
    # A session of its own: boto3's default one may not be used by two threads at once.
    made = (session or boto3.session.Session()).client("s3", config=config)
    if sent is not None:
        made.meta.events.register("before-send.s3", lambda **_: sent())
    return made


def list_objects(uri: S3Uri, is_file: bool) -> Iterator[tuple[str, tuple[int, int, str]]]:
    """What lies at a URI, folder markers left out; Arrow's own listing knows no ETags.

    Args:
        uri: an object, or a prefix.
        is_file: which of the two it is.

    Yields:
        Bucket and key, and the object's size in bytes, modification time in nanoseconds since 1970, and ETag.

    Raises:
        PermissionError: it may not be listed or looked at.
        ConnectionError: S3 does not answer.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    s3 = client(uri.anonymous)
    try:
        if is_file:
            yield uri.path, _facts(head := s3.head_object(Bucket=uri.bucket, Key=uri.key), head["ContentLength"])
            return
        prefix = f"{uri.key.rstrip('/')}/" if uri.key else ""
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=uri.bucket, Prefix=prefix):
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):
                    yield f"{uri.bucket}/{entry['Key']}", _facts(entry, entry["Size"])
    except ClientError as error:
        raise (PermissionError if is_refusal(error) else ConnectionError)(
            f"s3://{uri.path} cannot be listed: {error}"
        ) from None
    except BotoCoreError as error:
        raise ConnectionError(f"s3://{uri.path} cannot be listed: {error}") from None


def is_refusal(error: Any) -> bool:
    """True if S3 has refused a request of boto3's for who sent it; a token that is too old is a bad request there."""
    answer = error.response
    status, code = answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]
    return status in (401, 403) or (status == 400 and code in _BAD_TOKENS)


def _check_profile(session: Any, bucket: str) -> None:
    """Refuse credentials that boto3 finds and Arrow does not: it would send its requests without any.

    Raises:
        PermissionError: the profile assumes a role, or is that of `aws login`.
    """
    found = session.get_credentials()
    if found is not None and found.method in _UNKNOWN_TO_ARROW:
        raise PermissionError(
            f"s3://{bucket}: Arrow, which reads and writes the files, cannot use the profile {session.profile_name} "
            f"({found.method}). Give it by another profile, named by AWS_PROFILE, with the line\n"
            f"  credential_process = aws configure export-credentials --profile {session.profile_name} --format process"
        )


def _facts(entry: Mapping[str, Any], size: int) -> tuple[int, int, str]:
    return size, int(entry["LastModified"].timestamp()) * 10**9, entry["ETag"].strip('"')


def _client_of(uri: S3Uri) -> tuple[Any, Any]:
    """A client that has been answered by the bucket, and its session: finding credentials may take a process or a
    request, and is done once.
    """
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    # Listing, and only where the URI leads: what a policy for one prefix allows, which a look at the bucket is not.
    prefix = f"{uri.key.rstrip('/')}/" if uri.key else ""
    try:
        session = boto3.session.Session()
        s3 = client(uri.anonymous, session=session)
        s3.list_objects_v2(Bucket=uri.bucket, Prefix=prefix, MaxKeys=1)
    except NoCredentialsError:
        raise PermissionError(
            f"there are no credentials for s3://{uri.bucket}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            f"AWS_PROFILE, or write s3://{_ANONYMOUS}{uri.bucket} to read what is public"
        ) from None
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code == "NoSuchBucket":
            raise FileNotFoundError(f"there is no bucket s3://{uri.bucket} at {s3.meta.endpoint_url}") from None
        if is_refusal(error):
            raise PermissionError(
                f"s3://{uri.bucket}/{prefix} may not be listed ({code}): check the credentials and their policy"
            ) from None
        raise ConnectionError(f"s3://{uri.bucket} cannot be read: {error}") from None
    except BotoCoreError as error:  # also an unknown profile
        raise ConnectionError(f"s3://{uri.bucket} cannot be reached: {error}") from None
    return s3, session
