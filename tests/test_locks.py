"""Two runs never write to one folder: the second says who is there, and the dead hold nothing."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import one_line

import genre_detector
from common import UserError
from files import locked, locked_file

HOLDER = """
import sys
from pathlib import Path
from files import locked
with locked(Path(sys.argv[1])):
    print(flush=True)
    input()
"""


def hold(folder: Path, repo: Path) -> subprocess.Popen[bytes]:
    """Another process that holds the lock of a folder until its standard input ends."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, cwd=repo, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"\n"
    return process


@pytest.mark.parametrize(
    ("script", "where"),
    [
        ("prepare_gtzan_data", "data"),
        ("extract_features", "data"),
        ("train_ecas_cnn", "models/ecas_cnn"),
        ("extract_model_features", "data"),
        ("create_cleaned_features", "data"),
        ("train_fusion", "models/fusion_progressive"),
        ("evaluate", "results"),
    ],
)
def test_the_second_run_says_who_is_there(pipeline, tmp_path, capsys, script, where):
    folder = pipeline.data if where == "data" else tmp_path / where
    args = ["--data", str(pipeline.data)]
    if script in ("train_ecas_cnn", "extract_model_features", "train_fusion"):
        args += ["--models", str(tmp_path / "models")]
    if script == "train_ecas_cnn":
        args += ["--width", "0.05", "--device", "cpu"]
    if script == "evaluate":
        args += ["--models", str(pipeline.models), "--results", str(folder)]
    with locked(folder):
        before = sorted(folder.rglob("*"))
        assert importlib.import_module(script).main(args) == 1
        line = one_line(capsys)
        assert f"{folder} is in use by process {os.getpid()} on {socket.gethostname()} since 20" in line
        assert sorted(folder.rglob("*")) == before
    assert not (folder / ".lock").exists()


def test_a_file_of_answers_has_one_writer(models, tmp_path, capsys, render_tone):
    target, song = tmp_path / "new" / "out.jsonl", render_tone(tmp_path / "a.wav")
    args = ["--models", str(models), "--model", "cnn_bigru", "--jsonl", "--output", str(target), str(song)]
    with locked_file(target):
        assert genre_detector.main(args) == 1
    assert f"{target} is in use by process {os.getpid()} on " in one_line(capsys)
    assert genre_detector.main(args) == 0
    assert [path.name for path in target.parent.iterdir()] == ["out.jsonl"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_run_holds_nothing_and_is_swept_up(repo, tmp_path):
    folder = tmp_path / "data"
    process = hold(folder, repo)
    (folder / "raw").mkdir()
    for name in ("raw/.mine.mgf-part", ".metadata.json.x.mgf-part", ".theirs.part"):
        (folder / name).touch()
    with pytest.raises(UserError, match=f"in use by process {process.pid} "), locked(folder):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / ".lock").exists()
    with locked(folder):
        assert f"process {os.getpid()} " in (folder / ".lock").read_text()
    assert sorted(path.name for path in folder.rglob("*")) == [".mine.mgf-part", ".theirs.part", "raw"]
    process.communicate()


def test_a_folder_that_another_run_has_is_not_swept(tmp_path):
    for folder in ("data", "data/models/dpa_cnn"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / ".latest.safetensors.x.mgf-part").touch()
    with locked(tmp_path / "data" / "models" / "dpa_cnn"):
        (tmp_path / "data/models/dpa_cnn/.latest.safetensors.y.mgf-part").touch()
        with locked(tmp_path / "data"):
            pass
        assert [path.name for path in tmp_path.rglob("*.mgf-part")] == [".latest.safetensors.y.mgf-part"]


def test_folders_made_for_nothing_go(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "models" / "x"):
        raise RuntimeError
    assert not (tmp_path / "models").exists()
    with pytest.raises(RuntimeError), locked_file(tmp_path / "new" / "x"):
        raise RuntimeError
    assert not (tmp_path / "new").exists()


def test_a_lock_that_cannot_be_made_is_an_error_and_no_endless_wait(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "nowhere" / "x")
    with pytest.raises(UserError, match=r"\.lock can't be made .*: choose another place"), locked(tmp_path):
        pass


def test_only_one_at_a_time_gets_in(tmp_path):
    """Threads count up with a lost update wherever two are inside; the lock file goes and comes all the while."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    refused = []

    def work() -> None:
        done = 0
        while done < 40:
            try:
                with locked_file(tmp_path / "what"):
                    number = int(counter.read_text())
                    time.sleep(0.0002)
                    counter.write_text(str(number + 1))
                    done += 1
            except UserError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.read_text() == "160"
    assert refused
    assert [path.name for path in tmp_path.iterdir()] == ["counter"]
