"""Which layers each method knows, from the tables that the code reads.

python docs/scripts/layers.py            # writes docs/methods/layers.md
"""

from __future__ import annotations

from pathlib import Path

from rsplugins.aten.functions import SHAPES
from rsplugins.aten.rules import MOVING as PLACED
from rsplugins.aten.rules import RULES as INTERVALS
from rsplugins.lipschitz import activations, tables
from rsplugins.lirpa.outward import EXACT, FUNCTIONS, SUMS
from rsplugins.moments.exported import known_operators
from rsplugins.moments.rules import RULES as MOMENTS

PAGE = Path(__file__).resolve().parents[1] / "methods" / "layers.md"


def text() -> str:
    """Return the page."""
    layers = {kind.__name__ for kind in (*tables.MODULES, *activations.MODULES)}
    functions = {str(getattr(function, "__name__", function)) for function in tables.FUNCTIONS}
    return f"""# Which layers each method knows

Written by `python docs/scripts/layers.py` from the tables that the code reads; a test holds that they agree. How far that
reaches on timm and RobustBench models is in [method-rate](../method-rate.md).

## `gaussian`, `gaussian-soft`, `smooth-reduce`, `patch-cleanser`, the head of `latent`

Any layer: they run the model.

## `ibp`, `crown-ibp`, `crown`, `alpha-crown`, `sound-etb`, by auto-LiRPA

Operators of auto-LiRPA's graph whose rounding is accounted for; whether a release has bounds for them is its own affair.

{_listed({*SUMS, *EXACT, *FUNCTIONS})}

`clip`, `erf` and `hard-sigmoid` come in as built-in plugins where the release lacks them
(`rsplugins plugins list --kind bound-operator`).

## `ibp`, `crown-ibp`, `sound-etb`, where auto-LiRPA has no right bounds

Operators of torch.export's graph. Elementwise functions have an interval and two lines; products, normalisation, softmax and
attention have intervals, and `crown-ibp` carries rows through products and normalisation as well.

* with a rule: {_listed({*INTERVALS} - PLACED)}
* elementwise: {_listed(SHAPES)}
* only placing values: {_listed(PLACED)}

## `covariance`, `covariance-guided`

By auto-LiRPA's graph: {_listed(name.removeprefix("Bound") for name in MOMENTS)}

By torch.export's graph, where one of those is missing: {_listed(known_operators())}

Any other operator is linearised at the mean, and named in the certificate's assumptions.

## `lipschitz-margin`, and the encoder of `latent`

* layers: {_listed(layers)}
* functions: {_listed(functions)}
* methods of tensors: {_listed(tables.METHODS)}

Self-attention has no Lipschitz bound (Kim, Papamakarios, Mnih 2021) and is refused by name; a product of two functions of the
image has none that holds everywhere.
"""


def _listed(names: object) -> str:
    return ", ".join(f"`{name}`" for name in sorted(map(str, names), key=str.lower))  # type: ignore[call-overload]


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
