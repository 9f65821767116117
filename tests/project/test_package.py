"""What `pip install .` leaves on a machine, and what keeps strays out of the repository."""

from __future__ import annotations

import ast
import email
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

LARGEST = 512 * 1024
"""Bytes of a file in the repository; its largest is a picture."""


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [ROOT / name for name in names.split("\0") if name]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sources alone, without git's folder, as from a downloaded archive."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    strays = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "runs", "wandb")
    shutil.copytree(
        ROOT, source, ignore=lambda path, names: {*strays(path, names), *({"data"} if path == str(ROOT) else ())}
    )
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    ended = jobs.run([*build, "--wheel-dir", str(folder), str(source)])
    assert ended.code == 0, ended.err
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "ddp_mnist").rglob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == ours | {
        "ddp_mnist/py.typed",
        "ddp_mnist/report/page.html.j2",
    }
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    said = email.message_from_string(metadata)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (said["Name"], said["Version"], said["Summary"]) == tuple(
        project[key] for key in ("name", "version", "description")
    )
    assert (said["License-Expression"], said["Author"]) == ("MIT", project["authors"][0]["name"])
    assert said["Requires-Python"] == project["requires-python"]
    assert said.get_all("Classifier") == project["classifiers"]
    assert not any(classifier.startswith("License") for classifier in project["classifiers"])
    assert said["Description-Content-Type"] == "text/markdown" and said.get_payload().startswith("# ddp_mnist\n")


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
    told = jobs.run([sys.executable, "-c", "import ddp_mnist; print(ddp_mnist.__file__)"], variables, cwd=elsewhere)
    assert told.out.strip() == str(target / "ddp_mnist" / "__init__.py")
    ended = jobs.run([*jobs.TRAIN, *flags, "--output-dir", "run", "--pictures"], variables, cwd=elsewhere)
    jobs.succeeded([ended])
    summary = jobs.read_json(elsewhere / "run" / "summary.json")
    assert summary["finished"] and (elsewhere / "run" / "report.html").exists()
    config = jobs.read_json(elsewhere / "run" / "config.json")
    assert config["git"] is None
    assert config["versions"]["ddp_mnist"] == "0.1.0"
    scored = jobs.run([sys.executable, "-m", "ddp_mnist.evaluate", "run"], variables, cwd=elsewhere)
    assert scored.code == 0, scored.err


def test_what_is_imported_is_required() -> None:
    """And the other way round: a requirement that nothing imports is not one."""
    required = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    names = {re.split(r"[<>=!~ ]", requirement)[0] for requirement in required}
    sources = [*(ROOT / "ddp_mnist").rglob("*.py"), *(ROOT / "launch").glob("*.py")]
    imported = set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source.read_text()))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(str(node.module).partition(".")[0])
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

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path / "repository", env=variables, capture_output=True, text=True)

    (tmp_path / "repository").mkdir()
    assert run("git", "init").returncode == 0
    shutil.copy(ROOT / ".pre-commit-config.yaml", tmp_path / "repository")
    installed = run("pre-commit", "install")
    assert installed.returncode == 0, installed.stdout
    for name in ("data/MNIST/raw/train-images-idx3-ubyte", "runs/fast/summary.json", "a/model.safetensors", "x.pt"):
        path = tmp_path / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        run("git", "add", "--force", name)
        refused = run("git", "commit", "--message", "why")
        assert refused.returncode == 1
        assert "data, weights and runs stay out of the repository" in refused.stderr + refused.stdout
        run("git", "rm", "--cached", "--force", name)
    run("git", "add", ".pre-commit-config.yaml")
    assert run("git", "commit", "--message", "why").returncode == 0


def test_the_hooks_are_local_and_run_what_make_check_runs() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local", "a hook from elsewhere needs the network"
    check, strays = repository["hooks"]
    assert (check["entry"], check["language"], check["pass_filenames"]) == ("make check", "system", False)
    refused = re.compile(strays["files"])
    assert [str(path) for path in tracked() if refused.search(str(path.relative_to(ROOT)))] == []


def test_no_tracked_file_is_large() -> None:
    assert {str(path): path.stat().st_size for path in tracked() if os.path.getsize(path) > LARGEST} == {}
