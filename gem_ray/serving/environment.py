"""The environment of the Ray that `gem-ray serve` starts for itself."""

from __future__ import annotations

import os
import secrets

# Deployments call each other by gRPC, in one thread of each process: a third less CPU time in the ingress on two cores.
_FAST_CALLS = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # With images: the limits of requests bound a call, not the 4 MiB of gRPC.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
# Ray gives all of its workers a low priority, which is right for batches: here it would let whatever else runs on the
# machine keep the proxy and the ingress from answering. The threads of models lower their own.
_PRIORITY = {"RAY_worker_niceness": "0"}
# Named here, because its module imports what reads the variables above.
_LIMITED_HEADS = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "gem_ray.serving.proxy:middlewares"}
_TRACES = {
    "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "gem_ray.serving.tracing:span_processors",
    "RAY_SERVE_TRACING_SAMPLING_RATIO": "1",
}


def prepare_own_ray() -> None:
    """Call before Ray is imported, which reads all of this then. With `RAY_ADDRESS`, nothing changes.

    Ray runs what it is sent, and its ports are open to the network: a token that only its processes know closes them.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)} | _FAST_CALLS | _PRIORITY | _LIMITED_HEADS
    if {"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"} & os.environ.keys():
        own |= _TRACES
    for name, value in own.items():
        os.environ.setdefault(name, value)
