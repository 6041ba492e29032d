"""What is fuzzed: each function takes any bytes and may end with UserError, and in no other way.

The bytes become a file in a folder of their own; ``SEEDS`` are valid ones to start from.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from corpus.make_corpus import av_encoded

import archives
import checkpoints
import detector_output
import detector_tags
import extract_features
import extract_model_features
import files
import song_lists
import train_fusion
from catalogue import SPLITS, Song, artist_key, read_catalogue
from common import UserError

SUFFIXES = (".wav", ".mp3", ".flac", ".ogg", ".aiff", ".au", ".opus", ".m4a", ".wma")
KINDS = ("WAV", "MP3", "FLAC", "OGG", "AIFF", "AU")  # of libsndfile
AV_KINDS = ((".m4a", "mp4", "aac"), (".wma", "asf", "wmav2"))  # of PyAV: suffix, container, codec
LISTS = {"train": "a/a.0.wav\n", "val": "b/b.0.wav\n", "test": "a/a.1.wav\n"}
MADE_BY = "train_dpa_cnn.py"


# ---------------------------------------------------------------- targets


def decode(content: bytes, folder: Path) -> None:
    """The first byte picks the suffix."""
    if not content:
        return
    path = folder / f"song{SUFFIXES[content[0] % len(SUFFIXES)]}"
    path.write_bytes(content[1:])
    reader = extract_features.SoundReader(path, 0.0, 20.0)
    with contextlib.suppress(UserError):
        features = extract_features.song_features(reader)
        assert 0.1 <= reader.seconds <= 20.1
        assert all(np.isfinite(array).all() for array in features.values())


def tags(content: bytes, folder: Path) -> None:
    """The first byte picks the suffix."""
    if not content:
        return
    path = folder / f"song{SUFFIXES[content[0] % len(SUFFIXES)]}"
    path.write_bytes(content[1:])
    with contextlib.suppress(UserError):
        detector_tags.read_genre(path)
    try:
        detector_tags.write_genre(path, "jazz")
    except UserError:
        assert path.read_bytes() == content[1:]
    assert [*folder.iterdir()] == [path]


def checkpoint(content: bytes, folder: Path) -> None:
    for path in (folder / "ecas_cnn" / "model.safetensors", folder / "fusion_progressive" / "model.safetensors"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with contextlib.suppress(UserError):
        checkpoints.load_checkpoint(folder / "ecas_cnn" / "model.safetensors", MADE_BY)
    with contextlib.suppress(UserError):
        extract_model_features.load_members(folder, ["ecas_cnn"], "cpu")
    with contextlib.suppress(UserError):
        train_fusion.load_fusion(folder)


def metadata(content: bytes, folder: Path) -> None:
    """metadata.json beside whole lists."""
    (folder / "processed").mkdir(exist_ok=True)
    for split, text in LISTS.items():
        (folder / "processed" / f"{split}_files.txt").write_text(text)
    (folder / "metadata.json").write_bytes(content)
    with contextlib.suppress(UserError):
        catalogue = read_catalogue(folder)
        for split in SPLITS:
            catalogue.labels(catalogue.splits[split])
        for track in catalogue.songs:
            assert extract_features.feature_path(folder, "mfcc", track).parent == folder / "processed" / "mfcc"
        extract_features.load_features(catalogue, "mfcc", [])


def features(content: bytes, folder: Path) -> None:
    """A .npy file, and features.json."""
    (folder / "array.npy").write_bytes(content)
    with contextlib.suppress(UserError):
        assert isinstance(files.read_array(folder / "array.npy", MADE_BY), np.ndarray)
    with contextlib.suppress(UserError):
        extract_features.read_index(folder / "array.npy").get("track")


def artists(content: bytes, folder: Path) -> None:
    """Lines as in GTZANindex.txt."""
    (folder / "index.txt").write_bytes(content)
    with contextlib.suppress(UserError):
        for track, artist in song_lists.read_artists(folder / "index.txt").items():
            assert len(track.splitlines()) <= 1
            artist_key(artist)


def lists(content: bytes, folder: Path) -> None:
    """The published lists, parted by NUL."""
    parts = (content + b"\0\0").split(b"\0")
    for name, part in zip(song_lists.PUBLISHED_LISTS.values(), parts, strict=False):
        (folder / name).write_bytes(part)
    songs = [
        Song(f"{genre}.{n}", f"{genre}/{genre}.{n}.wav", "", genre, "", 1.0, 22_050, "", "ok")
        for genre in "ab"
        for n in (0, 1)
    ]
    with contextlib.suppress(UserError), contextlib.redirect_stderr(io.StringIO()):
        splits = song_lists.read_split_lists(folder, songs)
        tracks = [track for split in SPLITS for track in splits[split]]
        assert len(set(tracks)) == len(tracks)
        assert set(tracks) <= {song.track for song in songs}


def archive(content: bytes, folder: Path) -> None:
    """A zip or tar: its songs come out below one folder, or nothing does."""
    path = folder / ("a.zip" if content[:2] == b"PK" else "a.tar.gz")
    path.write_bytes(content)
    target = folder / "inner" / "genres"
    limits = archives.Limits(100, 1 << 20, 1 << 22)
    with contextlib.suppress(UserError), contextlib.redirect_stderr(io.StringIO()):
        archives.extract_songs(path, target, limits)
    there = {file.relative_to(folder).parts for file in folder.rglob("*")} - {(path.name,)}
    assert all(parts[:2] == ("inner", "genres")[: len(parts)] and len(parts) <= 4 for parts in there)
    assert not any(file.is_symlink() for file in folder.rglob("*"))
    assert target.exists() == bool(there)


def answers(content: bytes, folder: Path) -> None:
    """A file that --resume goes on with."""
    (folder / "answers.jsonl").write_bytes(content)
    with contextlib.suppress(UserError):
        run = {"model": "fusion", "min_confidence_given": False}
        detector_output.songs_done(folder / "answers.jsonl", run)


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    target.__name__: target
    for target in (decode, tags, checkpoint, metadata, features, artists, lists, archive, answers)
}


# ---------------------------------------------------------------- seeds


def _sounds() -> list[bytes]:
    import soundfile

    sound = 0.1 * np.random.default_rng(0).standard_normal((3000, 1))
    contents = []
    for suffix, kind, subtype in (*((f".{kind.lower()}", kind, None) for kind in KINDS), (".opus", "OGG", "OPUS")):
        stream = io.BytesIO()
        soundfile.write(stream, sound, 24_000, subtype, format=kind)
        contents.append(bytes([SUFFIXES.index(suffix)]) + stream.getvalue())
    with contextlib.suppress(ImportError):
        contents += [bytes([SUFFIXES.index(suffix)]) + av_encoded(*how, sound[:, 0]) for suffix, *how in AV_KINDS]
    return contents


def _checkpoints() -> list[bytes]:
    import tempfile

    import torch

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.safetensors"
        meta = {"genres": ["a", "b"], "settings": {"window": 9, "overlap": 0.5, "width": 0.1, "features": "mfcc"}}
        meta |= {"temperature": 1.0, "split": {"name": "x"}, "kind": "average", "members": {"a": ""}}
        tensors = {"coefficients": torch.ones(2, 2), "intercept": torch.ones(2), "kept": torch.zeros(0).long()}
        checkpoints.save_checkpoint(path, tensors, meta)
        return [path.read_bytes()]


def _metadata() -> list[bytes]:
    songs = [
        {"track": f"{genre}.{n}", "file": f"{genre}/{genre}.{n}.wav", "path": "x.wav", "genre": genre, "artist": "",
         "seconds": 30.0, "rate": 22_050, "sha256": "", "verdict": "ok"}
        for genre in "ab" for n in (0, 1)
    ]  # fmt: skip
    sums = {split: hashlib.sha256(text.encode()).hexdigest() for split, text in LISTS.items()}
    value = {"format": 1, "genres": ["a", "b"], "split": {"name": "x", "sha256": sums}, "songs": songs}
    return [json.dumps(value).encode()]


def _features() -> list[bytes]:
    stream = io.BytesIO()
    np.save(stream, np.zeros((20, 4), dtype=np.float16))
    index = {"settings": extract_features.STORED_SETTINGS, "songs": {"a": "b"}}
    return [stream.getvalue(), json.dumps(index).encode()]


def _archives() -> list[bytes]:
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("genres/a/a.wav", b"RIFF" * 9)
        bundle.writestr("../a/b.wav", b"x")
    with tarfile.open(fileobj=tarred, mode="w") as bundle:
        info = tarfile.TarInfo("genres/a/a.wav")
        info.size = 9
        bundle.addfile(info, io.BytesIO(b"123456789"))
        link = tarfile.TarInfo("genres/a/b.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        bundle.addfile(link)
    return [zipped.getvalue(), tarred.getvalue()]


def _answers() -> list[bytes]:
    record = {"schema": 1, "path": "x.wav", "size": 1, "mtime": 2.0, "run": {"model": "fusion"}}
    return [json.dumps(record).encode() + b"\n"]


SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "decode": _sounds,
    "tags": _sounds,
    "checkpoint": _checkpoints,
    "metadata": _metadata,
    "features": _features,
    "artists": lambda: [b"## comment\nblues.00000.wav ::: Somebody ::: Title\nb/x.wav ::: ::: \n"],
    "lists": lambda: [b"a/a.0.wav\n\0b/b.0.wav\n\0a/a.1.wav\n"],
    "archive": _archives,
    "answers": _answers,
}
