"""Upgrade and rollback keep the keys; uninstalling leaves nothing but the Secret that is annotated to stay."""

from concurrent.futures import ThreadPoolExecutor

from commands import Failed, until
from images import NEXT_TAG
from release import NAME, PATIENCE, Release
from rotation import QUICKLY, rotate

KEYS = f"{NAME}-keys"
# What Kubernetes itself puts into a namespace.
BELONGS = {"configmap/kube-root-ca.crt", "serviceaccount/default"}


def scenario(cluster, steps):
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda helm: try_with(cluster, steps, helm), ("helm3", "helm4")))
    release = Release(cluster, "upgrade-helm4", "helm4")
    with steps("the keys are changed under load, by the documented commands") as figures:
        rotate(release, figures)
    for helm in ("helm3", "helm4"):
        cluster.kubectl("delete", "namespace", f"upgrade-{helm}", "--wait=false")


def try_with(cluster, steps, helm):
    """The life of a release in a namespace of its own."""
    release = Release(cluster, f"upgrade-{helm}", helm)
    release.make_namespace()
    with steps(f"{helm}: upgrade and rollback keep the keys") as figures:
        release.install()
        keys = release.secret(KEYS)
        figures.append(f"{len(keys)} keys")
        release.upgrade("--set", f"image.tag={NEXT_TAG}", "--set", "edge.drain.graceSeconds=5")
        must_have(release, keys)
        release.helm("rollback", NAME, "1", "--wait", f"--timeout={PATIENCE}s")
        must_have(release, keys)
        release.test()
    with steps(f"{helm}: uninstall leaves the keys, and nothing else"):
        release.helm("uninstall", NAME, "--wait", f"--timeout={PATIENCE}s")
        until("only the keys are left", lambda: has_only_the_keys(release), timeout=120, pause=1)
        must_have(release, keys)
        annotations = release.get("secret", KEYS)["metadata"]["annotations"]
        if annotations.get("helm.sh/resource-policy") != "keep":
            raise Failed(f"the keys stay, but nothing says so: {annotations}")
    with steps(f"{helm}: an install after that finds the keys, and uses them"):
        release.install(*QUICKLY)
        must_have(release, keys)


def must_have(release, keys):
    if release.secret(KEYS) != keys:
        raise Failed(f"the keys are others after {release.helm('history', NAME, check=False)}")


def has_only_the_keys(release):
    """Looks at all objects of all kinds in the namespace, but events and what tells of pods that were."""
    kinds = release.cluster.kubectl("api-resources", "--namespaced", "--verbs=list", "--output=name").split()
    kinds = [kind for kind in kinds if not kind.startswith(("events", "pods.metrics"))]
    found = set(release.kubectl("get", ",".join(kinds), "--output=name").split())
    extra = found - BELONGS - {f"secret/{KEYS}"}
    if extra:
        raise Failed(f"left: {', '.join(sorted(extra))}")
    return f"secret/{KEYS}" in found
