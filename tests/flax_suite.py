"""Runs Flax's own tests of BatchNorm with jbn's classes in the place of Flax's.

    python -m tests.flax_suite                 # the test files that are about BatchNorm
    python -m tests.flax_suite --all           # every test file that mentions it
    python -m tests.flax_suite -k batch_norm   # further arguments go to pytest

The tests come from the source distribution of the installed version of Flax, which pip downloads.
A test that fails with Flax's own class as well says nothing about jbn and is reported apart.
"""

import argparse
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile

ABOUT = ("tests/linen/linen_test.py::NormalizationTest", "tests/nnx/nn/normalization_test.py")
PLUGIN = """
import flax.linen, flax.nnx, jbn.linen, jbn.nnx
flax.linen.BatchNorm = jbn.linen.BatchNorm
flax.nnx.BatchNorm = jbn.nnx.BatchNorm
"""
ROOT = pathlib.Path(__file__).parent.parent


def source_of_flax(folder: pathlib.Path) -> pathlib.Path:
    """Downloads and unpacks Flax's source distribution; returns its top folder."""
    version = importlib.metadata.version("flax")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=flax"]
    subprocess.run([*pip, f"--dest={folder}", f"flax=={version}"], check=True)
    with tarfile.open(next(folder.glob("flax-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"flax-{version}"


def mentions(source: pathlib.Path) -> list[str]:
    """Returns the test files that use a BatchNorm."""
    files = sorted((source / "tests").rglob("*_test.py"))
    return [
        str(f.relative_to(source)) for f in files if re.search(r"nnx?\.BatchNorm", f.read_text())
    ]


def run(source: pathlib.Path, tests: list[str], plugin: bool) -> set[str]:
    """Runs the tests, from a copy of Flax that is not on the path; returns those that failed."""
    (source / "in_place_of_flax.py").write_text(PLUGIN if plugin else "")
    # Flax's tests must import the installed flax, not the folder they were unpacked beside.
    (source / "flax").exists() and (source / "flax").rename(source / "flax_source")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "in_place_of_flax"]
    env = os.environ | {"PYTHONPATH": f"{source}{os.pathsep}{ROOT}"}
    out = subprocess.run(
        [*command, "-p", "no:cacheprovider", *tests],
        cwd=source,
        env=env,
        capture_output=True,
        text=True,
    ).stdout
    print("\n".join(out.splitlines()[-40:]))
    if not re.search(r"\d+ passed", out):
        raise SystemExit("no test of Flax's passed: nothing was compared")
    return set(re.findall(r"^(?:FAILED|ERROR) (\S+)", out, re.MULTILINE))


def main() -> None:
    """Exits with 1 if a test passes with Flax's class and fails with jbn's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every file that mentions BatchNorm")
    args, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        source = source_of_flax(pathlib.Path(folder))
        tests = mentions(source) if args.all else list(ABOUT)
        failed = run(source, [*tests, *rest], plugin=True)
        if failed:
            print(f"\n{len(failed)} failed with jbn's classes; now with Flax's own:")
            failed -= run(source, [*sorted(failed)], plugin=False) if failed else set()
    for test in sorted(failed):
        print(f"fails with jbn's class only: {test}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
