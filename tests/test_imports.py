"""Imports point one way: what each part of the package may import of the others."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "stemgenre"
GROUND = {"settings", "setting_checks", "cli", "runtime", "files", "prefetch", "errors", "status"}
STAGES = {"data", "separation", "features", "training", "submission", "html"}
MAY_IMPORT = {  # a part, a folder or module of the package -> the others, besides the ground
    **dict.fromkeys(GROUND, set()),
    "data": set(),
    "separation": {"data"},
    "features": set(),
    "training": {"features"},  # it is given the stem cache and the clips
    "submission": {"data", "training"},
    "html": {"data.audio"},
    "predict": STAGES,
    "eda": STAGES,
    "report": STAGES,
    "demo": STAGES,
    "downloads": {"separation", "training"},
    "tracking": STAGES | {"report.metrics"},
    "app": STAGES | {"predict"},
    "__init__": {"predict"},  # the public names, imported when they are used
}


def module_files(part):
    """The files of a part of the package: a folder's, or the one module."""
    return sorted((PACKAGE / part).rglob("*.py")) or [PACKAGE / f"{part}.py"]


def imported_modules(path):
    """Full names of all modules that a file imports, those inside its functions too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import, line {node.lineno}"
            for alias in node.names:
                folder = ROOT / node.module.replace(".", "/")
                is_module = (folder / f"{alias.name}.py").is_file() or (
                    folder / alias.name
                ).is_dir()
                names.append(f"{node.module}.{alias.name}" if is_module else node.module)
    return names


def test_every_part_of_the_package_has_a_rule():
    parts = {path.stem for path in PACKAGE.glob("*.py")}
    parts |= {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))}
    assert parts <= MAY_IMPORT.keys()


@pytest.mark.parametrize(
    "part", [part for part in sorted(MAY_IMPORT) if module_files(part)[0].is_file()]
)
def test_a_part_imports_only_what_it_may(part):
    allowed = GROUND | MAY_IMPORT[part] | {part}
    wrong, files = [], module_files(part)
    assert files
    for path in files:
        for name in imported_modules(path):
            package, _, module = name.partition(".")
            if package == "stemgenre" and not any(
                f"{module}.".startswith(f"{prefix}.") for prefix in allowed
            ):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_only_scripts_import_config_and_nothing_imports_tests_or_benchmarks():
    wrong, scripts = [], sorted(ROOT.glob("*.py"))
    assert {"train.py", "config.py"} < {path.name for path in scripts}
    for path in sorted(PACKAGE.rglob("*.py")):
        top_level = {name.partition(".")[0] for name in imported_modules(path)}
        for name in top_level & {"config", "tests", "benchmarks"}:
            wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    for path in scripts:
        top_level = {name.partition(".")[0] for name in imported_modules(path)}
        for name in top_level & {"tests", "benchmarks"}:
            wrong.append(f"{path.name} imports {name}")
    assert not wrong
