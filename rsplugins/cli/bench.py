"""``rsplugins bench``: the sampling engine beside the bare forward pass and the usual loop, on this machine."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsplugins.cli.models import load_behind
from rsplugins.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from rsplugins.classifier import Classifier
    from rsplugins.sampling.benchmark import Report


def register(app: typer.Typer) -> None:
    """Add the command ``bench`` to the application."""
    app.command("bench")(bench)


def bench(
    model: Annotated[str | None, typer.Option(help="Model reference; a ResNet-20 with random weights when left out.")] = None,
    denoiser: Annotated[str | None, typer.Option(help="Denoiser in front of the model, for noise of .25.")] = None,
    data: Annotated[str | None, typer.Option(help="Data reference; its first input is sampled.")] = None,
    input_size: Annotated[str | None, typer.Option(help="C,H,W of a random input, when there is no --data.")] = None,
    n: Annotated[int, typer.Option(min=1, help="Samples of each way and round.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="How often each way is measured, in turn.")] = 5,
    batch_size: Annotated[str, typer.Option(help="Micro-batch of the engine: a number, or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 (autocast).")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; cuda where there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Measure samples a second: bare forward pass, this engine, and the usual loop, interleaved in one run."""
    import torch

    from rsplugins.certifier import Execution
    from rsplugins.sampling.benchmark import benchmark

    classifier = _classifier(model, denoiser, input_size, data).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    item = _item(classifier, data, input_size)
    classifier.check_images(item[None])
    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"--dtype is {dtype!r}; expected float32 or bfloat16.")
    execution = Execution(batch_size=_batch_size(batch_size), dtype="bfloat16" if dtype == "bfloat16" else "float32")
    report = benchmark(classifier, item, classifier.num_classes or 0, execution, n=n, rounds=rounds)
    if as_json:
        typer.echo(json.dumps({"model": classifier.source, **dataclasses.asdict(report)}, indent=2))
    else:
        _print(classifier.source, report)


def _classifier(model: str | None, denoiser: str | None, input_size: str | None, data: str | None) -> Classifier:
    if model is not None:
        return load_behind(model, denoiser)
    if input_size is not None or data is not None or denoiser is not None:
        raise UsageError(
            "--input-size, --data and --denoiser go with --model.", fix="Name a model, such as --model timm:resnet18."
        )
    import torch

    from rsplugins.classifier import wrap
    from rsplugins.models.architectures import resnet20

    torch.manual_seed(0)
    return wrap(resnet20(), mean=0.5, std=0.25, input_size=(3, 32, 32), source="resnet20, random weights")


def _item(classifier: Classifier, data: str | None, input_size: str | None) -> Tensor:
    import torch

    if data is not None:
        from rsplugins.data import load

        image: Any = load(data, input_size=classifier.input_size)[0][0]
        return torch.as_tensor(image)
    size = _size(input_size) if input_size else classifier.input_size
    if size is None:
        raise UsageError("The model does not say what size it takes.", fix="Give --input-size C,H,W, or --data.")
    return torch.rand(*size, generator=torch.Generator().manual_seed(0))


def _size(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(side) for side in text.split(","))
    except ValueError:
        raise UsageError(f"--input-size is {text!r}; expected C,H,W, such as 3,32,32.") from None


def _batch_size(text: str) -> Any:
    if text == "auto":
        return text
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"--batch-size is {text!r}; expected auto, or a number of at least 1.")
    return int(text)


def _print(source: str, report: Report) -> None:
    setting = report.setting
    typer.echo(f"model   {source}, input {'x'.join(map(str, setting['input_size']))}, {setting['num_classes']} classes")
    typer.echo(
        f"on      {setting['device']}, {setting['threads']} threads, {setting['dtype']}, torch {setting['torch']}; "
        f"medians of {setting['rounds']} interleaved rounds of {setting['samples']} samples"
    )
    typer.echo(f"\n{'':<18}{'samples/s':>10}{'best':>9}{'batch':>7}  layout")
    for rate in report.rates:
        typer.echo(f"{rate.name:<18}{rate.median:>10.0f}{rate.best:>9.0f}{rate.batch:>7}  {rate.layout}")
    typer.echo("")
    for label, ratio in report.ratios.items():
        typer.echo(f"{label:<22}{ratio:>6.2f}")
