from __future__ import annotations

from pathlib import Path

import pytest

from mutants.run_mutants import MUTANTS, ROOT, Mutant, apply

# Not run here (each takes seconds): `make mutants` does. Here only: they still fit the code.


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_mutants_text_is_in_the_source_once_and_the_mutant_is_valid_python(mutant: Mutant, tmp_path: Path) -> None:
    copy = tmp_path / mutant.file
    copy.parent.mkdir(parents=True)
    copy.write_text((ROOT / "src" / "smolcluster" / mutant.file).read_text(encoding="utf-8"), encoding="utf-8")
    apply(mutant, tmp_path)
    compile(copy.read_text(encoding="utf-8"), str(copy), "exec")


def test_a_mutant_whose_text_is_gone_is_refused_loudly(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="occurs 0 times"):
        apply(Mutant("gone", "file.py", "x = 2", "x = 3"), tmp_path)
