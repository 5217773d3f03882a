"""A module imports only from the layers above its own (LAYERS, top first); no file has a name that says nothing."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "autoreid"
LAYERS = [
    {"version", "errors", "options"},
    {"genotype", "space", "runs", "recipe", "protocols", "parallel"},
    {"ops", "losses", "ranking", "rerank", "metrics", "cost", "data", "tracking",
     "averaging"},
    {"cell", "compression", "heads", "backbones", "augment", "pictures", "loading", "evaluate", "ranked", "swag"},
    {"supernet", "network", "pretrained", "studies", "runtimes"},
    {"search", "train"},
    {"tune", "sweep", "anytime", "compress", "export", "compare", "density", "index", "neighbours"},
    {"plots", "plots_anytime", "plots_compress", "plots_index", "report", "nni_bridge"},
    {"demo"},
    {"cli_parts", "cli_deploy", "cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# within a layer, what a later module of the same row may read of an earlier one
SAME_LAYER = {("space", "genotype"), ("recipe", "runs"), ("options", "errors"), ("errors", "version"),
              ("metrics", "ranking"), ("metrics", "rerank"), ("loading", "augment"), ("loading", "pictures"),
              ("evaluate", "loading"), ("report", "plots"), ("plots_anytime", "plots"), ("plots_compress", "plots"),
              ("plots_index", "plots"), ("__main__", "cli"),
              ("heads", "compression"), ("compress", "neighbours"), ("index", "neighbours"),
              ("cli_deploy", "cli_parts"), ("cli", "cli_parts"), ("cli", "cli_deploy")}
EMPTY_WORDS = {"utils", "helpers", "common", "base", "engine", "manager", "registry"}


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str):
    """The autoreid modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError("relative import: name the module in full, so that grep finds it")
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "autoreid" and len(parts) > 1 and parts[1] != "__version__":
                yield parts[1]


def faults(module: str, source: str) -> list[str]:
    allowed = {name for name in LEVEL if LEVEL[name] < LEVEL[module] or (module, name) in SAME_LAYER} | {module}
    return [f"{module} imports {name}" for name in imports(source) if name not in allowed]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_up_only(path):
    assert module_of(path) in LEVEL, f"{path.name} has no layer: add it to LAYERS"
    assert not faults(module_of(path), path.read_text())
    assert path.stem not in EMPTY_WORDS


def test_a_planted_fault_is_found():
    assert faults("genotype", "from autoreid.search import search") == ["genotype imports search"]
    assert faults("ops", "def f():\n    import autoreid.cell\n") == ["ops imports cell"]
    assert not faults("search", "from autoreid.supernet import Supernet")


def test_values_need_no_torch_and_only_one_file_imports_nni():
    for name in ("errors", "options", "genotype", "space", "runs", "recipe"):
        top = ast.parse((PACKAGE / f"{name}.py").read_text()).body
        roots = {(n.module or "") if isinstance(n, ast.ImportFrom) else a.name
                 for n in top if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
        assert not any(root.split(".")[0] in ("torch", "torchvision") for root in roots), name
    for path in FILES:
        if path.stem != "nni_bridge":
            assert "import nni" not in path.read_text(), path.name
