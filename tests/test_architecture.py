"""Rules for all files: who imports whom, sizes, annotations, nothing unsafe, nothing private."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from helpers.repository import ROOT, python_files, top_of, tracked_files
from trainer.config import StageConfig

# What a stage is told and what learns: so that nothing of it is restated.
TOLD = ("trainer.config", "trainer.optim", "trainer.train_llm", "trainer.train_pretrain_vlm", "trainer.train_sft_vlm")
MAY_IMPORT = {
    "model": ("model",),
    "dataset": ("dataset", "model"),
    "trainer": ("trainer", "dataset", "model"),
    "scripts": ("scripts", "dataset", "model", *TOLD),
    "eval_vlm": ("scripts", "dataset", "model", *TOLD),
    "web_demo": ("scripts", "dataset", "model", *TOLD),
}
OURS = {*MAY_IMPORT, "tests"}
MOST_LINES, MOST_LINES_OF_A_STAGE = 400, 39
FORBIDDEN_CALLS = {"pickle.load", "pickle.loads", "yaml.load", "eval", "exec", "os.system"}
FORBIDDEN_KEYWORDS = {"shell", "trust_remote_code"}
# The proof of a conversion runs the code that the conversion has written a moment before, and nobody else's.
# A table of mapped files is mapped anew by way of a copy, which the same line has made.
ALLOWED_CALLS = {
    ("scripts/export/proof.py", "trust_remote_code=own_code"),
    ("dataset/readers/hub_rows.py", "pickle.loads"),
}
# Machine paths and package indexes; brackets in the middle, or this line would be the first to break its rule.
PRIVATE = re.compile(r"/(work|root)[/]|--(extra-)?index[-]url|trusted[-]host|:[/]{2}\S+/simple\b")


def at(path: Path, node: ast.AST | int) -> str:
    return f"{path.relative_to(ROOT)}:{node if isinstance(node, int) else node.lineno}"


def imports_of(tree: ast.AST, own: str) -> list[tuple[int, str]]:
    """(line, module) of every import, also of those inside functions; `from a import b` is `a.b`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = own if node.level else node.module
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def is_within(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def test_all_progress_is_told_by_one_helper():
    """Who uses tqdm itself fills log files with carriage returns."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in python_files(*MAY_IMPORT)}
    users = [
        path for path, tree in trees.items() if any(is_within(name, ("tqdm",)) for _, name in imports_of(tree, ""))
    ]
    assert [str(path.relative_to(ROOT)) for path in users] == ["model/progress.py"]


def test_git_lists_the_project():
    names = {str(path.relative_to(ROOT)) for path in tracked_files()}
    assert {"model/weights.py", "trainer/stage.py", "dataset/formats.py", "pyproject.toml"} <= names


def test_imports_run_one_way():
    wrong = []
    for path in python_files(*MAY_IMPORT):
        allowed = MAY_IMPORT[top_of(path)]
        for line, module in imports_of(ast.parse(path.read_text()), top_of(path)):
            if module.split(".")[0] in OURS and not is_within(module, allowed):
                wrong.append(f"{at(path, line)} imports {module}")
    assert not wrong


def test_no_test_module_imports_another():
    """What two of them need stands in tests/helpers; a package of tests could hide one of ours (tests/model, model)."""
    tests = python_files("tests")
    modules = {path.stem for path in tests if path.stem.startswith("test_")} | {"conftest"}
    wrong = []
    for path in tests:
        for line, module in imports_of(ast.parse(path.read_text()), ""):
            parts = module.split(".")[:2]
            if modules & set(parts) or parts[0].startswith("test_"):  # also one that is no more
                wrong.append(f"{at(path, line)} imports {module}")
    assert len(modules) > 50 and not wrong
    assert [at(path, 1) for path in tests if path.stem == "__init__"] == ["tests/helpers/__init__.py:1"]


def test_no_file_is_long():
    lengths = {path: len(path.read_text().splitlines()) for path in tracked_files() if path.suffix == ".py"}
    assert not [f"{at(path, count)}" for path, count in lengths.items() if count > MOST_LINES]
    stages = {
        path: count for path, count in lengths.items() if path.parent == ROOT / "trainer" and "train_" in path.name
    }
    assert len(stages) == 3
    assert not [at(path, count) for path, count in stages.items() if count > MOST_LINES_OF_A_STAGE]


def public_functions(tree: ast.Module) -> list[ast.FunctionDef]:
    """Functions of the module and methods of its public classes; nested functions are nobody's business."""
    holders = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]
    functions = [node for holder in holders for node in holder.body if isinstance(node, ast.FunctionDef)]
    return [function for function in functions if function.name[0] != "_"]


def missing_annotations(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    missing = [a.arg for a in named if a.annotation is None and a.arg not in ("self", "cls") and a.arg[0] != "_"]
    return missing + (["return"] if function.returns is None else [])


def test_public_functions_are_annotated():
    bare = []
    for path in python_files("model", "dataset", "trainer", "scripts"):
        for function in public_functions(ast.parse(path.read_text())):
            if missing := missing_annotations(function):
                bare.append(f"{at(path, function)} {function.name}: {', '.join(missing)}")
    assert not bare


def unsafe_calls(tree: ast.AST) -> list[tuple[int, str]]:
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        unsafe = name in FORBIDDEN_CALLS or name.split(".")[-1] == "extractall"
        unsafe |= name == "torch.load" and given.get("weights_only") != "True"
        if unsafe:
            found.append((call.lineno, name))
        options = [f"{k}={given[k]}" for k in sorted(FORBIDDEN_KEYWORDS) if given.get(k, "False") != "False"]
        found += [(call.lineno, option) for option in options]
    return found


def test_nothing_unsafe_is_called():
    files = python_files(*MAY_IMPORT)
    assert len(files) > 20
    assert not [
        f"{at(path, line)} {name}"
        for path in files
        for line, name in unsafe_calls(ast.parse(path.read_text()))
        if (path.relative_to(ROOT).as_posix(), name) not in ALLOWED_CALLS
    ]


@pytest.mark.parametrize(
    ("source", "unsafe"),
    [("torch.load(p)", True), ("torch.load(p, weights_only=False)", True), ("torch.load(p, weights_only=True)", False),
     ("pickle.load(f)", True), ("yaml.load(f)", True), ("yaml.safe_load(f)", False), ("eval(text)", True),
     ("model.eval()", False), ("run(c, shell=True)", True), ("archive.extractall()", True),
     ("from_pretrained(p, trust_remote_code=True)", True), ("def f():\n return eval('1')", True)],
)  # fmt: skip
def test_unsafe_calls_would_be_found(source, unsafe):
    assert bool(unsafe_calls(ast.parse(source))) == unsafe


@pytest.mark.parametrize(
    ("source", "missing"),
    [("def f(a: int, *rest, b=1, **others): ...", ["b", "return"]), ("def f(a) -> int: ...", ["a"]),
     ("class A:\n def forward(self, x) -> int: ...", ["x"]), ("def _f(a): ...", []),
     ("class _A:\n def f(self): ...", []), ("def f() -> None:\n def g(a): ...", [])],
)  # fmt: skip
def test_missing_annotations_would_be_found(source, missing):
    assert [name for f in public_functions(ast.parse(source)) for name in missing_annotations(f)] == missing


def test_imports_would_be_found():
    source = (
        "import trainer.loop\nfrom model import config\ndef f():\n from dataset.formats import Sample\nfrom . import x"
    )
    assert sorted(imports_of(ast.parse(source), "scripts")) == [
        (1, "trainer.loop"),
        (2, "model.config"),
        (4, "dataset.formats.Sample"),
        (5, "scripts.x"),
    ]
    assert is_within("trainer.config.ROOT", MAY_IMPORT["scripts"]) and is_within("model", MAY_IMPORT["model"])
    assert not is_within("trainer.loop", MAY_IMPORT["scripts"]) and not is_within("trainer.configs", TOLD)


@pytest.mark.parametrize("field", dataclasses.fields(StageConfig), ids=lambda field: field.name)
def test_every_flag_has_help(field):
    assert len(field.metadata["help"].split()) >= 1 and field.metadata["help"].strip()


def test_no_machine_path_or_registry_in_any_text():
    assert PRIVATE.search("pip install --index" + "-url x") and PRIVATE.search("at /root" + "/x")
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # pictures and weights
        found += [at(path, number) for number, line in enumerate(lines, 1) if PRIVATE.search(line)]
    assert not found
