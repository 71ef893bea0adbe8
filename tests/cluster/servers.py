"""The servers of a cluster as processes: started inside its network namespace, and found again by another run of this program."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path


def started(pid):
    """When the process began, in ticks since the machine's start, so that a number used twice is no confusion."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def is_alive(pid, start):
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return start is not None and started(pid) == start


class Servers:
    """The processes of one cluster, listed in a file of its folder."""

    def __init__(self, folder: Path, network: str):
        self.folder, self.network = folder, network
        self.list = folder / "processes"

    def start(self, title, *words, env=None):
        """Starts a server in the cluster's network; its output goes to a file of its own."""
        log = (self.folder / f"{title}.log").open("ab")
        # nsenter becomes the program, so the number is the server's own.
        words = ["nsenter", f"--net=/run/netns/{self.network}", *(str(word) for word in words)]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=env)
        log.close()
        with self.list.open("a") as listed:
            listed.write(f"{process.pid} {started(process.pid)} {title}\n")
        return process.pid

    def pids(self, title):
        """The living processes of this title."""
        return [pid for pid, start, name in self._entries() if name == title and is_alive(pid, start)]

    def signal(self, title, number):
        for pid in self.pids(title):
            os.kill(pid, number)

    def stop(self, *titles):
        """Ends the servers of these titles, or all: politely at first, after five seconds by force."""
        victims = [(pid, start) for pid, start, name in self._entries() if not titles or name in titles]
        for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            victims = [(pid, start) for pid, start in victims if is_alive(pid, start)]
            for pid, _ in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                    # One that is stopped hears nothing else.
                    os.kill(pid, signal.SIGCONT)
            end = time.monotonic() + patience
            while time.monotonic() < end and any(is_alive(pid, start) for pid, start in victims):
                time.sleep(0.05)

    def dead(self):
        """Titles of servers that have ended by themselves, with the last lines of what they said."""
        ended = [name for pid, start, name in self._entries() if not is_alive(pid, start)]
        return [(name, (self.folder / f"{name}.log").read_text(errors="replace")[-1500:]) for name in ended]

    def _entries(self):
        if not self.list.exists():
            return []
        lines = (line.split(maxsplit=2) for line in self.list.read_text().splitlines())
        return [(int(pid), start, name) for pid, start, name in lines]
