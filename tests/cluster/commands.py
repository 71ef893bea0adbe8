"""Running programs, and waiting; everything ends in bounded time."""

import subprocess
import time


class Failed(Exception):
    """A step did not do what it should; the text says what was seen."""


def run(*words, timeout=60, check=True, stdin=None, env=None, cwd=None):
    """Runs a program to its end and gives its standard output. With `check`, another exit code than 0 is an error."""
    words = [str(word) for word in words]
    try:
        done = subprocess.run(
            words, input=stdin, capture_output=True, text=True, errors="replace", timeout=timeout, env=env, cwd=cwd, check=False
        )
    except subprocess.TimeoutExpired as expired:
        raise Failed(f"{' '.join(words)}: not done after {timeout} s") from expired
    if check and done.returncode != 0:
        said = "\n".join(text.strip()[-4000:] for text in (done.stdout, done.stderr) if text.strip())
        raise Failed(f"{' '.join(words)}: exit code {done.returncode}\n{said}")
    return done.stdout


def until(what, probe, timeout=60, pause=0.2):
    """Waits until `probe` gives something true, and gives that. An error of the probe counts as not yet."""
    end = time.monotonic() + timeout
    while True:
        seen = None
        try:
            seen = probe()
        except (Failed, OSError) as error:
            seen, reason = None, str(error)
        else:
            reason = f"last seen: {seen!r}"
        if seen:
            return seen
        if time.monotonic() > end:
            raise Failed(f"{what}: not so after {timeout} s; {reason}")
        time.sleep(pause)
