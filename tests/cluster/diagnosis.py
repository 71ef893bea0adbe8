"""What one wants to know of a cluster in which something went wrong, gathered before it is taken down."""

import shutil

from commands import Failed


def tell(cluster, folder):
    """Prints events and the ends of the pods' logs; everything at length goes into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, words in {
        "pods": ["get", "pods", "--all-namespaces", "--output", "wide"],
        "events": ["get", "events", "--all-namespaces", "--sort-by=.lastTimestamp"],
        "descriptions": ["describe", "pods,deployments,services,endpointslices,hpa,pdb", "--all-namespaces"],
    }.items():
        _gather(cluster, folder / f"{name}.txt", words, printed=name != "descriptions")
    try:
        pods = cluster.get("pods", "--all-namespaces")["items"]
    except Failed as failure:
        print(failure)
        pods = []
    for pod in pods:
        meta = pod["metadata"]
        words = ["logs", "--namespace", meta["namespace"], meta["name"], "--all-containers", "--tail=2000"]
        _gather(cluster, folder / f"{meta['name']}.log", words, printed=True)
        _gather(cluster, folder / f"{meta['name']}-before.log", [*words, "--previous"], printed=True)
    for log in cluster.folder.glob("*.log"):
        shutil.copy(log, folder / f"server-{log.name}")
    print(f"at length: {folder}", flush=True)


def _gather(cluster, path, words, printed):
    try:
        text = cluster.kubectl(*words, timeout=30)
    except Failed as failure:
        # Most containers have no life before this one.
        if "previous terminated container" in str(failure):
            return
        text = str(failure)
    path.write_text(text)
    if printed:
        print(f"--- {path.name}\n" + "\n".join(text.splitlines()[-40:]), flush=True)
