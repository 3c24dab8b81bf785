"""Commands of the online service: `serve`, `new-key`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gem_ray.commands.options import PresetOption, SetOption, configured, refuse
from gem_ray.redaction import redacted

app = typer.Typer()


@app.command(epilog="Example: `gem-ray serve --port 8000`, then open http://127.0.0.1:8000")
def serve(
    context: typer.Context,
    preset: PresetOption = "nano",
    serve_config: Annotated[
        Path | None, typer.Option(help="A Ray Serve config, as serve_configs/*.yaml, instead of --preset and --set.")
    ] = None,
    set_: SetOption = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on; default: 127.0.0.1, or the config's. Others need API keys."),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port; default: 8000, or the config's.", min=1, max=65535)] = None,
) -> None:
    """Annotate over HTTP, with a page to try it, until the command is stopped (Ctrl-C, SIGTERM).

    SIGHUP reloads the file of API keys and the Serve config, if there is one: `user_config` changes without a restart.
    """
    import signal
    from queue import SimpleQueue

    from gem_ray.config import ConfigError
    from gem_ray.serving.environment import prepare_own_ray

    prepare_own_ray()
    from gem_ray.serving.schemas import HOST, file_schema, preset_schema
    from gem_ray.serving.session import serving

    if serve_config is None:
        configured(preset, None, set_, unused="pipeline")
        schema = preset_schema(preset, set_ or (), host or HOST, port or 8000)
    elif set_:
        raise ConfigError("--set and --serve-config are mutually exclusive; set the key under the config's `args`")
    else:
        refuse(
            context, "preset", because="and --serve-config are mutually exclusive; the config's `args` name the preset"
        )
        schema = file_schema(serve_config)
        changes = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
        schema.http_options = schema.http_options.model_copy(update=changes)
    with serving(schema) as service:
        signals: SimpleQueue[int] = SimpleQueue()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # now, because Ray has set its own
            signal.signal(number, lambda number, _: signals.put(number))
        typer.echo(
            f"gem-ray listens on {service.url}; the page is there, the API's description at {service.url}/openapi.json"
        )
        while signals.get() == signal.SIGHUP:
            _reload("API keys", service.reload_keys)
            if serve_config is not None:
                _reload("Serve config", partial(_deploy_again, serve_config))
        typer.echo("finishing running requests")


def _reload(what: str, reload: Callable[[], None]) -> None:
    """Take over what has changed. Whatever is wrong with it, the service goes on, with the rest of the reload."""
    try:
        reload()
    except Exception as error:
        typer.secho(f"reload failed; keeping the current {what}: {redacted(str(error))}", fg="red", err=True)


def _deploy_again(serve_config: Path) -> None:
    from gem_ray.ray_private.serve import deploy
    from gem_ray.serving.schemas import file_schema

    deploy(file_schema(serve_config))


@app.command("new-key", epilog="Example: `gem-ray new-key --to keys.txt`")
def new_key(
    to: Annotated[
        Path | None, typer.Option(help="File to append the hash to, for serving.api_keys_file; default: print it.")
    ] = None,
    name: Annotated[str, typer.Option(help="Owner of the key, for metrics and the access log; one word.")] = "",
) -> None:
    """Make an API key: the key for a client, and its hash for the server."""
    from gem_ray.serving.keys import ApiKeys
    from gem_ray.serving.keys import new_key as make

    key, digest = make()
    line = f"{digest} {name}".strip()
    ApiKeys(line)  # raises on an invalid name
    if to is not None:  # before the key is shown, which is worth nothing if its hash cannot be written
        end = to.read_bytes()[-1:] if to.is_file() else b""
        with to.open("a", encoding="utf-8") as file:
            file.write(("" if end in (b"", b"\n") else "\n") + f"{line}\n")
    typer.echo(f"key, for the client:   {key}")
    if to is None:
        typer.echo(f"hash, for the server:  {line}")
