"""Load on the online service: `python jobs/load_test.py {compare,arrivals} [--url URL | --preset P] --out DIR …`."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

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
    from gem_ray.benchmarks.throughput import measure_in_process
    from gem_ray.config import load_config

    with _service(url, preset, set_) as address:
        load = Load(address, api_key=os.environ.get("GEM_RAY_API_KEY"))
        result = asyncio.run(measure_load(load, clients or [1, 4, 16, 32], requests, seconds))
    if url is None:
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

    with _service(url, preset, set_) as address:
        load = Load(address, api_key=os.environ.get("GEM_RAY_API_KEY"))
        write_result(out, "load-arrivals", asyncio.run(load.open(rate, seconds)).to_dict())


@contextmanager
def _service(url: str | None, preset: str, overrides: list[str] | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    from gem_ray.serving.environment import prepare_own_ray

    prepare_own_ray()
    from gem_ray.serving.schemas import preset_schema
    from gem_ray.serving.session import serving

    with serving(preset_schema(preset, overrides or (), "127.0.0.1", 8321)) as service:
        yield service.url


if __name__ == "__main__":
    app()
