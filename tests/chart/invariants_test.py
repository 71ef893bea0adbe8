"""What holds for every set of values."""

import functools
import unittest

from chart import MATRIX, containers, of_kind, pods, rendered


def for_every_set_of_values(test):
    @functools.wraps(test)
    def run(self):
        for file in MATRIX:
            with self.subTest(values=file.name):
                test(self, rendered(file))

    return run


class Invariants(unittest.TestCase):
    @for_every_set_of_values
    def test_an_autoscaler_owns_the_replicas_alone(self, documents):
        scaled = {it["spec"]["scaleTargetRef"]["name"] for it in documents if it["kind"] == "HorizontalPodAutoscaler"}
        for name, deployment in of_kind(documents, "Deployment").items():
            self.assertEqual("replicas" in deployment["spec"], name not in scaled, name)

    @for_every_set_of_values
    def test_pods_have_time_to_drain(self, documents):
        for name, (labels, spec) in pods(documents).items():
            if labels["app.kubernetes.io/component"] in ("control", "edge"):
                flags = dict(it[2:].split("=", 1) for it in spec["containers"][0]["args"][1:] if "=" in it)
                drain = sum(int(flags[it].removesuffix("s")) for it in ("drain-delay", "drain-grace"))
                self.assertGreaterEqual(spec["terminationGracePeriodSeconds"], drain + 36, name)

    @for_every_set_of_values
    def test_pods_keep_the_restricted_standard(self, documents):
        for name, (_, spec) in pods(documents).items():
            self.assertTrue(spec["securityContext"]["runAsNonRoot"], name)
            self.assertEqual(spec["securityContext"]["seccompProfile"], {"type": "RuntimeDefault"}, name)
            self.assertTrue({next(iter(it.keys() - {"name"})) for it in spec["volumes"]} <= {"secret", "emptyDir"}, name)
            for container in containers(spec):
                expected = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
                self.assertEqual(container["securityContext"], expected, name)

    @for_every_set_of_values
    def test_pods_get_nothing_that_they_do_not_need(self, documents):
        watching = "RoleBinding" in {it["kind"] for it in documents}
        for name, (labels, spec) in pods(documents).items():
            control = labels["app.kubernetes.io/component"] == "control"
            self.assertFalse(spec["enableServiceLinks"], name)
            self.assertEqual(spec["automountServiceAccountToken"], control and watching, name)
            # Each Secret file by name: no key of a CA, no credentials at an edge.
            files = {item["key"] for volume in spec["volumes"] for item in volume.get("secret", {}).get("items", [])}
            self.assertEqual("credentials.json" in files, control, name)
            self.assertFalse({"ca.key", "internal-ca.key"} & files, name)
            self.assertTrue(all(volume["secret"]["items"] for volume in spec["volumes"] if "secret" in volume), name)

    @for_every_set_of_values
    def test_the_control_plane_may_watch_edges_and_nothing_else(self, documents):
        for role in of_kind(documents, "Role", "ClusterRole").values():
            self.assertEqual(role["kind"], "Role")
            rules = [{"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]}]
            self.assertEqual(role["rules"], rules)

    @for_every_set_of_values
    def test_no_secret_is_an_argument_or_a_variable(self, documents):
        for name, (_, spec) in pods(documents).items():
            for container in containers(spec):
                for variable in container.get("env", []):
                    self.assertIn("fieldRef", variable["valueFrom"], name)

    @for_every_set_of_values
    def test_no_definition_comes_along(self, documents):
        self.assertNotIn("CustomResourceDefinition", {it["kind"] for it in documents})

    @for_every_set_of_values
    def test_every_port_that_is_named_exists(self, documents):
        deployed = pods(documents).values()
        for name, service in of_kind(documents, "Service").items():
            selector = service["spec"]["selector"].items()
            chosen = [spec for labels, spec in deployed if selector <= labels.items()]
            self.assertEqual(len(chosen), 1, name)
            ports = {port["name"] for port in chosen[0]["containers"][0]["ports"]}
            self.assertTrue({port["targetPort"] for port in service["spec"]["ports"]} <= ports, name)

    @for_every_set_of_values
    def test_every_secret_that_is_mounted_exists(self, documents):
        own = {"midspan-redis-credentials", "own-credentials", "own-connections", "own-deny-list", "own-internal-control"}
        own |= {"own-internal-edge", "own-redis", "own-ticket-key", "own-tls"}
        made = set(of_kind(documents, "Secret"))
        made |= {it["spec"]["secretName"] for it in of_kind(documents, "Certificate").values()}
        for name, (_, spec) in pods(documents).items():
            for volume in spec["volumes"]:
                if "secret" in volume:
                    self.assertIn(volume["secret"]["secretName"], made | own, name)


if __name__ == "__main__":
    unittest.main()
