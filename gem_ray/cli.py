"""The `gem-ray` command. Heavy imports are inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import Annotated

import typer

from gem_ray import __version__
from gem_ray.commands import annotate, check, config, evaluate, export, models, reranker, review, serve, shards, train
from gem_ray.commands.options import EXIT_FAILED, EXIT_TERMINATED, EXIT_USAGE
from gem_ray.process_exit import exit_code_kept
from gem_ray.redaction import RedactingFormatter, redacted
from gem_ray.standard_streams import prepare_streams

app = typer.Typer(
    name="gem-ray",
    help="Bulk annotation of social posts: fine-grained entities in the text, and where they are seen in the image.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(annotate.app)
app.add_typer(check.app)
app.add_typer(config.app)
app.add_typer(evaluate.app)
app.add_typer(export.app)
app.add_typer(models.app, name="models")
app.add_typer(reranker.app)
app.add_typer(review.app, name="review")
app.add_typer(shards.app, name="shards")
app.add_typer(train.app, name="train")
app.add_typer(train.nano, name="nano")
app.add_typer(serve.app)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"gem-ray {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,  # `main` reads it from the arguments
    json_logs: Annotated[
        bool, typer.Option(help="Progress and result of `annotate` and `export` as JSON lines.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log at level INFO.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    context.obj = {"json_logs": json_logs}


def command() -> None:
    """The process `gem-ray`: `main`, and its exit code."""
    with exit_code_kept():
        try:
            main()
        except SystemExit as end:
            if end.code == signal.SIGTERM:  # which Ray makes an exit with that code
                raise SystemExit(EXIT_TERMINATED) from None
            raise


def main() -> None:
    """Run the command; errors that a user can mend are a sentence, not a traceback."""
    from gem_ray.config import ConfigError

    prepare_streams()
    if not sys.stderr.isatty():  # bars of transformers and the hub would fill a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        if "--debug" in sys.argv:
            typer.echo(redacted(traceback.format_exc()), err=True)
        typer.secho(f"error: {redacted(str(error))}", fg="red", err=True)
        raise SystemExit(EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED) from None
