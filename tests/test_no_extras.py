"""The package works with its core dependencies alone.

As a script, in an environment without extras: import every module with what is there. `--block` plays such an
environment where the extras are installed.
"""

import importlib
import pkgutil
import subprocess
import sys

# the parts whose reason to exist is an extra
NEED_EXTRAS = {
    "adapterbank.demo",
    "adapterbank.peft_type",
    "adapterbank.report.plots",
    "adapterbank.serve",
    "adapterbank.shira.tuner",
    "adapterbank.training",
    "adapterbank.tuner",
}
# what the extras bring, and what that brings in turn
EXTRAS = {
    *("peft", "transformers", "accelerate", "tokenizers", "huggingface_hub", "hf_xet"),
    *("numba", "llvmlite"),
    *("matplotlib", "PIL", "sklearn", "scipy", "pandas", "datasets", "diffusers", "ray"),
    *("fastapi", "starlette", "uvicorn", "vllm", "lorashare", "vlora"),
    *("beartype", "hypothesis", "pytest"),
}


class Missing:
    """A finder that makes the extras look as if they weren't installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}: blocked, it belongs to an extra", name=name)
        return None


def import_all() -> list[str]:
    """Import every module that needs no extra and return their names."""
    package = importlib.import_module("adapterbank")
    names = ["adapterbank"]
    pending = [(package.__path__, "adapterbank.")]
    while pending:
        # not walk_packages: it imports a folder before its name can be refused
        for module in pkgutil.iter_modules(*pending.pop()):
            if module.name in NEED_EXTRAS or module.name.endswith(".__main__"):
                continue
            imported = importlib.import_module(module.name)
            names.append(module.name)
            if module.ispkg:
                pending.append((imported.__path__, f"{module.name}."))
    return names


def python(*arguments: str) -> str:
    """Run a fresh interpreter: in this one the tests have long imported everything."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_imports_without_extras():
    names = python(__file__, "--block").split()
    assert {"adapterbank", "adapterbank.errors"} <= set(names)


def test_the_blocker_refuses_an_extra():
    missing = Missing()
    assert missing.find_spec("torch.nn") is None
    try:
        missing.find_spec("peft.tuners")
    except ModuleNotFoundError as error:
        assert "'peft.tuners': blocked" in str(error)
    else:
        raise AssertionError("peft was let through")


def test_importing_the_package_loads_no_extra():
    loaded = python("-c", "import adapterbank, sys; print(*{name.partition('.')[0] for name in sys.modules})").split()
    assert EXTRAS.isdisjoint(loaded)


if __name__ == "__main__":
    if "--block" in sys.argv[1:]:
        sys.meta_path.insert(0, Missing())
    sys.stdout.write("\n".join(import_all()) + "\n")
