"""Ten ways a plugin can be broken. Each is isolated (the others work) and explained (who, which version, why, what next)."""

from __future__ import annotations

import warnings

import pytest

from rsplugins.certifier import CertifierParameters, Execution
from rsplugins.errors import PluginError, PluginUnavailableError, RspluginsWarning
from rsplugins.host import Host, Status, guard

HEADER = "import rsplugins\n"
CERTIFIER = 'rsplugins.CertifierDescriptor(name={name}, summary="s", factory="a:b", claim="a:c", norms=(rsplugins.Norm.L2,))'

DATASET = """
@rsplugins.hookimpl
def rsplugins_datasets():
    return [rsplugins.DatasetDescriptor(name="{name}", summary="s", factory="a:b")]
"""


def _hook(body: str, signature: str = "rsplugins_certifiers()") -> str:
    return f"{HEADER}@rsplugins.hookimpl\ndef {signature}:\n    {body}\n"


# what breaks it: (source, texts of the cause, text of the next step)
BROKEN = {
    "ImportError": ("import no_such_module_at_all", ["ModuleNotFoundError", "no_such_module_at_all", "line 1"], "requires"),
    "SyntaxError": ("def broken(:\n    pass", ["SyntaxError", "broken.py, line 1"], "python -c 'import broken'"),
    "SystemExit at import": ("import sys\nsys.exit(3)", ["SystemExit: 3", "line 2"], "__main__"),
    "wrong hook signature": (
        _hook("return []", "rsplugins_certifiers(config)"),
        ["wrong signature", "rsplugins_certifiers(config)", "{'config'}"],
        "def rsplugins_certifiers():",
    ),
    "misspelt hook": (
        _hook("return []", "rsplugins_certifier()"),
        ["no hook named 'rsplugins_certifier'", "Did you mean 'rsplugins_certifiers'?"],
        "rsplugins_training_hooks",
    ),
    "misspelt hook without the mark": (
        "def rsplugins_dataset():\n    return []",
        ["no hook named 'rsplugins_dataset'", "Did you mean 'rsplugins_datasets'?"],
        "rsplugins_models",
    ),
    "misspelt prefix": (
        _hook("return []", "rsplugin_models()"),
        ["no hook named 'rsplugin_models'", "Did you mean 'rsplugins_models'?"],
        "rsplugins_models",
    ),
    "hook without the mark": (
        "def rsplugins_models():\n    return []",
        ["rsplugins_models is not marked"],
        "@rsplugins.hookimpl",
    ),
    "no hook at all": ("x = 1", ["no hook"], "rsplugins_certifiers"),
    "malformed descriptor": (
        _hook(f"return [{CERTIFIER.format(name=repr('Not A Name'))}]"),
        ["malformed descriptor", "CertifierDescriptor.name", "'Not A Name'", "broken.py, line 4"],
        "Correct that field",
    ),
    "malformed requirement": (
        _hook(f"return [{CERTIFIER.format(name=repr('x'))[:-1]}, requires=('>>> what',))]"),
        ["malformed", "requires", ">>> what"],
        "auto-LiRPA>=0.3",
    ),
    "missing field": (_hook("return [rsplugins.CertifierDescriptor(name='x')]"), ["TypeError", "summary"], "descriptors"),
    "descriptor of another hook": (
        _hook("return [rsplugins.DatasetDescriptor(name='x', summary='s', factory='a:b')]"),
        ["rsplugins_certifiers returned a list that holds DatasetDescriptor"],
        "list of CertifierDescriptor",
    ),
    "not a list": (_hook("pass"), ["rsplugins_certifiers returned NoneType, not a list"], "list of CertifierDescriptor"),
    "a generator": (_hook(f"yield {CERTIFIER.format(name=repr('x'))}"), ["returned generator"], "list of CertifierDescriptor"),
    "one name twice": (
        _hook(f"return [{CERTIFIER.format(name=repr('x'))}] * 2"),
        ["two things of kind certifier named 'x'"],
        "Rename",
    ),
    "exception in a hook": (_hook("1 / 0"), ["rsplugins_certifiers raised ZeroDivisionError", "line 4"], "nothing else"),
    "SystemExit in a hook": (_hook("raise SystemExit"), ["rsplugins_certifiers raised SystemExit"], "nothing else"),
    "newer API version": ("RSPLUGINS_API = 2\n" + _hook("return []"), ["version 2 of the plugin API"], "--upgrade rsplugins"),
    "unknown API version": ("RSPLUGINS_API = 'beta'\n" + _hook("return []"), ["version 'beta' of"], "RSPLUGINS_API = 1"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_plugin_is_isolated_and_explained(install, good, what):
    source, cause, fix = BROKEN[what]
    install("zz-fine", good("zz-fine"))
    install("broken", source)
    install("aa-fine", good("aa-fine"))
    with pytest.warns(RspluginsWarning) as caught:
        host = Host()

    [failed] = host.entries("plugin")
    assert (failed.name, failed.distribution, failed.version, failed.status) == ("broken", "broken", "1.2", Status.FAILED)
    message = str(failed.error())
    for text in ["plugin 'broken' (broken 1.2)", "likely cause:", "next step:", fix, "pip install --upgrade broken", *cause]:
        assert text in message
    assert len(caught) == 1
    assert "plugin 'broken' (broken 1.2) failed" in str(caught[0].message)

    active = {entry.name for entry in host.entries("certifier")}
    assert {"gaussian", "gaussian-soft", "aa-fine", "zz-fine"} <= active
    assert not [entry for entry in host.entries("certifier") if entry.status is Status.FAILED]
    # rolled back: pluggy no longer knows it, and none of its descriptors stayed
    assert sorted(name for name, _ in host._manager.list_name_plugin()) == [
        "aa-fine:aa-fine",
        "rsplugins:rsplugins",
        "zz-fine:zz-fine",
    ]
    assert [entry.kind for entry in host.entries() if entry.distribution == "broken"] == ["plugin"]
    with pytest.raises(PluginError, match="failed to load"):
        failed.load()


def test_roll_back_takes_the_good_hooks_of_a_broken_plugin_too(install, good):
    install("broken", good("half") + "\n@rsplugins.hookimpl\ndef rsplugins_datasets():\n    raise OSError('no')\n")
    with pytest.warns(RspluginsWarning):
        host = Host()
    assert "half" not in {entry.name for entry in host.entries()}
    assert host._manager.hook.rsplugins_datasets.get_hookimpls()[0].plugin_name == "rsplugins:rsplugins"
    assert len(host._manager.hook.rsplugins_certifiers.get_hookimpls()) == 1


def test_duplicate_name_of_two_strangers_is_unusable_and_names_both(install, good):
    install("one", good("twin", "one"), version="1.0")
    install("two", good("twin", "two") + DATASET.format(name="other"), version="2.5")
    with pytest.warns(RspluginsWarning) as caught:
        host = Host()
    twins = [entry for entry in host.entries("certifier") if entry.name == "twin"]
    assert [entry.status for entry in twins] == [Status.FAILED, Status.FAILED]
    with pytest.raises(PluginError) as raised:
        host.find("certifier", "twin").load()
    for text in ["'twin'", "one 1.0", "two 2.5", "pip uninstall one", "pip uninstall two", "RSPLUGINS_LOAD"]:
        assert text in str(raised.value)
    assert len(caught) == 2
    assert host.find("dataset", "other").status is host.find("certifier", "gaussian").status is Status.ACTIVE


def test_a_stranger_cannot_take_a_built_in_name_nor_break_it(install, good):
    install("aa-pirate", good("gaussian", "aa_pirate"), version="6.6")
    with pytest.warns(RspluginsWarning, match="aa-pirate 6.6"):
        host = Host()
    found = host.find("certifier", "gaussian")
    assert (found.status, found.distribution) == (Status.ACTIVE, "rsplugins")
    [pirate] = [entry for entry in host.entries() if entry.distribution == "aa-pirate"]
    assert pirate.status is Status.FAILED
    assert "built-in one keeps working" in pirate.reason
    assert "pip uninstall aa-pirate" in pirate.fix


def test_one_name_of_two_kinds_is_no_conflict(install, good):
    install("shared", good("shared") + DATASET.format(name="shared"))
    host = Host()
    assert host.find("certifier", "shared").status is host.find("dataset", "shared").status is Status.ACTIVE


def test_missing_optional_dependency_is_unavailable_with_the_line_that_installs_it(install, good):
    install("lab", good("lab", requires=("no-such-dist>=3,<4", "pluggy>=1", "numpy<0.1")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # unavailable is not broken: no warning
        host = Host()
    entry = host.find("certifier", "lab")
    assert entry.status is Status.UNAVAILABLE
    assert "no-such-dist<4,>=3 is not installed; numpy<0.1 is needed, but " in entry.reason
    assert entry.fix == "pip install 'no-such-dist<4,>=3' 'numpy<0.1'"
    with pytest.raises(PluginUnavailableError, match=r"certifier 'lab' \(lab 1.2\) is unavailable") as raised:
        entry.load()
    assert entry.fix in str(raised.value)
    assert host.find("certifier", "gaussian").status is Status.ACTIVE


HEAVY = """
    from rsplugins.certificate import Claim, Gathered, Guarantee, Norm
    from rsplugins.certifier import Certifier

    def claim(evidence, parameters):
        return Claim(1, 0.5, Guarantee.DETERMINISTIC, Norm.L2, None, "rule")

    class Method(Certifier):
        def gather(self, inputs):
            yield Gathered(0, {{"x": 1}}, 0, 0.0)
            {body}
"""


def test_an_exception_while_certifying_is_isolated_and_explained(install, good):
    install("lab", good("lab"), extra={"lab_heavy.py": HEAVY.format(body="raise ArithmeticError('singular')")})
    install("fine", good("fine"), extra={"fine_heavy.py": HEAVY.format(body="yield Gathered(1, {}, 0, 0.0)")})
    host = Host()
    results, errors = {}, {}
    for name in ["lab", "fine"]:
        entry = host.find("certifier", name)
        certifier = entry.load()(None, CertifierParameters(), Execution())
        try:
            with guard(entry):
                results[name] = list(certifier.gather([]))
        except PluginError as error:
            errors[name] = error
    assert [gathered.index for gathered in results["fine"]] == [0, 1]
    assert list(errors) == ["lab"]
    message = str(errors["lab"])
    for text in [
        "certifier 'lab' (lab 1.2) failed while it worked",
        "ArithmeticError: singular",
        "lab_heavy.py, line 11",
        "--upgrade lab",
    ]:
        assert text in message
    assert isinstance(errors["lab"].__cause__, ArithmeticError)
