"""The same seed, machine and number of threads give the same bits; other machines' answers differ by little.

An old processor is played by telling the libraries to use no newer instructions than those of 2008.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_data import write_tiny_data

from checkpoints import load_checkpoint
from extract_model_features import MEMBERS, load_members
from genre_detector import listen

OPTIONS = {"epochs": 3, "check-every": 1, "width": 0.1, "window": 48, "share": 1, "batch-size": 8, "graduate-at": 0.3}
QUICK = [f"--{name}={value}" for name, value in OPTIONS.items()] + ["--device=cpu"]
OLD = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX",
    "OPENBLAS_CORETYPE": "Nehalem",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("tiny") / "data", dict.fromkeys("abc", (5, 2, 1)))


def trained(name: str, data: Path, models: Path, threads: int, *options: str) -> dict[str, Any]:
    """All that a training leaves, by file, but for the seconds it took."""
    torch.rand(3)  # whatever was drawn before
    command = ["--data", str(data), "--models", str(models), "--seed", "5", "--threads", str(threads), *QUICK, *options]
    assert importlib.import_module(MEMBERS[name]).main(command) == 0
    found: dict[str, Any] = {}
    for path in sorted((models / name).glob("*.safetensors")):
        tensors, meta = load_checkpoint(path, "")
        meta["progress"].pop("seconds")
        found[path.name] = meta, tensors
    records = [json.loads(line) for line in (models / name / "log.jsonl").read_text().splitlines()]
    found["log.jsonl"] = [{key: value for key, value in record.items() if key != "seconds"} for record in records]
    return found


@pytest.mark.parametrize(("name", "rhythm"), [*((n, 0) for n in MEMBERS), ("dpa_cnn", 1), ("ecas_cnn", 1)])
def test_the_same_seed_and_threads_give_the_same_bits(data, tmp_path, name, rhythm):
    one, two = (trained(name, data, tmp_path / run, 2, f"--rhythm={rhythm}") for run in ("one", "two"))
    assert one.keys() == two.keys()
    assert one.pop("log.jsonl") == two.pop("log.jsonl")
    assert len(one) == 2
    for file, (meta, tensors) in one.items():
        assert two[file][0] == meta
        assert two[file][1].keys() == tensors.keys()
        assert all(torch.equal(two[file][1][key], value) for key, value in tensors.items())


@pytest.mark.parametrize(("fast", "far"), [(0, 1e-4), (1, 0.02)])  # bfloat16 keeps eight binary digits
@pytest.mark.parametrize("name", MEMBERS)
def test_another_number_of_threads_begins_alike(data, tmp_path, name, fast, far):
    """Later on the last bits decide on other steps: two such trainings are two draws from one distribution."""
    options = ("--epochs=1", f"--fast={fast}")
    one, two = (trained(name, data, tmp_path / str(threads), threads, *options)["log.jsonl"] for threads in (1, 2))
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], abs=far)
    assert one[0]["val_loss"] == pytest.approx(two[0]["val_loss"], abs=far)
    assert one[0]["windows"] == two[0]["windows"]


def test_the_number_of_threads_decides_no_feature(repo):
    code = "from pathlib import Path; from hashlib import sha256; from extract_features import *; "
    code += "made = song_features(SoundReader(Path('examples/demo_song.ogg'))); "
    code += "print([sha256(array.tobytes()).hexdigest() for array in made.values()])"
    threads = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    one, two = (
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=repo,
            env=os.environ | dict.fromkeys(threads, number),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for number in "12"
    )
    assert one == two


def test_the_number_of_threads_decides_no_answer(models, repo):
    heard = listen(repo / "examples" / "demo_song.ogg", 0, 12)
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs.append([member.outputs([heard.features])[0] for member in load_members(models, device="cpu")])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*outputs, strict=True):
        np.testing.assert_allclose(one[0], two[0], atol=1e-4)
        np.testing.assert_allclose(one[1], two[1], atol=1e-3)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the instructions are those of x86")
def test_an_old_processor_answers_alike(detector, repo, run_script):
    song = repo / "examples" / "demo_song.ogg"
    command = ["genre_detector.py", song, "--duration", 12, "--json", "--device", "cpu"]
    new = detector.predict(song, 0, 12).probabilities
    old = json.loads(run_script(*command, env=OLD).stdout)[0]["probabilities"]
    assert new != old, "no other instructions were used"
    assert new == pytest.approx(old, abs=1e-4)
