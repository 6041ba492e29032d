"""Make bad and odd sound files, each with what must become of it: a detector's examination in bad input.

    answered   the song is classified, with nothing to say about the file
    noted      it is classified, with a note: it was padded, cut or repaired
    refused    one line says why not

Writes  OUT/<file>, OUT.json: what each is, its name and outcome

Example
    python tests/corpus/make_corpus.py /tmp/corpus
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

RATE = 22_050
SECONDS = 7.0  # longer than a window, so that nothing is padded
ANSWERED, NOTED, REFUSED = "answered", "noted", "refused"
Content = bytes | Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    name: str  # of the file; bytes that are no text as surrogates
    what: str
    outcome: str
    content: Content


# ---------------------------------------------------------------- material


def music(seconds: float = SECONDS, rate: int = RATE, channels: int = 1) -> np.ndarray:
    """A beat and a falling tone, float64 (samples, channels), below full scale."""
    times = np.arange(round(seconds * rate)) / rate
    beat = np.random.default_rng(0).standard_normal(len(times)) * np.exp(-9 * (times % 0.4))
    tone = np.sin(2 * np.pi * 330 * times) * np.exp(-2 * (times % 1.2))
    return np.tile(np.clip(0.15 * beat + 0.3 * tone, -0.9, 0.9)[:, None], (1, channels))


def encoded(suffix: str, sound: np.ndarray | None = None, rate: int = RATE, subtype: str | None = None) -> bytes:
    """A whole file of a format."""
    import io

    sound = music(rate=rate) if sound is None else sound
    stream = io.BytesIO()
    kind = "OGG" if suffix == "opus" else suffix.upper()
    subtype = "OPUS" if suffix == "opus" else subtype
    with soundfile.SoundFile(stream, "w", rate, sound.shape[1], subtype, format=kind) as target:
        for first in range(0, len(sound), 4096):  # libsndfile's Vorbis encoder overflows its stack on long blocks
            target.write(sound[first : first + 4096])
    return stream.getvalue()


def av_encoded(kind: str, codec: str, sound: np.ndarray | None = None) -> bytes:
    """A whole file of a format that libsndfile doesn't write: a container and a codec of PyAV."""
    import io
    from fractions import Fraction

    import av

    sound = music()[:, 0] if sound is None else sound
    stream = io.BytesIO()
    with av.open(stream, "w", format=kind) as container:
        track = container.add_stream(codec, rate=RATE, layout="mono")
        track.bit_rate = 48_000
        for first in range(0, len(sound), 1024):
            block = np.ascontiguousarray(sound[None, first : first + 1024], dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
            frame.rate, frame.pts, frame.time_base = RATE, first, Fraction(1, RATE)
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return stream.getvalue()


def wav(
    sound: bytes | None = None,
    rate: int = RATE,
    channels: int = 1,
    bits: int = 16,
    code: int = 1,
    announced: int | None = None,
    before: bytes = b"",
) -> bytes:
    """A wav whose header says whatever it is told to; ``before`` are chunks ahead of the sound."""
    if sound is None:
        sound = (music()[:, 0] * 32767).astype("<i2").tobytes()
    align = channels * bits // 8
    form = struct.pack("<IHHIIHH", 16, code, channels, rate, rate * align & 0xFFFFFFFF, align & 0xFFFF, bits)
    length = len(sound) if announced is None else announced
    body = b"WAVEfmt " + form + before + b"data" + struct.pack("<I", length)
    return b"RIFF" + struct.pack("<I", min(len(body) + length, 0xFFFFFFFF)) + body + sound


def floats(change: Callable[[np.ndarray], None], bits: int = 32) -> bytes:
    """A wav of floating-point samples, some of them changed."""
    sound = music()[:, 0].astype(f"<f{bits // 8}")
    change(sound)
    return wav(sound.tobytes(), bits=bits, code=3)


def put(where: slice, value: float) -> Callable[[np.ndarray], None]:
    def change(sound: np.ndarray) -> None:
        sound[where] = value

    return change


def without_xing(mp3: bytes) -> bytes:
    """An mp3 without the frame that says how long it is; this encoder's frames are MPEG 2 and begin with it."""
    return mp3[mp3.index(mp3[:2], 4) :]


def id3(length: int, announced: int | None = None) -> bytes:
    """An ID3v2.4 tag of zeros."""
    number = length if announced is None else announced
    return b"ID3\x04\0\0" + bytes(number >> shift & 127 for shift in (21, 14, 7, 0)) + bytes(length)


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def hole(content: bytes, length: int) -> bytes:
    """Zeros over a part in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes(length) + content[middle + length :]


def page(ogg: bytes, number: int) -> int:
    """Where an Ogg page starts."""
    place = 0
    for _ in range(number):
        place = ogg.index(b"OggS", place + 4)
    return place


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def unreadable(path: Path) -> None:
    path.write_bytes(wav())
    path.chmod(0)


# ---------------------------------------------------------------- the cases


def sound_cases() -> list[Case]:
    """Files that are sound, as odd as they may be."""
    good = {suffix: encoded(suffix) for suffix in ("wav", "flac", "ogg", "mp3", "aiff", "au")}
    mp3 = good["mp3"]
    ones = np.ones((round(SECONDS * RATE), 1))
    cases = [Case(f"whole.{suffix}", f"a whole {suffix}", ANSWERED, content) for suffix, content in good.items()]
    cases += [
        Case("whole.opus", "a whole opus", ANSWERED, encoded("opus", rate=48_000)),
        Case("8khz.wav", "8 kHz", ANSWERED, encoded("wav", rate=8_000)),
        Case("192khz.flac", "192 kHz", ANSWERED, encoded("flac", rate=192_000)),
        Case("8 channels.wav", "8 channels", ANSWERED, encoded("wav", music(channels=8))),
        Case("64 channels.wav", "64 channels", ANSWERED, encoded("wav", music(channels=64))),
        Case("64 bit.wav", "64-bit float", ANSWERED, encoded("wav", subtype="DOUBLE")),
        Case("24 bit.wav", "24 bit", ANSWERED, encoded("wav", subtype="PCM_24")),
        Case("8 bit.wav", "8 bit", ANSWERED, encoded("wav", subtype="PCM_U8")),
        Case("dc.wav", "nothing but DC", ANSWERED, encoded("wav", 0.5 * ones)),
        Case("silence.flac", "digital silence", ANSWERED, encoded("flac", 0 * ones)),
        Case("clipped.wav", "clipped", ANSWERED, encoded("wav", np.clip(50 * music(), -1, 1))),
        Case("denormal.wav", "samples of 1e-40", ANSWERED, floats(put(slice(None), 1e-40))),
        Case("loud.wav", "floats up to 1e6", ANSWERED, floats(lambda sound: np.multiply(sound, 1e6, out=sound))),
        Case("rf64.wav", "RF64", ANSWERED, encoded("rf64")),
        Case("streamed.wav", "written to a pipe: 4 GB announced", ANSWERED, wav(announced=0xFFFFFFFF)),
        Case("chunks.wav", "unknown chunks before the sound", ANSWERED, wav(before=b"LIST\x08\0\0\0abcdefgh" * 50)),
        Case("half a sample.wav", "ends within a sample", ANSWERED, wav()[:-1]),
        Case("tag.mp3", "an 8 MB tag before the sound", ANSWERED, id3(8 << 20) + mp3),
        Case("long tag.mp3", "a tag that claims to be longer than the file", ANSWERED, id3(0, 200 << 20) + mp3),
        Case("end tag.mp3", "ID3v1 behind the sound", ANSWERED, mp3 + b"TAG" + bytes(125)),
        Case("no length.mp3", "variable bit rate without a Xing header", ANSWERED, without_xing(mp3)),
        Case("from the middle.mp3", "starts within a frame", ANSWERED, mp3[1000:]),
        Case("junk first.mp3", "5 kB of junk before the sound", ANSWERED, b"junk " * 1000 + mp3),
        Case("wav named.mp3", "a wav named mp3", ANSWERED, good["wav"]),
        Case("mp3 named.wav", "an mp3 named wav", ANSWERED, mp3),
        Case("ogg named.flac", "an ogg named flac", ANSWERED, good["ogg"]),
    ]  # fmt: skip
    return cases


def flawed_cases() -> list[Case]:
    """Files of which something can be used."""
    cases = []
    for suffix in ("wav", "flac", "ogg", "mp3", "aiff", "au", "opus"):
        content = encoded(suffix, rate=48_000 if suffix == "opus" else RATE)
        cases.append(Case(f"half.{suffix}", f"{suffix}, cut in the middle", NOTED, half(content)))
    mp3, flac, ogg = encoded("mp3"), encoded("flac"), encoded("ogg")
    claims = bytearray(flac)
    claims[21:26] = struct.pack(">BI", claims[21] | 15, 0xFFFFFFF0)  # samples in STREAMINFO: 36 bits
    nothing, infinite = float("nan"), float("inf")
    cases += [
        Case("no length.wav", "its header announces 0 bytes of sound", NOTED, wav(announced=0)),
        Case("billion bytes.wav", "its header announces 1e9 bytes of sound", NOTED, wav(announced=10**9)),
        Case("days.flac", "its header announces 36 days", NOTED, bytes(claims)),
        Case("nan.wav", "a NaN in the middle", NOTED, floats(put(slice(5000, 5001), nothing))),
        Case("infinity.wav", "infinities in the middle", NOTED, floats(put(slice(5000, 5100), -infinite))),
        Case("half nan.wav", "half of it NaN", NOTED, floats(put(slice(0, 70_000), nothing))),
        Case("1e38.wav", "samples of 1e38", NOTED, floats(put(slice(5000, 5100), 1e38))),
        Case("1e300.wav", "64-bit samples of 1e300", NOTED, floats(put(slice(5000, 5100), 1e300), bits=64)),
        Case("broken frame.mp3", "a frame overwritten with zeros", NOTED, hole(mp3, 200)),
        Case("hole.mp3", "3 kB overwritten with zeros", NOTED, hole(mp3, 3000)),
        Case("gap.mp3", "1 kB lost", NOTED, mp3[: len(mp3) // 2] + mp3[len(mp3) // 2 + 1000 :]),
        Case("half no length.mp3", "cut in the middle, without a Xing header", NOTED, half(without_xing(mp3))),
        Case("hole.ogg", "300 bytes overwritten with zeros", NOTED, hole(ogg, 300)),
        Case("hole.flac", "300 bytes overwritten with zeros", NOTED, hole(flac, 300)),
        Case("0.1 s.wav", "0.11 s", NOTED, encoded("wav", music(0.11))),
        Case("0.5 s.wav", "0.5 s", NOTED, encoded("wav", music(0.5))),
        Case("0.5 s.mp3", "0.5 s", NOTED, encoded("mp3", music(0.5))),
        Case("5 s.ogg", "5 s, less than a window", NOTED, encoded("ogg", music(5))),
    ]
    return cases


def av_cases() -> list[Case]:
    """Formats that PyAV reads; none without it."""
    try:
        m4a, wma, aac = av_encoded("mp4", "aac"), av_encoded("asf", "wmav2"), av_encoded("adts", "aac")
    except ImportError:
        return []
    cases = [
        Case("whole.m4a", "a whole m4a", ANSWERED, m4a),
        Case("whole.wma", "a whole wma", ANSWERED, wma),
        Case("whole.aac", "a whole aac", ANSWERED, aac),
        Case("half.wma", "wma, cut in the middle", NOTED, half(wma)),
        Case("half.m4a", "m4a, cut in the middle: its index stands at the end", REFUSED, half(m4a)),
        Case("chance.m4a", "random bytes named m4a", REFUSED, np.random.default_rng(1).bytes(50_000)),
        Case("lies.m4a", "m4a whose boxes announce 4 GB", REFUSED, m4a.replace(b"stsz", b"\xff\xff\xff\xff")),
    ]
    for place in (4, 8, m4a.index(b"ftyp") + 4, m4a.index(b"mdat") - 4, m4a.index(b"moov") + 4, m4a.index(b"stsd") + 4):
        cases.append(Case(f"first {place}.m4a", f"the first {place} bytes of m4a", REFUSED, m4a[:place]))
    return cases


def refused_cases() -> list[Case]:
    """Files of which nothing can be used."""
    samples = (music()[:, 0] * 32767).astype("<i2").tobytes()
    cases = [Case(f"empty.{suffix}", "zero bytes", REFUSED, b"") for suffix in ("wav", "mp3", "flac", "ogg", "m4a")]
    cuts = {
        "wav": (4, 8, 12, 16, 20, 36, 40, 44, 46),
        "aiff": (4, 12, 20, 38, 46, 54),
        "au": (4, 8, 24),
        "flac": (4, 8, 42),
        "mp3": (4, 208),
    }
    for suffix, places in cuts.items():
        content = encoded(suffix)
        for place in places:
            name, what = f"first {place}.{suffix}", f"the first {place} bytes of {suffix}"
            cases.append(Case(name, what, REFUSED, content[:place]))
    for suffix, rate in (("ogg", RATE), ("opus", 48_000)):
        content = encoded(suffix, rate=rate)
        for number in (1, 2):
            what = f"the first {number} pages of {suffix}"
            cases.append(Case(f"first page {number}.{suffix}", what, REFUSED, content[: page(content, number)]))
    nothing = np.full(round(SECONDS * RATE), np.nan, dtype="<f4").tobytes()
    text = "These are words, and no music.\n" * 500
    chance = np.random.default_rng(1).bytes(50_000)
    many_channels = struct.pack(">4s5I", b".snd", 24, len(samples), 3, RATE, 10**9)
    cases += [
        Case("1 sample.wav", "1 sample", REFUSED, encoded("wav", music(1 / RATE))),
        Case("10 ms.wav", "10 ms", REFUSED, encoded("wav", music(0.01))),
        Case("10 ms.flac", "10 ms", REFUSED, encoded("flac", music(0.01))),
        Case("only nan.wav", "nothing but NaN", REFUSED, wav(nothing, bits=32, code=3)),
        Case("only infinity.wav", "nothing but infinity", REFUSED, floats(put(slice(None), float("inf")))),
        Case("no channels.wav", "0 channels", REFUSED, wav(channels=0)),
        Case("65535 channels.wav", "65,535 channels", REFUSED, wav(channels=65_535)),
        Case("billion channels.au", "1e9 channels", REFUSED, many_channels + samples),
        Case("rate 0.wav", "a rate of 0", REFUSED, wav(rate=0)),
        Case("rate 1.wav", "a rate of 1 Hz", REFUSED, wav(rate=1)),
        Case("rate 1e9.wav", "a rate of 1e9 Hz", REFUSED, wav(rate=10**9)),
        Case("no bits.wav", "0 bits a sample", REFUSED, wav(bits=0)),
        Case("codec.wav", "an unknown codec", REFUSED, wav(code=0x1234)),
        Case("text.mp3", "text named mp3", REFUSED, text.encode()),
        Case("text.wav", "text named wav", REFUSED, text.encode()),
        Case("text.m4a", "text named m4a", REFUSED, text.encode()),
        Case("page.mp3", "a web page named mp3", REFUSED, b"<!DOCTYPE html><html><body>Not found</body></html>"),
        Case("chance.mp3", "random bytes named mp3", REFUSED, chance),
        Case("chance.ogg", "random bytes named ogg", REFUSED, chance),
        Case("zeros.wav", "zeros named wav", REFUSED, bytes(50_000)),
        Case("zeros.mp3", "zeros named mp3", REFUSED, bytes(50_000)),
        Case("only a tag.mp3", "a tag and no sound", REFUSED, id3(1 << 20)),
        Case("archive.wav", "a zip named wav", REFUSED, b"PK\x05\x06" + bytes(18)),
        Case("folder.mp3", "a folder", REFUSED, Path.mkdir),
        Case("pipe.mp3", "a FIFO that nobody writes to", REFUSED, lambda path: os.mkfifo(path)),
        Case("loop.wav", "a symbolic link to itself", REFUSED, link_to("loop.wav")),
        Case("nowhere.wav", "a symbolic link to nothing", REFUSED, link_to("there is no such file")),
        Case("device.wav", "a symbolic link to an endless device", REFUSED, link_to("/dev/zero")),
        Case("locked.wav", "no permission to read", REFUSED, unreadable),
    ]  # fmt: skip
    return cases


def name_cases() -> list[Case]:
    """Good songs with names that are hard to say."""
    content = encoded("flac", music(6.1))
    names = {
        "line\nbreak.flac": "a line break",
        "bell\a and \x1b[31mred\x1b[0m.flac": "control characters",
        "\U0001f3b5 emoji.flac": "an emoji",
        "-dash.flac": "a leading dash",
        "a" * 250 + ".flac": "255 bytes",
        os.fsdecode(b"caf\xe9.flac"): "bytes that are no UTF-8",
        "two  spaces .flac": "two spaces",
        "[a-z]*?.flac": "a pattern",
        "quote\"s, 'and' commas;.flac": "quotes and commas",
        "%s {0} $HOME `id` \\n.flac": "what a shell or a formatter might read",
        "\u202egnp.flac": "a mark that turns the direction of text",
    }
    return [Case(name, f"name with {what}", ANSWERED, content) for name, what in names.items()]


def cases() -> list[Case]:
    return [*sound_cases(), *flawed_cases(), *av_cases(), *refused_cases(), *name_cases()]


def make(folder: Path) -> dict[str, Case]:
    """Write the corpus; the cases by path. What this system can't hold is left out, with a line on stderr."""
    folder.mkdir(parents=True)
    made: dict[str, Case] = {}
    for case in cases():
        path = folder / case.name
        try:
            path.write_bytes(case.content) if isinstance(case.content, bytes) else case.content(path)
        except (OSError, AttributeError) as error:
            print(f"left out: {case.what} ({error})", file=sys.stderr)
            continue
        if case.content is unreadable and os.access(path, os.R_OK):  # root reads everything
            case = Case(case.name, case.what, ANSWERED, case.content)
        made[str(path)] = case
    return made


def main(argv: Sequence[str] | None = None) -> int:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that is made")
    folder = parser.parse_args(argv).out
    made = make(folder)
    records = [{"file": path, "what": case.what, "outcome": case.outcome} for path, case in made.items()]
    folder.with_suffix(".json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    counts = {outcome: sum(c.outcome == outcome for c in made.values()) for outcome in (ANSWERED, NOTED, REFUSED)}
    print(f"{len(made)} files in {folder}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
