"""An edge's process is killed: its streams are cut, those of others flow, and it comes back by itself."""

import os
import signal
import time

from commands import Failed, until
from load import Load, count, told
from release import names, the_release

# Long ones; about half of them are on the edge that is killed.
STREAMS = 200
# Until nobody takes the dead process for a living one any more, in seconds: its lease and a little.
AFTER = 8


def scenario(cluster, steps):
    release = the_release(cluster)
    release.scale("edge", 2)
    with Load(release, "rolling.js", "kill", LOAD_STREAMS=STREAMS, LOAD_RATE=20) as load:
        load.wait_for_streams()
        victim = release.ready("edge")[0]
        with steps("an edge that is killed comes back") as figures:
            began = time.monotonic()
            os.kill(process_of(cluster, victim), signal.SIGKILL)
            name = victim["metadata"]["name"]
            until(f"{name} is ready again", lambda: restarted(release, name), timeout=120, pause=0.5)
            figures.append(f"ready after {time.monotonic() - began:.1f} s")
        with steps("the others' streams flow, and new ones are opened") as figures:
            time.sleep(AFTER)
            seen = load.finish()
            figures.extend(told(seen))
            if not 0 < count(seen, "cut_streams") < STREAMS:
                raise Failed(f"{count(seen, 'cut_streams')} of {STREAMS} streams were cut: {load.said()}")
            # Until its lease has ended or its next life has told the store, a dead edge is given new streams; k6 tries twice.
            if count(seen, "held_streams") < STREAMS / 4:
                raise Failed(f"{count(seen, 'held_streams')} of {STREAMS} streams stood at the end: {load.said()}")


def restarted(release, name):
    return any(pod["status"]["containerStatuses"][0]["restartCount"] and name in names([pod]) for pod in release.ready("edge"))


def process_of(cluster, pod):
    """The number of the pod's first process, which is the program itself."""
    container = pod["status"]["containerStatuses"][0]["containerID"].rpartition("/")[2]
    node = next(node for node in cluster.nodes if node.name == pod["spec"]["nodeName"])
    for line in node.ctr("task", "list").splitlines():
        task, number, *_ = line.split()
        if task == container:
            return int(number)
    raise Failed(f"{pod['metadata']['name']} has no process on {node.name}")
