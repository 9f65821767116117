"""`pip install .` leaves what it should on a machine; strays stay out of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jobs
import pytest
import yaml
from documents import ROOT
from test_imports import imports_of


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel that was built without git's folder, as from a downloaded archive."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("ddp_mnist", "launch", "tests", "benchmarks", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    ended = jobs.run([*build, "--wheel-dir", str(folder), str(source)])
    jobs.succeeded([ended])
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "ddp_mnist").rglob("*.py")}
    others = {"ddp_mnist/py.typed", "ddp_mnist/report/page.html.j2"}
    assert {name for name in names if ".dist-info/" not in name} == ours | others
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    lines = {"Name: ddp_mnist", "License-Expression: MIT", "Description-Content-Type: text/markdown", "# ddp_mnist"}
    assert lines < {*metadata.splitlines()}


@pytest.mark.slow
def test_the_wheel_trains_where_there_is_neither_checkout_nor_git(
    wheel: Path, flags: list[str], tmp_path: Path
) -> None:
    target, elsewhere, nothing = tmp_path / "target", tmp_path / "elsewhere", tmp_path / "bin"
    elsewhere.mkdir()
    nothing.mkdir()
    install = ["install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    jobs.succeeded([jobs.run([sys.executable, "-m", "pip", *install])])
    variables = {"PYTHONPATH": str(target), "PATH": str(nothing)}
    found = jobs.run([sys.executable, "-c", "import ddp_mnist; print(ddp_mnist.__file__)"], variables, cwd=elsewhere)
    assert found.out.strip() == str(target / "ddp_mnist" / "__init__.py")
    jobs.succeeded([jobs.run([*jobs.TRAIN, *flags, "--output-dir", "run", "--pictures"], variables, cwd=elsewhere)])
    run = elsewhere / "run"
    assert jobs.read_json(run / "summary.json")["finished"] and (run / "report.html").exists()
    config = jobs.read_json(run / "config.json")
    assert (config["git"], config["versions"]["ddp_mnist"]) == (None, "0.1.0")


def test_what_is_imported_is_required_and_nothing_else() -> None:
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=!~ ]", requirement)[0] for requirement in required}
    sources = [*(ROOT / "ddp_mnist").rglob("*.py"), *(ROOT / "launch").glob("*.py")]
    imported = {word.partition(".")[0] for source in sources for word in imports_of(source)}
    foreign = imported - set(sys.stdlib_module_names) - {"ddp_mnist", "launch"}
    assert foreign == {{"pillow": "PIL"}.get(name, name) for name in names}


@pytest.mark.slow
def test_git_refuses_to_commit_data_and_weights(tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PRE_COMMIT_HOME": str(tmp_path / "cache"),
        "SKIP": "check",  # which is `make check`: it would install the package
        **{f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
        **{"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull},
    }
    repository = tmp_path / "repository"
    repository.mkdir()

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=repository, env=variables, capture_output=True, text=True)

    assert run("git", "init").returncode == 0
    shutil.copy(ROOT / ".pre-commit-config.yaml", repository)
    assert run("pre-commit", "install").returncode == 0
    names = "data/MNIST/raw/train-images-idx3-ubyte", "runs/fast/summary.json", "a/model.safetensors", "x.pt"
    for name in names:
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text("x")
    assert run("git", "add", "--force", *names).returncode == 0
    refused = run("git", "commit", "--message", "why")
    assert refused.returncode == 1
    assert all(name in refused.stderr + refused.stdout for name in names)
    run("git", "rm", "--cached", "--force", *names)
    run("git", "add", ".pre-commit-config.yaml")
    assert run("git", "commit", "--message", "why").returncode == 0


def test_the_hooks_run_make_check_and_no_tracked_file_is_large_or_refused() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local", "a hook from elsewhere needs the network"
    check, strays = repository["hooks"]
    assert (check["entry"], check["language"], check["pass_filenames"]) == ("make check", "system", False)
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    tracked = [name for name in names.split("\0") if (ROOT / name).is_file()]
    assert [name for name in tracked if re.search(strays["files"], name)] == []
    assert [name for name in tracked if (ROOT / name).stat().st_size > 512 * 1024] == []


@pytest.mark.parametrize(
    ("visible", "driver", "ranks"),
    [(None, True, 2), ("0,1,3", True, 3), ("", True, 1), ("GPU-aa", True, 1), (None, False, 1), ("0,1", False, 1)],
)
def test_make_train_starts_a_rank_for_each_gpu_that_it_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, driver: bool, ranks: int
) -> None:
    """Without a driver nvidia-smi fails, and writes why."""
    lines = "GPU 0: NVIDIA H200\nGPU 1: NVIDIA H200\n" if driver else "NVIDIA-SMI has failed\n"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{lines}'\nexit {int(not driver)}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    shown = subprocess.run(["make", "--dry-run", "train"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert f"--num_processes {ranks} " in shown and ("--multi_gpu" in shown) == (ranks > 1)
