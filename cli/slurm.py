"""`dsv3 slurm`: submit runs to SLURM, see how they do, end them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from dsv3_train.runtime.slurm_jobs import Status

app = typer.Typer(no_args_is_help=True, help="Submit runs to SLURM, see how they do, end them.")

_Run = Annotated[str, typer.Argument(help="A run directory.")]
_Text = Optional[str]


@app.command()
def submit(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (dsv3 recipes list) or a YAML file.")],
    overrides: Annotated[
        Optional[list[str]], typer.Argument(help="Recipe overrides, as training.seed=7.", metavar="[a.b=c]...")
    ] = None,
    nodes: Annotated[Optional[int], typer.Option(min=1, help="Must be what parallel.world_size takes.")] = None,
    partition: Annotated[_Text, typer.Option(help="As these four, the site's file has defaults.")] = None,
    account: Annotated[_Text, typer.Option()] = None,
    time: Annotated[_Text, typer.Option(help="Limit of one job, as 24:00:00.")] = None,
    container: Annotated[_Text, typer.Option(help="Image for pyxis.")] = None,
    after: Annotated[_Text, typer.Option(help="Begin when this job has ended.", metavar="JOB")] = None,
    chain: Annotated[int, typer.Option(min=1, max=1000, help="Jobs in a row, each after the one before it.")] = 1,
    sweep: Annotated[
        Optional[list[str]], typer.Option(help="key=v1,v2: one run per value, as an array.", metavar="KEY=V,V")
    ] = None,
    max_requeues: Annotated[int, typer.Option(min=0, help="How often a job goes back into the queue.")] = 100,
    out: Annotated[
        _Text, typer.Option(help="Write the script to this file, the recipe to the run directory; submit nothing.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script and the recipe; touch nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Submit a run that saves before its time is over, goes back into the queue, and goes on.

    Site defaults are in ~/.config/dsv3/cluster.yaml (or where DSV3_CLUSTER says).

    Example: dsv3 slurm submit dsv3_671b_2048xh800 --time 24:00:00 pipeline.schedule=dualpipe --dry-run
    """
    from dsv3_train.runtime.slurm_jobs import prepare

    given = {"partition": partition, "account": account, "time": time, "container": container}
    prepared = prepare(recipe, overrides or [], sweep or [], given, nodes, after, max_requeues)
    if dry_run:
        _show(prepared.script, prepared.resolved, as_json)
        return
    if out is not None:
        import json
        from pathlib import Path

        from dsv3_train.whole import write

        write(Path(out), prepared.script)
        prepared.lay_out()
        print(json.dumps({"script": out}) if as_json else out)
        return
    jobs = prepared.submit(chain)
    if as_json:
        import json

        print(json.dumps({"jobs": jobs, "run_dirs": [str(path) for path in prepared.job.run_dirs]}))
    else:
        for number, path in enumerate(prepared.job.run_dirs):
            print(f"{path}: job {', '.join(prepared.job.of_run(number, jobs))}; dsv3 slurm status {path}")


def _show(script: str, resolved: list[str], as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps({"script": script, "recipes": resolved}))
        return
    print(script)
    for text in resolved:
        print(f"# ---- recipe.yaml ----\n{text}", end="")


@app.command()
def status(run: _Run, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """How a run does: its job, its last step, its newest checkpoint, what went wrong.

    Example: dsv3 slurm status runs/dsv3_16b
    """
    from dsv3_train.runtime.slurm_jobs import status as look

    found = look(run)
    if as_json:
        import json
        from dataclasses import asdict

        print(json.dumps(asdict(found)))
        return
    _print_status(found)


def _print_status(found: Status) -> None:
    from dsv3_train.errors import printable

    lines = [
        f"job        {found.job or 'none'}  {found.queue or 'not in the queue'}",
        f"state      {found.state}",
        f"step       {found.step}",
        f"checkpoint {found.checkpoint or 'none'}",
        *(f"{incident['time']}  {incident['kind']}: {incident['text']}" for incident in found.incidents),
    ]
    print(printable("\n".join(lines)))


@app.command()
def logs(run: _Run, lines: Annotated[int, typer.Option(min=1, help="How many, from the end.")] = 50) -> None:
    """The end of what a run's newest job has printed.

    Example: dsv3 slurm logs runs/dsv3_16b --lines 20
    """
    from dsv3_train.errors import printable
    from dsv3_train.lines import tail
    from dsv3_train.runtime.slurm_jobs import output

    print(printable("\n".join(tail(output(run), lines))))


@app.command()
def cancel(run: _Run) -> None:
    """End a run's jobs for good; its ranks save a checkpoint first if SLURM gives them the time.

    Example: dsv3 slurm cancel runs/dsv3_16b
    """
    from dsv3_train.runtime.slurm_jobs import cancel as end

    print("cancelled: " + ", ".join(end(run)))
