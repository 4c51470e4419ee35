"""Small videos of many containers, codecs and GOP structures, made by the ffmpeg command line.

A cell's name is an encoding and an extension: `x264_open.mkv`. Most have 40 frames of 64x48 with motion and
changing colours, so that no two frames are equal.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter

WIDTH, HEIGHT, NUM_FRAMES = 64, 48, 40
SOURCE = f"-f rawvideo -pix_fmt yuv420p -s {WIDTH}x{HEIGHT} -r 12 -i source.yuv"

_X264 = "-c:v libx264 -preset veryfast -sc_threshold 0"
_X265 = "-c:v libx265 -x265-params log-level=0:scenecut=0:keyint=8"
ENCODINGS = {
    "x264": f"{_X264} -g 8 -bf 3",
    "x264_no_b": f"{_X264} -g 8 -bf 0",
    "x264_pyramid": "-c:v libx264 -x264-params keyint=12:bframes=5:b-pyramid=normal:b-adapt=0:scenecut=0",
    "x264_open": "-c:v libx264 -x264-params open-gop=1:keyint=8:bframes=3:b-adapt=0:scenecut=0",
    "x264_refresh": "-c:v libx264 -x264-params intra-refresh=1:keyint=8:bframes=0:scenecut=0",
    "x264_refresh_b": "-c:v libx264 -x264-params intra-refresh=1:keyint=8:bframes=2:scenecut=0",
    "x264_interlaced": "-c:v libx264 -flags +ildct+ilme -g 8 -bf 2",
    "x264_one_key": f"{_X264} -g 250 -bf 3",
    "x264_keys": f"{_X264} -g 1",
    "x265_open": _X265,
    "x265_closed": f"{_X265}:open-gop=0",
    "x265_no_b": f"{_X265}:bframes=0",
    "x265_radl": f"{_X265}:open-gop=0:radl=2:bframes=3",
    "mpeg4": "-c:v mpeg4 -g 8 -bf 0 -q:v 3",
    "mpeg4_b": "-c:v mpeg4 -g 8 -bf 2 -q:v 3",
    "xvid_b": "-c:v libxvid -g 8 -bf 2 -q:v 3",
    "mpeg2": "-c:v mpeg2video -g 8 -bf 0 -q:v 3 -r 25",
    "mpeg2_b": "-c:v mpeg2video -g 8 -bf 2 -q:v 3 -r 25",
    "mpeg2_closed": "-c:v mpeg2video -g 8 -bf 2 -flags +cgop -sc_threshold 1000000000 -q:v 3 -r 25",
    "mpeg1_b": "-c:v mpeg1video -g 8 -bf 2 -q:v 3 -r 25",
    "vp8": "-c:v libvpx -g 8 -b:v 400k -auto-alt-ref 0",
    "vp9": "-c:v libvpx-vp9 -g 8 -b:v 400k -cpu-used 5 -auto-alt-ref 0",
    "vp9_hidden": "-c:v libvpx-vp9 -g 30 -b:v 100k -cpu-used 5 -auto-alt-ref 1 -lag-in-frames 25",
    "av1": "-c:v libaom-av1 -g 8 -cpu-used 8 -b:v 200k",
    "mjpeg": "-c:v mjpeg -q:v 3 -pix_fmt yuvj420p",
    "prores": "-c:v prores_ks",
    "qtrle": "-c:v qtrle -g 8",
    "png": "-c:v png",
    "ffv1": "-c:v ffv1 -g 8",
    "huffyuv": "-c:v huffyuv",
    "raw": "-c:v rawvideo",
    "h263": "-c:v h263 -s 128x96 -g 8",
    "h263p": "-c:v h263p -g 8",
    "flv1": "-c:v flv -g 8",
    "wmv1": "-c:v wmv1 -g 8 -b:v 400k",
    "wmv2": "-c:v wmv2 -g 8 -b:v 400k",
    "msmpeg4v2": "-c:v msmpeg4v2 -g 8 -b:v 400k",
    "msmpeg4v3": "-c:v msmpeg4 -g 8 -b:v 400k",
    "theora": "-c:v libtheora -g 8 -q:v 8",
    "gif": "-c:v gif",
    "dv": "-c:v dvvideo -s 720x576 -r 25 -pix_fmt yuv420p",
}
CONTAINERS = {
    "mp4": "x264 x264_no_b x264_pyramid x264_open x264_refresh x264_refresh_b x264_interlaced x264_one_key "
    "x264_keys x265_open x265_closed x265_no_b x265_radl mpeg4 mpeg4_b xvid_b mpeg2_b mpeg2_closed mpeg1_b vp9 "
    "vp9_hidden av1 mjpeg png",
    "mov": "x264 x264_no_b x264_open x265_open x265_closed mpeg4_b mjpeg prores qtrle h263 mpeg2_b dv",
    "mkv": "x264 x264_no_b x264_pyramid x264_open x264_refresh x264_interlaced x264_one_key x265_open x265_closed "
    "x265_no_b mpeg4 mpeg4_b xvid_b mpeg2_b mpeg2_closed mpeg1_b vp8 vp9 vp9_hidden av1 mjpeg prores ffv1 huffyuv "
    "raw theora wmv2",
    "webm": "vp8 vp9 vp9_hidden av1",
    "avi": "x264 x264_no_b x264_open mpeg4 mpeg4_b xvid_b mpeg2 mpeg2_b mjpeg ffv1 huffyuv raw wmv2 msmpeg4v2 "
    "msmpeg4v3 h263p flv1 dv",
    "ts": "x264 x264_no_b x264_open x264_refresh x264_interlaced x264_one_key x265_open x265_closed x265_no_b "
    "mpeg2 mpeg2_b mpeg2_closed mpeg1_b mpeg4",
    "m2ts": "x264 mpeg2_b",
    "mpg": "mpeg1_b mpeg2 mpeg2_b mpeg2_closed x264",
    "vob": "mpeg2_b",
    "flv": "flv1 x264 x264_no_b x264_open",
    "3gp": "h263 mpeg4 x264",
    "wmv": "wmv1 wmv2 msmpeg4v3",
    "asf": "x264 mpeg4 mpeg4_b mjpeg",
    "ogv": "theora",
    "mxf": "mpeg2 mpeg2_b",
    "nut": "x264 x264_open mpeg4_b",
    "ivf": "vp8 vp9 vp9_hidden",
    "h264": "x264",
    "hevc": "x265_open",
    "m2v": "mpeg2_b",
    "m4v": "mpeg4_b",
    "mjpeg": "mjpeg",
    "gif": "gif",
}
_VARIED_RATE = "-vf setpts=(N*N*0.02+N)/12/TB -vsync vfr"
# Cells left out: ffmpeg cannot cut them, or nothing can decode the result.
_NOT_CUT = ("vp9.mov", "vp9.ts", "vp9.avi", "mpeg4.ts", "mpeg4_b.ts", "x264_open.ts")
_HIDDEN_VP8 = "-c:v libvpx -b:v 100k -auto-alt-ref 1 -lag-in-frames 16 -g 30 -passlogfile vp8"
# Name -> arguments of ffmpeg without the output file. Input files are cells too.
COMMANDS: dict[str, list[str]] = {
    f"{encoding}.{extension}": [f"{SOURCE} {ENCODINGS[encoding]}"]
    for extension, encodings in CONTAINERS.items()
    for encoding in encodings.split()
}
for _kind in ("x264", "x264_open", "x265_open", "mpeg4_b"):
    COMMANDS[f"{_kind}_fragments.mp4"] = [f"{SOURCE} {ENCODINGS[_kind]} -movflags frag_keyframe+empty_moov"]
    COMMANDS[f"{_kind}_no_edits.mp4"] = [f"{SOURCE} {ENCODINGS[_kind]} -use_editlist 0"]
    COMMANDS[f"{_kind}_negative.mp4"] = [f"{SOURCE} {ENCODINGS[_kind]} -movflags negative_cts_offsets"]
for _name in ("x264.mp4", "x264_open.mkv", "x265_open.mp4", "vp9.webm", "mpeg4.avi", "mpeg4_b.mp4"):
    _kind, _extension = _name.split(".")
    COMMANDS[f"{_kind}_rate.{_extension}"] = [f"{SOURCE} {_VARIED_RATE} {ENCODINGS[_kind]}"]
for _name in (
    "x264.mp4",
    "x264_open.mp4",
    "x265_open.mp4",
    "x265_closed.mp4",
    "mpeg4.mp4",
    "mpeg4_b.mp4",
    "vp9.webm",
):
    _kind = _name.split(".")[0]
    for _extension in ("mp4", "mkv", "mov", "ts", "avi"):
        if f"{_kind}.{_extension}" not in _NOT_CUT:
            COMMANDS[f"{_kind}_cut.{_extension}"] = [f"-ss 1.3 -i {_name} -c copy"]
    if _kind != "vp9":
        COMMANDS[f"{_kind}_late.mp4"] = [f"-itsoffset 0.7 -i {_name} -c copy"]
COMMANDS |= {
    "x264_cut_again.mp4": ["-ss 0.9 -i x264_cut.mp4 -c copy"],
    "x264_short.mp4": ["-i x264.mp4 -t 1.55 -c copy"],
    "x264_sound.mp4": ["-f lavfi -i sine=d=4 -i x264.mp4 -map 0 -map 1 -c:v copy -c:a aac -shortest"],
    "x264_offset.mkv": [f"{SOURCE} {ENCODINGS['x264']} -output_ts_offset 2"],
    "x264_offset.ts": [f"{SOURCE} {ENCODINGS['x264']} -output_ts_offset 30"],
    "vp9_live.webm": [f"{SOURCE} {ENCODINGS['vp9']} -live 1"],
    "vp8_hidden.webm": [f"{SOURCE} {_HIDDEN_VP8} -pass {number}" for number in (1, 2)],
    "vp8_hidden.mkv": ["-i vp8_hidden.webm -c copy"],
    "mpeg4_b_from_avi.mp4": ["-i mpeg4_b.avi -c copy"],
}
# Files cut or joined as bytes: name -> source file, bytes to skip at its start, number of repeats.
JOINED = {
    "x264_twice.ts": ("x264.ts", 0, 2),
    "x264_open_twice.ts": ("x264_open.ts", 0, 2),
    "mpeg2_b_twice.mpg": ("mpeg2_b.mpg", 0, 2),
    "x264_begun.ts": ("x264.ts", 188 * 40, 1),
    "x264_open_begun.ts": ("x264_open.ts", 188 * 40, 1),
    "mpeg2_b_begun.ts": ("mpeg2_b.ts", 188 * 60, 1),
    "mpeg2_b_begun.mpg": ("mpeg2_b.mpg", 2048 * 6, 1),
}
CELLS = [*COMMANDS, *JOINED]


def require_ffmpeg() -> None:
    """Skip a test if the ffmpeg command line is missing."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs the ffmpeg command line")


def make_cell(folder: Path, name: str) -> Path:
    """Make a file of the corpus and its source files unless they exist; skip the test if this ffmpeg cannot."""
    path = folder / name
    if path.exists():
        return path
    if name in JOINED:
        source, skipped, times = JOINED[name]
        path.write_bytes(make_cell(folder, source).read_bytes()[skipped:] * times)
        return path
    if not (folder / "source.yuv").exists():
        (folder / "source.yuv").write_bytes(_source())
    for command in COMMANDS[name]:
        words = shlex.split(command)
        for word in words:
            if word in COMMANDS:
                make_cell(folder, word)
        written = ["ffmpeg", "-v", "error", "-nostdin", "-y", *words, name]
        done = subprocess.run(written, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            path.unlink(missing_ok=True)
            pytest.skip(f"ffmpeg cannot make {name} here: {done.stderr.strip()[-200:]}")
    return path


def _source() -> bytes:
    """Return yuv420p frames: a moving pattern, a square with another motion, and changing colours."""
    noise = np.random.default_rng(0).random((2 * HEIGHT, 2 * WIDTH))
    for _ in range(3):
        noise = sum(np.roll(noise, shift, axis) for axis in (0, 1) for shift in (-1, 0, 1)) / 6
    pattern = 20 + 160 * (noise - noise.min()) / np.ptp(noise)
    planes = []
    for frame in range(NUM_FRAMES):
        luma = pattern[frame : frame + HEIGHT, frame : frame + WIDTH].copy()
        luma[8:24, 3 * frame % 48 : 3 * frame % 48 + 12] = 30 + 5 * frame
        planes += [
            luma.ravel(),
            np.full(WIDTH * HEIGHT // 4, 90 + frame),
            np.full(WIDTH * HEIGHT // 4, 160 - frame),
        ]
    return np.concatenate(planes).astype(np.uint8).tobytes()


def decode_all(path: Path) -> list[np.ndarray]:
    """Return all frames in RGB, decoded by plain PyAV from the beginning, without rotation."""
    convert = VideoReformatter()
    with av.open(f"file:{path}") as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        return [convert.reformat(frame, format="rgb24").to_ndarray() for frame in container.decode(stream)]


def ffmpeg_digests(path: Path) -> list[str]:
    """Return the MD5 sums of all frames in their native pixel format, decoded by the ffmpeg command line."""
    # One thread: with several, frames of xvid_b.mkv differed once on a busy machine.
    words = ["ffmpeg", "-v", "quiet", "-nostdin", "-threads", "1", "-i", str(path)]
    words += ["-map", "0:v:0", "-vsync", "passthrough"]
    done = subprocess.run([*words, "-f", "framemd5", "-"], capture_output=True, text=True, timeout=120, check=False)
    return [line.split(",")[-1].strip() for line in done.stdout.splitlines() if not line.startswith("#")]
