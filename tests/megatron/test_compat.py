"""Versions of Megatron-Core, and packages of the name apex."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from megatron_patch import compat

ROOT = Path(__file__).resolve().parents[2]


def is_accepted() -> bool:
    try:
        compat.require()
    except compat.MegatronVersionError:
        return False
    return True


@pytest.mark.parametrize("version", ["0.13.0", "0.13.1", "0.14.0rc3", "0.15.0", "0.16.0", "0.16.1"])
def test_versions_in_the_range_pass(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda: version)
    assert is_accepted()


@pytest.mark.parametrize("version", ["0.12.3", "0.16.2", "0.17.0", "1.0.0"])
def test_other_versions_are_named_with_the_range(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda: version)
    with pytest.raises(compat.MegatronVersionError, match=rf"megatron-core {version} .* 0\.13 to 0\.16\.1"):
        compat.require()


def test_a_feature_can_need_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda: "0.15.0")
    with pytest.raises(compat.MegatronVersionError, match=r"the server needs 0\.16 to"):
        compat.require(compat.ENGINE_SINCE, "the server")


REPORT = """
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    {first}
    from megatron.core.models import backends
    from megatron.core.transformer import transformer_block
    {last}
print(backends.HAVE_APEX, transformer_block.HAVE_APEX, backends.LNImpl.__name__)
print([str(w.message) for w in seen if "not NVIDIA's apex" in str(w.message)])
"""


def report(folder: Path, first: str = "import megatron_patch", last: str = "") -> subprocess.CompletedProcess[str]:
    """What Megatron believes about apex in a new process, with a folder of packages in front."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    code = REPORT.format(first=first, last=last)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with a package `apex` such as the package index has one."""
    (tmp_path / "apex" / "lib").mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").write_text("")
    (tmp_path / "apex" / "lib" / "__init__.py").write_text("")
    return tmp_path


def test_megatron_does_not_see_an_unrelated_apex(foreign: Path) -> None:
    done = report(foreign)
    believed, warned = done.stdout.splitlines()
    assert believed == "False False WrappedTorchNorm", done.stderr
    assert str(foreign / "apex") in warned


def test_an_unrelated_apex_that_was_taken_already_is_an_error(foreign: Path) -> None:
    done = report(foreign, first="", last="import megatron_patch")
    assert done.returncode != 0
    assert "import megatron_patch before megatron" in done.stderr


def test_nvidias_apex_is_left_alone(foreign: Path) -> None:
    (foreign / "apex" / "normalization").mkdir()
    (foreign / "apex" / "normalization" / "__init__.py").write_text("")
    (foreign / "apex" / "normalization" / "fused_layer_norm.py").write_text("FusedLayerNormAffineFunction = object\n")
    done = report(foreign)
    assert done.stdout.splitlines() == ["True True FusedLayerNorm", "[]"], done.stderr


def test_without_any_apex_nothing_is_said(tmp_path: Path) -> None:
    done = report(tmp_path)
    assert done.stdout.splitlines() == ["False False WrappedTorchNorm", "[]"], done.stderr
