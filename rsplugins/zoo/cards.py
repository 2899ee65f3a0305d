"""The README of a model, the table of the zoo, and their figures: written from manifests and records alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsplugins.certificate import Guarantee, Norm
from rsplugins.machine.files import write_whole
from rsplugins.models import manifest as manifests
from rsplugins.models.manifest import Manifest, Result
from rsplugins.provenance import NOT_RECORDED
from rsplugins.rounding import round_down, round_up
from rsplugins.runs.tables import radius_text
from rsplugins.zoo import evidence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CARD, CURVE = "README.md", "curve.png"
LATENT = "latent"
SAMPLED = ("gaussian", LATENT)
"""Certifiers whose curves, all of l2 radii on raw pixels, stand in the figure of a data set."""
_HEADINGS = {
    Guarantee.DETERMINISTIC: "Certified, for every input in the ball",
    Guarantee.PROBABILISTIC: "Certified, with confidence 1 - alpha for each input",
    Guarantee.ESTIMATE: "Estimates, not certificates",
    Guarantee.EMPIRICAL: "Attacked: what survives is not proved",
    None: "Without noise or attack",
}


def write_card(folder: Path) -> Path:
    """Write a model's README.md, and curve.png where there are numbers; return the README."""
    manifest = manifests.read(folder)
    figure = model_figure(folder, manifest)
    if figure is not None:
        _save(folder / CURVE, figure)
    write_whole(folder / CARD, card(manifest, curve=figure is not None))
    return folder / CARD


def card(manifest: Manifest, *, curve: bool) -> str:
    """Return a model's README in markdown.

    Args:
        manifest: of the model.
        curve: whether curve.png lies beside it.
    """
    lines = [f"# {manifest.id}", "", manifest.summary, ""]
    if curve:
        lines += [f"![accuracy against the radius](./{CURVE})", ""]
    if not manifest.no_weights:
        if manifest.package is not None:
            lines += [f"    pip install {manifest.package.requirement}", ""]
        lines += ["```python", "import rsplugins", f'classifier = rsplugins.load("zoo:{manifest.id}")', "```", ""]
        lines += [f"    {_command(manifest)}", ""]
    else:
        lines += [f"**It has no weights.** {manifest.no_weights}", ""]
    lines += [*_results(manifest), *_facts(manifest)]
    lines += [
        "",
        f"Written by `rsplugins zoo card`; `rsplugins zoo verify {manifest.id}` recomputes every number from `records/`.",
    ]
    return "\n".join(lines) + "\n"


def _command(manifest: Manifest) -> str:
    """Return the command that checks what the model is for, by the evidence that it comes with: a certificate or an attack."""
    options = f"--model zoo:{manifest.id} --data {manifest.data}"
    certified = {result.certifier: result for result in manifest.results if result.guarantee and result.guarantee.certifies}
    bounded = next((result for result in certified.values() if result.norm is Norm.LINF), None)
    attacked = next((result for result in manifest.results if result.metric == "accuracy_under_attack"), None)
    if bounded is not None:
        return f"rsplugins certify {options} --method {bounded.certifier} --set eps={_radius(bounded)}"
    if attacked is not None and not certified:
        return f"rsplugins attack {options} --eps {_radius(attacked)} --stride {attacked.stride or 1} --out attacked"
    # The encoder-head pairs of this package; other models may have been cut anywhere.
    is_latent = manifest.architecture.name.startswith("latent_") and "gaussian" not in certified
    method = f"{LATENT} --set split=encoder" if is_latent else "gaussian"
    # The noise that the model was trained for is that of its evidence, not the certifier's default.
    measured = certified.get(LATENT if is_latent else "gaussian")
    return f"rsplugins certify {options} --method {method}" + (f" --set sigma={measured.sigma:g}" if measured else "")


def _results(manifest: Manifest) -> Iterator[str]:
    for guarantee, heading in _HEADINGS.items():
        rows = [result for result in manifest.results if result.guarantee is guarantee]
        if not rows:
            continue
        yield f"## {heading}"
        yield ""
        yield "| number | value | 95 % interval | by | settings | inputs | on | records |"
        yield "| --- | ---: | --- | --- | --- | ---: | --- | --- |"
        for result in rows:
            cells = [_name(result), shown(result), _interval(result), result.certifier or "the model itself", _settings(result)]
            cells += [
                f"{which(result)} of {result.data} ({result.split})",
                result.device,
                f"[{result.records}]({_place(result)})",
            ]
            yield f"| {' | '.join(cells)} |"
        yield ""


def _place(result: Result) -> str:
    return f"./records/{result.records}"


def _radius(result: Result) -> str:
    return "" if result.radius is None else radius_text(result.radius, result.norm)


def _name(result: Result) -> str:
    words = result.metric.replace("_", " ").replace("acr", "average certified radius")
    return words if result.radius is None else f"{words}, {result.norm} radius {_radius(result)}"


def shown(result: Result) -> str:
    """Return a value as printed: rates in percent, radii with four digits, rounded down."""
    cut = round_down(result.value, 4)
    # The point moved by two places in decimals: 100 times a float may round up.
    return f"{Decimal(cut).scaleb(2):.2f} %" if "accuracy" in result.metric else cut


def which(result: Result) -> str:
    """Return which inputs a number is over, as far as its evidence says: ``1000 (every 10th)``."""
    if result.stride is None or result.images == 1 or (result.stride == 1 and not result.certifier):
        return str(result.images)
    return f"{result.images} (" + ("in a row" if result.stride == 1 else f"every {result.stride}th") + ")"


def _interval(result: Result) -> str:
    if result.interval is None:
        return ""
    low, high = result.interval
    if "accuracy" in result.metric:
        return f"{Decimal(round_down(low, 3)).scaleb(2):.1f} to {Decimal(round_up(high, 3)).scaleb(2):.1f} %"
    return f"{round_down(low, 3)} to {round_up(high, 3)}"


def _settings(result: Result) -> str:
    # The noise of `latent` is in other units than that of pixels.
    sigma = "sigma in the latent" if result.certifier == LATENT else "sigma"
    found = {sigma: result.sigma, "n": result.n, "alpha": result.alpha}
    return ", ".join(
        f"{key} {value:,}" if key == "n" else f"{key} {value:g}" for key, value in found.items() if value is not None
    )


def _facts(manifest: Manifest) -> Iterator[str]:
    shape = " x ".join(map(str, manifest.input.shape))
    yield "## How it was made"
    yield ""
    yield f"* architecture `{manifest.architecture.name}`, {manifest.architecture.num_classes} classes"
    yield f"* input: {manifest.input.domain}, {shape}; normalisation lies inside the model"
    if manifest.recipe is not None:
        yield f"* recipe: [{manifest.recipe.file}](./{manifest.recipe.file}), on the data set `{manifest.data}`"
    if manifest.package is not None:
        held = manifest.package
        yield f"* weights: in the package `{held.requirement}`, {held.file}, {held.bytes:,} bytes, sha256 `{held.sha256}`"
    if manifest.training is not None:
        training = manifest.training
        versions = ", ".join(f"{name} {version}" for name, version in training.versions.items())
        made = f"{training.epochs} epochs, {training.minutes:g} minutes on {training.device}, seed {training.seed}"
        yield f"* trained: {made} ({versions})"
        yield f"* arithmetic: {training.arithmetic or NOT_RECORDED}; processor: {training.processor or NOT_RECORDED}"
        if training.notes:
            yield f"* {training.notes}"
    for weights in manifest.weights:
        yield f"* weights: {weights.file}, {weights.bytes:,} bytes, {weights.dtype}, sha256 `{weights.sha256}`"
    yield f"* source: {manifest.source}"
    if manifest.paper:
        yield f"* method: {manifest.paper}"
    licences = manifest.licences
    yield f"* licences: code {licences.code}; weights {licences.weights}; data {licences.data}"


def write_table(zoo: Path) -> Path:
    """Write the zoo's README.md with one figure a data set; return it."""
    folders = sorted(path.parent for path in zoo.glob(f"*/{manifests.FILE}"))
    models = [(folder, manifests.read(folder)) for folder in folders]
    figures = {}
    for old in zoo.glob("curves-*.png"):
        old.unlink()
    for data in _data_sets(models):
        figure = data_figure([(folder, manifest) for folder, manifest in models if data_of(manifest) == data])
        if figure is not None:
            figures[data] = f"curves-{data}.png"
            _save(zoo / figures[data], figure)
    write_whole(zoo / CARD, table([manifest for _, manifest in models], figures))
    return zoo / CARD


def data_of(manifest: Manifest) -> str:
    """Return the data set that a model's id names, ``cifar10-jpeg`` being one.

    Example: ``mnist`` of ``mnist-cnn.mnist-gaussian025-v1``.
    """
    recipe = manifest.id.partition(".")[2]
    # moving-digits, cifar10-jpeg and ucf101: the longest name of a data set that the recipe begins with
    known = ("moving-digits", "cifar10-jpeg", manifest.data.partition(":")[0])
    return next((name for name in known if recipe.startswith(name)), recipe.partition("-")[0])


def _data_sets(models: Sequence[tuple[Path, Manifest]]) -> list[str]:
    return list(dict.fromkeys(data_of(manifest) for _, manifest in models))


def table(models: Sequence[Manifest], figures: Mapping[str, str]) -> str:
    """Return the README of a zoo in markdown.

    Args:
        models: all of them, in order.
        figures: by data set, the file of its curves.
    """
    lines = ["# Model zoo", "", 'Load a model with `rsplugins.load("zoo:ID")`, or name it with `--model zoo:ID`. Every number is']
    lines += ["computed from the records that lie beside the model; `rsplugins zoo verify` does it again. Certified numbers, and"]
    lines += ["accuracy under attack, which proves nothing, stand in columns of their own.", ""]
    for data in dict.fromkeys(map(data_of, models)):
        lines += [f"## {data}", ""]
        if data in figures:
            lines += [f"![certified accuracy on {data}](./{figures[data]})", ""]
        lines += ["| model | accuracy | certified | under attack | trained on | kB |", "| --- | ---: | --- | --- | --- | ---: |"]
        lines += [f"| {' | '.join(_row(manifest))} |" for manifest in models if data_of(manifest) == data]
        lines += [""]
    lines += ["Written by `rsplugins zoo card`."]
    return "\n".join(lines) + "\n"


def _row(manifest: Manifest) -> list[str]:
    name = f"[{manifest.id}](./{manifest.id})"
    if manifest.no_weights:
        return [name, "", "", "", "no weights: the data are needed", ""]
    plain = next((f"{shown(result)}, {which(result)} inputs" for result in manifest.results if result.metric == "accuracy"), "")
    certified = "<br>".join(headline(manifest.results))
    attacked = "<br>".join(
        f"{shown(result)} by {result.certifier.partition(' (')[0]} at {result.norm} {_radius(result)}, {which(result)} inputs"
        for result in manifest.results
        if result.metric == "accuracy_under_attack" and "margin" not in result.certifier
    )
    size = sum(weights.bytes for weights in manifest.weights)
    kilobytes = f"{size / 1000:.0f}" if manifest.package is None else "in a package"
    return [
        name,
        plain,
        certified,
        attacked,
        f"{manifest.training.device}, {manifest.training.minutes:.1f} min" if manifest.training else "by others",
        kilobytes,
    ]


def headline(results: Sequence[Result]) -> list[str]:
    """Return the certified numbers that stand for a model: ACR, or the rate at the radius that was verified."""
    lines = []
    for result in results:
        if result.metric == "acr":
            by = "" if result.certifier == "gaussian" else f" by {result.certifier}"
            lines.append(f"ACR {shown(result)}{by} ({_settings(result)}, {which(result)} inputs)")
        elif result.metric == "certified_accuracy" and result.n is None:
            lines.append(f"{shown(result)} at {result.norm} {_radius(result)} by {result.certifier}, {which(result)} inputs")
    return lines


def model_figure(folder: Path, manifest: Manifest) -> Figure | None:
    """Draw a model's curves of certified accuracy, or its accuracies as bars where no radius was searched for."""
    from rsplugins.runs.plots import curve_figure

    runs = [run for run in _runs(folder) if run.manifest.parameters.get("eps") is None]
    if runs:
        return curve_figure(runs)
    rows = [result for result in manifest.results if "accuracy" in result.metric]
    return _bars(manifest, rows) if rows else None


def data_figure(models: Sequence[tuple[Path, Manifest]]) -> Figure | None:
    """Draw the curves of all models of a data set that have l2 curves certified by sampling, in one figure.

    A model with runs of several n is drawn once, with the n that most models have: curves of different n do not compare.
    """
    from rsplugins.runs.plots import curve_figure

    sampled = [(manifest, run) for folder, manifest in models for run in _runs(folder) if run.manifest.method in SAMPLED]
    if not sampled:
        return None
    usual = Counter(run.manifest.parameters.get("n") for _, run in sampled).most_common(1)[0][0]
    with_usual = {manifest.id for manifest, run in sampled if run.manifest.parameters.get("n") == usual}
    chosen = [
        (manifest, run) for manifest, run in sampled if manifest.id not in with_usual or run.manifest.parameters.get("n") == usual
    ]
    names = [manifest.id.partition(".")[2] for manifest, _ in chosen]
    models_of = {
        name: {manifest.id for (manifest, _), other in zip(chosen, names, strict=True) if other == name} for name in names
    }
    # The architecture only where two models would have one name.
    labels = [manifest.id if len(models_of[name]) > 1 else name for (manifest, _), name in zip(chosen, names, strict=True)]
    figure = curve_figure([run for _, run in chosen], labels)
    counts = " or ".join(map(str, sorted({len(run.rows) for _, run in chosen})))
    figure.axes[0].set_title(f"{data_of(chosen[0][0])}, {counts} inputs each", loc="left", fontsize=10)
    return figure


def _runs(folder: Path) -> list[Any]:
    from rsplugins.runs.run import open_run
    from rsplugins.runs.summary import summarise

    runs = [open_run(evidence.place(folder, name)) for name in evidence.names(folder)]
    return [run for run in runs if summarise(run)["guarantee"] not in ("empirical", "none")]


def _bars(manifest: Manifest, rows: Sequence[Result]) -> Figure:
    from matplotlib.figure import Figure

    from rsplugins.runs.plots import COLOURS

    figure = Figure(figsize=(7.2, 0.9 + 0.42 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    certifies = [row.guarantee is not None and row.guarantee.certifies for row in rows]
    colours = [
        COLOURS[2] if certified else COLOURS[0] if row.guarantee is None else COLOURS[1]
        for row, certified in zip(rows, certifies, strict=True)
    ]
    labels = [f"{_name(row)}\n{row.certifier or 'no attack'}, {row.images} inputs" for row in rows]
    between = [row.interval or (row.value, row.value) for row in rows]
    errors = [[row.value - low for row, (low, _) in zip(rows, between, strict=True)]]
    errors += [[high - row.value for row, (_, high) in zip(rows, between, strict=True)]]
    axes.barh(range(len(rows)), [row.value for row in rows], color=colours, xerr=errors, height=0.6)
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_title(manifest.id, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _save(path: Path, figure: Figure) -> None:
    from rsplugins.runs.plots import png

    write_whole(path, png(figure, dpi=100))
