"""Reading checkpoints without running what is in them, and fitting them into a network."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsplugins.errors import CheckpointError, ParameterError, did_you_mean, warn
from rsplugins.models.files import check_file
from rsplugins.models.formats import check_format

State = dict[str, Tensor]

_NESTED = ("state_dict", "model_state_dict", "model", "net", "weights")
"""Where training scripts put the weights inside a checkpoint, tried in this order."""

_SECOND = re.compile(r"(^|[_.-])(ema|swa)([_.-]|$)|averaged|teacher|student|shadow|momentum_(model|encoder)", re.IGNORECASE)
"""What the second set of weights is called that training keeps beside the first, in whatever form."""

_NO_WEIGHTS = re.compile(r"optim|sched|scaler|rng|loss|criterion", re.IGNORECASE)
_SHOWN, _DEEPEST = 3, 3


def read(path: str | Path, key: str | None = None) -> State:
    """Read a state dict: safetensors, or a legacy torch file with ``weights_only=True``.

    Args:
        path: the file.
        key: which entry of a legacy checkpoint holds the weights, when it has several; ``"ema.module"`` for one inside another.

    Raises:
        CheckpointError: no such file, an HTML page, a Git LFS pointer, damaged, with code inside, or with two sets of weights
            for one network (a model and its moving average) of which none is named.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = sorted(entry.name for entry in path.iterdir() if entry.suffix in (".safetensors", ".pt", ".pth"))
        fix = f"Give the file: {path / files[0]}." if files else "Give the file, .safetensors, .pt or .pth."
        raise CheckpointError(f"{path} is a directory, not a checkpoint; it holds {', '.join(files[:5]) or 'none'}.", fix=fix)
    if not path.is_file():
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CheckpointError(f"There is no checkpoint {path}.{did_you_mean(path.name, near)}", fix="Check the path.")
    check_file(path)
    check_format(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _pick(_read_legacy(path), path, key)


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file: {error}.",
            cause="a truncated download, or another format under this name.",
            fix="Get it again; a torch file needs the suffix .pt or .pth.",
        ) from error


def _read_legacy(path: Path) -> Any:
    try:
        # Never unpickle: a checkpoint is data from elsewhere.
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message ends in advice to switch the protection off; only the name it stumbled over is passed on.
        wanted = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        if wanted is None:
            raise _unreadable(path, "it is not in torch's format") from None
        raise CheckpointError(
            f"{path} holds more than tensors ({wanted.group(1)}), and is not loaded.",
            cause="a whole model or a configuration object was saved; loading it would run code from the file.",
            fix="Where you trust it, save only the weights: torch.save(model.state_dict(), PATH), better as safetensors.",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _unreadable(path, (str(error).strip() or type(error).__name__).splitlines()[0][:200]) from error


def _unreadable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a readable torch checkpoint: {reason}.",
        cause="a truncated download, or another format under this name.",
        fix="Get it again; a safetensors file needs the suffix .safetensors.",
    )


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(entry, Tensor) for entry in value.values())


def _pick(checkpoint: Any, path: Path, key: str | None) -> State:
    if key is None and _is_state(checkpoint):
        return dict(checkpoint)
    states = dict(_states(checkpoint)) if isinstance(checkpoint, Mapping) else {}
    if key is None:
        key = next((name for name in _NESTED if name in states), None) or (next(iter(states)) if len(states) == 1 else None)
        _check_one_set(states, checkpoint, path, key)
    if key not in states:
        inside = (
            ", ".join(repr(name) for name in list(checkpoint)[:8])
            if isinstance(checkpoint, Mapping)
            else type(checkpoint).__name__
        )
        raise CheckpointError(
            f"{path} has no weights under {key!r}." if key else f"{path} has no state dict where it is usually found.",
            cause=f"the file holds: {inside}.",
            fix=f"Say which entry holds the weights: key={' or '.join(map(repr, states))}."
            if states
            else "Use a file with a state dict.",
        )
    return dict(states[key])


def _states(checkpoint: Mapping[Any, Any], before: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """Yield the state dicts inside a checkpoint, by name; those further inside with dots: ``ema.module``."""
    for name, value in checkpoint.items():
        if not isinstance(name, str) or _NO_WEIGHTS.search(name):
            continue
        if _is_state(value):
            yield f"{before}{name}", value
        elif isinstance(value, Mapping) and depth < _DEEPEST:
            # Some keep a counter beside the weights.
            inner = {key: entry for key, entry in value.items() if isinstance(entry, Tensor) and entry.dim() > 0}
            if len(inner) > 0.5 * len(value):
                yield f"{before}{name}", inner
            yield from _states(value, f"{before}{name}.", depth + 1)


def _check_one_set(states: Mapping[str, State], checkpoint: Any, path: Path, key: str | None) -> None:
    """Refuse to choose between two sets of weights of one network, such as a model and its moving average."""
    if key is None or key not in states:
        return
    chosen = states[key]
    same = {name for name, state in states.items() if name != key and _is_equal(state, chosen)}
    twins = [name for name, state in states.items() if name != key and name not in same and _is_twin(state, chosen)]
    averages = [
        str(name)
        for name, value in (checkpoint.items() if isinstance(checkpoint, Mapping) else ())
        if str(name) not in {key, *same} and _SECOND.search(str(name)) and 2 * _count(value) >= len(chosen)
    ]
    others = twins or averages
    if others:
        named = ", ".join(map(repr, dict.fromkeys([key, *others])))
        raise CheckpointError(
            f"{path} holds several sets of weights: {named}.",
            cause="training kept a second set beside the first, such as a moving average or a teacher; they are two models.",
            fix="Say which one is meant: " + " or ".join(f"key={name!r}" for name in dict.fromkeys([key, *others])) + ".",
        )


def _is_twin(one: State, other: State) -> bool:
    """Whether two states are of one network, of which one may lack the buffers."""
    shapes = [Counter(tuple(value.shape) for value in state.values() if value.dim() > 0) for state in (one, other)]
    less, more = sorted(shapes, key=Counter.total)
    return not less - more and 2 * less.total() >= more.total() > 0


def _is_equal(one: State, other: State) -> bool:
    pairs = list(zip(one.values(), other.values(), strict=False))
    return len(one) == len(other) and all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def _count(value: Any) -> int:
    """Return how many tensors with dimensions lie inside a value."""
    if isinstance(value, Tensor):
        return int(value.dim() > 0)
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_count, inner))


def own_state(module: nn.Module) -> State:
    """Return a network's state without what it says is another model's, in an attribute ``elsewhere``: prefixes of names."""
    elsewhere: tuple[str, ...] = getattr(module, "elsewhere", ())
    return {name: value for name, value in module.state_dict().items() if not name.startswith(elsewhere)}


def fit(module: nn.Module, state: Mapping[str, Tensor], source: str, match: str = "name") -> None:
    """Load a state dict into a network, all of it; half-precision weights become the network's own dtype.

    A prefix that all keys share and the network lacks (or the other way round) is taken off (or put on), and said as a warning.

    Args:
        module: the network, changed in place.
        state: names and tensors.
        source: what to call the checkpoint in errors.
        match: ``"name"``, or ``"order"``: where the names are others, the tensors are taken in the order of the file, all of
            them, each of the shape (and, where it says so, the kind: weight, bias, running_mean, running_var) of its place.
            Neighbours of one shape are told apart by the order alone.

    Raises:
        ParameterError: another ``match``.
        CheckpointError: missing or unexpected keys (the first few), or shapes that differ.
    """
    own = own_state(module)
    if match not in ("name", "order"):
        raise ParameterError(f"match is {match!r}.", fix='Use "name" or "order".')
    by_order = _in_order(state, own, source)
    state, note = _without_prefix(dict(state), own)
    if match == "order" and not set(state) & set(own):
        if by_order is None:
            raise CheckpointError(
                f"The tensors of {source} are not those of {type(module).__name__} in order, shape and kind.",
                cause="another architecture, or a safetensors file, which keeps no order.",
                fix="Name the architecture that the checkpoint was saved from, or rename the tensors.",
            )
        state, note = by_order, f"put {len(by_order)} tensors in by their order, not by name; check the clean accuracy"
    # Counters of batch normalisation do nothing in eval mode; old checkpoints lack them.
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    if missing or unexpected:
        raise CheckpointError(
            f"{source} does not fit {type(module).__name__}: {_some('missing', missing)}; {_some('unexpected', unexpected)}.",
            cause=_prefix_cause(missing, unexpected),
            fix=f'All {len(by_order)} tensors fit by order, shape and kind: give match="order".'
            if by_order is not None
            else "Name the architecture that the checkpoint was saved from, with the same arguments.",
        )
    for name, value in own.items():
        if name in state and state[name].shape != value.shape:
            raise _shape_error(module, source, name, tuple(state[name].shape), tuple(value.shape))
    module.load_state_dict(state, strict=False)
    if note:
        warn(f"{source}: {note}")


_KINDS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var", "kernel": "weight"}


def _in_order(state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> State | None:
    """Return the tensors of a file under the names of a network, by order; None where one of them does not fit its place."""

    def kind(name: str) -> str:
        leaf = name.rpartition(".")[2]
        return _KINDS.get(leaf, leaf)

    names = [name for name in own if not name.endswith("num_batches_tracked")]
    there = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    if source.endswith(".safetensors") or len(names) != len(there):
        return None
    pairs = list(zip(names, there, strict=True))
    if any(own[a].shape != there[b].shape or kind(a) != kind(b) for a, b in pairs):
        return None
    return {a: there[b] for a, b in pairs}


def _some(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {kind}{' (' if names else ''}{', '.join(names[:_SHOWN])}{more}{')' if names else ''}"


def _prefix(longer: Mapping[str, Any], shorter: Mapping[str, Any]) -> str:
    """Return the one prefix that all of ``longer`` has over names of ``shorter``, or an empty string."""
    names = {name for name in shorter if not name.endswith("num_batches_tracked")}
    if not names:
        return ""
    first = next(iter(names))
    for name in longer:
        prefix = name[: -len(first)]
        if name.endswith(f".{first}") and {n[len(prefix) :] for n in longer if n.startswith(prefix)} >= names:
            return prefix
    return ""


def _without_prefix(state: State, own: Mapping[str, Tensor]) -> tuple[State, str]:
    if set(state) & set(own):
        return state, ""
    prefix = _prefix(state, own)
    if prefix and all(name.startswith(prefix) for name in state):
        return {name[len(prefix) :]: value for name, value in state.items()}, f"took the prefix {prefix!r} off all names."
    prefix = _prefix(own, state)
    if prefix and all(name.startswith(prefix) for name in own):
        return {prefix + name: value for name, value in state.items()}, f"put the prefix {prefix!r} before all names."
    return state, ""


def _prefix_cause(missing: list[str], unexpected: list[str]) -> str:
    for short in missing[:_SHOWN]:
        for long in unexpected:
            if long.endswith(f".{short}"):
                prefix = long[: -len(short)]
                return (
                    f"the names in the file begin with {prefix!r} (DataParallel, Lightning or a wrapper), and others do not fit."
                )
    return "another architecture, or other arguments (depth, width, num_classes)."


def _shape_error(module: nn.Module, source: str, name: str, there: tuple[int, ...], here: tuple[int, ...]) -> CheckpointError:
    last = [key.rpartition(".")[0] for key in module.state_dict()][-1:]
    # The first entry that does not fit is a head only where it belongs to the last layer.
    is_head = len(there) == len(here) and there[0] != here[0] and there[1:] == here[1:] and name.rpartition(".")[0] in last
    return CheckpointError(
        f"{source} does not fit {type(module).__name__}: {name} has shape {there} in the file and {here} in the network.",
        cause=f"a head for {there[0]} classes, or another width." if is_head else "another architecture, or other arguments.",
        fix=f"Give num_classes={there[0]}." if is_head else "Name the architecture that the checkpoint was saved from.",
    )
