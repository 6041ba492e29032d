"""Fixtures that every test file shares. What the session fixtures return is shared: copy it before changing it.

What takes long to make is made by the first of several test processes that asks for it; the others take a copy.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings
from mini_songs import write_source

import genre_detector
from genre_detector import GenreDetector

ROOT = Path(__file__).resolve().parents[1]
Runs = dict[str, str]  # what each script printed
RunScript = Callable[..., subprocess.CompletedProcess[str]]
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background: scripts would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
# However slow the machine; a commit is told the same at each check, and elsewhere every run looks at new examples
settings.register_profile(
    "project", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("project")
# A real training, made small: two fifths of all windows, networks of a tenth of their width. One thread, as another
# test process needs the other core: two that wait for each other and for a core take three times as long
QUICK = ("--epochs", 4, "--check-every", 2, "--width", 0.1, "--window", 64, "--share", 0.4, "--threads", 1)


@dataclass(frozen=True)
class Pipeline:
    """What the scripts made of ``mini_source``, each run once in the order of the README."""

    source: Path
    data: Path
    models: Path
    results: Path
    runs: Runs


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the project."""
    return ROOT


@pytest.fixture(scope="session")
def run_script(repo: Path) -> RunScript:
    """Run a script of the project as a user would: ``run_script("evaluate.py", "--data", folder, cwd=folder)``.

    ``check`` fails the test, with the script's output, unless the exit code is 0. ``env`` adds to the environment.
    """

    def run(
        name: str,
        *args: object,
        cwd: Path | None = None,
        check: bool = True,
        timeout: float = 300,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [sys.executable, str(repo / name), *map(str, args)],
            cwd=cwd,
            env={**os.environ, "COLUMNS": "120", "PYTHONUTF8": "1", **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout,
        )
        if check and result.returncode != 0:
            pytest.fail(f"{name} left with {result.returncode}\n{result.stdout}\n{result.stderr}", pytrace=False)
        return result

    return run


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], Runs]], tuple[Path, Runs]]:
    """``made_once(name, make)``: a folder that ``make`` fills, once for all test processes, and what it returned."""
    base = tmp_path_factory.getbasetemp()
    common = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, make: Callable[[Path], Runs]) -> tuple[Path, Runs]:
        original, said = common / name, common / f"{name}.json"
        with FileLock(common / f"{name}.lock"):
            if not said.exists():
                shutil.rmtree(original, ignore_errors=True)  # of a process in which it failed
                original.mkdir()
                said.write_text(json.dumps(make(original)), encoding="utf-8")
        return original, json.loads(said.read_text(encoding="utf-8"))

    return folder


@pytest.fixture(scope="session")
def mini_source(made_once) -> Path:
    """Ten genre folders of seven made-up songs (wav, 5 to 6 s) and ``artists.txt``; treat it as read-only."""

    def make(folder: Path) -> Runs:
        write_source(folder / "genres")
        return {}

    return made_once("mini", make)[0] / "genres"


@pytest.fixture(scope="session")
def mini_features(mini_source, made_once, run_script, tmp_path_factory) -> tuple[Path, Runs]:
    """A data folder in which ``mini_source`` is prepared and its features are extracted, and how that went."""
    prepare = ("--source", mini_source, "--split", "artist", "--artist-index", mini_source / "artists.txt")
    commands: dict[str, tuple[object, ...]] = {"prepare_gtzan_data.py": prepare, "extract_features.py": ()}

    def make(folder: Path) -> Runs:
        options = ("--data", folder / "data", "--workers", 2)
        return {name: run_script(name, *options, *args).stdout for name, args in commands.items()}

    made, runs = made_once("features", make)
    return shutil.copytree(made / "data", tmp_path_factory.mktemp("features") / "data"), runs


@pytest.fixture(scope="session")
def pipeline(mini_source, mini_features, made_once, run_script, tmp_path_factory) -> Pipeline:
    """Every script of the project, once, on the made-up songs; treat it as read-only."""
    training = ("--models", "models", *QUICK)
    commands: dict[str, tuple[object, ...]] = {
        "train_dpa_cnn.py": training,
        "train_ecas_cnn.py": training,
        "train_bigru_cnn.py": training,
        "extract_model_features.py": ("--models", "models"),
        "create_cleaned_features.py": (),
        "verify_model_features.py": (),
        "train_fusion.py": ("--models", "models"),
        "evaluate.py": ("--models", "models", "--results", "results"),
    }

    def make(folder: Path) -> Runs:
        shutil.copytree(mini_features[0], folder / "data")
        return {name: run_script(name, "--data", "data", *args, cwd=folder).stdout for name, args in commands.items()}

    made, runs = made_once("pipeline", make)
    folder = shutil.copytree(made, tmp_path_factory.mktemp("pipeline") / "all")
    return Pipeline(mini_source, folder / "data", folder / "models", folder / "results", mini_features[1] | runs)


@pytest.fixture(scope="session")
def gtzan_dir() -> Path:
    """The real data set, for the few tests that need it: ``$GTZAN_DIR/genres/<genre>/*``."""
    folder = Path(os.environ.get("GTZAN_DIR", ROOT.parent / "shared" / "gtzan"))
    if not (folder / "genres").is_dir():
        pytest.skip(f"no genres folder in {folder}: set GTZAN_DIR to a copy of GTZAN to run this test")
    return folder


@pytest.fixture(scope="session")
def render_tone() -> Callable[..., Path]:
    """Write a tone in any shape: ``render_tone(path, seconds=3, rate=8000, channels=2)`` returns the path.

    The suffix picks the format; ``level`` 0 is silence; ``subtype`` is soundfile's, ``"FLOAT"`` keeps ``bad`` values.
    """

    def render(
        path: Path,
        seconds: float = 3.0,
        rate: int = 22_050,
        channels: int = 1,
        hz: float = 440.0,
        level: float = 0.5,
        bad: float | None = None,
        subtype: str | None = None,
    ) -> Path:
        import soundfile

        times = np.arange(round(seconds * rate)) / rate
        signal = level * np.sin(2 * np.pi * hz * times)
        if bad is not None:
            signal[len(signal) // 2] = bad  # NaN or infinity in the middle
        soundfile.write(path, np.tile(signal[:, None], (1, channels)), rate, subtype=subtype)
        return path

    return render


@pytest.fixture(scope="session")
def models(repo: Path) -> Path:
    """The released networks."""
    return repo / "models"


@pytest.fixture(scope="session")
def detector(models: Path) -> GenreDetector:
    return GenreDetector("fusion", models, "cpu")


@pytest.fixture
def detect(models, capsys):
    """Run the command line in this process: exit code, standard output, standard error."""

    def run(*args: object) -> tuple[int, str, str]:
        code = genre_detector.main(["--models", str(models), "--device", "cpu", "--threads", "1", *map(str, args)])
        return code, *capsys.readouterr()

    return run
