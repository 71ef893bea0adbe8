"""Renders the chart with the real Helm 3 and Helm 4."""

import functools
import os
import pathlib
import subprocess
import tempfile

import yaml

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CHART = REPOSITORY / "helm" / "midspan"
TOOLS = pathlib.Path(os.environ["MIDSPAN_CHART_TOOLS"])
HELMS = {name: TOOLS / "bin" / name for name in ("helm3", "helm4")}
# Names every Secret, so that nothing has to be made; the other sets of values stand on it.
RENDERED_ONLY = CHART / "ci" / "rendered-only.yaml"
# What users may render: each file of the matrix, and the examples.
MATRIX = sorted(path for path in (*CHART.glob("ci/*.yaml"), CHART / "values-ha.yaml"))


class Refused(Exception):
    """Helm would not render; its message."""


def helm(name, *arguments):
    ran = subprocess.run([HELMS[name], *arguments], capture_output=True, text=True, timeout=120, check=False)
    if ran.returncode:
        raise Refused(ran.stderr + ran.stdout)
    return ran.stdout


def render(*files, values=None, name="helm4", extra=()):
    """The manifests of a release `m` in the namespace `relay`, as a list of documents."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as own:
        yaml.safe_dump(values or {}, own)
        own.flush()
        arguments = [word for file in (*files, own.name) for word in ("--values", str(file))]
        output = helm(name, "template", "m", str(CHART), "--namespace", "relay", *arguments, *extra)
    return [document for document in yaml.safe_load_all(output) if document]


@functools.cache
def rendered(file, name="helm4"):
    """The manifests of one set of values of the matrix; not to be changed."""
    return render(RENDERED_ONLY, file, name=name)


def of_kind(documents, *kinds):
    return {document["metadata"]["name"]: document for document in documents if document["kind"] in kinds}


def pods(documents):
    """The pods that the manifests ask for: name -> (labels, spec)."""
    found = {}
    for document in documents:
        if document["kind"] == "Pod":
            found[document["metadata"]["name"]] = (document["metadata"]["labels"], document["spec"])
        elif document["kind"] == "Deployment":
            template = document["spec"]["template"]
            found[document["metadata"]["name"]] = (template["metadata"]["labels"], template["spec"])
    return found


def containers(spec):
    return [*spec.get("initContainers", []), *spec["containers"]]


def paths(values, start=""):
    """The names of all values, with dots."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from paths(value, f"{start}{key}.")
        else:
            yield start + key
