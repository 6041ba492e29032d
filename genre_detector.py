"""Classify songs by genre with the trained networks.

Reads   the songs (wav, flac, ogg, opus, mp3, au, aiff; m4a, mp4, aac, wma and webm with requirements-formats.txt),
        models/*/model.safetensors
Writes  text, or with --json, --jsonl or --csv what docs/output.md describes, on standard output or to --output;
        with --plot a picture; with --report an HTML page; with --write-tags --yes the songs' genre tags

Probabilities are calibrated on held-out songs of 30 s and sum to 100 %. An answer is uncertain below the top
probability from which on held-out songs were right 9 times in 10, for 6 s of sound or less unless --min-confidence is
given, and always for what sounds like noise, a tone, silence or speech. Exit code 0 when every song was classified, 1
when at least one couldn't be, or be tagged (a line on stderr names each), or it couldn't begin, 2 for bad usage, 130
after Ctrl-C and 143 after SIGTERM, which keep what is done.

Examples
    python genre_detector.py song.mp3
    python genre_detector.py --timeline --plot song.png --start 60 --duration 120 song.mp3
    python genre_detector.py --jsonl --output genres.jsonl --resume --workers 2 ~/Music
    find . -name "*.ogg" | python genre_detector.py --csv - > genres.csv

From Python
    from genre_detector import GenreDetector
    detector = GenreDetector()
    print(detector.predict("song.mp3").genre)
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

from common import (
    UserError,
    argument_parser,
    command,
    complain,
    fraction,
    one_line,
    path_name,
    positive_int,
    progress,
    seconds,
)
from detector_inputs import Found, Heard, Listeners, find_songs, listen
from detector_output import CsvWriter, JsonLinesWriter, JsonWriter, TextWriter, Writer, songs_done
from detector_report import Report, check_target
from detector_tags import check_installed, plain, read_genre, write_genre
from detector_timeline import MARK, Section, draw, sections, window_borders
from extract_features import FRAMES_PER_SECOND
from extract_model_features import MEMBERS, fusion_inputs, load_members, song_inputs
from files import check_replaceable, file_sha256, locked_file, write_text
from hyper_dynamic import pick_device
from predict import is_confident, log_softmax, window_starts
from stopping import signals_to

FUSION = "fusion"


@dataclass(frozen=True)
class Analysis:
    """What every loaded model says of one song: calibrated log-probabilities, float64."""

    song: dict[str, np.ndarray]  # model -> (classes,)
    windows: dict[str, np.ndarray]  # model -> (windows, classes)
    borders: np.ndarray  # (windows + 1,): seconds of the file between which each window is nearest
    padded: bool  # shorter than a window


@dataclass(frozen=True)
class Prediction:
    """The answer for one song; ``probabilities`` sum to 1 and keep the order of the classes."""

    path: str
    duration_s: float
    windows: int
    genre: str
    probabilities: dict[str, float]
    notes: list[str]  # what had to be mended, silence that was left out, padding
    confident: bool  # the top probability reaches ``min_confidence``, it may be music, and is long enough
    sections: list[Section]  # which part is what
    size: int  # bytes, and
    mtime: float  # seconds since 1970: the file's before it was read
    sounds_like: str | None  # "noise" (or a tone, or silence) or "speech", where it is unlike music

    @property
    def unlike_music(self) -> bool:
        return self.sounds_like is not None

    @property
    def ranked(self) -> list[tuple[str, float]]:
        """Genres with their probabilities, the likeliest first."""
        return sorted(self.probabilities.items(), key=lambda item: -item[1])

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "duration_s": round(self.duration_s, 3),
            "windows": self.windows,
            "genre": self.genre,
            "probabilities": self.probabilities,
            **({"notes": self.notes} if self.notes else {}),
        }


class GenreDetector:
    """The frozen networks, loaded once. ``predict`` sees no labels and keeps no state between songs.

    Parameters
    ----------
    model : "fusion", or the name of one network
    models : folder of checkpoints; by default the one beside this file
    device : "auto", "cpu", "cuda" or "mps"
    min_confidence : top probability from which on an answer is confident; by default the model's own, from which on
        its answers to held-out songs were right 9 times in 10 (of a network with a --refit, as it was before). That
        promises nothing for sounds shorter than a window (6 s), so no answer to one is confident by default

    Raises
    ------
    UserError if a checkpoint is absent, broken, made with other feature settings, or not what the fusion was
    fitted on.
    """

    def __init__(
        self,
        model: str = FUSION,
        models: str | Path | None = None,
        device: str = "auto",
        min_confidence: float | None = None,
    ):
        folder = Path(models) if models is not None else Path(__file__).resolve().parent / "models"
        if min_confidence is not None and not 0 <= min_confidence <= 1:
            raise UserError(f"min_confidence {min_confidence} is not between 0 and 1: give a probability")
        if model not in (FUSION, *MEMBERS):
            raise UserError(f"no model {model!r}: choose from {', '.join((FUSION, *MEMBERS))}")
        self.model = model
        pick_device(device)
        try:
            self._load(model, folder, device, min_confidence)
        except UserError as error:
            if models is None:
                restore = f"git -C {shlex.quote(str(folder.parent))} checkout models"
                raise UserError(f"{error}, or restore the released networks: {restore}") from None
            raise

    def _load(self, model: str, folder: Path, device: str, min_confidence: float | None) -> None:
        from train_fusion import MADE_BY, fusion_path, load_fusion

        self.members = load_members(folder, MEMBERS if model == FUSION else [model], device)
        self._fusion = None
        self.meta = own = self.members[0].meta
        sha256 = self.members[0].sha256
        if model == FUSION:
            self._fusion, own = load_fusion(folder)
            sha256 = file_sha256(fusion_path(folder))
            for member in self.members:
                if own["members"].get(member.name) != member.sha256:
                    raise UserError(
                        f"the fusion was fitted on another {member.name}: run extract_model_features.py and the "
                        "scripts after it again"
                    )
            if self._fusion.kept.max(initial=0) >= sum(member.feature_size for member in self.members):
                raise UserError(f"the fusion uses features that the networks don't have: run {MADE_BY} again")
        self._own_threshold = min_confidence is None
        self.min_confidence: float = own["min_confidence"] if min_confidence is None else min_confidence
        self.weights = sha256[:12]  # tells released models apart
        self.genres: list[str] = self.members[0].genres
        self.knows = {split for member in self.members for split in member.knows}  # whose songs were trained on
        self.device = str(next(self.members[0].network.parameters()).device)

    def analyse(self, path: str | Path) -> Analysis:
        """What every loaded model says of a song, and of each of its windows. Raises UserError as ``SoundReader``."""
        return self.judge(listen(path))

    def judge(self, heard: Heard) -> Analysis:
        """What every loaded model says of a song that ``listen`` decoded."""
        outputs = [member.outputs([heard.features])[0] for member in self.members]
        windows = {member.name: rows for member, (rows, _) in zip(self.members, outputs, strict=True)}
        song = {name: log_softmax(rows.mean(axis=0)) for name, rows in windows.items()}
        if self._fusion is not None:
            inputs = fusion_inputs(outputs)
            windows[FUSION] = self._fusion(*inputs)
            song[FUSION] = self._fusion(*(array[None] for array in song_inputs(*inputs)))[0]
        window, frames = self.members[0].window, heard.features["mfcc"].shape[1]
        starts = window_starts(frames, window, self.members[0].overlap)
        borders = window_borders(starts, window, heard.sounding, heard.start, heard.seconds)
        return Analysis(song, windows, borders, frames < window)

    def predict(self, path: str | Path, start: float = 0.0, duration: float | None = None) -> Prediction:
        """The genre of a song, or of a part of it (seconds). Raises UserError as ``SoundReader``."""
        heard = listen(path, start, duration)
        return self.conclude(str(path), heard, self.judge(heard))

    def conclude(self, path: str, heard: Heard, analysis: Analysis) -> Prediction:
        """The answer that follows from an analysis."""
        log_probabilities = analysis.song[self.model]
        probabilities = np.exp(log_probabilities)
        probabilities /= probabilities.sum()
        unproven = heard.sounds_like or (analysis.padded and self._own_threshold)
        window = self.members[0].window / FRAMES_PER_SECOND
        note = [f"padded to the {window:.1f} s that the networks hear at a time"] if analysis.padded else []
        return Prediction(
            path=path,
            duration_s=heard.seconds,
            windows=len(analysis.windows[self.model]),
            genre=self.genres[int(log_probabilities.argmax())],
            probabilities=dict(zip(self.genres, probabilities.tolist(), strict=True)),
            notes=heard.notes + note,
            confident=bool(is_confident(probabilities.max(), self.min_confidence)) and not unproven,
            sections=sections(analysis.windows[self.model], analysis.borders, self.genres),
            size=heard.size,
            mtime=heard.mtime,
            sounds_like=heard.sounds_like,
        )

    def predictions(
        self, songs: Iterable[str | Path], start: float = 0.0, duration: float | None = None, workers: int = 1
    ) -> Iterator[tuple[str, Prediction | UserError]]:
        """Each song's answer, or why there is none; ``workers`` threads decode while the networks run."""
        with Listeners(((str(song), None) for song in songs), start, duration, workers) as heard:
            yield from self.answers(heard)

    def answers(
        self, songs: Iterable[tuple[str, Heard | UserError]], plot: Path | None = None
    ) -> Iterator[tuple[str, Prediction | UserError]]:
        """The same for songs that ``Listeners`` decode; ``plot`` is a picture of the last one's probabilities."""
        for path, heard in songs:
            if isinstance(heard, UserError):
                yield path, heard
                continue
            analysis = self.judge(heard)
            yield path, self.conclude(path, heard, analysis)
            if plot is not None:
                log_mel = heard.features["melspectrogram"]
                draw(log_mel, heard.sounding, analysis.windows[self.model], analysis.borders, self.genres, plot)


# ---------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser(__doc__, "--device", "--threads")
    parser.add_argument(
        "songs",
        nargs="+",
        metavar="SONG",
        help="sound file, folder, pattern, or - for a list of them on standard input",
    )
    parser.add_argument("--model", choices=(FUSION, *MEMBERS), default=FUSION, help="the fusion, or one network alone")
    parser.add_argument(
        "--models", type=path_name, metavar="DIR", help="folder of checkpoints; else that beside this script"
    )
    parser.add_argument("--start", type=seconds, default=0.0, metavar="S", help="seconds left out at the start")
    parser.add_argument("--duration", type=seconds, metavar="S", help="seconds used; if not given, to the end")
    parser.add_argument(
        "--min-confidence",
        type=fraction,
        metavar="P",
        help="probability below which an answer is uncertain, 1 for all; if not given, the model's own",
    )
    parser.add_argument("--workers", type=positive_int, default=1, metavar="N", help="threads that decode ahead")
    parser.add_argument("--top-k", type=positive_int, default=5, metavar="K", help="genres listed a song, in text")
    parser.add_argument("--timeline", action="store_true", help="also say which part of a song is what")
    parser.add_argument("--plot", type=path_name, metavar="PNG", help="draw the probabilities over time of one song")
    parser.add_argument(
        "--report", type=path_name, metavar="HTML", help="also make a page of all songs to look at and hear"
    )
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="print one JSON array, at the end")
    formats.add_argument("--jsonl", action="store_true", help="print a JSON line a song, as it is done")
    formats.add_argument("--csv", action="store_true", help="print a CSV row a song, as it is done")
    parser.add_argument("--output", type=path_name, metavar="FILE", help="write there instead of on standard output")
    parser.add_argument("--write-tags", action="store_true", help="say which genre tags confident answers would change")
    parser.add_argument("--yes", action="store_true", help="with --write-tags: change them")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="with --jsonl --output: skip unchanged songs that FILE answers for the same options",
    )
    return parser


def _writer(args: argparse.Namespace, detector: GenreDetector, stream: IO[str], run: dict[str, Any]) -> Writer:
    if args.json:
        return JsonWriter(stream, run)
    if args.jsonl:
        return JsonLinesWriter(stream, run)
    if args.csv:
        return CsvWriter(stream, run, detector.genres)
    return TextWriter(stream, run, args.top_k, detector.device)


@contextmanager
def _output(args: argparse.Namespace) -> Iterator[IO[str]]:
    """Where answers go. Raises UserError where they can't be written, and says how to go on."""
    if not args.output:
        yield sys.stdout
    elif args.json:  # an array is there whole or not at all
        stream = io.StringIO()
        try:
            yield stream
        finally:
            write_text(Path(os.path.realpath(args.output)), stream.getvalue())
    else:
        try:
            with args.output.open("a", encoding="utf-8", newline="\n") as file:
                yield file
        except OSError as error:
            if error.filename is not None:  # of another file
                raise
            again = "go on with --resume" if args.jsonl else "delete it and run the same command again"
            raise UserError(f"{args.output} can't be written ({error.strerror}): make room, then {again}") from None


def tag(name: str, genre: str, confident: bool, write: bool) -> dict[str, Any]:
    """Put a confident answer into the file's tags, or say on stderr that it would be.

    Returns the file's new ``size`` and ``mtime`` if it was changed. Raises UserError if the tags can't be read or
    written.
    """
    path = Path(name)
    if not confident or [*map(plain, old := read_genre(path))] == [plain(genre)]:
        return {}
    change = f"{path}: genre tag {', '.join(old) or 'none'} -> {genre}"
    if not write:
        complain(f"{change}; --yes would write it")
        return {}
    write_genre(path, genre)
    complain(change)
    status = os.stat(path)
    return {"size": status.st_size, "mtime": status.st_mtime}


def _check_files(args: argparse.Namespace) -> None:
    """Raise UserError for what can't be written, or would be written over something else; nothing is done by then."""
    if args.output and args.output.is_dir():
        raise UserError(f"{args.output} is a folder: name a file in it with --output")
    if args.output and args.output.exists() and not args.output.is_file():
        raise UserError(f"{args.output} is no ordinary file: name another one with --output, or leave it out")
    if args.output and args.output.exists() and not args.resume:
        again = ", or go on with --resume" if args.jsonl else ""
        raise UserError(f"{args.output} is there already: name another file with --output{again}")
    if args.plot:
        check_replaceable(args.plot, MARK, "picture that this version made", "--plot")
    if args.report:
        check_target(args.report)
    if args.write_tags:
        check_installed()


def _run(args: argparse.Namespace) -> int:
    done = Future[dict[str, dict[str, Any]]]()  # known once the model is
    if not args.resume:
        done.set_result({})
    skipped = dict[str, dict[str, Any]]()  # those of the named songs

    def is_new(found: Found) -> bool:
        undrawn = args.plot and not args.plot.exists()
        if found[0] in done.result() and not undrawn:
            skipped[found[0]] = done.result()[found[0]]
        return found[0] not in skipped

    named: Iterable[Found] = find_songs(args.songs)
    if args.plot:
        named = list(named)
        if len(named) != 1:
            raise UserError(f"--plot draws one song, {len(named)} are named: leave out the others")
    _check_files(args)
    answered = failed = 0
    with Listeners(filter(is_new, named), args.start, args.duration, args.workers) as heard, ExitStack() as stack:
        if args.output:
            stack.enter_context(locked_file(Path(os.path.realpath(args.output))))  # whichever link leads there
        import torch  # while the first song is decoded

        torch.set_num_threads(args.threads)
        detector = GenreDetector(args.model, args.models, args.device, args.min_confidence)
        if args.write_tags and args.min_confidence is None and detector.min_confidence >= 1:
            complain("no answer of these networks counts as confident, no tag changes: set a limit by --min-confidence")
        run = {
            "model": args.model,
            "weights": detector.weights,
            "min_confidence": detector.min_confidence,
            "min_confidence_given": args.min_confidence is not None,
            "start": args.start,
            "duration": args.duration,
            "timeline": args.timeline,
        }
        if args.resume:
            done.set_result(songs_done(args.output, run) if args.output.exists() else {})
        stream = stack.enter_context(_output(args))
        writer = _writer(args, detector, stream, run)
        report = Report(args.report, detector.genres, run, skipped) if args.report else None
        if report:

            def close(error: type[BaseException] | None, *_: object) -> None:
                if not (error and args.resume and report.path.exists()):  # that page may know more answers
                    report.finish()

            stack.push(close)
        stack.callback(writer.finish)
        answers = detector.answers(heard, args.plot)
        for path, answer in progress(answers, "songs") if args.output else answers:
            problem = answer if isinstance(answer, UserError) else None
            if args.write_tags and not isinstance(answer, UserError):
                try:
                    answer = replace(answer, **tag(path, answer.genre, answer.confident, args.yes))
                except UserError as error:
                    problem = error
            answered += problem is None
            writer.add(path, answer)
            if report:
                report.add(path, answer)
            if problem:
                failed += 1
                complain(str(problem))
        for path, record in skipped.items() if args.write_tags else ():  # answered by a run that wrote no tags
            try:
                if changed := tag(path, record["genre"], record["confident"], args.yes):
                    print(json.dumps(record | changed), file=stream, flush=True)
            except UserError as error:
                failed += 1
                complain(str(error))
    if args.output and sys.stdout.isatty():
        already = f", there already: {len(skipped)}" if args.resume else ""
        print(f"{one_line(str(args.output))}: songs answered: {answered}, failed: {failed}{already}")
    return 1 if failed else 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as of ``timeout`` or at a shutdown, ends this like Ctrl-C."""


def _terminate(number: int) -> NoReturn:
    raise _Terminated


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.resume and not (args.jsonl and args.output):
        parser.error("--resume goes with --jsonl and --output FILE")
    if args.timeline and args.csv:
        parser.error("--timeline doesn't go with --csv: choose --json or --jsonl")
    if args.yes and not args.write_tags:
        parser.error("--yes goes with --write-tags")
    files = [os.path.realpath(path) for path in (args.output, args.plot, args.report) if path]
    if len(set(files)) < len(files):
        parser.error("--output, --plot and --report are different files")
    try:
        in_a_thread = threading.current_thread() is not threading.main_thread()  # where no signal can be heard
        with nullcontext() if in_a_thread else signals_to(_terminate, signal.SIGTERM):
            return _run(args)
    except KeyboardInterrupt as stop:
        again = "run the same command again" if args.resume else "start with --jsonl --output FILE --resume"
        complain(f"interrupted; to go on, {again}")
        return 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
