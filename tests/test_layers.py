"""The house has floors: imports run downward only, Ray stays where it may be, policy needs neither Ray nor torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# package -> packages it may import, itself apart
BELOW = {
    "paceline": {"deploy", "drafter_service", "verifier_service", "cluster", "modeling", "kernels"},
    "deploy": {"drafter_service", "verifier_service", "cluster", "modeling", "kernels"},
    "drafter_service": {"cluster", "modeling", "kernels"},
    "verifier_service": {"cluster", "modeling", "kernels"},
    "cluster": {"kernels"},
    "modeling": {"kernels"},
    "kernels": set(),
}

# Ray may be imported by these, and by modules that import them.
RAY = ("cluster/placement/", "cluster/api/", "deploy/")
RAY_FILES = {"drafter_service/deployment.py", "verifier_service/deployment.py", "paceline/serve.py"}

# Policy: plain Python. Folders or files; every module in them must import without torch.
POLICY = (
    "cluster/api/balance.py",
    "cluster/api/settings.py",
    "cluster/api/stops.py",
    "cluster/contracts.py",
    "cluster/errors.py",
    "cluster/handshake.py",
    "cluster/own_process.py",
    "cluster/tls.py",
    "cluster/wire.py",
    "cluster/link/answers.py",
    "cluster/link/candidates.py",
    "cluster/link/face.py",
    "cluster/link/messages.py",
    "cluster/pairing/",
    "cluster/placement/membership.py",
    "cluster/scaling/",
    "deploy/architecture.py",
    "deploy/checks.py",
    "deploy/config.py",
    "deploy/unknown_keys.py",
    "drafter_service/buckets.py",
    "drafter_service/config.py",
    "drafter_service/context.py",
    "drafter_service/sizing.py",
    "modeling/device_memory.py",
    "modeling/dflash_config.py",
    "modeling/families.py",
    "modeling/kernel_choice.py",
    "modeling/pair.py",
    "modeling/footprint.py",
    "modeling/quantized/scheme.py",
    "modeling/shards.py",
    "paceline/bench/agreement.py",
    "paceline/bench/figures.py",
    "paceline/bench/loops.py",
    "paceline/bench/percentiles.py",
    "paceline/plan/fit.py",
    "paceline/plan/gpus.py",
    "paceline/plan/memory.py",
    "paceline/plan/pool.py",
    "paceline/plan/times.py",
    "paceline/plan/timing.py",
    "paceline/simulate/virtual_time.py",
    "verifier_service/model/device/buckets.py",
    "verifier_service/model/kernel_path.py",
    "verifier_service/model/largest_steps.py",
    "verifier_service/model/latent_shape.py",
    "verifier_service/model/memory_room.py",
    "verifier_service/allowance.py",
    "verifier_service/calibration.py",
    "verifier_service/control.py",
    "verifier_service/step_costs.py",
    "verifier_service/acceptance.py",
    "verifier_service/blocks.py",
    "verifier_service/config.py",
    "verifier_service/deadlines.py",
    "verifier_service/flight.py",
    "verifier_service/health.py",
    "verifier_service/plan.py",
    "verifier_service/proposers/patience.py",
    "verifier_service/proposers/room.py",
    "verifier_service/proposers/sources.py",
    "verifier_service/block_hashes.py",
    "verifier_service/checkpoints.py",
    "verifier_service/prefill_shares.py",
    "verifier_service/prefix_cache.py",
    "verifier_service/scheduler.py",
    "verifier_service/seats.py",
    "verifier_service/sequence.py",
    "verifier_service/step_tables/",
    "verifier_service/step_watch.py",
    "verifier_service/tally.py",
    "verifier_service/validation.py",
)

# Extras that a user may not have installed.
OPTIONAL = {"dflash"}


@dataclass(frozen=True)
class Import:
    """module: dotted name. At the top level of `file`, or inside a function (lazy), or for type checkers only."""

    file: str
    line: int
    module: str
    lazy: bool

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def files() -> list[Path]:
    found = [path for package in BELOW for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(found) > len(BELOW)
    return found


def imports() -> Iterator[Import]:
    for path in files():
        yield from _imports(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8")), lazy=False)


def _imports(file: str, node: ast.AST, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(file, child.lineno, alias.name, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{file}:{child.lineno} imports relatively: name the package"
            assert child.module is not None
            yield Import(file, child.lineno, child.module, lazy)
            # `from package import module` imports the module too
            yield from (Import(file, child.lineno, f"{child.module}.{alias.name}", lazy) for alias in child.names)
        else:
            inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or _is_type_checking(child)
            yield from _imports(file, child, inside)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def may_import_ray(file: str) -> bool:
    return file.startswith(RAY) or file in RAY_FILES


def is_policy(file: str) -> bool:
    return any(file.startswith(entry) if entry.endswith("/") else file == entry for entry in POLICY)


def test_imports_run_downward_only():
    wrong = []
    for found in imports():
        own = found.file.partition("/")[0]
        if found.package in BELOW and found.package != own and found.package not in BELOW[own]:
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_nothing_in_the_house_imports_tests_or_the_recipes_of_models():
    assert [str(found) for found in imports() if found.package in ("tests", "models")] == []


def test_ray_is_named_only_where_it_may_be():
    assert [str(found) for found in imports() if found.package == "ray" and not may_import_ray(found.file)] == []


def test_package_inits_import_nothing():
    wrong = [str(found) for found in imports() if found.file.endswith("__init__.py") and found.module != "__future__"]
    assert not wrong, "\n".join(wrong)


def test_every_folder_with_modules_is_a_package():
    assert [str(path.parent) for path in files() if not (path.parent / "__init__.py").is_file()] == []


def ray_free_modules() -> list[str]:
    """Modules that must import where Ray is not installed: all but those that name Ray at the top, and their users."""
    top_level = [found for found in imports() if not found.lazy]
    tainted = {_module(found.file) for found in top_level if found.package == "ray"}
    assert all(may_import_ray(file) for file in (found.file for found in top_level if found.package == "ray"))
    grown = True
    while grown:
        users = {_module(found.file) for found in top_level if found.module in tainted and may_import_ray(found.file)}
        grown = not users <= tainted
        tainted |= users
    return [module for module in map(_module, _relative_files()) if module not in tainted]


def policy_modules() -> list[str]:
    return [_module(file) for file in _relative_files() if is_policy(file)]


def _relative_files() -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in files()]


def _module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


IMPORTER = """
import importlib, sys, traceback

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)

blocked, modules = set(sys.argv[1].split(",")), sys.argv[2:]
sys.meta_path.insert(0, Absent())
failed = False
for module in modules:
    try:
        importlib.import_module(module)
    except Exception:
        failed = True
        print(module, "does not import:", traceback.format_exc())
assert not blocked & set(sys.modules)
sys.exit(failed)
"""


def import_all(modules: list[str], without: set[str]) -> subprocess.CompletedProcess[str]:
    """Import modules in one fresh interpreter in which the packages `without` cannot be imported."""
    command = [sys.executable, "-c", IMPORTER, ",".join(sorted(without)), *modules]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def test_the_interpreter_without_a_package_notices_its_import():
    done = import_all(["cluster.wire", "json.tool", "wave"], without={"wave"})
    assert done.returncode == 1
    assert "wave does not import" in done.stdout
    assert "cluster.wire does not" not in done.stdout


@pytest.mark.slow
def test_engines_models_and_link_import_without_ray():
    modules = ray_free_modules()
    for wanted in ("verifier_service.model.runner", "cluster.link.verifier_end", "drafter_service.model"):
        assert wanted in modules
    assert "cluster.placement.gang" not in modules
    done = import_all(modules, without={"ray", *OPTIONAL})
    assert done.returncode == 0, done.stdout


def test_policy_imports_without_torch_and_ray():
    modules = policy_modules()
    assert {"cluster.contracts", "cluster.pairing.policy", "verifier_service.plan"} <= set(modules)
    done = import_all(modules, without={"torch", "ray", "transformers", "numpy"})
    assert done.returncode == 0, done.stdout


def test_every_policy_entry_is_there():
    missing = [entry for entry in POLICY if not (ROOT / entry).exists()]
    assert not missing, f"POLICY names what is not there: {missing}"
