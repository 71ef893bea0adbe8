"""Under load, the number of edges is changed, both roles are updated, and the API server is away: nobody notices."""

import signal
import time

from commands import Failed
from load import Load, must_be_clean, told
from release import NAME, names, the_release

# Of the load, once all streams stand; what is done meanwhile takes less, also on a busy machine.
SECONDS = 270
API_SERVER_AWAY = 60


def scenario(cluster, steps):
    release = the_release(cluster)
    release.scale("edge", 1)
    with Load(release, "rolling.js", "changes", LOAD_DURATION=SECONDS) as load:
        load.wait_for_streams()
        with steps("edges are scaled 1, 3, 6, 2 under load") as figures:
            figures.append(scale(release, load))
        with steps("both roles are updated under load") as figures:
            figures.append(update(release, load))
        with steps("the API server is away for 60 s under load"):
            away(cluster, release, load)
        with steps("no initiation failed, and no stream was cut before its grace") as figures:
            seen = load.finish(timeout=SECONDS + 120)
            figures.extend(told(seen))
            must_be_clean(load, seen)


def scale(release, load):
    took = []
    for replicas in (3, 6, 2):
        before = names(release.pods("edge"))
        began = time.monotonic()
        release.scale("edge", replicas)
        took.append(f"to {replicas} in {time.monotonic() - began:.1f} s")
        release.gone(set(before) - set(names(release.pods("edge"))))
        load.must_run()
    return ", ".join(took)


def update(release, load):
    before = names(release.pods("edge") + release.pods("control"))
    began = time.monotonic()
    release.kubectl("rollout", "restart", f"deployment/{NAME}-control", f"deployment/{NAME}-edge")
    for role in ("control", "edge"):
        release.rolled_out(role)
    ready = time.monotonic() - began
    # What was replaced still drains.
    release.gone(before)
    load.must_run()
    return f"all new after {ready:.1f} s, the last old one gone after {time.monotonic() - began:.1f} s"


def away(cluster, release, load):
    restarts = restart_counts(release)
    cluster.servers.signal("api-server", signal.SIGSTOP)
    try:
        time.sleep(API_SERVER_AWAY)
        load.must_run()
    finally:
        cluster.servers.signal("api-server", signal.SIGCONT)
    cluster.wait_for_api_server()
    for role in ("control", "edge"):
        release.rolled_out(role)
    if restart_counts(release) != restarts:
        raise Failed(f"containers were started again: {restart_counts(release)}, before {restarts}")


def restart_counts(release):
    pods = release.pods("control") + release.pods("edge")
    return {pod["metadata"]["name"]: [one["restartCount"] for one in pod["status"]["containerStatuses"]] for pod in pods}
