"""Honest empirical robustness: clean, PGD and AutoAttack accuracy side by side, and signs of gradient masking.

EMPIRICAL: an attack that fails proves nothing. None of these numbers may stand beside certified ones.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import inspect
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rsplugins.attacks import pgd
from rsplugins.certificate import Certificate, Guarantee, Norm
from rsplugins.data.table import Table
from rsplugins.errors import ParameterError, PluginUnavailableError, UsageError
from rsplugins.machine.device import device_name
from rsplugins.machine.files import write_whole
from rsplugins.sampling.tuning import prefers_channels_last
from rsplugins.stopping import keeping
from rsplugins.training.files import versions
from rsplugins.training.schema import Count, Eps, Positive, Settings, Whole, plain, read

if TYPE_CHECKING:
    from rsplugins.classifier import Classifier

RECORDS, SUMMARY = "attacked.jsonl", "attack.json"
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
"""AutoAttack's standard version (Croce and Hein, ICML 2020)."""
GAP = 0.05
"""A difference between attacks above this, and beyond the sampling error, is flagged as likely gradient masking."""
SIGNIFICANCE = 0.01
"""Largest p-value of the paired test at which a difference is beyond the sampling error."""


@dataclass(frozen=True, kw_only=True)
class AttackSettings(Settings):
    """What is attacked with what.

    Attributes:
        eps: l-infinity budget, raw [0, 1] pixels.
        steps: of PGD.
        step_size: of PGD; None takes eps / 4.
        scales: factors of the logits in the scale check; a robust model's PGD accuracy does not depend on them.
        autoattack: AutoAttack's attacks, in order; empty leaves it out.
        images: how many inputs.
        stride: every how many-th input, from the first; None spreads them over the whole table, whose first ones may be all of
            one class.
        batch_size: inputs at a time; part of the result, because the attacks' coins depend on it.
        seed: of all coins.
    """

    WHERE = "attack"

    eps: Eps
    steps: Count = 20
    step_size: Positive | None = None
    scales: tuple[Positive, ...] = (0.1, 10.0, 100.0)
    autoattack: tuple[str, ...] = STANDARD
    images: Count = 1000
    stride: Count | None = None
    batch_size: Count = 250
    seed: Whole = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {*STANDARD, "apgd-dlr", "fab"}
        if unknown := [name for name in self.autoattack if name not in known]:
            raise ParameterError(f"AutoAttack has no attack {unknown[0]!r}.", fix=f"Use: {', '.join(sorted(known))}.")


@dataclass(frozen=True)
class Accuracy:
    """Shares of the attacked inputs that are still classified correctly. EMPIRICAL.

    Attributes:
        images: how many inputs.
        clean: without an attack.
        pgd: under PGD on the cross-entropy.
        scaled: under the same PGD with the logits multiplied, by factor.
        margin: under the same PGD on the margin, which no factor changes.
        autoattack: under AutoAttack, or None when it was left out.
        flags: what looks like gradient masking, in words.
        notes: differences of that size that these inputs are too few to tell from chance, in words.
    """

    images: int
    clean: float
    pgd: float
    scaled: Mapping[str, float]
    margin: float
    autoattack: float | None
    flags: Sequence[str]
    guarantee: str = str(Guarantee.EMPIRICAL)
    notes: Sequence[str] = ()


class Scaled(nn.Module):
    """A model with its logits multiplied by a factor: the same classifier, another loss surface."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        """Return factor * logits."""
        logits: Tensor = self.model(x)
        return self.factor * logits


def attack(
    model: nn.Module,
    table: Table,
    settings: AttackSettings,
    out: str | Path,
    *,
    identity: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Accuracy:
    """Attack a model on a table, a batch at a time; what is done is kept, and the same call goes on from there.

    Args:
        model: raw [0, 1] pixels to logits (B, K), put in eval mode.
        table: on the model's device.
        settings: see :class:`AttackSettings`.
        out: directory of ``attacked.jsonl`` (a line an input) and ``attack.json``.
        identity: what names model and data; a directory of another one is refused.
        progress: called with inputs done and inputs in all.

    Raises:
        UsageError: the directory belongs to another attack; with the difference.
        PluginUnavailableError: AutoAttack is wanted and not installed.
        ParameterError: too few classes for AutoAttack's targeted attacks.
    """
    stride = settings.stride or max(1, len(table) // settings.images)
    chosen = torch.arange(0, len(table), stride, device=table.labels.device)[: settings.images]
    total = len(chosen)
    directory = Path(out).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    header = json.loads(json.dumps({**asdict(settings), "images": total, "stride": stride, **(identity or {})}, default=str))
    rows = _resume(directory, header)
    model = _for_gradients(model).eval()
    wanted = settings.autoattack and len(rows) < total
    auto = _autoattack(model, settings, table.num_classes, table.labels.device) if wanted else None
    with (directory / RECORDS).open("a", encoding="utf-8") as file, keeping(lambda: _kept(directory, len(rows), total)):
        for start in range(len(rows), total, settings.batch_size):
            progress(start, total)
            index = chosen[start : start + settings.batch_size]
            images, labels = table.take(index)
            found = _attack_batch(model, images, labels, settings, auto)
            lines = [{"index": i, **{name: bool(kept[j]) for name, kept in found.items()}} for j, i in enumerate(index.tolist())]
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            rows += lines
    progress(total, total)
    result = summarise(rows, settings)
    ran = {"device": device_name(table.labels.device), "versions": {**versions(), **_attack_versions()}}
    about = {"settings": header, "ran": ran, "result": asdict(result)}
    write_whole(directory / SUMMARY, (json.dumps(about, indent=2) + "\n").encode())
    return result


def _kept(directory: Path, done: int, total: int) -> str:
    return f"{done} of {total} attacked inputs are kept in {directory}; the same command goes on there"


def attack_images(
    classifier: Classifier, images: Tensor, labels: Any, values: Mapping[str, Any], autoattack: Sequence[str] | None
) -> list[Certificate]:
    """Attack images in memory; see :func:`rsplugins.attack`.

    Args:
        classifier: the model.
        images: (N, C, H, W), raw [0, 1] pixels.
        labels: (N,) whole numbers.
        values: of :class:`AttackSettings`.
        autoattack: AutoAttack's attacks; None for the standard ones where they can run.
    """
    classes = classifier.num_classes or 0
    if autoattack is None:
        autoattack = STANDARD if has_autoattack() and classes >= 4 else ()
    settings = read(AttackSettings, {**values, "autoattack": tuple(autoattack)}, "attack")
    model, device = _for_gradients(classifier).eval(), classifier.device
    auto = _autoattack(model, settings, classes, device) if settings.autoattack else None
    function = {"sha256": classifier.fingerprint(), "dtype": "float32"}
    found: list[Certificate] = []
    for start in range(0, len(images), settings.batch_size):
        began = time.perf_counter()
        batch = images[start : start + settings.batch_size].to(device)
        truth = torch.as_tensor(labels[start : start + settings.batch_size], device=device)
        with torch.no_grad():
            predicted = classifier(batch).argmax(1).tolist()
        kept = _attack_batch(model, batch, truth, settings, auto)
        seconds = (time.perf_counter() - began) / len(batch)
        for j, prediction in enumerate(predicted):
            survived = {name: bool(right[j]) for name, right in kept.items()}
            found.append(
                Certificate(
                    index=start + j,
                    method="attack",
                    prediction=prediction,
                    radius=settings.eps if all(survived.values()) else 0.0,
                    guarantee=Guarantee.EMPIRICAL,
                    norm=Norm.LINF,
                    alpha=None,
                    samples=0,
                    seconds=seconds,
                    evidence={"survived": survived},
                    parameters=plain(settings),
                    function=function,
                    rule="attack",
                    assumptions=("survived these attacks only",),
                )
            )
    return found


def has_autoattack() -> bool:
    """Whether AutoAttack is installed, under either of its names."""
    return any(importlib.util.find_spec(name) is not None for name in ("pyautoattack", "autoattack"))


def _for_gradients(model: nn.Module) -> nn.Module:
    """Return a copy that is attacked faster: no gradients of weights, channels-last convolutions; up to twice as fast."""
    try:
        copied = copy.deepcopy(model)
    except Exception:  # a part cannot be copied: the model is attacked as it is
        return model
    copied.requires_grad_(False)
    if prefers_channels_last(copied):
        copied.to(memory_format=torch.channels_last)
    return copied


def _attack_versions() -> dict[str, str]:
    found = {}
    for name in ("pyautoattack", "autoattack"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def summarise(rows: Sequence[Mapping[str, Any]], settings: AttackSettings) -> Accuracy:
    """Return the accuracies over the records, and what they say about gradient masking."""

    def share(name: str) -> float:
        return sum(bool(row[name]) for row in rows) / max(1, len(rows))

    scaled = {f"{factor:g}": share(f"pgd x{factor:g}") for factor in settings.scales}
    pgd, margin = share("pgd"), share("margin")
    auto = share("autoattack") if settings.autoattack else None
    flags: list[str] = []
    notes: list[str] = []

    def judge(lower: str, comparisons: int, text: str) -> None:
        gap = pgd - share(lower)
        if gap <= GAP:
            return
        chance = min(1.0, comparisons * paired_p_value(rows, "pgd", lower))
        seen, counted = text.format(100 * gap), f"({round(gap * len(rows))} of {len(rows)} inputs, p = {chance:.2g})"
        if chance <= SIGNIFICANCE:
            flags.append(f"{seen}: likely gradient masking {counted}")
        else:
            notes.append(f"{seen}: too few inputs to tell that from chance {counted}; attack more")

    if auto is not None:
        judge("autoattack", 1, f"AutoAttack is {{:.1f}} points below PGD-{settings.steps}")
    rescaled = ["margin", *(f"pgd x{factor:g}" for factor in settings.scales)]
    judge(min(rescaled, key=share), len(rescaled), "PGD falls by {:.1f} points when the logits are rescaled")
    return Accuracy(len(rows), share("clean"), pgd, scaled, margin, auto, tuple(flags), notes=tuple(notes))


def paired_p_value(rows: Sequence[Mapping[str, Any]], weaker: str, stronger: str) -> float:
    """Return McNemar's exact one-sided p-value: how probable such a lead of one attack is, were both equally strong.

    Both saw the same inputs, so only those that fell to one of the two count; each is then as probably the one's as the other's.

    Example:
        >>> rows = [{"pgd": True, "autoattack": False}] * 4 + [{"pgd": True, "autoattack": True}] * 46
        >>> paired_p_value(rows, "pgd", "autoattack")
        0.0625
    """
    only_stronger = sum(bool(row[weaker]) and not row[stronger] for row in rows)
    only_weaker = sum(bool(row[stronger]) and not row[weaker] for row in rows)
    n = only_stronger + only_weaker
    return float(sum(math.comb(n, k) for k in range(only_stronger, n + 1)) / 2**n)


def _attack_batch(
    model: nn.Module, images: Tensor, labels: Tensor, settings: AttackSettings, auto: Callable[[Tensor, Tensor], Tensor] | None
) -> dict[str, Tensor]:
    """Return for each attack which inputs (B,) are still right, an input that was wrong at first being wrong throughout."""

    @torch.no_grad()
    def right(x: Tensor) -> Tensor:
        scores: Tensor = model(x)
        return scores.argmax(1) == labels

    clean = right(images)
    generator = torch.Generator(images.device).manual_seed(settings.seed)
    offset = torch.empty_like(images).uniform_(-settings.eps, settings.eps, generator=generator)

    def survives(attacked: nn.Module, objective: pgd.Objective | None = None) -> Tensor:
        step_size = settings.eps / 4 if settings.step_size is None else settings.step_size
        last, _ = pgd.pgd(
            attacked,
            images,
            labels,
            eps=settings.eps,
            step_size=step_size,
            steps=settings.steps,
            start=offset,
            objective=objective,
        )
        return clean & right(last)

    found = {"clean": clean, "pgd": survives(model), "margin": survives(model, pgd.margin(labels))}
    for factor in settings.scales:
        found[f"pgd x{factor:g}"] = survives(Scaled(model, factor))
    if auto is not None:
        found["autoattack"] = clean & right(auto(images, labels))
    return found


def check_autoattack(settings: AttackSettings, num_classes: int) -> None:
    """Check that the wanted attacks of AutoAttack can run here on a model with that many classes.

    Raises:
        PluginUnavailableError: AutoAttack is not installed.
        ParameterError: too few classes for the DLR loss.
    """
    if not settings.autoattack:
        return
    if not has_autoattack():
        raise PluginUnavailableError(
            "AutoAttack is not installed.",
            fix='pip install "pyautoattack>=0.2"; or leave it out with --autoattack none, and do not trust PGD alone.',
        )
    if num_classes < 4 and any(name in ("apgd-t", "apgd-dlr") for name in settings.autoattack):
        raise ParameterError(
            f"AutoAttack's DLR loss needs at least 4 classes; the model has {num_classes}.",
            fix="Use --autoattack apgd-ce,fab,square.",
        )


def _autoattack(
    model: nn.Module, settings: AttackSettings, num_classes: int, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    from rsplugins.compat import alias_autoattack

    check_autoattack(settings, num_classes)
    alias_autoattack()
    from autoattack import AutoAttack

    # pyautoattack and the original name it differently.
    signature = inspect.signature(AutoAttack.run_standard_evaluation)
    keyword = "batch_size" if "batch_size" in signature.parameters else "bs"
    adversary = AutoAttack(model, norm="Linf", eps=settings.eps, seed=settings.seed, version="standard", device=device)
    adversary.verbose = False
    adversary.attacks_to_run = list(settings.autoattack)
    # The standard version attacks 9 target classes; a model with fewer has fewer.
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = min(9, num_classes - 1)

    def run(images: Tensor, labels: Tensor) -> Tensor:
        result = adversary.run_standard_evaluation(images, labels, **{keyword: settings.batch_size})
        attacked: Tensor = result[0] if isinstance(result, tuple) else result
        return attacked

    return run


def _resume(directory: Path, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the records that are there, whole batches only, and write down what they belong to."""
    summary, records = directory / SUMMARY, directory / RECORDS
    if not summary.exists():
        write_whole(summary, (json.dumps({"settings": header}, indent=2) + "\n").encode())
    before = json.loads(summary.read_text(encoding="utf-8"))["settings"]
    if before != header:
        names = sorted({*before, *header})
        changed = [f"{name} {before.get(name)} -> {header.get(name)}" for name in names if before.get(name) != header.get(name)]
        raise UsageError(f"{directory} belongs to another attack: {'; '.join(changed)}.", fix="Choose another --out.")
    if not records.exists():
        return []
    lines = [line for line in records.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    size, total = header["batch_size"], header["images"]
    whole = len(lines) if len(lines) >= total else len(lines) // size * size
    write_whole(records, "".join(lines[:whole]).encode())
    return [json.loads(line) for line in lines[:whole]]
