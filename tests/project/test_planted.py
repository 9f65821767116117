"""The list of planted faults stays true: `make faults` would plant each of them, and run tests that exist."""

from __future__ import annotations

import subprocess
import sys

import planted
import pytest
from planted import FAULTS, ROOT


def test_every_fault_can_still_be_planted() -> None:
    assert len(FAULTS) >= 28
    for name, (_, _, *tests) in FAULTS.items():
        planted.plant(name)
        assert tests, name


@pytest.mark.slow
def test_every_test_that_is_named_for_a_fault_exists() -> None:
    named = sorted({test for _, _, *tests in FAULTS.values() for test in tests})
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *named]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert sorted(line for line in ended.stdout.splitlines() if "::" in line) == named


@pytest.mark.slow
def test_a_fault_that_no_test_notices_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    test = "tests/project/test_imports.py::test_arrows_point_downwards_in_no_circle_and_are_few"
    assert planted.failed(f"FAILED {test} - assert 1\nERROR tests/test_a.py::test_e - fixture\n1 failed") == {test}
    monkeypatch.setattr(planted, "FAULTS", {"harmless": ("os._exit(code)", "os._exit(int(code))", test)})
    assert planted.main([]) == 1
    printed = capsys.readouterr().out
    assert "NOT CAUGHT  harmless" in printed and printed.endswith("0 of 1 faults caught\n")
