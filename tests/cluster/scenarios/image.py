"""The image: the same input gives the same bytes, and deploy/Dockerfile says the same of it as the script."""

import json
import tarfile
import tempfile
from pathlib import Path

import images
from commands import Failed, run
from tools import REPOSITORY

PROGRAMS = {"usr/local/bin/midspan", "usr/local/bin/midspand"}
# Beside shared libraries, which differ from machine to machine.
FILES = PROGRAMS | {"etc/passwd", "etc/group", "etc/nsswitch.conf", "etc/ssl/certs/ca-certificates.crt"}


def scenario(_cluster, steps):
    with tempfile.TemporaryDirectory() as folder:
        first, second = (images.build(images.MIDSPAN, Path(folder) / name, images.relay()) for name in ("1.tar", "2.tar"))
        with steps("two builds are equal to the byte") as figures:
            if first.read_bytes() != second.read_bytes():
                raise Failed("they differ")
            figures.append(f"{first.stat().st_size / 2**20:.0f} MiB")
        config, paths = contents(first)
        with steps("it holds the two programs, their libraries, and nothing else"):
            extra = {path for path in paths - FILES if not path.startswith(("lib/", "lib64/", "usr/lib/"))}
            if extra or not paths >= PROGRAMS:
                raise Failed(f"it holds {sorted(paths)}")
        with steps("the Dockerfile says the same of how it starts"):
            said = instructions((REPOSITORY / "deploy/Dockerfile").read_text())
            wanted = {
                "COPY": "--from=build /image/ /",
                "USER": config["User"],
                "ENV": " ".join(config["Env"]),
                "WORKDIR": config["WorkingDir"],
                "ENTRYPOINT": json.dumps(config["Entrypoint"]),
            }
            if said != wanted:
                raise Failed(f"the Dockerfile: {said}; the script: {wanted}")
        with steps("the root file system for the Dockerfile is that of the image"):
            root = Path(folder) / "root"
            run(images.BUILDER, "--root", root, *images.relay())
            found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
            if found != paths:
                raise Failed(f"differs: {sorted(found ^ paths)}")


def contents(path):
    """The image's config, and the paths of the files in its only layer."""
    with tarfile.open(path) as tar:

        def blob(digest):
            return tar.extractfile(f"blobs/sha256/{digest.removeprefix('sha256:')}")

        index = json.load(tar.extractfile("index.json"))
        manifest = json.load(blob(index["manifests"][0]["digest"]))
        (layer,) = manifest["layers"]
        with tarfile.open(fileobj=blob(layer["digest"])) as files:
            paths = {entry.name for entry in files if entry.isfile()}
        return json.load(blob(manifest["config"]["digest"]))["config"], paths


def instructions(dockerfile):
    """The instructions of the last stage but its FROM; each may be there once."""
    last = dockerfile.rpartition("\nFROM ")[2].splitlines()[1:]
    pairs = [line.split(" ", 1) for line in last if line and not line.startswith("#")]
    if len({name for name, _ in pairs}) != len(pairs):
        raise Failed(f"an instruction is there twice: {pairs}")
    return dict(pairs)
