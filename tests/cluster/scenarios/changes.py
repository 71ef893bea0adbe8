"""Under load edges come and go, both roles are updated, a node is drained, the API server is away: nobody notices."""

import signal
import time

from commands import Failed
from load import Load, must_be_clean, told
from release import NAME, names, the_release

# Of an edge that goes down: what is tried does not depend on its length, but the test's length does.
GRACE = 10
API_SERVER_AWAY = 60
# Of a control replica. Streams that an edge ended are all opened anew within seconds, beside the load's own.
INITIATIONS = 1000


def scenario(cluster, steps):
    release = the_release(cluster)
    release.upgrade(
        "--set", f"edge.drain.graceSeconds={GRACE}",
        "--set-json", f'control.extraArgs=["--limit-initiations-per-second={INITIATIONS}"]',
    )  # fmt: skip
    release.scale("edge", 1)
    with Load(release, "rolling.js", "changes", LOAD_GRACE=GRACE) as load:
        load.wait_for_streams()
        with steps("edges are scaled 1, 3, 6, 2 under load") as figures:
            figures.append(scale(release, load))
        with steps("both roles are updated under load") as figures:
            figures.append(update(release, load))
        with steps("one of two nodes is drained under load") as figures:
            figures.append(drain(cluster, release, load))
        with steps("the API server is away for 60 s under load"):
            away(cluster, release, load)
        with steps("no initiation failed, and no stream was cut before its grace") as figures:
            seen = load.finish()
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


def drain(cluster, release, load):
    for role in ("control", "edge"):
        allowed = release.get("pdb", f"{NAME}-{role}")["status"]["disruptionsAllowed"]
        if allowed != 1:
            raise Failed(f"{allowed} pods of {role} may be away, and not 1")
    # The chart's own Redis is there once, and keeps nothing.
    keeps = release.pods("redis")[0]["spec"]["nodeName"]
    node = next(one.name for one in cluster.nodes if one.name != keeps)
    victims = [pod for pod in release.pods("edge") + release.pods("control") if pod["spec"]["nodeName"] == node]
    if not victims:
        raise Failed(f"no pod is on {node}, although they are to be spread")
    began = time.monotonic()
    try:
        cluster.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=150s", timeout=180)
        took = time.monotonic() - began
        for role in ("control", "edge"):
            release.wait_for(role, 2)
    finally:
        cluster.kubectl("uncordon", node)
    load.must_run()
    return f"{len(victims)} pods moved in {took:.1f} s"


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
