from __future__ import annotations

import dataclasses
import inspect
import textwrap

import pytest

import rsplugins
from rsplugins.host import BoundOperatorDescriptor, CertifierDescriptor, DatasetDescriptor, Descriptor
from rsplugins.host.hookspecs import RETURNS, HookSpecs
from rsplugins.host.manager import KINDS
from rsplugins.host.requirements import install_line, missing_text, unmet

SPECS = [name for name, value in vars(HookSpecs).items() if inspect.isfunction(value)]


def test_every_hook_has_a_return_type_and_takes_nothing():
    assert set(RETURNS) == set(SPECS)
    assert all(list(inspect.signature(getattr(HookSpecs, name)).parameters) == ["self"] for name in SPECS)
    assert len(set(KINDS)) == len(KINDS) == len(SPECS) + 1


@pytest.mark.parametrize("name", SPECS)
def test_the_example_in_each_hooks_docstring_runs(name):
    before, marker, example = inspect.getdoc(getattr(HookSpecs, name)).partition("Example::\n")
    assert before.strip()
    assert marker
    room = {"rsplugins": rsplugins}
    exec(textwrap.dedent(example), room)
    descriptors = room[name]()
    assert descriptors
    assert all(type(descriptor) is RETURNS[name] for descriptor in descriptors)


CERTIFIER = CertifierDescriptor(name="x", summary="s", factory="a:b", claim="a:c", norms=(rsplugins.Norm.L2,))
OPERATOR = BoundOperatorDescriptor(name="x", summary="s", factory="a.b:C.d", operator="onnx::Gemm")


@pytest.mark.parametrize(
    ("good", "field", "value"),
    [
        (CERTIFIER, "name", "X"),
        (CERTIFIER, "name", "-x"),
        (CERTIFIER, "name", "x\n"),
        (CERTIFIER, "name", None),
        (CERTIFIER, "summary", " "),
        (CERTIFIER, "summary", "two\nlines"),
        (CERTIFIER, "factory", "module"),
        (CERTIFIER, "factory", "module:1"),
        (CERTIFIER, "requires", "auto-LiRPA"),
        (CERTIFIER, "requires", (1,)),
        (CERTIFIER, "guarantee", "probabilistic"),
        (CERTIFIER, "norms", ()),
        (CERTIFIER, "norms", ("l2",)),
        (CERTIFIER, "claim", ""),
        (OPERATOR, "operator", "Gemm"),
        (OPERATOR, "guarantee", None),
    ],
)
def test_a_malformed_field_is_named(good, field, value):
    with pytest.raises(ValueError, match=rf"{type(good).__name__}.{field} is .*; expected "):
        dataclasses.replace(good, **{field: value})


def test_descriptors_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CERTIFIER.name = "y"
    assert isinstance(DatasetDescriptor(name="x", summary="s", factory="a:b"), Descriptor)


@pytest.mark.parametrize(
    ("requires", "line"),
    [
        (("no-such-dist>=1.2",), "pip install 'no-such-dist>=1.2'"),
        (("no-such-dist", "No_Such[b,a]==1"), "pip install no-such-dist 'No_Such[a,b]==1'"),
        (("robustbench>=99",), "pip install 'rsplugins[robustbench]'"),
        (("setuptools>=999", "PyAutoAttack>=99"), "pip install 'rsplugins[robustbench]'"),
        (("av>=999",), "pip install 'rsplugins[video]'"),
        (("auto_lirpa>=99",), "pip install --no-deps 'auto_lirpa>=99' appdirs setuptools"),
        (
            ("auto-LiRPA>=99", "no-such-dist"),
            "pip install no-such-dist && pip install --no-deps 'auto-LiRPA>=99' appdirs setuptools",
        ),
        (("no-such @ https://example.org/x.whl",), "pip install 'no-such @ https://example.org/x.whl'"),
    ],
)
def test_the_line_that_installs_what_is_missing(requires, line):
    needs = unmet(requires)
    assert len(needs) == len(requires)
    assert install_line(needs) == line


def test_what_counts_as_missing(install):
    site = install("present", "", version="2.0.0rc1")
    assert site.exists()
    requires = ("present>=1", "Present<3", "present>=2.0.0", "absent", "absent; python_version < '3'")
    needs = unmet(requires)
    assert [str(need) for need in needs] == ["present>=2.0.0", "absent"]
    assert missing_text(needs) == "present>=2.0.0 is needed, but 2.0.0rc1 is installed; absent is not installed"
    assert unmet(()) == []
