"""The chart in a namespace of the cluster, installed with the real helm."""

import base64
import os

from commands import Failed, until
from tools import REPOSITORY

CHART = REPOSITORY / "helm/midspan"
NAME = "midspan"
# Time for pods to be ready on a machine that does other things as well.
PATIENCE = 240


class Release:
    """A release of the chart in a namespace of its own, by one of the two helms."""

    def __init__(self, cluster, namespace, helm="helm4"):
        self.cluster, self.namespace, self.program = cluster, namespace, cluster.tools.program(helm)

    def make_namespace(self):
        """The namespace refuses every pod that is not restricted."""
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        self.cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace, "labels": labels}})
        # No pod is taken before.
        until("the namespace has its account", lambda: self.get("serviceaccount", "default"))

    def helm(self, *words, timeout=PATIENCE + 60, **options):
        home = self.cluster.folder / "helm"
        env = os.environ | {
            "KUBECONFIG": str(self.cluster.kubeconfig),
            "KUBECACHEDIR": str(home),
            **{f"HELM_{kind}_HOME": str(home) for kind in ("CACHE", "CONFIG", "DATA")},
        }
        return self.cluster.within(self.program, "--namespace", self.namespace, *words, timeout=timeout, env=env, **options)

    def install(self, *values):
        return self.helm("install", NAME, CHART, "--wait", f"--timeout={PATIENCE}s", *values)

    def upgrade(self, *values):
        return self.helm("upgrade", NAME, CHART, "--wait", f"--timeout={PATIENCE}s", *values)

    def test(self):
        return self.helm("test", NAME, f"--timeout={PATIENCE}s")

    def kubectl(self, *words, **options):
        return self.cluster.kubectl("--namespace", self.namespace, *words, **options)

    def get(self, *words):
        return self.cluster.get("--namespace", self.namespace, *words)

    def secret(self, name):
        """The contents of a Secret as texts."""
        data = self.get("secret", name).get("data", {})
        return {key: base64.b64decode(value).decode() for key, value in data.items()}

    def service_address(self, role):
        return self.get("service", f"{NAME}-{role}")["spec"]["clusterIP"]

    def pods(self, role):
        """The pods of a role that are not on their way out."""
        items = self.get("pods", "--selector", f"app.kubernetes.io/component={role}")["items"]
        return [pod for pod in items if "deletionTimestamp" not in pod["metadata"]]

    def ready(self, role):
        return [pod for pod in self.pods(role) if is_ready(pod)]

    def wait_for(self, role, count):
        """Waits until exactly so many pods of a role are there, and are ready."""

        def as_wanted():
            return len(self.ready(role)) == len(self.pods(role)) == count

        until(f"{count} pods of {role} are ready", as_wanted, timeout=PATIENCE, pause=0.5)

    def rolled_out(self, role):
        self.kubectl("rollout", "status", f"deployment/{NAME}-{role}", f"--timeout={PATIENCE}s", timeout=PATIENCE + 30)

    def gone(self, names, timeout=PATIENCE):
        """Waits until none of these pods is left."""

        def left():
            return [pod for pod in self.get("pods")["items"] if pod["metadata"]["name"] in names]

        until(f"{', '.join(names)} have ended", lambda: not left(), timeout=timeout, pause=0.5)

    def scale(self, role, count):
        self.kubectl("scale", f"deployment/{NAME}-{role}", f"--replicas={count}")
        self.wait_for(role, count)


def is_ready(pod):
    conditions = pod["status"].get("conditions", [])
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def names(pods):
    return [pod["metadata"]["name"] for pod in pods]


def the_release(cluster):
    """The release that most scenarios share, installed with defaults by whoever comes first."""
    release = Release(cluster, "relay")
    try:
        release.get("deployment", f"{NAME}-edge")
    except Failed:
        release.make_namespace()
        release.install()
    return release
