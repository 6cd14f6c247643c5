"""What every command has in common: help, exit codes, one line for an error, and the real program."""

import importlib.util
import json
import os
import signal
import subprocess
import sys

import pytest
from typer.main import get_command

import adapterbank
from adapterbank.cli import app
from adapterbank.cli.app import clean


def leaves(command, *words):
    """Every command by its words, those below others too."""
    below = getattr(command, "commands", None)
    if below is None:
        return {words: command}
    return {path: leaf for word, child in below.items() for path, leaf in leaves(child, *words, word).items()}


COMMANDS = leaves(get_command(app))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def program(*words, **options):
    return subprocess.run(
        [sys.executable, "-c", "from adapterbank.cli import main; main()", *map(str, words)],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=120, **options,
    )  # fmt: skip


every_command = pytest.mark.parametrize("command", sorted(COMMANDS), ids=" ".join)


@every_command
def test_help_has_an_example_that_parses(run, command):
    text = run(*command, "--help", terminal_width=200).stdout
    examples = [line.split("Example: adapterbank ")[1].split() for line in text.splitlines() if "Example: " in line]
    assert examples
    for words in examples:
        assert tuple(words[: len(command)]) == command
        # parsed, not run: the files of an example don't exist
        COMMANDS[command].make_context(command[-1], words[len(command) :])


@every_command
def test_every_command_speaks_json(run, command):
    assert "--json" in run(*command, "--help").stdout


@every_command
def test_an_unknown_option_is_exit_code_2(run, command):
    result = run(*command, "--bogus")
    assert result.exit_code == 2 and "--bogus" in result.stderr and result.stdout == ""


def test_unknown_commands_choices_and_missing_arguments_are_exit_code_2(run, family, tmp_path):
    assert run("frobnicate").exit_code == 2
    assert run("fit", *family).exit_code == 2
    assert run("fit", *family, "-o", tmp_path / "bank", "--method", "magic").exit_code == 2
    assert run("info").exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_version(run):
    assert run("--version").stdout == f"adapterbank {adapterbank.__version__}\n"


def test_the_demo_says_what_is_not_installed(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("adapterbank.cli.demo.find_spec", lambda name: None)
    line = refused("demo", "-o", tmp_path / "out")
    assert "peft and transformers and matplotlib" in line and "pip install 'adapterbank[demo]'" in line


@pytest.mark.parametrize(
    ("text", "line"),
    [("a\nb", "a b"), ("\x1b[31mred", "\\x1b[31mred"), ("half\udce9", "half\\udce9"), ("émoji ≤ [b]", "émoji ≤ [b]")],
)
def test_what_a_stranger_wrote_becomes_one_printable_line(text, line):
    assert clean(text) == line


def test_errors_of_the_system_are_one_line(refused, fitted, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", "some/file")

    monkeypatch.setattr(adapterbank.Bank, "load", denied)
    assert refused("info", fitted) == "Error: some/file: Permission denied\n"


def test_a_bug_is_not_dressed_up_as_bad_input(run, fitted, monkeypatch):
    def broken(path):
        raise RuntimeError("a bug")

    monkeypatch.setattr(adapterbank.Bank, "load", broken)
    assert isinstance(run("info", fitted).exception, RuntimeError)


# --- the real program -----------------------------------------------------------------------------------------------


def test_help_and_version_do_not_wait_for_torch():
    code = "import sys, adapterbank.cli; print(*sorted({'torch', 'numpy', 'peft', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("\n", "")


def test_the_program_fits_and_shows_and_restores(family, tmp_path):
    done = program("fit", *family, "-o", "bank", "--max-error", 0.1, "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["bank"] == "bank"
    done = program("info", "nothing", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: nothing holds no bank.json; give the directory of a bank\n"
    assert program("info", "bank", "--bogus", cwd=tmp_path).returncode == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank"]


def test_an_interrupt_is_exit_code_130_and_leaves_nothing(family, tmp_path):
    # the signal arrives in the middle of the fit, whatever the machine's speed
    code = """
import os, signal, sys
from adapterbank.bank import family
add = family.Family.add
def interrupted(*arguments):
    add(*arguments)
    os.kill(os.getpid(), signal.SIGINT)
family.Family.add = interrupted
from adapterbank.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "fit", *map(str, family), "-o", "bank"],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=120, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")
    assert list(tmp_path.iterdir()) == []
