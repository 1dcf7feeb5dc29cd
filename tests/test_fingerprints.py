"""The library's programs are as recorded, so that a change of a program is noticed."""

import os
import pathlib
import platform
import tomllib

import pytest

from tests import fingerprints

PYPROJECT = pathlib.Path(__file__).parent.parent / "pyproject.toml"
RECORDED = fingerprints.read()


@pytest.mark.skipif(
    os.environ.get("JBN_NATIVE", "0") not in ("", "0"), reason="recorded with XLA's own sums"
)
@pytest.mark.parametrize("name", fingerprints.PROGRAMS)
def test_a_program_is_as_recorded(name):
    version = fingerprints.version()
    if version not in RECORDED:
        pytest.skip(
            f"{fingerprints.PATH.name} has no entry for jax {version}, only for "
            f"{', '.join(RECORDED)}: `{fingerprints.COMMAND} --write` makes one"
        )
    recorded, found = RECORDED[version][name], fingerprints.fingerprint(name)
    if platform.machine() not in ("x86_64", "AMD64"):  # XLA has other rules for other processors
        recorded, found = ({k: f[k] for k in ("jaxpr", "stablehlo")} for f in (recorded, found))
    changes = fingerprints.changes(recorded, found)
    assert not changes, (
        f"the program {name!r} changed, with jax {version}: {'; '.join(changes)}. If that is meant "
        f"and no worse, record it with `{fingerprints.COMMAND} --write`, once with each of jax "
        f"{', '.join(RECORDED)}, and say why in the commit."
    )


def test_the_oldest_jax_has_an_entry():
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    (oldest,) = (d.removeprefix("jax>=") for d in project["dependencies"] if d.startswith("jax>="))
    assert oldest in RECORDED


def test_every_entry_has_every_program():
    for version, programs in RECORDED.items():
        assert list(programs) == list(fingerprints.PROGRAMS), version


def test_changes_are_found():
    old = {"jaxpr": {"all": 3, "add": 2, "mul": 1}, "bytes": {"accessed": 8}}
    new = {"jaxpr": {"all": 4, "add": 2, "sub": 2}, "collectives": {"all-reduce": 16}}
    assert fingerprints.changes(old, old) == []
    assert fingerprints.changes(old, new) == [
        "jaxpr all: 3 -> 4",
        "jaxpr mul: 1 -> 0",
        "jaxpr sub: 0 -> 2",
        "bytes accessed: 8 -> 0",
        "collectives all-reduce: 0 -> 16",
    ]


def test_written_entries_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "PATH", tmp_path / "fingerprints.json")
    assert fingerprints.read() == {}
    part = {"jaxpr": {"all": 1}, "collectives": {}}
    entries = {"0.2": {"a": part, "b": part}, "0.1": {"a": part}}
    fingerprints.write(entries)
    assert fingerprints.read() == entries
    assert len(fingerprints.PATH.read_text().splitlines()) == 2 + 2 * 2 + 3 * (2 + 2)
