"""What the detector answers: confidence, sections, every output form, going on after a stop."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import no_larger_files, prediction
from hypothesis import given, settings
from hypothesis import strategies as st

import genre_detector
from checkpoints import load_checkpoint, save_checkpoint
from common import UserError
from decoding import decode
from detector_inputs import listen
from detector_output import as_text, songs_done
from detector_timeline import Section
from files import locked_file
from genre_detector import GenreDetector

GENRES = list("abcdefghij")


@pytest.fixture
def songs(tmp_path: Path, repo: Path) -> Path:
    """A folder of three songs, the second of which is none."""
    folder = tmp_path / "songs"
    folder.mkdir()
    for name, start in (("a.wav", 4), ("c.flac", 12)):
        soundfile.write(folder / name, decode(repo / "examples" / "demo_song.ogg", start, 1).samples, 22_050)
    (folder / "b.wav").write_text("no music here\n" * 100)
    return folder


# ---------------------------------------------------------------- confidence


def test_confident_is_a_matter_of_the_threshold(models, detector, songs):
    top = max(detector.predict(songs / "a.wav").probabilities.values())
    for threshold, confident in ((top - 1e-6, True), (top + 1e-6, False)):
        assert GenreDetector("fusion", models, "cpu", threshold).predict(songs / "a.wav").confident is confident


def test_no_answer_reaches_a_threshold_of_one(detector, songs, monkeypatch):
    heard = listen(songs / "a.wav")
    analysis = detector.judge(heard)
    certain = np.log(np.eye(10)[0] + 1e-300)
    analysis = dataclasses.replace(analysis, song={**analysis.song, "fusion": certain}, padded=False)
    for threshold, confident in ((1 - 1e-9, True), (1.0, False)):
        monkeypatch.setattr(detector, "min_confidence", threshold)
        assert detector.conclude("a.wav", heard, analysis).confident is confident


def test_no_answer_to_less_than_a_window_is_confident_by_itself(detector, repo, tmp_path, monkeypatch):
    paths = {seconds: tmp_path / f"{seconds}.wav" for seconds in (5.9, 6.1)}
    for seconds, path in paths.items():
        soundfile.write(path, decode(repo / "examples" / "demo_song.ogg", 4, seconds).samples, 22_050)
    answer = detector.predict(paths[6.1])
    assert answer.confident == (max(answer.probabilities.values()) >= detector.min_confidence)
    monkeypatch.setattr(detector, "min_confidence", 0.0)
    for seconds, confident in ((5.9, False), (6.1, True)):
        answer = detector.predict(paths[seconds])
        assert not answer.unlike_music
        assert answer.confident is confident


def test_text_names_the_two_nearest_when_uncertain(detect, songs):
    code, out, _ = detect("--min-confidence", 1, songs / "a.wav")
    assert code == 0
    best, second = [line.split()[0] for line in out.splitlines() if "%" in line][:2]
    assert f"Genre:     {best}\nUncertain: {best} or {second}\n" in out
    assert "Uncertain" not in detect("--min-confidence", 0, songs / "a.wav")[1]


@pytest.mark.parametrize("model", ["fusion", "dpa_cnn"])
def test_a_checkpoint_without_a_limit_is_refused(models, tmp_path, model):
    copied = shutil.copytree(models, tmp_path / "models", ignore=shutil.ignore_patterns("latest.*", "best.*"))
    path = copied / ("fusion_progressive" if model == "fusion" else model) / "model.safetensors"
    tensors, meta = load_checkpoint(path, "")
    del meta["min_confidence"]
    save_checkpoint(path, tensors, meta)
    with pytest.raises(UserError, match=r"'min_confidence'.*train_\w+\.py"):
        GenreDetector(model, copied, "cpu")


# ---------------------------------------------------------------- any sound


@settings(max_examples=15)
@given(
    seconds=st.floats(0.1, 8),
    rate=st.sampled_from([8_000, 11_025, 22_050, 44_100, 48_000, 96_000]),
    channels=st.integers(1, 6),
    subtype=st.sampled_from(["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"]),
    gain_db=st.floats(-20, 6),
    batch=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_sound_is_answered_alike_in_every_level_container_and_batch(
    detector, tmp_path_factory, seconds, rate, channels, subtype, gain_db, batch, seed
):
    folder = tmp_path_factory.getbasetemp()
    rng = np.random.default_rng(seed)
    count = round(seconds * rate) + 1
    beat = np.exp(-4 * (np.arange(count) / rate % 0.5))[:, None]
    sound = np.clip(0.2 * beat * rng.standard_normal((count, channels)), -1, 1)
    soundfile.write(folder / "any.wav", sound, rate, subtype=subtype)
    answer = detector.predict(folder / "any.wav")
    values = np.array(list(answer.probabilities.values()))
    assert np.isfinite(values).all()
    assert values.min() >= 0
    assert values.sum() == pytest.approx(1, abs=1e-6)
    assert answer.duration_s == pytest.approx(seconds, abs=2 / rate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("predict.INFERENCE_BATCH", batch)
        assert detector.predict(folder / "any.wav").probabilities == pytest.approx(answer.probabilities, abs=1e-5)
    if subtype in ("PCM_U8", "PCM_16", "PCM_24"):
        stored = soundfile.read(folder / "any.wav", dtype="int32")[0]
        soundfile.write(folder / "any.flac", stored, rate, subtype=subtype.replace("U8", "S8"))
        assert detector.predict(folder / "any.flac").probabilities == answer.probabilities
    if subtype == "DOUBLE":
        soundfile.write(folder / "louder.wav", sound * 10 ** (gain_db / 20), rate, subtype="FLOAT")
        assert detector.predict(folder / "louder.wav").probabilities == pytest.approx(answer.probabilities, abs=1e-2)


@pytest.mark.parametrize("gain_db", [-20, 6])
@pytest.mark.parametrize("genre", ["blues", "classical", "hiphop", "pop"])
def test_level_changes_no_real_songs_genre(detector, gtzan_dir, tmp_path, genre, gain_db):
    path = sorted((gtzan_dir / "genres" / genre).iterdir())[5]
    soundfile.write(tmp_path / "song.wav", decode(path).samples * 10 ** (gain_db / 20), 22_050, subtype="FLOAT")
    answer, expected = detector.predict(tmp_path / "song.wav"), detector.predict(path)
    assert answer.genre == expected.genre
    assert answer.probabilities == pytest.approx(expected.probabilities, abs=1e-2)


# ---------------------------------------------------------------- sections


def test_timeline_in_text_and_json(detect, songs):
    code, out, _ = detect("--timeline", "--start", 0.25, songs / "a.wav")
    assert code == 0
    assert "  0:00 -   0:01  " in out
    [record] = json.loads(detect("--timeline", "--start", 0.25, "--json", songs / "a.wav")[1])
    [section] = record["timeline"]
    assert [*section] == ["start_s", "end_s", "genre", "probability"]
    assert (section["start_s"], section["end_s"]) == (0.25, 1.0)
    assert section["genre"] == record["genre"]


def test_plot_is_a_picture_of_one_song(detect, songs, tmp_path):
    from PIL import Image

    assert detect("--plot", tmp_path / "out.png", songs / "a.wav")[0] == 0
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    code, out, err = detect("--plot", tmp_path / "other.png", songs)
    assert (code, out) == (1, "")
    assert "draws one song, 3 are named" in err
    assert not (tmp_path / "other.png").exists()


def test_silence_is_black_in_a_picture(detect, songs, tmp_path):
    from PIL import Image

    sound, rate = soundfile.read(songs / "a.wav")
    soundfile.write(tmp_path / "late.flac", np.pad(sound, (len(sound), 0)), rate)
    assert detect("--plot", tmp_path / "out.png", tmp_path / "late.flac")[0] == 0
    with Image.open(tmp_path / "out.png") as picture:
        log_mel = np.asarray(picture.convert("L"))[420:660, 110:1040]
    before, after = np.array_split(log_mel, [465], axis=1)
    assert (before[:, :-20] < 30).mean() > 0.95
    assert (after[:, 20:] < 30).mean() < 0.5


@pytest.mark.parametrize("option", ["--plot", "--report"])
def test_what_can_not_be_written_is_told_before_any_work(detect, songs, tmp_path, monkeypatch, option):
    def refused(dir: Path) -> None:
        assert dir == tmp_path
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("files.tempfile.TemporaryFile", refused)
    target = tmp_path / "new" / "out.xyz"
    code, out, err = detect(option, target, "--jsonl", "--output", tmp_path / "out.jsonl", songs / "a.wav")
    assert (code, out) == (1, "")
    assert err.endswith(f"{target} can't be written (Permission denied): choose another {option}\n")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_picture_that_fails_costs_no_answer(detect, songs, tmp_path, monkeypatch):
    def no_room(*_: object) -> None:
        raise UserError("no room")

    monkeypatch.setattr(genre_detector, "draw", no_room)
    code, out, err = detect("--plot", tmp_path / "out.png", "--jsonl", songs / "a.wav")
    assert (code, len(out.splitlines())) == (1, 1)
    assert err.endswith("no room\n")


def test_two_runs_that_write_one_file_by_two_names_exclude_each_other(detect, songs, tmp_path):
    target, link = tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    target.touch()
    link.symlink_to(target)
    with locked_file(target):
        code, out, err = detect("--jsonl", "--resume", "--output", link, songs / "a.wav")
    assert (code, out) == (1, "")
    assert "is in use by process" in err


def test_plot_goes_with_resume_and_replaces_nothing_of_others(detect, songs, tmp_path):
    from PIL import Image

    into = ["--jsonl", "--resume", "--output", tmp_path / "out.jsonl"]
    for _ in range(2):
        assert detect("--plot", tmp_path / "out.png", *into, songs / "a.wav")[0] == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1
    (tmp_path / "out.png").unlink()
    assert detect("--plot", tmp_path / "out.png", *into, songs / "a.wav")[0] == 0
    assert (tmp_path / "out.png").exists()
    holiday = tmp_path / "holiday.png"
    Image.new("RGB", (2, 2)).save(holiday)
    for other in (Path(shutil.copy(songs / "a.wav", tmp_path / "song.wav")), holiday):
        before = other.read_bytes()
        code, out, err = detect("--plot", other, songs / "a.wav")
        assert (code, out) == (1, "")
        assert err.endswith(
            f"{other.name} is there already and is no picture that this version made: choose another --plot\n"
        )
        assert other.read_bytes() == before


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_text_fits_the_terminal(width):
    path = "/music/" + "a very long name " * 20 + "end.mp3"
    parts = dict(zip(GENRES, np.linspace(0.01, 0.19, 10), strict=True))
    answer = prediction(path=path, duration_s=3599.96, probabilities=parts)
    lines = as_text(answer, 10, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].endswith("end.mp3")
    assert "60:00.0" in lines[1]


def test_text_to_a_file_is_not_shortened():
    answer = prediction(path="x" * 500, sections=[Section(0, 75, "a", 0.5)])
    text = as_text(answer, 5, timeline=True)
    assert "x" * 500 in text
    assert "    0:00 -   1:15  a   50.0 %" in text


# ---------------------------------------------------------------- JSON lines and CSV


def test_json_lines_have_the_documented_fields(detect, detector, songs, repo):
    code, out, err = detect("--jsonl", "--timeline", "--min-confidence", 1, songs)
    assert code == 1
    assert len(err.splitlines()) == 1
    first, second, third = [json.loads(line) for line in out.splitlines()]
    assert [*second] == ["schema", "path", "error", "run"]
    for name, record in (("a.wav", first), ("c.flac", third)):
        path = songs / name
        assert record["path"] == str(path)
        assert (record["size"], record["mtime"]) == (path.stat().st_size, path.stat().st_mtime)
        assert record["probabilities"] == detector.predict(path).probabilities
        assert sum(record["probabilities"].values()) == pytest.approx(1, abs=1e-6)
        assert record["confident"] is False
        assert record["nearest"][0] == record["genre"]
        assert record["timeline"][-1]["end_s"] == pytest.approx(record["duration_s"])
        assert record["run"]["model"] == "fusion"
    document = (repo / "docs" / "output.md").read_text(encoding="utf-8")
    for name in [*first, *first["run"], *first["timeline"][0], "error"]:
        assert f"`{name}`" in document, f"docs/output.md doesn't describe {name}"


def test_csv_has_a_row_a_song(detect, detector, songs):
    code, out, _ = detect("--csv", songs, songs / "a.wav")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 1
    assert [Path(row["path"]).name for row in rows] == ["a.wav", "b.wav", "c.flac", "a.wav"]
    assert rows[0] == rows[3], "a song named twice is answered twice"
    assert rows[1]["genre"] == ""
    assert rows[1]["error"].startswith(str(songs / "b.wav"))
    answer = detector.predict(songs / "a.wav")
    assert rows[0]["genre"] == answer.genre
    assert rows[0]["confident"] == str(answer.confident).lower()
    for genre, probability in answer.probabilities.items():
        assert float(rows[0][f"p_{genre}"]) == pytest.approx(probability, abs=1e-6)


def test_the_answers_do_not_depend_on_the_workers(detect, songs):
    assert detect("--jsonl", songs) == detect("--jsonl", "--workers", 3, songs)


# ---------------------------------------------------------------- a file of answers


def test_each_file_of_answers_has_a_name_of_its_own(detect, songs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for other in ("--report", "--plot"):
        with pytest.raises(SystemExit, match="2"):
            detect("--jsonl", "--output", "out", other, tmp_path / "out", songs / "a.wav")
        assert "--output, --plot and --report are different files" in capsys.readouterr().err
    code, out, err = detect("--jsonl", "--output", tmp_path, songs / "a.wav")
    assert (code, out) == (1, "")
    assert err.endswith(f"{tmp_path} is a folder: name a file in it with --output\n")
    assert list(tmp_path.iterdir()) == [songs]


@pytest.mark.skipif(sys.platform == "win32", reason="needs ulimit")
@pytest.mark.parametrize(
    ("form", "again"),
    [
        ("--jsonl", "make room, then go on with --resume"),
        ("--csv", "make room, then delete it and run the same command again"),
        ("--json", "make room or mend that, then run this again"),
    ],
)
def test_a_full_disk_is_said_with_what_to_do_next(detect, songs, tmp_path, form, again):
    target = tmp_path / "out"
    with no_larger_files(1024):
        code, out, err = detect(form, "--output", target, *[songs / "a.wav"] * 6)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert err.endswith(f": {target} can't be written (File too large): {again}\n")
    assert target.exists() == (form != "--json")


def test_a_closed_or_narrow_stream_makes_no_traceback(songs, tmp_path, render_tone, repo):
    detector = f"{shlex.quote(sys.executable)} {shlex.quote(str(repo / 'genre_detector.py'))}"
    name = shlex.quote(str(render_tone(tmp_path / "\u5c0f.wav", 3)))
    for line in (f"{detector} - <&-", f"{detector} {name} >&-", f"{detector} --jsonl {name} absent.wav 2>&-"):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == (name not in line or "absent" in line), done.stderr
        assert done.stderr == ("" if name in line else "genre_detector.py: -: standard input names no song\n")
        if "--jsonl" in line:
            assert len([json.loads(row) for row in done.stdout.splitlines()]) == 2
    done = subprocess.run(
        [sys.executable, repo / "genre_detector.py", tmp_path / "\u5c0f.wav"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u5c0f.wav" in done.stdout


@pytest.mark.parametrize("text", ['{"schema": 1, "paths": [', '{"schema": "https://example.org", "a": 1}'])
def test_no_file_of_others_is_gone_on_with(detect, songs, tmp_path, text):
    target = tmp_path / "mine.json"
    target.write_text(text)  # without a line break in the end, as if a run was killed
    code, out, err = detect("--jsonl", "--output", target, "--resume", songs / "a.wav")
    assert (code, out) == (1, "")
    assert "line 1 is not of this detector" in err
    assert target.read_text() == text


@pytest.mark.parametrize("probabilities", [None, {}, {"jazz": 1.0}])
def test_an_answer_that_lacks_a_field_is_made_again(detect, songs, tmp_path, probabilities):
    target = tmp_path / "out.jsonl"
    args = ("--jsonl", "--output", target, "--resume", "--report", tmp_path / "page.html", songs / "a.wav")
    assert detect(*args)[0] == 0
    [record] = lines_of(target)
    record = record | {"genre": "blues", "probabilities": probabilities}
    target.write_text(json.dumps(record) + "\n")
    assert detect(*args)[0] == 0
    assert len(lines_of(target)[1]["probabilities"]) == 10


def test_output_goes_to_a_file_that_is_never_overwritten(detect, songs, tmp_path):
    target = tmp_path / "new" / "out.json"
    code, out, _ = detect("--json", "--output", target, songs / "a.wav")
    assert (code, out) == (0, "")
    before = target.read_text()
    assert len(json.loads(before)) == 1
    code, out, err = detect("--json", "--output", target, songs / "a.wav")
    assert (code, out) == (1, "")
    assert "is there already" in err
    assert target.read_text() == before


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_resume_answers_what_is_missing_changed_or_failed(detect, songs, tmp_path, render_tone, monkeypatch):
    target = tmp_path / "out.jsonl"
    args = ("--jsonl", "--output", target, "--resume", songs)
    assert detect(*args)[0] == 1
    assert [Path(line["path"]).name for line in lines_of(target)] == ["a.wav", "b.wav", "c.flac"]

    whole = target.read_text()
    target.write_text(whole[:-20])  # killed while it wrote the last line
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, out, _ = detect(*args)
    monkeypatch.undo()
    assert (code, out) == (1, f"{target}: songs answered: 1, failed: 1, there already: 1\n")
    assert [Path(line["path"]).name for line in lines_of(target)] == ["a.wav", "b.wav", "b.wav", "c.flac"]

    for name in ("a.wav", "b.wav"):
        render_tone(songs / name, seconds=2)
    assert detect(*args)[0] == 0
    assert [Path(line["path"]).name for line in lines_of(target)][4:] == ["a.wav", "b.wav"]
    before = target.read_bytes()
    assert detect(*args)[0] == 0
    assert target.read_bytes() == before
    assert detect(*args, "--duration", 1)[0] == 0
    assert len(lines_of(target)) == 9, "another question has other answers"


def test_resume_tells_a_limit_that_was_asked_for_from_the_models_own(detect, songs, tmp_path):
    """Short songs are confident with the first alone."""
    target = tmp_path / "out.jsonl"
    args = ("--jsonl", "--output", target, "--resume", songs / "a.wav")
    assert detect(*args)[0] == 0
    own = lines_of(target)[0]["run"]["min_confidence"]
    assert detect(*args, "--min-confidence", own)[0] == 0
    assert [line["run"]["min_confidence_given"] for line in lines_of(target)] == [False, True]

    text = target.read_text()
    target.write_text(text.replace('"min_confidence_given": true, ', ""))  # as older versions wrote it
    assert target.read_text() != text
    assert detect(*args, "--min-confidence", own)[0] == 0
    assert len(lines_of(target)) == 2


def test_resume_refuses_a_file_of_others(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text('{"some": "thing"}\nmore')
    with pytest.raises(UserError, match=r"line 1 is not of this detector \('schema'\)"):
        songs_done(path, {})
    assert path.read_text() == '{"some": "thing"}\nmore'
    for text in ('{"some": "thing"}', "more"):  # no line end, but no start of an answer either
        path.write_text(text)
        with pytest.raises(UserError, match="line 1 is not of this detector"):
            songs_done(path, {})
        assert path.read_text() == text


def test_usage_that_cannot_be_meant(capsys):
    resume = ("--resume", "--resume --jsonl", "--resume --json --output x")
    for args in (*resume, "--csv --timeline", "--json --csv", "--start -1", "--duration nan", "--min-confidence 2"):
        with pytest.raises(SystemExit) as caught:
            genre_detector.main([*args.split(), "song.wav"])
        assert caught.value.code == 2
        assert capsys.readouterr().out == ""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize(
    ("form", "number"),
    [("--jsonl", signal.SIGINT), ("--json", signal.SIGINT), ("--csv", signal.SIGINT), ("--json", signal.SIGTERM)],
)
def test_interrupt_keeps_what_is_done(repo, models, songs, form, number, tmp_path):
    """A list on standard input that never ends; the answers come all the same."""
    target = tmp_path / "out"
    command = [sys.executable, str(repo / "genre_detector.py"), "--models", str(models), form, "--output", str(target)]
    with subprocess.Popen([*command, "-"], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(os.fsencode(songs / "a.wav") + b"\n" + os.fsencode(songs / "b.wav") + b"\n")
        process.stdin.flush()
        assert b"b.wav" in process.stderr.readline(), "the second song's error comes after the first one's answer"
        process.send_signal(number)
        rest = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + number
    assert rest.splitlines() == [b"genre_detector.py: interrupted; to go on, start with --jsonl --output FILE --resume"]
    text = target.read_text()
    if form == "--json":
        kept = [record["path"] for record in json.loads(text)]
    elif form == "--jsonl":
        kept = [json.loads(line)["path"] for line in text.splitlines()]
    else:
        kept = [row["path"] for row in csv.DictReader(io.StringIO(text))]
    assert kept[0] == str(songs / "a.wav")


def test_it_runs_in_a_thread(models, songs, tmp_path):
    args = ["--models", str(models), "--json", "--output", str(tmp_path / "out"), str(songs / "a.wav")]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(genre_detector.main, args).result() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is another error there")
def test_a_reader_that_leaves_is_no_traceback(repo, models, songs):
    command = [sys.executable, str(repo / "genre_detector.py"), "--models", str(models), "--jsonl"]
    names = [str(songs / "a.wav")] * 50
    with subprocess.Popen([*command, *names], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_a_prediction_can_be_compared(detector, songs):
    answer = detector.predict(songs / "a.wav")
    assert answer == detector.predict(songs / "a.wav")
    assert dataclasses.replace(answer, genre="x") != answer
