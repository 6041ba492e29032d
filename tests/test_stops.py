"""A stop at any moment loses nothing: a kill, a disk that is full, a rename that fails."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import no_larger_files, one_line

import create_cleaned_features
import extract_features
import extract_model_features
import genre_detector
import prepare_gtzan_data
import train_fusion
from checkpoints import save_checkpoint
from common import UserError
from files import locked, write_text

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither SIGKILL nor limits of file sizes")


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(main: Callable[[list[str]], int], args: list[str], size: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a script ends on a full disk."""
    capsys.readouterr()
    with no_larger_files(size):
        assert main(args) == 1
    line = one_line(capsys)
    assert re.search(r"File too large|\d+ requested and \d+ written", line), line
    return line


# ---------------------------------------------------------------- kills


def test_killed_preparations_and_extractions_go_on(run_script):
    """All steps and more kills: python benchmarks/kill_test.py."""
    output = run_script("benchmarks/kill_test.py", "--steps", 2, "--kills", 3, "--seed", 1).stdout
    assert "seed 1: nothing lost" in output


KILLED_AS_IT_SAVES = """
import resource, signal, sys, torch
from pathlib import Path
from checkpoints import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
save_checkpoint(Path(sys.argv[1]), {"weight": torch.zeros(4096)}, {})
"""


def test_killed_while_it_saves_leaves_only_what_is_swept_up(repo, tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, {"weight": torch.ones(2)}, {})
    before = files(tmp_path)
    killed = subprocess.run([sys.executable, "-c", KILLED_AS_IT_SAVES, path], cwd=repo, timeout=100)
    assert killed.returncode == -signal.SIGXFSZ
    assert len(files(tmp_path)) == 2, "it was not killed while it saved"
    with locked(tmp_path):
        pass
    assert files(tmp_path).items() - {(".lock", b"")} == before.items()


# ---------------------------------------------------------------- writing fails


def test_a_full_disk_while_songs_are_extracted_and_checked(tmp_path, render_tone, capsys):
    data = tmp_path / "data"
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(6):
            name = render_tone(tmp_path / "song.wav", seconds=1.2, hz=200 + 90 * number)
            archive.write(name, f"genres/{'polka' if number % 2 else 'samba'}/{number}.wav")
    args = ["--data", str(data), "--source", str(tmp_path / "a.zip"), "--workers", "1"]
    assert "a.zip" in refused(prepare_gtzan_data.main, args, 20_000, capsys)
    assert not data.exists()
    assert prepare_gtzan_data.main(args) == 0
    whole = files(data)
    (data / "metadata.json").write_text("an older one")
    assert "metadata.json" in refused(prepare_gtzan_data.main, args, 500, capsys)
    assert (data / "metadata.json").read_text() == "an older one"
    assert files(data).keys() == whole.keys()
    assert prepare_gtzan_data.main(args) == 0
    assert files(data) == whole

    args = ["--data", str(data), "--workers", "1"]
    assert "can't be written" in refused(extract_features.main, args, 5_000, capsys)
    assert files(data) == whole
    assert extract_features.main(args) == 0
    assert len(list((data / "processed" / "mfcc").iterdir())) == 6


def test_a_full_disk_in_the_fusion(pipeline, tmp_path, capsys):
    data = shutil.copytree(pipeline.data, tmp_path / "data")
    models = shutil.copytree(pipeline.models, tmp_path / "models")
    before, released = files(data), files(models)
    both = ["--data", str(data), "--models", str(models)]
    assert "can't be written" in refused(create_cleaned_features.main, both[:2], 10_000, capsys)
    assert "can't be written" in refused(train_fusion.main, both, 1_000, capsys)
    assert files(data) == before
    assert files(models) == released
    assert "can't be written" in refused(extract_model_features.main, [*both, "--device", "cpu"], 1_000, capsys)
    assert train_fusion.main(both) == 1
    assert "provenance.json is not there: run extract_model_features.py first" in one_line(capsys)
    assert not list(data.rglob(".*"))


def test_a_full_disk_under_the_answers(models, tmp_path, capsys, render_tone):
    songs = [str(render_tone(tmp_path / f"{number}.wav", seconds=0.5)) for number in range(6)]
    options = ["--models", str(models), "--model", "cnn_bigru", "--device", "cpu", "--jsonl", "--resume", "--output"]
    target = tmp_path / "answers.jsonl"
    refused(genre_detector.main, [*options, str(target), *songs], 2_000, capsys)
    assert 0 < target.stat().st_size <= 2_000
    assert not list(tmp_path.glob(".*"))
    assert genre_detector.main([*options, str(target), *songs]) == 0
    whole = tmp_path / "whole.jsonl"
    assert genre_detector.main([*options, str(whole), *songs]) == 0
    assert target.read_text() == whole.read_text()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_rename_that_fails_leaves_the_old_file(tmp_path, monkeypatch, number):
    import torch

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    path, checkpoint = tmp_path / "list.txt", tmp_path / "model.safetensors"
    write_text(path, "old")
    save_checkpoint(checkpoint, {"weight": torch.ones(2)}, {})
    before = files(tmp_path)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match=r"list\.txt can't be written \(.+\): make room or mend that, then run"):
        write_text(path, "new")
    with pytest.raises(UserError, match=r"model\.safetensors can't be written"):
        save_checkpoint(checkpoint, {"weight": torch.zeros(2)}, {})
    assert files(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")
@pytest.mark.parametrize("mask", ["022", "077"])
def test_files_are_for_those_whom_the_umask_lets_read_them(repo, tmp_path, mask):
    path = tmp_path / "genres.json"
    words = [sys.executable, "-c", "import sys, pathlib, files; files.write_text(pathlib.Path(sys.argv[1]), '')", path]
    subprocess.run(["bash", "-c", f"umask {mask}; exec {shlex.join(map(str, words))}"], cwd=repo, check=True)
    assert path.stat().st_mode & 0o777 == 0o666 & ~int(mask, 8)
