"""checkov and kube-score find nothing that exceptions.yaml does not explain."""

import json
import pathlib
import subprocess
import tempfile
import unittest

import yaml

from chart import CHART, RENDERED_ONLY, TOOLS, rendered

EXCEPTIONS = yaml.safe_load((pathlib.Path(__file__).parent / "exceptions.yaml").read_text())


class Hardening(unittest.TestCase):
    maxDiff = None

    def test_checkov(self):
        excepted = {(it["checkov"], name) for it in EXCEPTIONS if "checkov" in it for name in it["at"]}
        self.assertEqual(checkov(rendered(RENDERED_ONLY)), excepted)

    def test_checkov_where_traffic_comes_from_outside(self):
        excepted = {(it["checkov"], name) for it in EXCEPTIONS if "checkov" in it for name in it["at"]}
        for file in ("ingress-one-host", "balancer-owner"):
            with self.subTest(values=file):
                self.assertLessEqual(checkov(rendered(CHART / "ci" / f"{file}.yaml")), excepted)

    def test_kube_score(self):
        excepted = {(it["kube-score"], name) for it in EXCEPTIONS if "kube-score" in it for name in it["at"]}
        self.assertEqual(kube_score(rendered(RENDERED_ONLY)), excepted)

    def test_kube_score_where_traffic_comes_from_outside(self):
        excepted = {(it["kube-score"], name) for it in EXCEPTIONS if "kube-score" in it for name in it["at"]}
        for file in ("ingress-one-host", "balancer-owner", "autoscaling"):
            with self.subTest(values=file):
                self.assertLessEqual(kube_score(rendered(CHART / "ci" / f"{file}.yaml")), excepted)

    def test_they_find_what_is_wrong(self):
        documents = json.loads(json.dumps(rendered(RENDERED_ONLY)))
        deployment = next(it for it in documents if it["kind"] == "Deployment" and it["metadata"]["name"] == "m-edge")
        deployment["spec"]["template"]["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] = False
        self.assertIn(("CKV_K8S_22", "m-edge"), checkov(documents))
        self.assertIn(("container-security-context-readonlyrootfilesystem", "m-edge"), kube_score(documents))


def checkov(documents):
    command = [TOOLS / "venv" / "bin" / "checkov", "--framework", "kubernetes", "--skip-download", "--quiet", "--output", "json", "--file"]
    found = json.loads(run(command, documents))
    return {(it["check_id"], it["resource"].rsplit(".", 1)[-1]) for it in found["results"]["failed_checks"]}


def kube_score(documents):
    found = json.loads(run([TOOLS / "bin" / "kube-score", "score", "--kubernetes-version", "v1.33", "--output-format", "json"], documents))
    return {
        (check["check"]["id"], it["object_name"].rsplit("/", 1)[-1])
        for it in found
        for check in it["checks"] or []
        if not check["skipped"] and check["grade"] < 10
    }


def run(command, documents):
    """Both end with 1 when they find something."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "manifests.yaml"
        file.write_text(yaml.safe_dump_all(documents, sort_keys=False))
        ran = subprocess.run([*command, file.name], cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        if ran.returncode not in (0, 1):
            raise RuntimeError(ran.stderr)
        return ran.stdout


if __name__ == "__main__":
    unittest.main()
