from __future__ import annotations

import warnings

import pytest

from rsplugins.errors import InputValueError, PluginError, RspluginsWarning, UnknownNameError, UsageError
from rsplugins.host import API_VERSION, Host, Status, get_host, guard

BROKEN = "import no_such_module_at_all"


def test_the_built_in_plugin_comes_through_the_same_door(install):
    host = Host()
    assert {entry.plugin for entry in host.entries()} == {"rsplugins"}
    assert {entry.distribution for entry in host.entries()} == {"rsplugins"}
    names = {kind: [entry.name for entry in host.entries(kind)] for kind in ("certifier", "model-source", "dataset")}
    assert names["certifier"][:2] == ["gaussian", "gaussian-soft"]
    assert {"timm", "torchvision", "robustbench", "zoo", "file"} <= set(names["model-source"])
    assert {"digits", "mnist", "fashion-mnist", "svhn", "cifar10", "cifar100", "imagenet", "places365", "folder"} <= set(
        names["dataset"]
    )


def test_the_same_module_of_two_distributions_is_registered_once(install, good):
    install("first", good("first"))
    install("second", "", value="first")
    with pytest.warns(RspluginsWarning, match=r"plugin 'second' \(second 1.2\)"):
        host = Host()
    assert host.find("certifier", "first").status is Status.ACTIVE


def test_entry_point_may_name_an_object(install):
    source = """
        import rsplugins

        RSPLUGINS_API = 1

        class Plugin:
            @rsplugins.hookimpl
            def rsplugins_datasets(self):
                return [rsplugins.DatasetDescriptor(name="xrays", summary="s", factory="a:b")]

        plugin = Plugin()
    """
    install("lab", source, value="lab:plugin")
    assert Host().find("dataset", "xrays").distribution == "lab"


def test_api_version_of_an_object_is_read_from_its_module(install):
    install("lab", "RSPLUGINS_API = 99\nclass Plugin: ...\nplugin = Plugin()", value="lab:plugin")
    with pytest.warns(RspluginsWarning, match=f"version 99 of the plugin API, and this rsplugins has version {API_VERSION}"):
        Host()


def test_an_optional_hook_of_another_version_and_an_imported_module_are_no_mistakes(install, good):
    source = (
        good("lab")
        + "\nimport rsplugins_lab\n\n@rsplugins.hookimpl(optionalhook=True)\ndef rsplugins_attacks():\n    return []\n"
    )
    install("lab", source, extra={"rsplugins_lab.py": ""})
    assert Host().find("certifier", "lab").status is Status.ACTIVE


def test_an_entry_point_to_a_module_that_does_not_exist(install):
    install("lab", "", value="lab_gone")
    with pytest.warns(RspluginsWarning):
        [failed] = Host().entries("plugin")
    assert "No module named 'lab_gone'" in failed.reason
    assert failed.fix.startswith("Correct the entry point")


def test_a_plugin_object_that_breaks_on_inspection_fails_alone(install):
    source = "class Odd:\n    def __dir__(self):\n        raise OSError('nothing to see')\nplugin = Odd()"
    install("odd", source, value="odd:plugin")
    with pytest.warns(RspluginsWarning, match="OSError: nothing to see"):
        host = Host()
    assert host.find("certifier", "gaussian").status is Status.ACTIVE


def test_metadata_without_name_or_file_do_not_hide_a_plugin(install, good):
    site = install("lab", good("lab"))
    (site / "lab-1.2.dist-info" / "METADATA").unlink()
    entry = Host().find("certifier", "lab")
    assert (entry.distribution, entry.status) == ("lab", Status.ACTIVE)


def test_strict_raises_with_the_original_chained(install):
    install("broken", BROKEN)
    with pytest.raises(PluginError, match=r"plugin 'broken' \(broken 1.2\)") as raised:
        Host(strict=True)
    assert isinstance(raised.value.__cause__.__cause__, ModuleNotFoundError)


def test_strict_raises_for_a_conflict(install, good):
    install("one", good("twin", "one"))
    install("two", good("twin", "two"))
    with pytest.raises(PluginError, match=r"claimed by one 1\.2 and by two 1\.2"):
        Host(strict=True)


def test_strict_does_not_mind_a_missing_optional_dependency(install, good):
    install("lab", good("lab", requires=("no-such-dist",)))
    assert Host(strict=True).find("certifier", "lab").status is Status.UNAVAILABLE


def test_an_interrupt_while_a_plugin_loads_ends_the_load(install):
    install("slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        Host()


def test_load_only_what_is_named(install, good):
    install("mine", good("mine"))
    install("broken", BROKEN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host = Host(only=["mine"])
        both = Host(only=["mine", "rsplugins"])
    assert [entry.name for entry in host.entries()] == ["mine"]
    assert both.entries("certifier")[0].name == "gaussian"
    assert "broken" not in {entry.name for entry in both.entries()}


def test_load_of_a_name_that_nobody_has(install, good):
    install("mine", good("mine"))
    with pytest.raises(UnknownNameError, match=r"no plugin named 'mien'\. Did you mean 'mine'") as raised:
        Host(only=["mien"])
    assert "RSPLUGINS_LOAD may name the installed plugins: mine, rsplugins" in str(raised.value)


def test_get_host_reads_the_environment_and_loads_once(install, good, monkeypatch):
    install("mine", good("mine"))
    monkeypatch.setenv("RSPLUGINS_LOAD", " mine, ")
    host = get_host()
    assert [entry.name for entry in host.entries()] == ["mine"]
    assert get_host() is host
    assert not host.strict
    get_host.cache_clear()
    monkeypatch.setenv("RSPLUGINS_STRICT", "1")
    assert get_host().strict
    install("broken", BROKEN)
    get_host.cache_clear()
    monkeypatch.setenv("RSPLUGINS_LOAD", "")
    with pytest.raises(PluginError):
        get_host()


def test_find_suggests_and_names_the_plugins_that_failed(install):
    with pytest.raises(UnknownNameError, match=r"no certifier named 'gausian'\. Did you mean 'gaussian'"):
        Host().find("certifier", "gausian")
    with pytest.raises(UnknownNameError, match=r"no kind named 'certifiers'\. Did you mean 'certifier'"):
        Host().find("certifiers", "gaussian")
    install("broken", BROKEN)
    with pytest.warns(RspluginsWarning):
        host = Host()
    with pytest.raises(UnknownNameError, match=r"belong to a plugin that failed: 'broken' \(broken 1.2\)") as raised:
        host.find("certifier", "uniform")
    assert "Use one of: " in str(raised.value)


def test_load_imports_only_when_asked_and_guards_the_import(install, good):
    heavy = {"lab_heavy.py": "class Method: ...\ndef claim(evidence, parameters): return 7"}
    install("lab", good("lab"), extra=heavy)
    install("bad", good("bad"), extra={"bad_heavy.py": "import sys\nsys.exit('bye')"})
    install("gone", good("gone"), extra={"gone_heavy.py": ""})
    host = Host()
    assert host.find("certifier", "lab").load().__name__ == "Method"
    assert host.find("certifier", "lab").load_claim()({}, {}) == 7
    with pytest.raises(
        PluginError, match=r"certifier 'bad' \(bad 1.2\) failed while its factory 'bad_heavy:Method' was imported"
    ) as raised:
        host.find("certifier", "bad").load()
    assert "SystemExit: bye" in str(raised.value)
    with pytest.raises(PluginError, match="has no attribute 'claim'"):
        host.find("certifier", "gone").load_claim()
    with pytest.raises(PluginError, match="no claim function"):
        host.find("dataset", "digits").load_claim()


def test_a_claim_is_re_read_without_the_optional_dependency(install, good):
    install("lab", good("lab", requires=("no-such-dist",)), extra={"lab_heavy.py": "def claim(evidence, parameters): return 7"})
    entry = Host().find("certifier", "lab")
    assert entry.load_claim()({}, {}) == 7
    with pytest.raises(UsageError, match="unavailable"):
        entry.load()


class Silent(Exception):  # noqa: N818
    def __str__(self):
        raise ValueError("not even this")


@pytest.mark.parametrize("error", [SystemExit(1), MemoryError(), StopIteration(), Silent()])
def test_guard_turns_anything_into_a_plugin_error(install, error):
    entry = Host().find("certifier", "gaussian")
    with (
        pytest.raises(PluginError, match=r"certifier 'gaussian' \(rsplugins \S+\) failed while it worked") as raised,
        guard(entry),
    ):
        raise error
    assert raised.value.__cause__ is error
    assert type(error).__name__ in raised.value.cause


@pytest.mark.parametrize("error", [KeyboardInterrupt(), GeneratorExit(), InputValueError("values outside [0, 1]")])
def test_guard_lets_our_errors_and_interrupts_through(install, error):
    with pytest.raises(type(error)) as raised, guard(Host().find("certifier", "gaussian")):
        raise error
    assert raised.value is error
