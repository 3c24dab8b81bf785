"""Load on the online service: `python jobs/load_test.py {compare,arrivals,health,memory} … --out DIR`."""

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from gem_ray.benchmarks.results import write_result

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

UrlOption = Annotated[str | None, typer.Option(help="A service that runs; else one is started on this machine.")]
PresetOption = Annotated[str, typer.Option(help="Of the service that is started.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="One key of its configuration.")]
OutOption = Annotated[Path, typer.Option(help="Folder for `load-NAME.json`.")]


@app.command()
def compare(
    url: UrlOption = None,
    preset: PresetOption = "nano",
    set_: SetOption = None,
    clients: Annotated[list[int] | None, typer.Option(help="Clients at once; from few to many.", min=1)] = None,
    requests: Annotated[int, typer.Option(help="Requests of the most clients.", min=32)] = 2000,
    seconds: Annotated[float, typer.Option(help="Length of the overload.", min=1)] = 20,
    out: OutOption = Path("out/benchmark"),
) -> None:
    """1, 4, 16 and 32 clients, twice the rate that the most reached, and the same models in process."""
    from gem_ray.benchmarks.load import Load, measure_load
    from gem_ray.config import load_config

    with _service(url, preset, set_) as service:
        load = Load(service.url, api_key=service.api_key)
        result = asyncio.run(measure_load(load, clients or [1, 4, 16, 32], requests, seconds))
    if url is None:
        # Imported here: it brings Ray, which reads its environment then, and the service has one of its own.
        from gem_ray.benchmarks.throughput import measure_in_process

        result["in_process"] = measure_in_process(load_config(preset, overrides=set_ or ()), requests)
    write_result(out, "load-compare", result)


@app.command()
def arrivals(
    rate: Annotated[float, typer.Option(help="Requests a second.", min=0.1)],
    url: UrlOption = None,
    preset: PresetOption = "nano",
    set_: SetOption = None,
    seconds: Annotated[float, typer.Option(help="For how long.", min=1)] = 30,
    out: OutOption = Path("out/benchmark"),
) -> None:
    """Requests that arrive at random, whether or not the last are answered. The key is in GEM_RAY_API_KEY."""
    from gem_ray.benchmarks.load import Load

    with _service(url, preset, set_) as service:
        load = Load(service.url, api_key=service.api_key)
        write_result(out, "load-arrivals", asyncio.run(load.open(rate, seconds)).to_dict())


@app.command()
def health(
    url: UrlOption = None,
    preset: PresetOption = "nano",
    set_: SetOption = None,
    clients: Annotated[int, typer.Option(help="Clients that send good posts.", min=1)] = 32,
    slow: Annotated[int, typer.Option(help="Connections that send a byte now and then.", min=1)] = 256,
    large: Annotated[int, typer.Option(help="Connections that send large bodies, one after the other.", min=1)] = 4,
    seconds: Annotated[float, typer.Option(help="Length of each kind of load.", min=1)] = 20,
    out: OutOption = Path("out/benchmark"),
) -> None:
    """How soon `/healthz` answers under good posts, slow senders, large bodies, and all of them."""
    from gem_ray.benchmarks.abuse import Abuse, measure_health
    from gem_ray.benchmarks.load import Load

    with _service(url, preset, set_) as service:
        load, abuse = Load(service.url, api_key=service.api_key), Abuse(service.url, service.api_key)
        measuring = measure_health(load, abuse, service.url, seconds, clients, slow, large)
        write_result(out, "load-health", asyncio.run(measuring))


@app.command()
def memory(
    preset: PresetOption = "nano",
    set_: SetOption = None,
    few: Annotated[int, typer.Option(help="Requests before the first look.", min=20)] = 500,
    many: Annotated[int, typer.Option(help="Requests before the second look.", min=40)] = 4500,
    clients: Annotated[int, typer.Option(help="That send them.", min=1)] = 16,
    out: OutOption = Path("out/benchmark"),
) -> None:
    """Memory of all processes of a service after few and after many requests, half of which are abuse."""
    from gem_ray.benchmarks.abuse import Mixture, measure_memory
    from gem_ray.benchmarks.load import memory_of_processes

    with _service(None, preset, set_) as service:
        mixture = Mixture(service.url, service.api_key)
        measuring = measure_memory(mixture, memory_of_processes, few, many, clients)
        write_result(out, "load-memory", asyncio.run(measuring))


class _Service(NamedTuple):
    url: str
    api_key: str | None


@contextmanager
def _service(url: str | None, preset: str, overrides: list[str] | None) -> Iterator[_Service]:
    if url is not None:
        yield _Service(url, os.environ.get("GEM_RAY_API_KEY"))
        return
    from gem_ray.serving.environment import prepare_own_ray
    from gem_ray.serving.keys import new_key

    api_key, os.environ["GEM_RAY_API_KEYS"] = new_key()
    prepare_own_ray()
    from gem_ray.serving.schemas import preset_schema
    from gem_ray.serving.session import serving

    with socket.socket() as probe:  # several services may be measured on one machine
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with serving(preset_schema(preset, overrides or (), "127.0.0.1", port)) as service:
        yield _Service(service.url, api_key)


if __name__ == "__main__":
    app()
