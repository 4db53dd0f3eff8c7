"""Entry point of `dsv3`. Imports nothing heavy: `dsv3 --help` must answer at once."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from dsv3_cli import convert, data, doctor, generate, numerics, pipeline, preflight, profile, recipes, slurm, train
from dsv3_train.errors import UserError, of_file, on_one_line, unexpected

app = typer.Typer(
    name="dsv3",
    help="Train DeepSeek-V3 on Megatron-core: on a laptop's CPU, on one GPU, on a cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("train")(train.train)
app.command("generate")(generate.generate)
app.command("doctor")(doctor.doctor)
app.command("preflight")(preflight.preflight)
app.add_typer(recipes.app, name="recipes")
app.add_typer(data.app, name="data")
app.add_typer(slurm.app, name="slurm")
app.add_typer(convert.app, name="convert")
app.add_typer(pipeline.app, name="pipeline")
app.add_typer(profile.app, name="profile")
app.add_typer(numerics.app, name="numerics")


def _one_line(error: Any) -> str:
    """What Typer would say of a command line in a usage, a hint and a box; nothing where it has printed the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return ""
    command = error.ctx.command_path if getattr(error, "ctx", None) else app.info.name
    said = " ".join(error.format_message().split())
    said = on_one_line(said)
    return f"{command}: {said[:1].lower()}{said[1:].removesuffix('.')} ({command} --help)\n"


def run() -> None:
    """Run the command line; bad input ends in its message alone and exit code 2."""
    code: int | str | None = 0
    for name in ("stdout", "stderr"):  # `>&-`
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  for as long as the process is there
    try:
        code = app(standalone_mode=False, prog_name="dsv3")
    except SystemExit as ended:
        code = ended.code
    except typer.Abort:
        print("aborted", file=sys.stderr)
        code = 1
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if hasattr(error, "format_message"):  # Typer's own errors, whose class it does not give away
            print(_one_line(error), end="", file=sys.stderr)
            sys.exit(2)
        from dsv3_train.runtime.launch import report_to_parent

        error = of_file(error) or error
        fault, told = isinstance(error, UserError), report_to_parent(error)
        if not told:
            print(error if fault else unexpected(error), file=sys.stderr)
        code = 2 if fault else 1
    torch_distributed = sys.modules.get("torch.distributed")
    if torch_distributed is not None and torch_distributed.is_initialized():
        from dsv3_train.runtime.exits import leave

        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
