"""Installed with defaults into a namespace that takes restricted pods only, the relay carries a stream."""

import json

from commands import Failed
from release import Release, names


def scenario(cluster, steps):
    release = Release(cluster, "relay")
    release.make_namespace()
    with steps("a pod that may gain privileges is refused, so the namespace is restricted"):
        refuses_what_is_not_restricted(release)
    with steps("helm install with defaults") as figures:
        release.install()
        pods = release.get("pods")["items"]
        figures.append(f"{len(pods)} pods")
        restarts = [status["restartCount"] for pod in pods for status in pod["status"]["containerStatuses"]]
        if any(restarts):
            raise Failed(f"containers were started again: {names(pods)} {restarts}")
    with steps("helm test opens a stream and echoes through it"):
        said = release.test()
        if "Succeeded" not in said:
            raise Failed(said)


def refuses_what_is_not_restricted(release):
    container = {"name": "c", "image": "none", "securityContext": {"allowPrivilegeEscalation": True}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "loose"}, "spec": {"containers": [container]}}
    try:
        release.kubectl("create", "--filename", "-", stdin=json.dumps(pod))
    except Failed as refusal:
        if "violates PodSecurity" not in str(refusal):
            raise
    else:
        raise Failed("it was taken")
