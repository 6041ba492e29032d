"""Every script's command line: quick help, refused options, one line that says which script comes first."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common import argument_parser, command, format_table

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if "\ndef main(" in path.read_text(encoding="utf-8"))
# What the one line names when the script is run in an empty folder
FIRST = {
    "prepare_gtzan_data": "--source",
    "create_cleaned_features": "extract_model_features.py",
    "evaluate": "prepare_gtzan_data.py",
    "extract_features": "prepare_gtzan_data.py",
    "extract_model_features": "prepare_gtzan_data.py",
    "genre_detector": "train_bigru_cnn.py",
    "train_bigru_cnn": "prepare_gtzan_data.py",
    "train_dpa_cnn": "prepare_gtzan_data.py",
    "train_ecas_cnn": "prepare_gtzan_data.py",
    "train_fusion": "extract_model_features.py",
    "verify_model_features": "prepare_gtzan_data.py",
}


@pytest.fixture(scope="module")
def helps(tmp_path_factory) -> dict[str, subprocess.CompletedProcess[str]]:
    """``--help`` of every script, with Python's list of imports on stderr."""

    folder = tmp_path_factory.getbasetemp()  # is made at the first call, which threads can't share

    def ask(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-X", "importtime", str(ROOT / f"{name}.py"), "--help"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=60)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SCRIPTS, pool.map(ask, SCRIPTS), strict=True))


def test_a_name_in_a_table_can_not_drive_the_terminal():
    table = format_table(("genre", "songs"), [("\x1b[31mred\n", 3)])
    assert len(table.splitlines()) == 3
    assert all(line.isprintable() for line in table.splitlines())
    assert "\\x1b[31mred\\n" in table


@pytest.mark.parametrize("make", ["torch.empty(1 << 50)", "numpy.empty(1 << 50)"])
def test_full_memory_is_one_line(make, capsys):
    code = command(lambda argv: eval(make, {name: importlib.import_module(name) for name in ("numpy", "torch")}))([])
    words = capsys.readouterr().err.splitlines()
    assert code == 1
    assert len(words) == 1
    assert "memory is full" in words[0]


def without_output(code: str) -> list[subprocess.CompletedProcess[str]]:
    """A script of some code, its output going to a reader that has gone and to a full disk."""
    words = [sys.executable, "-c", f"from common import *\nraise SystemExit(command(lambda argv: {code})([]))"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    gone, pipe = os.pipe()
    os.close(gone)
    with os.fdopen(pipe, "w") as closed, open("/dev/full", "w") as full:
        return [
            subprocess.run(words, cwd=ROOT, env=buffered, stdout=stream, stderr=subprocess.PIPE, text=True)
            for stream in (closed, full)
        ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    ("problem", "code", "word"),
    [
        ("UserError('no songs')", 1, "no songs"), ("ValueError('a fault')", 1, "a fault"),
        ("KeyboardInterrupt", 130, "interrupted"), ("SystemExit(143)", 143, ""),
    ],
)  # fmt: skip
def test_what_went_wrong_is_told_before_output_that_can_not_be_written(problem, code, word):
    statements = f"print(1)\nraise {problem}"
    for run in without_output(f"exec({statements!r})"):
        assert run.returncode == code
        assert word in run.stderr
        assert "No space" not in run.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("code", ["print(1) or 0", "exec('print(1)\\nraise SystemExit(0)')", "print('1' * 99999)"])
def test_output_that_can_not_be_written_is_no_traceback(code):
    to_nobody, to_full_disk = without_output(code)
    assert (to_nobody.returncode, to_nobody.stderr) == (1, "")
    assert to_full_disk.returncode == 1
    assert [*map(str.strip, to_full_disk.stderr.splitlines())] == [
        "-c: a file can't be written: No space left on device; put that right, then run the same command again"
    ]


def test_every_script_is_tested():
    assert set(FIRST) == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_quick_and_shows_the_docstring(helps, name):
    run = helps[name]
    assert run.returncode == 0
    doc = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")))
    assert doc.splitlines()[0] in run.stdout
    assert "Example" in run.stdout
    assert "(default: " in run.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in run.stderr.splitlines()}
    assert "common" in imported
    assert not imported & {"torch", "librosa", "sklearn", "soundfile", "matplotlib", "scipy"}


def test_help_shows_defaults_of_0_and_of_lists_and_none_of_switches(helps):
    text = " ".join(helps["train_dpa_cnn"].stdout.split())
    for option in ("--seed N", "--refit N", "--short-windows N"):
        assert re.search(rf"{option} [^()]*\(default: 0(\.0)?\)", text), option
    assert "default: False" not in text
    assert "(default: train val test)" in " ".join(helps["extract_model_features"].stdout.split())
    parser = argument_parser("What it does.")
    parser.add_argument("--songs", nargs="+", default=["50%(s).ogg", "b.ogg"], help="songs")
    assert "(default: 50%(s).ogg b.ogg)" in parser.format_help()


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("genre_detector", "--threads=0"),
        ("genre_detector", "--models="),
        ("train_fusion", "--data="),
        ("train_ecas_cnn", "--threads=-1"),
        ("train_ecas_cnn", "--threads=9999999999"),
        ("evaluate", "--rounds=0"),
        ("genre_detector", "--start=1e305"),
        ("genre_detector", "--duration=nan"),
        ("train_dpa_cnn", "--learning-rate=inf"),
        ("train_bigru_cnn", "--weight-decay=nan"),
        ("train_dpa_cnn", "--epochs=10000000000000000000"),
        ("train_dpa_cnn", "--refit=10000000000000000000"),
    ]
    + [(name, "--seed=-1") for name in ("prepare_gtzan_data", "train_dpa_cnn", "train_fusion")]
    + [("train_fusion", f"--seed={2**32}")],
)
def test_numbers_that_make_no_sense_are_bad_usage(name, option, capsys):
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(name).main([option, *(["a.wav"] if name == "genre_detector" else [])])
    assert caught.value.code == 2
    assert f"argument {option.partition('=')[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_unknown_option_is_bad_usage(name, capsys):
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(name).main(["--no-such-option"])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: ")


def test_a_complaint_has_a_line_of_its_own_beside_a_bar(repo):
    code = "import common; [common.complain(str(i)) for i in common.progress(range(2), 'songs')]"
    ours, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    subprocess.run([sys.executable, "-c", code], cwd=repo, stderr=terminal, check=True)
    shown = os.read(ours, 10_000).decode()
    assert "songs:   0%" in shown
    lines = [line.rpartition("\r")[2] for line in shown.split("\r\n")]
    assert lines[:2] == ["-c: 0", "-c: 1"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_empty_folder_is_answered_in_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    args = ["song.wav", "--models", "models"] if name == "genre_detector" else []
    assert importlib.import_module(name).main(args) in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{name}.py: ")
    assert FIRST[name] in lines[0]
    assert not any(tmp_path.rglob("*")), "it wrote something all the same"
