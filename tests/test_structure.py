"""The shape of the house: who may import whom, a lazy front door, and rules that keep checkpoints loadable."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import armm

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("armm", "tokenizers_visual", "pipelines")

# Room -> module prefixes; the longest prefix that matches a module names its room.
ROOMS = {
    "front": ("armm",),
    "leaf": ("armm.version", "armm.weights", "armm.hub"),
    "nn": ("armm.nn",),
    "tokenizers": ("tokenizers_visual",),
    "trunk": ("armm.transformer", "armm.cache", "armm.heads", "armm.model", "armm.model_base", "armm.model_layout", "armm.condition",
              "armm.next_scale_model", "armm.next_x_model", "armm.next_scale_flow_model", "armm.masked_latent_model",
              "armm.pivot_latent_model", "armm.multimodal_model"),  # fmt: skip
    "decoding": ("armm.decoding",),
    "pruning": ("armm.pruning",),
    "explain": ("armm.explain",),
    "pipelines": ("pipelines",),
    "data": ("armm.data",),
    "training": ("armm.training",),
    "evaluation": ("armm.evaluation",),
    "convert": ("armm.convert",),
    "zoo": ("armm.zoo", "armm.zoo_entry", "armm.zoo_unified", "armm.auto"),
    "serving": ("armm.serving",),
    "cli": ("armm.cli",),
}
LOW = {"leaf", "nn", "trunk", "decoding", "tokenizers", "pruning", "explain"}
# Room -> the rooms it may import besides itself. Only the command line goes through the front door.
ALLOWED = {
    "front": {"leaf"},
    "leaf": set(),
    "nn": set(),
    "tokenizers": {"nn"},
    "trunk": {"nn"},
    "decoding": {"nn", "trunk"},
    "pruning": {"nn", "trunk", "decoding"},
    "explain": {"nn", "trunk", "decoding"},
    "pipelines": LOW,
    "data": {"leaf"},
    "evaluation": LOW | {"pipelines", "data", "zoo"},
    "training": LOW | {"pipelines", "data", "evaluation"},
    "convert": LOW | {"pipelines"},
    "zoo": LOW | {"pipelines", "convert"},
    "serving": LOW | {"pipelines", "data"},
    "cli": LOW | {"front", "serving", "pipelines", "data", "training", "evaluation", "convert", "zoo"},
}
# Third-party packages a room may not touch.
FORBIDDEN_THIRD_PARTY = {
    "nn": {"diffusers", "transformers", "timm", "accelerate", "PIL"},
    "front": {"torch", "diffusers", "transformers", "numpy"},
    "leaf": {"torch", "diffusers", "transformers", "numpy"},
}


def python_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    best, best_length = None, -1
    for room, prefixes in ROOMS.items():
        for prefix in prefixes:
            inside = module == prefix or (module.startswith(prefix + ".") and prefix != "armm")
            if inside and len(prefix) > best_length:
                best, best_length = room, len(prefix)
    return best


def is_module(name: str) -> bool:
    base = ROOT.joinpath(*name.split("."))
    return base.with_suffix(".py").is_file() or base.is_dir()


@functools.cache
def imports_of(path: Path) -> list[tuple[int, str]]:
    """Every module a file imports, lazy imports and `import_module("...")` included, as (line, module).

    Imports under `if TYPE_CHECKING` do not count: they name a type and are never run.
    """
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: list[tuple[int, str]] = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")
                anchor = anchor[: len(anchor) - node.level + 1]
                base = ".".join([*anchor, *([base] if base else [])])
            for alias in node.names:
                child = f"{base}.{alias.name}"
                found.append((node.lineno, child if base.split(".")[0] in PACKAGES and is_module(child) else base))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name == "import_module" and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return found


def test_every_module_has_a_room():
    homeless = [module_name(path) for path in python_files() if room_of(module_name(path)) is None]
    assert not homeless, f"modules without a room in tests/test_structure.py: {homeless}"


def test_import_direction():
    wrong = []
    for path in python_files():
        room = room_of(module_name(path))
        for line, target in imports_of(path):
            top = target.split(".")[0]
            where = f"{path.relative_to(ROOT)}:{line}"
            if top not in PACKAGES:
                if top in FORBIDDEN_THIRD_PARTY.get(room, ()):
                    wrong.append(f"{where}: {room} may not import {top}")
                continue
            other = room_of(target)
            if other != room and other not in ALLOWED[room]:
                wrong.append(f"{where}: {room} may not import {target} ({other})")
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_the_tests_or_the_cli():
    for path in python_files():
        if room_of(module_name(path)) == "cli":
            continue
        for line, target in imports_of(path):
            assert not target.startswith(("armm.cli", "tests")), f"{path.relative_to(ROOT)}:{line} imports {target}"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_front_door_is_lazy_and_quick():
    code = (
        "import sys, time, json; t = time.process_time(); import armm; s = time.process_time() - t;"
        "names = ('torch', 'diffusers', 'transformers', 'timm', 'accelerate', 'numpy', 'PIL');"
        "heavy = [name for name in names if name in sys.modules];"
        "print(json.dumps([s, heavy, len(dir(armm))]))"
    )
    runs = [json.loads(run_python(code)) for _ in range(3)]
    assert min(run[0] for run in runs) < 0.3, runs
    assert runs[0][1] == [], f"import armm pulls in {runs[0][1]}"
    assert runs[0][2] > 10


def test_an_unknown_name_is_answered_with_near_matches():
    with pytest.raises(AttributeError, match="did you mean .*LlamaGenPipeline"):
        armm.LlamagenPipeline  # noqa: B018
    with pytest.raises(AttributeError, match=r"dir\(armm\)"):
        armm.zzzzzzzz  # noqa: B018


@pytest.mark.parametrize("name", sorted(armm.PUBLIC_NAMES))
def test_public_name_is_importable(name):
    value = getattr(armm, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__ == armm.PUBLIC_NAMES[name], f"{name} is defined in {value.__module__}"
    assert inspect.getdoc(value), f"{name} has no docstring"


@pytest.mark.parametrize("name", armm.PUBLIC_MODULES)
def test_public_module_is_importable(name):
    assert inspect.ismodule(getattr(armm, name))


def test_component_modules_name_their_base_class():
    """diffusers finds a component's kind by looking for the base class NAME in the module that defines it."""
    from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

    for path in python_files():
        module = importlib.import_module(module_name(path))
        for value in vars(module).values():
            if not inspect.isclass(value) or value.__module__ != module.__name__ or inspect.isabstract(value):
                continue
            for base in (ModelMixin, SchedulerMixin, DiffusionPipeline):
                if issubclass(value, base):
                    found = getattr(module, base.__name__, None)
                    assert found is base, (
                        f"{module.__name__} defines {value.__name__} but does not import {base.__name__}"
                    )


def test_component_configs_have_no_variadic_arguments():
    """`@register_to_config` stores a **kwargs slot as a type object, which cannot be saved."""
    from diffusers import ConfigMixin, DiffusionPipeline

    for path in python_files():
        module = importlib.import_module(module_name(path))
        for value in vars(module).values():
            if not inspect.isclass(value) or value.__module__ != module.__name__:
                continue
            if issubclass(value, ConfigMixin) and not issubclass(value, DiffusionPipeline):
                for parameter in inspect.signature(value.__init__).parameters.values():
                    variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
                    assert not variadic or "__init__" not in vars(value), f"{value.__name__}.__init__ has {parameter}"


def test_no_folder_is_named_like_a_diffusers_pipeline():
    """diffusers would look inside itself for the components of a package whose folder it has too."""
    import diffusers.pipelines

    taken = {p.name for p in Path(diffusers.pipelines.__file__).parent.iterdir() if p.is_dir()} - {"__pycache__"}
    ours = {path.parent.name for path in python_files()}
    assert not ours & taken, ours & taken


def test_files_are_short():
    long = {str(p.relative_to(ROOT)): n for p in python_files() if (n := len(p.read_text("utf-8").splitlines())) > 500}
    assert not long, f"files over 500 lines: {long}"


def test_only_the_cli_prints():
    for path in python_files():
        if room_of(module_name(path)) == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                raise AssertionError(f"{path.relative_to(ROOT)}:{node.lineno} prints; use logging")


def test_tracked_files_stay_small():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        files = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        files = [p for folder in (*PACKAGES, "weights", "tests", "docs") for p in (ROOT / folder).rglob("*")]
    total = sum(path.stat().st_size for path in files if path.is_file())
    assert total < 56 * 2**20, f"tracked files add up to {total / 2**20:.1f} MiB"
