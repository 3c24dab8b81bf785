"""What vLLM's engines are told where there is no GPU, as in trials and tests."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.executor.uniproc_executor import UniProcExecutor


def cpu_options() -> dict[str, Any]:
    """Arguments of an engine that make it start sooner on a CPU; none where there is a GPU.

    There is nothing to capture, and compiling takes longer than small models run. The engine's process also does the
    worker's job, as with one GPU: by its default on a CPU, vLLM gives the worker a process of its own, which imports
    everything once more, so that it can pin the threads of large models to cores.
    """
    if torch.cuda.is_available():
        return {}
    return {"enforce_eager": True, "distributed_executor_backend": UniProcExecutor}
