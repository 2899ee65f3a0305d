"""``report``, ``compare``, ``rescore``, ``verify``, ``merge``, ``import-tsv``: what is done with finished runs. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsplugins.cli.output import plain_warnings, print_json, print_runs, say, shown_path
from rsplugins.errors import ParameterError, UsageError

if TYPE_CHECKING:
    from rsplugins.runs.manifest import Manifest
    from rsplugins.runs.scoring import Run
    from rsplugins.runs.tables import Table

Directory = Annotated[Path, typer.Argument(help="A run directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Format = Annotated[str, typer.Option("--format", help="markdown or latex.")]
Html = Annotated[Path | None, typer.Option("--html", help="Also write a self-contained page here.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for name, command in (
        ("report", report),
        ("compare", compare),
        ("rescore", rescore),
        ("verify", verify),
        ("merge", merge),
        ("import-tsv", import_tsv),
    ):
        app.command(name)(command)


def report(
    directories: Annotated[list[Path], typer.Argument(help="Run directories, or directories of run directories.")],
    form: Format = "markdown",
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Print the tables of runs: certified accuracy by radius, ACR over all inputs, abstentions. Estimates stand apart."""
    from rsplugins.runs.summary import summarise
    from rsplugins.runs.tables import result_tables

    plain_warnings()
    runs = [_open(directory) for directory in _expand(directories)]
    if as_json:
        print_json([{"directory": str(run.directory), **summarise(run)} for run in runs])
    else:
        _print_tables(result_tables(runs), form)
    _write_html(runs, html)


def compare(
    first: Directory,
    second: Annotated[Path, typer.Argument(help="The run to compare it with.")],
    form: Format = "markdown",
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Compare two runs on the inputs that both have, paired by index."""
    from rsplugins.runs.tables import compare_tables

    plain_warnings()
    runs = [_open(first), _open(second)]
    tables = compare_tables(*runs)
    if as_json:
        print_json([{"title": table.title, "header": table.header, "rows": table.rows, "note": table.note} for table in tables])
    else:
        _print_tables(tables, form)
    _write_html(runs, html, compare=True)


def rescore(
    directory: Directory,
    alpha: Annotated[float | None, typer.Option(help="Probability of a false certificate, for each input.")] = None,
    dataset_alpha: Annotated[
        float | None, typer.Option(help="Probability that any certificate of the run is false; shared among the inputs.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the re-scored run here; otherwise it is only printed.")] = None,
    as_json: Json = False,
) -> None:
    """Recompute a run's claims at another confidence, from its evidence, without the model."""
    from rsplugins.runs.manifest import read_manifest
    from rsplugins.runs.rescore import copy_rescored, with_alpha
    from rsplugins.runs.summary import summarise

    plain_warnings()
    if (alpha is None) == (dataset_alpha is None):
        raise UsageError("rescore needs one of --alpha and --dataset-alpha.", fix="rsplugins rescore DIR --alpha 0.01")
    old = read_manifest(directory)
    if dataset_alpha is not None:
        manifest = with_alpha(old, dataset_alpha, inputs=len(old.selection.indices()))
    else:
        manifest = with_alpha(old, float(alpha or 0.0))
    run = _open(directory, manifest)
    if out is not None:
        run = copy_rescored(run, out)
    if as_json:
        print_json({"directory": None if out is None else str(out), **summarise(run)})
    else:
        print_runs([run])
    if out is not None:
        say(f"results: {shown_path(out)}")


def verify(directories: Annotated[list[Path], typer.Argument(help="Run directories.")], as_json: Json = False) -> None:
    """Recompute every claim from the evidence and compare it with what the directory says. Exit code 1 when something differs."""
    from rsplugins.runs.verify import verify as check

    plain_warnings()
    results: list[dict[str, Any]] = []
    for directory in _expand(directories):
        run, problems = check(directory)
        results.append({"directory": str(directory), "inputs": len(run.rows), "ok": not problems, "problems": problems})
        if as_json:
            continue
        state = "DOES NOT MATCH" if problems else "ok"
        typer.echo(f"{shown_path(directory)}: {state}: {len(run.rows)} claims of {run.manifest.method} recomputed")
        for problem in problems:
            typer.echo(f"  {problem}")
    if as_json:
        print_json(results)
    raise typer.Exit(int(not all(result["ok"] for result in results)))


def merge(
    directories: Annotated[list[Path], typer.Argument(help="The directories of the shards, or the one that holds them all.")],
    out: Annotated[Path | None, typer.Option(help="Where to. Default: the first directory.")] = None,
) -> None:
    """Merge the records of shards into one run. Exit code 1 while inputs are missing."""
    from rsplugins.runs.merge import merge as join

    plain_warnings()
    run = join(directories, out or directories[0])
    print_runs([run])
    if run.missing:
        some = ", ".join(map(str, run.missing[:5]))
        say(f"{len(run.missing)} inputs are missing ({some}{', ...' if len(run.missing) > 5 else ''}): a shard has not ended")
    say(f"results: {shown_path(run.directory)}")
    raise typer.Exit(int(bool(run.missing)))


def import_tsv(
    file: Annotated[Path, typer.Argument(help="A log: idx label predict radius correct time, tab-separated, header optional.")],
    sigma: Annotated[float | None, typer.Option(help="The noise that it was made with.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Its probability of a false certificate, for each input.")] = None,
    n: Annotated[int | None, typer.Option(help="Its samples an input.")] = None,
    guarantee: Annotated[
        str, typer.Option(help="What the log claims: deterministic, probabilistic, estimate, empirical.")
    ] = "probabilistic",
    norm: Annotated[str, typer.Option(help="l1, l2 or linf.")] = "l2",
    name: Annotated[str | None, typer.Option(help="What to call the method. Default: the file's name.")] = None,
    model: Annotated[str, typer.Option(help="The model, for tables.")] = "",
    data: Annotated[str, typer.Option(help="The data set, for tables.")] = "",
    out: Annotated[Path | None, typer.Option(help="Make a run directory here; otherwise the summary is only printed.")] = None,
    as_json: Json = False,
) -> None:
    """Read a log of another program. It has claims but no evidence, so `verify` says that it cannot recompute them."""
    from rsplugins.runs.imports import claimed_parameters, import_log
    from rsplugins.runs.merge import finish
    from rsplugins.runs.summary import summarise

    plain_warnings()
    claimed = claimed_parameters(guarantee=guarantee, norm=norm, alpha=alpha, sigma=sigma, n=n)

    def make(directory: Path, *, keep: bool) -> None:
        log = import_log(file, directory, method=name or file.stem, claimed=claimed, model=model, data=data)
        run = finish(directory, pages=keep)
        if as_json:
            print_json({"dialect": log.dialect, **summarise(run)})
        else:
            say("dialect: " + ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in log.dialect.items()))
            print_runs([run])
        if log.contradictions:
            some = ", ".join(map(str, log.contradictions[:5]))
            say(f"rsplugins: the log's `correct` contradicts label and prediction for {len(log.contradictions)} inputs ({some})")

    if out is not None:
        make(out, keep=True)
        say(f"results: {shown_path(out)}")
        return
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        make(Path(temporary), keep=False)


def _open(directory: Path, manifest: Manifest | None = None) -> Run:
    from rsplugins.runs.scoring import open_run

    run = open_run(directory, manifest=manifest)
    if not run.rows:
        raise UsageError(f"{directory} has no records yet.", fix="run its `rsplugins certify` command again")
    return run


def _expand(directories: list[Path]) -> list[Path]:
    """Replace a directory of run directories, as several methods leave it, by those."""
    from rsplugins.runs.manifest import MANIFEST

    found: list[Path] = []
    for directory in directories:
        inner = [] if (directory / MANIFEST).exists() else sorted(path.parent for path in directory.glob(f"*/{MANIFEST}"))
        found += inner or [directory]
    return found


def _print_tables(tables: list[Table], form: str) -> None:
    if form not in ("markdown", "latex"):
        raise ParameterError(f"--format is {form!r}; allowed: markdown, latex.")
    typer.echo("\n".join(table.to_latex() if form == "latex" else table.to_markdown() for table in tables))


def _write_html(runs: list[Run], path: Path | None, *, compare: bool = False) -> None:
    if path is None:
        return
    from rsplugins.runs.files import write_whole
    from rsplugins.runs.report import to_html

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, to_html(runs, compare=compare))
    say(f"report:  {shown_path(path)}")
