from __future__ import annotations

import re
import subprocess
from pathlib import Path

from packaging.version import Version

import rsplugins
from rsplugins.provenance import RELEASE, source_version, version, versions


def git(folder, *words):
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    return subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True).stdout.strip()


def test_the_version_names_the_commit_and_whether_the_package_differs(tmp_path):
    (tmp_path / "rsplugins").mkdir()
    (tmp_path / "rsplugins" / "a.py").write_text("a = 1\n")
    assert source_version(tmp_path) == f"{RELEASE}+unknown"
    git(tmp_path, "init")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-m", "one")
    commit = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert source_version(tmp_path) == f"{RELEASE}+g{commit}"
    assert Version(source_version(tmp_path)) > Version(RELEASE)
    (tmp_path / "rsplugins" / "a.py").write_text("a = 2\n")
    assert source_version(tmp_path) == f"{RELEASE}+g{commit}.dirty"
    git(tmp_path, "checkout", "-q", "rsplugins")
    git(tmp_path, "tag", f"v{RELEASE}")
    assert source_version(tmp_path) == RELEASE


def test_an_unpacked_source_distribution_says_what_it_was_built_from(tmp_path):
    (tmp_path / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: rsplugins\nVersion: 0.1.0+gabc\n\n")
    assert source_version(tmp_path) == "0.1.0+gabc"


def test_there_is_one_value():
    from rsplugins.host import get_host

    assert rsplugins.__version__ == version() == versions()["rsplugins"]
    assert get_host().find("certifier", "gaussian").version == version()


def test_the_newest_release_in_the_changelog_is_the_one_that_the_version_names():
    text = (Path(__file__).parents[1] / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.M)
    assert headings[0] == ("Unreleased", "")
    assert headings[1][0] == RELEASE
    assert all(date for _, date in headings[1:])
