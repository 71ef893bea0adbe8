"""Every switch of the chart makes manifests that Kubernetes takes, the same ones with Helm 3 and Helm 4."""

import copy
import functools
import json
import unittest

import jsonschema
import kubernetes_validate
import yaml

from chart import CHART, HELMS, MATRIX, RENDERED_ONLY, TOOLS, helm, of_kind, paths, rendered

KUBERNETES = ("1.33", "1.34", "1.35", "1.36", "1.37")
CUSTOM = ("cert-manager.io", "gateway.networking.k8s.io", "monitoring.coreos.com")


class Rendering(unittest.TestCase):
    def test_both_helms_find_no_fault(self):
        for name in HELMS:
            for file in MATRIX:
                with self.subTest(helm=name, values=file.name):
                    helm(name, "lint", "--strict", str(CHART), "--values", str(RENDERED_ONLY), "--values", str(file))

    def test_both_helms_make_the_same(self):
        for file in MATRIX:
            with self.subTest(values=file.name):
                by_name = lambda documents: sorted(documents, key=lambda it: (it["kind"], it["metadata"]["name"]))
                self.assertEqual(by_name(rendered(file, "helm3")), by_name(rendered(file, "helm4")))

    def test_kubernetes_takes_it(self):
        # Most manifests are the same in many sets of values.
        distinct = {json.dumps(it): it for file in MATRIX for it in rendered(file) if not is_custom(it)}
        for document in distinct.values():
            for version in KUBERNETES:
                with self.subTest(version=version, kind=document["kind"], name=document["metadata"]["name"]):
                    kubernetes_validate.validate(copy.deepcopy(document), version, strict=True)

    def test_operators_take_it(self):
        schemas = custom_schemas()
        seen = set()
        for file in MATRIX:
            for document in rendered(file):
                if is_custom(document):
                    kind = document["kind"]
                    seen.add(kind)
                    with self.subTest(values=file.name, kind=kind):
                        jsonschema.validate(document, schemas[(document["apiVersion"], kind)])
        self.assertEqual(seen, {"BackendTLSPolicy", "Certificate", "HTTPRoute", "ServiceMonitor", "TLSRoute"})

    def test_a_schema_refuses_a_typing_error(self):
        routes = of_kind(rendered(CHART / "ci" / "gateway-one-host.yaml"), "HTTPRoute")
        route = copy.deepcopy(routes["m-control"])
        route["spec"]["rules"][0]["timeout"] = "0s"
        with self.assertRaises(jsonschema.ValidationError):
            jsonschema.validate(route, custom_schemas()[(route["apiVersion"], "HTTPRoute")])

    def test_the_matrix_turns_every_switch(self):
        everything = yaml.safe_load((CHART / "values.yaml").read_text())
        turned = set()
        for file in MATRIX:
            turned |= set(paths(yaml.safe_load(file.read_text()) or {}))
        # What only names or sizes something.
        plain = {
            "control.drain", "edge.drain",
            "image.repository", "image.tag", "redis.image.repository", "redis.image.tag", "redis.image.pullPolicy", "redis.command",
            "redis.maxMemory", "redis.prefix", "redis.passwordKey", "redis.resources", "logs.level", "logs.format", "serviceMonitor.interval",
            "edge.maxStreams", "test.caSecret", "networkPolicy.publicFrom", "networkPolicy.redisPorts", "networkPolicy.apiServerTo",
            "internalTls.certManager.kind",
        }
        missing = {path for path in paths(everything) if not any(it == path or it.startswith(path + ".") for it in turned)}
        missing = {path for path in missing if not any(path == it or path.startswith(it + ".") for it in plain)}
        self.assertEqual(missing, set())


def is_custom(document):
    return document["apiVersion"].split("/")[0] in CUSTOM


@functools.cache
def custom_schemas():
    """The schemas in the operators' own definitions: (apiVersion, kind) -> a strict JSON schema."""
    schemas = {}
    for file in (TOOLS / "crds").glob("*.yaml"):
        crd = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        for version in crd["spec"]["versions"]:
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            schemas[(f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"])] = schema
    return schemas


def strict(schema):
    """As the API server reads it, but unknown fields are errors."""
    if isinstance(schema, list):
        return [strict(it) for it in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "properties" in schema and isinstance(schema["properties"], dict) and "additionalProperties" not in schema:
        schema.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return schema


if __name__ == "__main__":
    unittest.main()
