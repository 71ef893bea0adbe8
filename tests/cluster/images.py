"""The images that the chart's pods need, made from programs of this machine; there is no registry to ask."""

import os
import shutil
from pathlib import Path

from commands import run
from node import PAUSE_IMAGE
from tools import REPOSITORY

BUILDER = REPOSITORY / "deploy/image"
# Names that the chart gives them when nobody says otherwise.
MIDSPAN_REPOSITORY = "docker.io/library/midspan"
MIDSPAN = f"{MIDSPAN_REPOSITORY}:0.1.0"
# The same programs under another name: what an upgrade changes.
NEXT_TAG = "next"
REDIS = "docker.io/valkey/valkey:8.1-alpine"
# What is called in place of that image: Debian's Redis speaks the same.
REDIS_PROGRAM = "valkey-server"


def make(folder: Path):
    """Builds all images into the folder and gives the tars."""
    folder.mkdir(parents=True, exist_ok=True)
    pause = folder / "pause"
    shutil.copy(shutil.which("catatonit"), pause)
    redis = folder / REDIS_PROGRAM
    shutil.copy(shutil.which("redis-server"), redis)
    wanted = {
        "midspan": (MIDSPAN, relay()),
        "next": (f"{MIDSPAN_REPOSITORY}:{NEXT_TAG}", relay()),
        "redis": (REDIS, ["--program", redis]),
        # catatonit waits, as a pause container does, with -P.
        "pause": (PAUSE_IMAGE, ["--program", pause, "--entrypoint=pause", "--entrypoint=-P"]),
    }
    return [build(image, folder / f"{name}.tar", options) for name, (image, options) in wanted.items()]


def build(image, tar, options):
    """Builds one image; gives its tar."""
    run(BUILDER, "--name", image, "--tar", tar, *options)
    return tar


def relay():
    """Options for the relay's programs: a release build, or what is in the folder that PROGRAMS names."""
    release = Path(os.environ.get("PROGRAMS") or REPOSITORY / "target/release")
    return ["--program", release / "midspand", "--program", release / "midspan"]
