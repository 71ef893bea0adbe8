"""A real Kubernetes cluster for tests, on this machine and without Docker.

    python3 tests/cluster test [SCENARIO...]   brings up a cluster, runs the scenarios (all without names), takes it down
    python3 tests/cluster up [NAME]            leaves a cluster with the images of target/release, and says how to use it
    python3 tests/cluster down [NAME]          takes it down
    python3 tests/cluster install              only installs and builds the programs of a cluster

It needs root, and Go for what it builds once.
"""

import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import diagnosis
import images
import scenarios
from cluster import Cluster, free_name, take_down_abandoned
from commands import Failed
from report import FAILED, PASSED, Report, Steps
from tools import REPOSITORY, Tools

KEPT = REPOSITORY / "target/cluster"
# No run needs longer, also on a busy machine, once the programs are there; in seconds.
LONGEST_RUN = 30 * 60


def main(words):
    command, names = (words or ["help"])[0], words[1:]
    if command not in ("test", "up", "down", "install"):
        print(__doc__)
        return 2
    if os.geteuid() != 0:
        print("skipped: a cluster needs root, for its network and its containers")
        return 1 if os.environ.get("CI") == "true" else 0
    # Ended from outside, a run takes its cluster down as after any other error.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    tools = Tools()
    if command != "down":
        tools.install()
    if command == "test":
        return test(tools, names)
    if command == "up":
        up(tools, names)
    if command == "down":
        Cluster((names or ["dev"])[0], tools).down()
    return 0


def up(tools, names):
    cluster = Cluster((names or ["dev"])[0], tools)
    cluster.up(images.make(KEPT / "images"))
    (cluster.folder / "kept").touch()
    programs = tools.program("kubectl").parent
    print("A shell with kubectl and helm in its network:")
    print(f"nsenter --net=/run/netns/{cluster.network} env KUBECONFIG={cluster.kubeconfig} PATH={programs}:$PATH bash")


def test(tools, names):
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST_RUN)
    take_down_abandoned(tools)
    shutil.rmtree(KEPT / "failed", ignore_errors=True)
    report = Report(KEPT / "report.md")
    cluster = Cluster(free_name(), tools)
    steps = Steps(report, "cluster")
    try:
        chosen = scenarios.chosen(names)
        with steps("images are built"):
            tars = images.make(KEPT / "images")
        with steps("comes up, from no process to two nodes that are ready"):
            cluster.up(tars)
        for name, scenario in chosen:
            play(cluster, report, name, scenario)
    except Exception:  # the cluster is taken down whatever happened
        traceback.print_exc()
        if not report.count(FAILED):
            report.add("cluster", "run", FAILED, 0)
        if cluster.kubeconfig.exists():
            diagnosis.tell(cluster, KEPT / "failed/cluster")
    finally:
        signal.alarm(0)
        take_down(cluster, report)
    print(report.table())
    print(report.summary())
    return 1 if report.count(FAILED) or not report.count(PASSED) else 0


def too_long(*_):
    raise TimeoutError(f"not done after {LONGEST_RUN} s")


def play(cluster, report, name, scenario):
    """Runs one scenario; after a failure the next ones are still tried."""
    try:
        scenario(cluster, Steps(report, name))
    except Exception as error:
        if not isinstance(error, Failed):
            traceback.print_exc()
        print(f"{name}: {error}", flush=True)
        if not any(row[0] == name and row[2] == FAILED for row in report.rows):
            report.add(name, "run", FAILED, 0)
        diagnosis.tell(cluster, KEPT / "failed" / name)


def take_down(cluster, report):
    began = time.monotonic()
    try:
        cluster.down()
        left = cluster.left_behind()
    except Exception as error:
        traceback.print_exc()
        left = [str(error)]
    result = FAILED if left else PASSED
    report.add("cluster", "is taken down, and leaves nothing", result, time.monotonic() - began, ", ".join(left))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    # Lines appear when they are printed, also in a pipe.
    sys.exit(main(sys.argv[1:]))
