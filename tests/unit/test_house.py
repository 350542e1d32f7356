"""What keeps the package extensible: no import circle, no method known by name, no long file, a list that needs no torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from routevl.methods.table import METHODS
from routevl.settings import SHARED_SETTINGS
from routevl.tasks.table import TASKS

SOURCE = Path(__file__).resolve().parents[2] / "src"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCE.rglob("*.py")
}


def imported_by(module: str) -> set[str]:
    """The modules of the package that one imports when it is imported itself."""
    found = set()
    for node in ast.parse(MODULES[module].read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found & MODULES.keys() if name != module}


def test_there_is_no_import_circle() -> None:
    assert list(TopologicalSorter({module: imported_by(module) for module in MODULES}).static_order())


def test_no_module_outside_its_folder_knows_a_method_by_name() -> None:
    names = "|".join(map(re.escape, METHODS))
    compared = re.compile(rf"""(?:==|!=|\bin\b) *[(\[{{]?["'](?:{names})["']""")
    for module, path in MODULES.items():
        if not module.startswith("routevl.methods."):
            assert not compared.search(path.read_text()), path
    for path in (SOURCE.parent / "workflow").rglob("*.smk"):
        assert not compared.search(path.read_text()), path


def test_no_file_is_long() -> None:
    assert [str(path) for path in MODULES.values() if len(path.read_text().splitlines()) > 450] == []


def test_option_names_of_methods_are_no_settings() -> None:
    from routevl.methods.table import method_class

    for name in METHODS:
        assert not {f for f in method_class(name).Options.__dataclass_fields__} & set(SHARED_SETTINGS), name


def test_the_lists_need_no_torch() -> None:
    script = (
        "import sys; import routevl.sheet, routevl.backbones.derivations, routevl.reporting; "
        "from routevl.methods.table import method_records; assert list(method_records()); "
        "heavy = {'torch', 'transformers', 'peft', 'pandas', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_task_and_method_of_the_lists_can_be_loaded() -> None:
    from routevl.tasks.table import task_class

    assert [task_class(name).__name__ for name in TASKS]
