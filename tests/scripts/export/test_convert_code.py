"""The code that ships in a `transformers` folder is this project's own, but for the lines that import neighbours."""

import ast

import pytest

from helpers.repository import ROOT
from scripts.export.shipped import SHIPPED_CODE, TEMPLATES, files_behind, shipped_code


class WithoutOwnImports(ast.NodeTransformer):
    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
        return None if node.level or node.module.split(".")[0] == "model" else node


def stripped(text: str) -> str:
    return ast.dump(WithoutOwnImports().visit(ast.parse(text)))


@pytest.mark.parametrize("name", SHIPPED_CODE)
def test_shipped_code_is_the_projects(name):
    source, shipped = SHIPPED_CODE[name].read_text(), shipped_code(name)
    assert stripped(source) == stripped(shipped)
    pairs = list(zip(source.splitlines(), shipped.splitlines(), strict=False))
    changed = [(before, after) for before, after in pairs if before != after]
    assert all(before.startswith("from model.") and after.startswith("from .") for before, after in changed)
    for line in shipped.splitlines()[len(pairs) :]:  # for transformers 5.3
        assert not line or line.startswith("# ") or line.endswith("import __name__ as _  # noqa: E402, F401")


@pytest.mark.parametrize("name", SHIPPED_CODE)
def test_shipped_code_needs_nothing_else_of_the_project(name):
    packages = {path.name for path in ROOT.iterdir() if path.is_dir()}
    for node in ast.walk(ast.parse(shipped_code(name))):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & packages
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module.split(".")[0] not in packages
        elif isinstance(node, ast.ImportFrom):
            assert f"{node.module}.py" in SHIPPED_CODE
            asked = {alias.name for alias in node.names}
            neighbour = ast.parse(shipped_code(f"{node.module}.py"))
            assert asked <= defined_names(neighbour) | {"__name__"}


def defined_names(tree: ast.Module) -> set[str]:
    names = {node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return names | {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}


def test_only_code_that_the_model_needs_ships():
    names = set(files_behind("processing_minimind_vlm.py", "modeling_minimind_vlm.py"))
    assert set(SHIPPED_CODE) - names == {"modeling_without_vision.py", "tower_folder.py", "files.py"}
    assert set(files_behind("processing_minimind_vlm.py", "modeling_without_vision.py")) == set(SHIPPED_CODE)


def test_every_template_ships():
    assert {path.name for path in TEMPLATES.glob("*.py")} == {
        p.name for p in SHIPPED_CODE.values() if p.parent == TEMPLATES
    }
