"""Upgrade and rollback keep the keys; uninstalling leaves nothing but the Secret that is annotated to stay."""

from commands import Failed, until
from images import NEXT_TAG
from release import NAME, Release

KEYS = f"{NAME}-keys"
# What Kubernetes itself puts into a namespace.
BELONGS = {"configmap/kube-root-ca.crt", "serviceaccount/default"}


def scenario(cluster, steps):
    for helm in ("helm3", "helm4"):
        release = Release(cluster, f"upgrade-{helm}", helm)
        release.make_namespace()
        with steps(f"{helm}: upgrade and rollback keep the keys") as figures:
            release.install()
            keys = release.secret(KEYS)
            figures.append(f"{len(keys)} keys")
            for change in (
                lambda: release.upgrade("--set", f"image.tag={NEXT_TAG}", "--set", "edge.drain.graceSeconds=5"),
                lambda: release.helm("rollback", NAME, "1", "--wait", "--timeout=240s"),
            ):
                change()
                if release.secret(KEYS) != keys:
                    raise Failed(f"the keys are others after {release.helm('history', NAME)}")
            release.test()
        with steps(f"{helm}: uninstall leaves the keys, and nothing else"):
            release.helm("uninstall", NAME, "--wait", "--timeout=240s")
            until("only the keys are left", lambda: leaves_only_the_keys(release), timeout=120, pause=1)
            if release.secret(KEYS) != keys:
                raise Failed("the keys that stayed are others")
            annotations = release.get("secret", KEYS)["metadata"]["annotations"]
            if annotations.get("helm.sh/resource-policy") != "keep":
                raise Failed(f"the keys stay, but nothing says so: {annotations}")
        cluster.kubectl("delete", "namespace", release.namespace, "--timeout=120s", timeout=150)


def leaves_only_the_keys(release):
    """All objects of all kinds in the namespace, but events and what tells of pods that were."""
    kinds = release.cluster.kubectl("api-resources", "--namespaced", "--verbs=list", "--output=name").split()
    kinds = [kind for kind in kinds if not kind.startswith(("events", "pods.metrics"))]
    found = set(release.kubectl("get", ",".join(kinds), "--output=name").split())
    extra = found - BELONGS - {f"secret/{KEYS}"}
    if extra:
        raise Failed(f"left: {', '.join(sorted(extra))}")
    return f"secret/{KEYS}" in found
