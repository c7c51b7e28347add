"""How much memory an answer about ten minutes of video takes beside one about a picture. Needs requirements/video.txt.

    python scripts/measure/video_memory.py --weight out/quickstart/sft_vlm_192.safetensors

The video is made on the spot. Each is asked about in a process of its own, whose peak (resident set) is told.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from model.command_line import CommandLine
from model.inference.answerer import Answerer, Options, add_weight_flags, user_turn
from model.messages import UserError
from model.pictures import open_picture
from model.video import is_video, open_video, read_frames, write_video
from model.views import FRAMES
from scripts.demo.weights import weights_or_newest

WIDTH, HEIGHT, RATE = 640, 360, 25  # pixels, frames a second
ALLOWED = 300  # MB more than a picture


def scene(seconds: int) -> Iterator[Image.Image]:
    """A square that crosses a grey ground."""
    for number in range(seconds * RATE):
        picture = Image.new("RGB", (WIDTH, HEIGHT), "grey")
        left = number * 4 % (WIDTH - 40)
        picture.paste("red", (left, 100, left + 40, 140))
        yield picture


def answer(options: argparse.Namespace) -> None:
    """One question about a video or a picture, and what it took."""
    answerer = Answerer.from_flags(options)
    started = time.perf_counter()
    if is_video(options.show):
        shown = open_video(options.show, options.frames, answerer.processor.square)
    else:
        shown = open_picture(options.show)
    read = time.perf_counter() - started
    answerer.batch([answerer.prompt([user_turn("What do you see?", 1)], [shown])], Options(max_new_tokens=16))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, read)


def peak(options: argparse.Namespace, show: Path) -> tuple[int, float]:
    """MB and seconds until the frames were there, of a process that answers about this file."""
    command = [sys.executable, __file__, "--weight", options.weight, "--device", "cpu", "--frames", options.frames]
    done = subprocess.run([*map(str, command), "--show", str(show)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the process that answers about {show.name} ended: {done.stderr[-2000:]}")
    memory, seconds = done.stdout.split()[-2:]
    return int(memory), float(seconds)


def main() -> None:
    parser = CommandLine(__doc__)
    add_weight_flags(parser)
    parser.add_argument("--seconds", type=int, default=600, help="of video")
    parser.add_argument("--frames", type=int, default=FRAMES, help="of it that the model sees")
    parser.add_argument("--show", type=Path, help="only answer about this .mp4 or picture, in this process")
    options = parser.parse_args()
    try:
        options.weight = weights_or_newest(options.weight)
        if options.show:
            return answer(options)
        with tempfile.TemporaryDirectory() as folder:
            video, still = Path(folder) / "video.mp4", Path(folder) / "still.png"
            write_video(video, scene(options.seconds), RATE)
            next(read_frames(video, (1.0,))).save(still)
            (picture, _), (shown, seconds) = peak(options, still), peak(options, video)
    except UserError as error:
        raise SystemExit(f"video_memory: {error}") from error
    print(f"{options.seconds} seconds of {WIDTH} x {HEIGHT}, {options.frames} frames seen, read in {seconds:.1f} s")
    print(f"peak: {shown} MB, with a picture {picture} MB: {shown - picture} MB more, {ALLOWED} are allowed")
    if shown - picture > ALLOWED:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
