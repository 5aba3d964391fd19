"""What the package promises as a whole: cheap imports, no circles, examples that run when pasted."""

import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

import mtl_lora

MODULES = ["mtl_lora", *(m.name for m in pkgutil.walk_packages(mtl_lora.__path__, "mtl_lora."))]


def _loaded_by(statement: str, *packages: str) -> list[str]:
    """Return which of the packages a fresh interpreter has loaded after a statement."""
    code = f"import sys; {statement}; print(*sorted({set(packages)!r} & set(sys.modules)))"
    root = Path(mtl_lora.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.mark.parametrize(
    "statement",
    [
        "import mtl_lora",
        "from mtl_lora.config import MTLLoRAConfig",
        "from mtl_lora import MTLLoRAConfig, MTLLoRAError",
    ],
)
def test_a_configuration_needs_no_torch(statement):
    heavy = ("torch", "numpy", "safetensors", "transformers", "peft", "deepspeed", "ray", "mtl_lora.model")
    assert _loaded_by(statement, *heavy) == []


def test_the_whole_package_needs_torch_and_safetensors_alone():
    frameworks = ("ray", "deepspeed", "mlflow", "pipeline", "jobs", "transformers", "peft", "webdataset")
    assert _loaded_by(f"import {', '.join(MODULES)}", "torch", "safetensors", *frameworks) == ["safetensors", "torch"]


def test_every_public_name_is_there_and_others_are_refused():
    for name in mtl_lora.__all__:
        assert getattr(mtl_lora, name) is not None
    assert set(mtl_lora.__all__) <= set(dir(mtl_lora))
    with pytest.raises(AttributeError, match="no attribute 'paramter_groups'"):
        _ = mtl_lora.paramter_groups


def test_no_module_reaches_itself_by_imports_not_even_for_types():
    graph = grimp.build_graph("mtl_lora", cache_dir=None)
    submodules = sorted(graph.modules - {"mtl_lora", "mtl_lora.baselines"})  # packages only gather names
    assert {name for name in submodules if name in graph.find_upstream_modules(name)} == set()
    reached = {a: graph.find_upstream_modules(a) for a in submodules}
    assert [(a, b) for a in submodules for b in reached[a] if a in reached.get(b, ())] == []


@pytest.mark.parametrize("name", MODULES)
def test_every_example_runs_when_pasted(name):
    module = importlib.import_module(name)
    tests = doctest.DocTestFinder(exclude_empty=True).find(module, globs={})  # nothing but what it imports itself
    results = [doctest.DocTestRunner(verbose=False).run(test, clear_globs=False) for test in tests if test.examples]
    assert sum(result.failed for result in results) == 0
