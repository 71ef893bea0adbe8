"""Load on a release: k6 in the cluster's network, with the scripts that anybody can run against a relay of their own."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import network
from commands import Failed, until
from release import NAME
from tools import REPOSITORY

SCRIPTS = REPOSITORY / "benches/k6"
KEPT = REPOSITORY / "target/cluster/load"
# What the scenarios are about: so many streams held, and so many set-ups a second beside them.
STREAMS, RATE = 500, 50
# Of a load that nobody ends, in seconds.
LONGEST = 10 * 60
# k6 asks here whether the load is still wanted.
PORT = 8099


class Load:
    """One run of a k6 script: `with Load(...) as load:` starts it, `load.finish()` ends it and gives its figures."""

    def __init__(self, release, script, name, group_key=None, **settings):
        self.release, self.script, self.name, self.group_key = release, script, name, group_key
        self.settings = {"LOAD_STREAMS": STREAMS, "LOAD_RATE": RATE, "LOAD_DURATION": LONGEST} | settings
        self.folder = release.cluster.folder / "load"
        self.wanted = self.folder / "wanted" / name
        self.process = None
        self.stood = time.monotonic()

    def __enter__(self):
        release, cluster = self.release, self.release.cluster
        self.wanted.parent.mkdir(parents=True, exist_ok=True)
        self.wanted.touch()
        if not cluster.servers.pids("wanted"):
            words = ("-m", "http.server", PORT, "--bind", "127.0.0.1", "--directory", self.wanted.parent)
            cluster.servers.start("wanted", sys.executable, *words)
        keys = release.secret(f"{NAME}-keys")
        credentials = json.loads(keys["credentials.json"])
        contents = {
            "ca": keys["ca.crt"],
            "group": self.group_key or credentials["group_keys"][0],
            "service": release.secret(f"{NAME}-connections")["operator.connection"],
        }
        for file, text in contents.items():
            (self.folder / file).write_text(text)
        hosts = {f"{NAME}-{role}.{release.namespace}.svc": release.service_address(role) for role in ("control", "edge")}
        env = os.environ | {
            # There is memory enough, and k6 takes half of the machine.
            "GOGC": "400",
            "SSL_CERT_FILE": str(self.folder / "ca"),
            "LOAD_SERVICE_FILE": str(self.folder / "service"),
            "LOAD_GROUP_KEY_FILE": str(self.folder / "group"),
            "LOAD_WHILE": f"http://127.0.0.1:{PORT}/{self.name}",
            "LOAD_HOSTS": ",".join(f"{host}={address}" for host, address in hosts.items()),
            **{key: str(value) for key, value in self.settings.items()},
        }
        self.summary, self.log = KEPT / f"{self.name}.json", KEPT / f"{self.name}.log"
        KEPT.mkdir(parents=True, exist_ok=True)
        words = [
            *network.within(cluster.network), cluster.tools.program("k6"), "run", "--quiet", "--no-usage-report",
            "--summary-export", self.summary, SCRIPTS / self.script,
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env
            )
        return self

    def __exit__(self, *_):
        if self.runs():
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(timeout=10)

    def runs(self):
        return self.process.poll() is None

    def must_run(self):
        """What was done under load must be done before the load has ended."""
        if not self.runs():
            raise Failed(f"the load has ended too early, with {self.process.returncode}: {self.said()}")

    def wait_for_streams(self):
        """Waits until all that are to be held are there; from then on short ones come at their rate."""
        count = self.settings["LOAD_STREAMS"]

        def enough():
            self.must_run()
            return streams(self.release) >= count

        until(f"{count} streams are joined", enough, timeout=120, pause=0.5)
        self.stood = time.monotonic()

    def finish(self, timeout=180):
        """Ends the run when what is under way has come to its end, and gives its figures by name."""
        self.must_run()
        self.wanted.unlink()
        self.seconds = time.monotonic() - self.stood
        try:
            self.process.wait(timeout=timeout)
        except subprocess.TimeoutExpired as expired:
            raise Failed(f"k6 has not ended after {timeout} s more: {self.said()}") from expired
        # 99: a threshold was crossed, which the scenario judges by the figures.
        if self.process.returncode not in (0, 99):
            raise Failed(f"k6 ended with {self.process.returncode}: {self.said()}")
        return json.loads(self.summary.read_text())["metrics"]

    def said(self):
        """The first complaints of k6, and the thresholds that were crossed."""
        lines = self.log.read_text(errors="replace").splitlines()
        complaints = [line for line in lines if line.startswith("time=")]
        return "\n".join([*complaints[:20], *(line for line in lines if "\u2717" in line), f"at length: {self.log}"])


def count(figures, name):
    return int(figures.get(f"midspan_{name}", {}).get("count", 0))


def must_be_clean(load, figures):
    """Nothing failed, and nothing was cut that should not have been."""
    if not count(figures, "streams"):
        raise Failed(f"there was no load: {load.said()}")
    wrong = {name: count(figures, name) for name in ("failed_initiations", "cut_streams", "wrong_echoes")}
    if any(wrong.values()):
        raise Failed(f"{wrong}: {load.said()}")
    least = load.settings["LOAD_STREAMS"] + 0.99 * load.settings["LOAD_RATE"] * load.seconds
    if count(figures, "streams") < least:
        raise Failed(f"{count(figures, 'streams')} streams, and not {least:.0f}: {load.said()}")
    if load.process.returncode != 0:
        raise Failed(f"a threshold was crossed: {load.said()}")


def told(figures):
    """The figures that a report shows."""
    shown = ("streams", "failed_initiations", "cut_streams", "drained_streams", "retries", "held_streams")
    texts = [f"{count(figures, name)} {name.replace('_', ' ')}" for name in shown]
    for name in ("handshake", "echo"):
        if f"midspan_{name}" in figures:
            texts.append(f"{name} p95 {figures[f'midspan_{name}']['p(95)']:.0f} ms")
    return texts


def metric(text, name, **labels):
    """The sum of a metric's samples whose labels are these."""
    total = 0.0
    for line in text.splitlines():
        match = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
        if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
            total += float(match[2])
    return total


def metrics_of(release, pod):
    """What the admin port of a pod says."""
    path = f"/api/v1/namespaces/{release.namespace}/pods/{pod['metadata']['name']}:9090/proxy/metrics"
    return release.cluster.kubectl("get", "--raw", path, timeout=20)


def streams(release):
    """Joined streams of all edges."""
    return sum(metric(metrics_of(release, pod), "midspan_edge_streams", state="joined") for pod in release.ready("edge"))
