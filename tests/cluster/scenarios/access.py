"""The relay's accounts may do what they must and nothing else; a real API server takes every manifest that the chart can make."""

from concurrent.futures import ThreadPoolExecutor

import tools
from commands import Failed, run
from release import CHART, NAME, the_release

# How many calls judge the manifests, at the same time.
PARTS = 3
# What a control plane may do in its own namespace: follow the edges.
FOLLOW = {"endpointslices.discovery.k8s.io": {"get", "list", "watch"}}
# What Kubernetes lets everybody ask: who am I, what may I do.
EVERYBODY = {
    "selfsubjectreviews.authentication.k8s.io",
    "selfsubjectaccessreviews.authorization.k8s.io",
    "selfsubjectrulesreviews.authorization.k8s.io",
}


def scenario(cluster, steps):
    release = the_release(cluster)
    with steps("accounts may do what they must, and nothing else") as figures:
        accounts = {role: account(release, role) for role in ("control", "edge", "redis")}
        for role, name in accounts.items():
            expected = FOLLOW if role == "control" else {}
            seen = allowed(release, name)
            if seen != expected:
                raise Failed(f"{role} ({name}) may {seen}, and needs {expected}")
        figures.append(", ".join(f"{role}: {len(allowed(release, name))} rules" for role, name in accounts.items()))
    with steps("only control planes have a token"):
        for role in accounts:
            for pod in release.pods(role):
                if has_token(pod) and role != "control":
                    raise Failed(f"{pod['metadata']['name']} has a token")
    with steps("the real API server takes every manifest of helm/midspan/ci, with the real definitions") as figures:
        figures.append(dry_run(cluster))


def account(release, role):
    return release.pods(role)[0]["spec"].get("serviceAccountName", "default")


def allowed(release, name):
    """What `kubectl auth can-i --list` says of an account, without what everybody may."""
    who = f"system:serviceaccount:{release.namespace}:{name}"
    lines = release.kubectl("auth", "can-i", "--list", f"--as={who}", "--no-headers").splitlines()
    rules = {}
    for line in lines:
        resource, _, rest = line.partition(" ")
        if resource and resource not in EVERYBODY:
            verbs = rest.rpartition("[")[2].rstrip("] ").split()
            rules[resource] = rules.get(resource, set()) | set(verbs)
    return rules


def has_token(pod):
    volumes = pod["spec"].get("volumes", [])
    sources = [source for volume in volumes for source in volume.get("projected", {}).get("sources", [])]
    return any("serviceAccountToken" in source for source in sources)


def dry_run(cluster):
    """Renders the chart with each file of values, and has the API server judge what comes out."""
    for name in tools.DEFINITIONS:
        cluster.kubectl("apply", "--server-side", "--filename", cluster.tools.definitions(name), timeout=120)
    cluster.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s", timeout=90)
    namespace = "dry-run"
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    files = [*sorted((CHART / "ci").glob("*.yaml")), CHART / "values-ha.yaml"]
    folder = cluster.folder / "rendered"
    folder.mkdir()
    # A few calls, since each kubectl asks first what there is.
    parts = [files[first::PARTS] for first in range(PARTS)]
    with ThreadPoolExecutor(PARTS) as pool:
        objects = sum(pool.map(lambda part: judged(cluster, namespace, part, folder), parts))
    return f"{len(files)} files of values, {objects} objects"


def judged(cluster, namespace, files, folder):
    """How many objects the API server would take of the chart with each of these files of values."""
    # What a chart needs that is rendered only, below what each file is about.
    ground = CHART / "ci/rendered-only.yaml"
    words = []
    for values in files:
        rendered = run(
            cluster.tools.program("helm4"), "template", NAME, CHART, "--namespace", namespace,
            "--values", ground, "--values", values, "--kube-version", tools.KUBERNETES,
        )  # fmt: skip
        (folder / values.name).write_text(rendered)
        words += ["--filename", folder / values.name]
    taken = cluster.kubectl(
        "apply", "--server-side", "--dry-run=server", "--namespace", namespace, "--output=name", *words, timeout=240
    )
    return len(taken.split())
