"""The autoscaler adds edges and takes them away: by CPU from the real metrics-server, and by the streams that edges tell."""

import time

import metrics
from commands import Failed, until
from load import Load, count
from release import NAME, the_release

MOST = 4
# Small requests, so that the load of a test is much.
BY_CPU = ("cpu=50", "streams=0")
BY_STREAMS = ("cpu=0", "streams=100")


def scenario(cluster, steps):
    release = the_release(cluster)
    with steps("metrics-server and a custom-metrics API are found") as figures:
        metrics.start(cluster)
        figures.append(" ".join(release.kubectl("top", "pods", "--no-headers").split()[:3]))
    for title, target, script in (("CPU", BY_CPU, "rolling.js"), ("active streams", BY_STREAMS, "concurrent.js")):
        with steps(f"out and in by {title}") as figures:
            figures.append(out_and_in(release, target, script, title.replace(" ", "-")))


def out_and_in(release, target, script, name):
    values = {"enabled": "true", "minReplicas": 1, "maxReplicas": MOST}
    options = [f"edge.autoscaling.{key}={value}" for key, value in values.items()]
    options += [f"edge.autoscaling.{value}" for value in target]
    options += ["edge.resources.requests.cpu=50m", "edge.drain.graceSeconds=5"]
    release.upgrade(*(word for option in options for word in ("--set", option)))
    until("an idle relay has one edge", lambda: len(release.pods("edge")) == 1, timeout=240, pause=1)
    began = time.monotonic()
    with Load(release, script, name, LOAD_GRACE=1) as load:
        until("a second edge is ready", lambda: len(release.ready("edge")) >= 2, timeout=240, pause=1)
        out, peak = time.monotonic() - began, wanted(release)
        figures = load.finish()
    if not count(figures, "streams"):
        raise Failed(f"there was no load: {load.said()}")
    began = time.monotonic()
    until("the autoscaler takes them away", lambda: len(release.pods("edge")) == 1, timeout=240, pause=1)
    back = time.monotonic() - began
    return f"a second edge {out:.1f} s after the load began, {peak} wanted, one again {back:.1f} s after its end"


def wanted(release):
    return release.get("hpa", f"{NAME}-edge")["status"].get("desiredReplicas", 0)
