"""What is installed: the locks keep up with what is asked for and with what is imported, and name no place."""

import ast
import re
import subprocess
import sys
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[1]
WANTED = sorted([*PROJECT.glob("requirements*.in"), *PROJECT.glob("examples/requirements/*.in")])
LOCKS = [path.with_suffix(".txt") for path in WANTED]
PYTHONS = ("3.11.0", "3.12.0", "3.13.0", "3.14.0")
UNSAFE = (
    "\n# The following packages are considered to be unsafe in a requirements file:\n"  # pip-tools' words on setuptools
)
PIN = re.compile(r"(?P<name>[\w.-]+)==(?P<version>\S+)(?P<hashes>(?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")


def names_of(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(PROJECT)) for path in paths]


def wanted(path: Path) -> tuple[dict[str, Requirement], list[Path]]:
    """The packages that a *.in file asks for, by name, and the locks that it must agree with."""
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    constraints = [(path.parent / line.removeprefix("-c ")).resolve() for line in lines if line.startswith("-c ")]
    packages = [Requirement(line) for line in lines if line and not line.startswith("-c ")]
    return {canonicalize_name(package.name): package for package in packages}, constraints


def pins(path: Path) -> dict[str, str]:
    return {match["name"]: match["version"] for match in PIN.finditer(path.read_text())}


def asked_for(path: Path) -> set[str]:
    """The packages in a lock of which it says that the *.in file beside it asks for them."""
    source = re.escape(path.with_suffix(".in").relative_to(PROJECT).as_posix())
    return {
        match["name"]
        for match in re.finditer(PIN.pattern + r"(?P<via>(?:    #.*\n)+)", path.read_text())
        if re.search(rf"-r {source}$", match["via"], re.MULTILINE)
    }


def test_every_lock_belongs_to_a_list() -> None:
    """No *.txt is left behind by a *.in that has gone, and none is missing."""
    found = [*PROJECT.glob("requirements*.txt"), *PROJECT.glob("examples/requirements/*.txt")]
    assert names_of(sorted(found)) == names_of(LOCKS)


@pytest.mark.parametrize("path", WANTED, ids=names_of(WANTED))
def test_a_lock_keeps_up_with_its_list(path: Path) -> None:
    """It pins what the list asks for and no more, in versions that the list and its constraints allow."""
    packages, constraints = wanted(path)
    lock = path.with_suffix(".txt")
    pinned = pins(lock)
    assert asked_for(lock) == set(packages), "run make lock"
    assert {name for name, package in packages.items() if not package.specifier.contains(pinned[name])} == set()
    for constraint in constraints:
        other = pins(constraint)
        assert {name: version for name, version in pinned.items() if other.get(name, version) != version} == {}


@pytest.mark.parametrize("path", LOCKS, ids=names_of(LOCKS))
def test_a_lock_is_exact_and_hashed_and_names_no_place(path: Path) -> None:
    """It holds pins with hashes and the reasons for them: no option, no address of an index, no path on a machine."""
    rest = PIN.sub("", path.read_text()).replace(UNSAFE, "")
    reason = r"(-[rc] \w[\w./-]+|\w[\w.-]*(\[[\w,-]+\])?)"
    assert [line for line in rest.splitlines() if not re.fullmatch(rf"    # (via( {reason})?|  {reason})", line)] == []


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("environment", [".venv", ".venv-examples"])
def test_what_is_installed_suits_every_python(environment: str, python: str) -> None:
    """No pin refuses it, not even its first patch release, and no package needs another one there, not pinned."""
    folders = [str(path) for path in PROJECT.glob(f"{environment}/lib/python3*/site-packages")]
    packages = list(distributions(path=folders))
    installed = {canonicalize_name(package.name) for package in packages}
    assert len(installed) > 1, "run make setup examples"
    there = {"python_version": python.rpartition(".")[0], "python_full_version": python, "extra": ""}
    faults = []
    for package in packages:
        metadata = package.metadata
        if "Requires-Python" in metadata and python not in SpecifierSet(metadata["Requires-Python"]):
            faults.append(f"{package.name} refuses it")
        needs = [Requirement(need) for need in package.requires or ()]
        names = [need.name for need in needs if need.marker is None or need.marker.evaluate(there)]
        faults += [f"{package.name} needs {name}" for name in names if canonicalize_name(name) not in installed]
    assert faults == []


def test_what_is_imported_is_what_is_installed() -> None:
    """The service imports every package of requirements.in, and no other."""
    imported = set()
    for path in [PROJECT / "gunicorn.conf.py", *PROJECT.glob("inference_api/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import(names=names):
                    imported |= {alias.name for alias in names}
                case ast.ImportFrom(module=str(module), level=0):
                    imported.add(module)
                case ast.Call(func=ast.Attribute(attr="find_spec"), args=[ast.Constant(value=str(module))]):
                    imported.add(module)
    modules = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names - {"inference_api"}
    distributions = packages_distributions()
    packages = {canonicalize_name(distribution) for module in modules for distribution in distributions[module]}
    assert packages == set(wanted(PROJECT / "requirements.in")[0])


@pytest.mark.parametrize("dockerfile", ["Dockerfile", "examples/Dockerfile"])
def test_a_dockerfile_follows_the_rules(dockerfile: str) -> None:
    """hadolint finds nothing in it."""
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, dockerfile], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
