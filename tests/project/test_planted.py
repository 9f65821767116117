"""The list of planted faults stays true: `make faults` would plant each of them, and run tests that exist."""

from __future__ import annotations

import subprocess
import sys

import planted
import pytest
from planted import FAULTS, ROOT, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_still_be_planted(fault: Fault) -> None:
    path, text = planted.planted(fault)
    assert text != path.read_text()
    assert fault.tests


def test_their_names_tell_them_apart() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 13


@pytest.mark.slow
def test_every_test_that_is_named_for_a_fault_exists() -> None:
    named = sorted({test for fault in FAULTS for test in fault.tests})
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *named]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert sorted(line for line in ended.stdout.splitlines() if "::" in line) == named


def test_only_a_test_that_fails_itself_catches_anything() -> None:
    output = (
        "FAILED tests/test_a.py::test_b[c d] - assert 1\nERROR tests/test_a.py::test_e - fixture\n1 failed, 1 error"
    )
    assert planted.failed(output) == {"tests/test_a.py::test_b[c d]"}


@pytest.mark.slow
def test_a_fault_that_no_test_notices_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    test = "tests/training/test_config.py::test_what_is_default_needs_no_flag"
    monkeypatch.setattr(planted, "FAULTS", (Fault("harmless", "os._exit(code)", "os._exit(int(code))", (test,)),))
    assert planted.main([]) == 1
    told = capsys.readouterr().out
    assert f"passes or breaks: {test}" in told
    assert told.startswith("without a fault: 1 tests pass") and "NOT CAUGHT  harmless" in told
    assert told.endswith("0 of 1 faults caught\n")
