"""``report``, ``compare``, ``rescore``, ``verify``, ``merge``, ``import-tsv``: what is done with finished runs. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsplugins.cli.output import plain_warnings, print_json, print_runs, say, shown_path
from rsplugins.errors import ParameterError, RunError, UsageError

if TYPE_CHECKING:
    from rsplugins.runs.manifest import Manifest
    from rsplugins.runs.run import Run
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
    """Print the tables of runs: certified accuracy by radius, ACR over all inputs, abstentions. Estimates stand apart.

    So do runs that `verify` refuses because a file was edited; exit code 1 then.
    """
    from rsplugins.runs.summary import summarise
    from rsplugins.runs.tables import result_tables

    plain_warnings()
    runs = [_open(directory) for directory in _expand(directories)]
    if as_json:
        print_json([{"directory": str(run.directory), **summarise(run)} for run in runs])
    else:
        _print_tables(result_tables(runs), form)
    _write_html(runs, html)
    _end(runs)


def compare(
    first: Directory,
    second: Annotated[Path, typer.Argument(help="The run to compare it with.")],
    form: Format = "markdown",
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Compare two runs on the inputs that both have, paired by index. Exit code 1 when `verify` refuses one of them."""
    from rsplugins.runs.tables import compare_tables

    plain_warnings()
    runs = [_open(first), _open(second)]
    tables = compare_tables(*runs)
    if as_json:
        print_json([{"title": table.title, "header": table.header, "rows": table.rows, "note": table.note} for table in tables])
    else:
        _print_tables(tables, form)
    _write_html(runs, html, compare=True)
    _end(runs)


def rescore(
    directory: Directory,
    alpha: Annotated[float | None, typer.Option(help="Probability of a false certificate, for each input.")] = None,
    dataset_alpha: Annotated[
        float | None, typer.Option(help="Probability that any certificate of the run is false; shared among the inputs.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the re-scored run here; otherwise it is only printed.")] = None,
    as_json: Json = False,
) -> None:
    """Recompute a run's claims at another confidence, from its evidence, without the model.

    A run that `verify` refuses because a file was edited is marked, not written; exit code 1 then.
    """
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
    _end([run])


def verify(directories: Annotated[list[Path], typer.Argument(help="Run directories.")], as_json: Json = False) -> None:
    """Hold every file against its digest, and recompute every claim from the evidence.

    Exit code 1 when something differs, when inputs are missing, or when there is nothing to recompute claims from.
    """
    plain_warnings()
    results = [_verified(directory) for directory in _expand(directories)]
    if as_json:
        print_json(results)
    else:
        for result in results:
            typer.echo(f"{shown_path(Path(result['directory']))}: {result['state']}: {result['what']}")
            for text in [*result["problems"], *(f"({note})" for note in result["notes"])]:
                typer.echo(f"  {text}")
    raise typer.Exit(int(not all(result["ok"] for result in results)))


def _verified(directory: Path) -> dict[str, Any]:
    """Return what there is to say about one run; a file that cannot be read at all is one thing that does not match."""
    from rsplugins.runs.verify import examine

    try:
        found = examine(directory)
    except RunError as error:
        said = {"state": "DOES NOT MATCH", "what": "it cannot be read"}
        return {"directory": str(directory), "inputs": 0, "ok": False, **said, "problems": [str(error)], "notes": []}
    wrong = bool(found.edited or found.unfinished)
    inputs, method = len(found.run.rows), found.run.manifest.method
    return {
        "directory": str(directory),
        "inputs": inputs,
        "ok": not found.problems,
        "state": "DOES NOT MATCH" if wrong else "ok" if found.verifiable else "cannot be verified",
        "what": f"{inputs} claims of {method} " + ("recomputed" if found.verifiable else "repeated from another program's log"),
        "problems": found.problems,
        "notes": found.notes,
    }


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
        str | None,
        typer.Option(
            help="What the log claims: deterministic, probabilistic, estimate, empirical. Default: the log's own sign, else "
            "probabilistic."
        ),
    ] = None,
    norm: Annotated[str, typer.Option(help="l1, l2 or linf.")] = "l2",
    name: Annotated[str | None, typer.Option(help="What to call the method. Default: the file's name.")] = None,
    model: Annotated[str, typer.Option(help="The model, for tables.")] = "",
    data: Annotated[str, typer.Option(help="The data set, for tables.")] = "",
    out: Annotated[Path | None, typer.Option(help="Make a run directory here; otherwise the summary is only printed.")] = None,
    as_json: Json = False,
) -> None:
    """Read a log of another program. It has claims but no evidence, so `verify` says that it cannot recompute them."""
    from rsplugins.runs.imports import claimed_parameters, import_log, read_log
    from rsplugins.runs.merge import finish
    from rsplugins.runs.summary import summarise

    plain_warnings()
    guarantee = guarantee or read_log(file).sign or "probabilistic"
    claimed = claimed_parameters(guarantee=guarantee, norm=norm, alpha=alpha, sigma=sigma, n=n)

    def make(directory: Path, *, keep: bool) -> None:
        log = import_log(file, directory, method=name or file.name, claimed=claimed, model=model, data=data)
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
    from dataclasses import replace

    from rsplugins.runs.rows import claim_function, score
    from rsplugins.runs.verify import examine

    found = examine(directory)
    if not found.run.rows:
        raise UsageError(f"{directory} has no records yet.", fix="run its `rsplugins certify` command again")
    run = found.run
    if manifest is not None:
        rows = score((row.record for row in run.rows), claim_function(manifest), manifest.parameters)
        run = replace(run, manifest=manifest, rows=tuple(rows))
    return replace(run, problems=tuple(found.edited))


def _end(runs: list[Run]) -> None:
    """Say which runs do not verify, and end with exit code 1 when there is one."""
    edited = [run for run in runs if run.problems]
    for run in edited:
        say(f"NOT VERIFIED: {shown_path(run.directory)}: {run.problems[0]}; `rsplugins verify` lists everything that differs")
    if edited:
        raise typer.Exit(1)


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
    from rsplugins.machine.files import write_whole
    from rsplugins.runs.report import to_html
    from rsplugins.runs.seals import DERIVED, DIGESTS, MANIFEST

    path.parent.mkdir(parents=True, exist_ok=True)
    page = to_html(runs, compare=compare)
    if (path.parent / DIGESTS).exists() and path.name in (*DERIVED, DIGESTS, MANIFEST):
        raise UsageError(
            f"{path} is a file of the run in that directory, whose digest is known.", fix="write the page under another name"
        )
    write_whole(path, page)
    say(f"report:  {shown_path(path)}")
