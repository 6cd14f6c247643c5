"""Which part may import what. The table below is the rule; everything else here reads the source and compares."""

import ast
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "adapterbank"
# every part may use these: shapes in signatures, and the tensors they describe
COMMON = {"torch", "jaxtyping", "typing_extensions"}


@dataclass(frozen=True, kw_only=True)
class Rule:
    parts: set[str] = field(default_factory=set)
    """Other parts that this part may import."""

    third: set[str] = field(default_factory=set)
    """Third-party packages beside ``COMMON``."""

    lazy: set[str] = field(default_factory=set)
    """Parts and packages that only a function, or a type checker, may import."""

    only_in: dict[str, str] = field(default_factory=dict)
    """Package -> the one file, relative to the part, that may import it; ``"*"`` is one file of any name."""


EVERYTHING = {
    *("calibration", "peft_scaling", "peft_type", "adapters", "subspace", "codec", "bank", "tuner", "shira"),
    *("training", "runtime", "serve", "report", "demo", "errors", "peft_injection"),
}
EXTRAS = {"peft", "transformers", "accelerate", "huggingface_hub", "matplotlib", "sklearn", "scipy", "datasets"}

TABLE = {
    "errors": Rule(),
    # what both tuners do before training
    "calibration": Rule(parts={"errors"}),
    # what both tuners' layers take on
    "peft_scaling": Rule(),
    # takes back what couldn't be put in
    "peft_injection": Rule(parts={"peft_scaling"}),
    # registers our methods with PEFT
    "peft_type": Rule(parts={"errors"}, third={"peft"}),
    "adapters": Rule(
        parts={"errors"},
        third={"safetensors"},
        lazy={"peft", "huggingface_hub"},
        only_in={"peft": "*", "huggingface_hub": "*"},
    ),
    "subspace": Rule(parts={"errors"}),
    "codec": Rule(parts={"subspace", "errors"}, third={"numpy", "constriction", "zstandard"}),
    "bank": Rule(parts={"adapters", "subspace", "codec", "errors"}, third={"numpy", "safetensors"}),
    # adapters and codec too: what it trains leaves as an ordinary adapter, and gradient directions are stored packed
    "tuner": Rule(
        parts={
            "peft_type",
            "peft_injection",
            "peft_scaling",
            "calibration",
            "bank",
            "adapters",
            "subspace",
            "codec",
            "errors",
        },
        third={"peft", "transformers", "safetensors", "accelerate", "huggingface_hub"},
    ),
    "shira": Rule(
        parts={"peft_type", "peft_injection", "peft_scaling", "calibration", "adapters", "subspace", "errors"},
        third={"numpy", "safetensors", "peft", "transformers"},
        lazy={"numba"},
        only_in={"peft": "tuner", "transformers": "tuner", "peft_type": "tuner", "numba": "sampling"},
    ),
    # one loop for both tuners
    "training": Rule(parts={"tuner", "shira", "bank", "adapters", "errors"}, third={"peft", "transformers"}),
    "runtime": Rule(
        parts={"bank", "adapters", "shira", "errors"}, third={"safetensors"}, lazy={"transformers", "triton"}
    ),
    "serve": Rule(
        parts={"runtime", "bank", "adapters", "errors"},
        third={"fastapi", "pydantic", "starlette", "uvicorn"},
        lazy={"transformers", "vllm"},
    ),
    "report": Rule(parts={"bank", "subspace", "errors"}, third={"numpy", "rich"}, lazy={"matplotlib"}),
    "demo": Rule(parts=EVERYTHING | {"adapterbank"}, third={"numpy", "rich", "typer", "safetensors"} | EXTRAS),
    # starting the command must not wait for torch
    "cli": Rule(parts={"errors"}, third={"typer", "rich"}, lazy=EVERYTHING | {"adapterbank"} | EXTRAS | {"numpy"}),
    "__main__": Rule(parts={"cli"}),
    # what `import adapterbank` offers; the parts that need an extra are imported by their own name
    "adapterbank": Rule(parts={"adapters", "subspace", "codec", "bank", "shira", "runtime", "errors"}),
}


@dataclass(frozen=True)
class Import:
    part: str
    """The part that imports; ``adapterbank`` is the package's own ``__init__``."""

    file: str
    """Relative to the part's folder."""

    line: int
    target: str
    """A part, ``adapterbank`` for a name of the package itself, or a third-party package."""

    when: str
    """``always``, ``called`` (inside a function) or ``typing`` (under ``TYPE_CHECKING``)."""

    def __str__(self) -> str:
        late = " inside a function" if self.when == "called" else ""
        return f"{self.part}: {self.file} line {self.line} imports {self.target}{late}"


def imports_of(path: Path, root: Path) -> list[Import]:
    """Every import in one file except those of the standard library and of its own part, wherever it stands."""
    found = []
    inside = path.relative_to(root)
    part = inside.parts[0].removesuffix(".py")
    part = "adapterbank" if part == "__init__" else part
    package = ["adapterbank", *inside.parts[:-1]]
    own = {child.name.removesuffix(".py") for child in root.iterdir()}

    def target_of(module: str) -> str:
        first, *rest = module.split(".")
        if first != "adapterbank":
            return first
        return rest[0] if rest and rest[0] in own | set(TABLE) else "adapterbank"

    def note(node: ast.AST, module: str, when: str) -> None:
        target = target_of(module)
        if target != part and target not in sys.stdlib_module_names:
            found.append(Import(part, inside.as_posix(), node.lineno, target, when))

    def walk(node: ast.AST, when: str) -> None:
        match node:
            case ast.Import():
                for alias in node.names:
                    note(node, alias.name, when)
            case ast.ImportFrom():
                base = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                # `from adapterbank import bank` names a part, `from adapterbank import Bank` the package
                for name in [f"{module}.{a.name}" for a in node.names] if module == "adapterbank" else [module]:
                    note(node, name, when)
            case ast.Call(func=ast.Name("__import__" | "import_module") | ast.Attribute(attr="import_module")):
                if node.args and isinstance(node.args[0], ast.Constant) and not node.args[0].value.startswith("."):
                    note(node, node.args[0].value, when)
        # decorators and defaults of a function run at import time, its body doesn't
        late: list[ast.AST] = []
        then = "called" if when == "always" else when
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            late = list(node.body)
        elif isinstance(node, ast.Lambda):
            late = [node.body]
        elif isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            late, then = list(node.body), "typing"
        for child in ast.iter_child_nodes(node):
            walk(child, then if any(child is node for node in late) else when)

    walk(ast.parse(path.read_text(encoding="utf-8"), str(path)), when="always")
    return found


def breaches(root: Path) -> list[str]:
    """Every import under ``root`` that the table does not allow."""
    out = []
    users: dict[tuple[str, str], set[str]] = {}
    for path in sorted(root.rglob("*.py")):
        for found in imports_of(path, root):
            rule = TABLE.get(found.part)
            if rule is None:
                out.append(f"{found}, but the part has no row in the table")
                continue
            allowed = COMMON | rule.parts | rule.third | (rule.lazy if found.when != "always" else set())
            if found.part == "errors" or (found.part in {"cli", "__main__"} and found.when == "always"):
                allowed -= COMMON
            if found.target not in allowed:
                late = found.target in rule.lazy
                out.append(f"{found}, allowed inside a function only" if late else f"{found}, not allowed")
            if found.target in rule.only_in and found.when != "typing":
                users.setdefault((found.part, found.target), set()).add(found.file)
    for (part, target), files in users.items():
        place = TABLE[part].only_in[target]
        if place != "*":
            # a file or a folder of that name
            strays = {f for f in files if f.removeprefix(f"{part}/").split("/")[0].removesuffix(".py") != place}
            out += [f"{part}: {f} imports {target}, which only {part}/{place} may" for f in sorted(strays)]
        elif len(files) > 1:
            out.append(f"{part}: one file may import {target}, not {len(files)}: {', '.join(sorted(files))}")
    return out


def test_every_import_is_in_the_table():
    assert breaches(ROOT) == []


def test_every_part_has_a_row():
    parts = {p.name.removesuffix(".py") for p in ROOT.iterdir() if p.suffix == ".py" or any(p.glob("**/*.py"))}
    assert parts - {"__init__"} <= set(TABLE)


def test_the_table_has_no_cycle():
    # lazy imports count too: a cycle that is hidden in a function is still one
    above: dict[str, set[str]] = {part: (rule.parts | rule.lazy) & set(TABLE) - {part} for part, rule in TABLE.items()}
    while free := {part for part, needs in above.items() if not needs & set(above)}:
        above = {part: needs for part, needs in above.items() if part not in free}
    assert above == {}


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        ("subspace/fit.py", "from adapterbank.bank import Bank", "imports bank, not allowed"),
        ("subspace/fit.py", "from ..bank.store import Bank", "imports bank, not allowed"),
        ("subspace/fit.py", "from .. import bank", "imports bank, not allowed"),
        ("subspace/fit.py", "from adapterbank import Bank", "imports adapterbank, not allowed"),
        (
            "subspace/fit.py",
            "def f():\n    import safetensors.torch",
            "imports safetensors inside a function, not allowed",
        ),
        ("subspace/fit.py", "import importlib\nimportlib.import_module('numpy.linalg')", "imports numpy, not allowed"),
        ("errors.py", "import torch", "imports torch, not allowed"),
        ("adapters/live.py", "import peft", "imports peft, allowed inside a function only"),
        ("adapters/live.py", "class A:\n    import peft", "imports peft, allowed inside a function only"),
        ("adapters/live.py", "def f(x=__import__('peft')): ...", "imports peft, allowed inside a function only"),
        ("cli.py", "from adapterbank.bank import Bank", "imports bank, allowed inside a function only"),
        ("cli.py", "import torch", "imports torch, not allowed"),
        ("shira/masks.py", "import peft", "which only shira/tuner may"),
        ("runtime/op.py", "def f():\n    import peft", "imports peft inside a function, not allowed"),
        ("extra/new.py", "import torch", "has no row in the table"),
        ("__init__.py", "from adapterbank.tuner import EigenLoraConfig", "imports tuner, not allowed"),
    ],
)
def test_a_breach_is_found(tmp_path, file, source, reason):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(source)
    assert [reason in found for found in breaches(tmp_path)] == [True]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "subspace/fit.py",
            "import math\nfrom torch import Tensor\nfrom .basis import Basis\nfrom adapterbank.errors import X",
        ),
        ("adapters/live.py", "def f():\n    import peft"),
        ("adapters/live.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from peft import PeftModel"),
        ("shira/tuner/model.py", "import peft"),
        ("cli.py", "import typer\ndef fit():\n    import torch\n    from adapterbank import Bank"),
        ("demo/run.py", "import transformers\nfrom adapterbank import Bank\nfrom adapterbank.bank import store"),
    ],
)
def test_what_the_table_allows_is_not_a_breach(tmp_path, file, source):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(source)
    assert breaches(tmp_path) == []
