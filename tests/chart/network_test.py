"""The NetworkPolicies allow the connections that the relay needs, each of them, and no other."""

import unittest

from chart import CHART, RENDERED_ONLY, render
from network import End, allowed, ends, passes

INTERNET = End("internet", address="203.0.113.7")
API_SERVER = End("api-server", address="172.16.0.1")
STRANGER = End("stranger", "relay", (("app", "shop"),))
PROMETHEUS = End("prometheus", "monitoring", (("app", "prometheus"),))
OTHER_REDIS = End("other-redis", "redis", (("app", "redis"),), (("redis", 6379),))
OUTSIDE = (INTERNET, API_SERVER, STRANGER, PROMETHEUS, OTHER_REDIS)
# All ports of the relay, and those of what may stand beside it.
PORTS = (22, 53, 80, 443, 6379, 6443, 7000, 8080, 8443, 8444, 8445, 8446, 8447, 9090, 26379)
RELAY = ("control", "edge", "redis", "test")

# Into the relay: (from, to, port). The public ports are for everybody.
PUBLIC = {(source, target, port) for source in ("internet", "api-server", "stranger", "prometheus", "other-redis") for target, port in (("control", 8443), ("edge", 8444))}
INTERNAL = {("control", "control", 8446), ("control", "edge", 8445), ("edge", "edge", 8445)}
BUNDLED_REDIS = {("control", "redis", 6379), ("edge", "redis", 6379)}
TEST = {("test", "control", 8443), ("test", "edge", 8444)}
OWNER = {("edge", "edge", 8447)}


def out(source, ports, targets=OUTSIDE):
    """Out of the relay. What is not of the relay lets everything in."""
    return {(source, target.name, port) for target in targets for port in ports}


DNS = {it for source in ("control", "edge", "test") for it in out(source, [53])}
TO_API_SERVER = out("control", [443, 6443])


class Connections(unittest.TestCase):
    maxDiff = None

    def check(self, expected, *files, values=None):
        documents = render(RENDERED_ONLY, *files, values=values)
        everybody = [*ends(documents), *OUTSIDE]
        found = {
            (source.name, target.name, port)
            for source in everybody
            for target in everybody
            for port in PORTS
            if {source.name, target.name} & set(RELAY) and allowed(documents, source, target, port)
        }
        self.assertEqual(found, expected)

    def test_by_default(self):
        self.check(PUBLIC | INTERNAL | BUNDLED_REDIS | TEST | DNS | TO_API_SERVER)

    def test_without_the_api_server(self):
        self.check(PUBLIC | INTERNAL | BUNDLED_REDIS | TEST | DNS, values={"endpointSlices": {"enabled": False}})

    def test_with_an_api_server_that_is_named(self):
        values = {"networkPolicy": {"apiServerTo": [{"ipBlock": {"cidr": "172.16.0.1/32"}}]}}
        self.check(PUBLIC | INTERNAL | BUNDLED_REDIS | TEST | DNS | out("control", [443, 6443], [API_SERVER]), values=values)

    def test_with_the_owner_in_the_name(self):
        expected = PUBLIC | INTERNAL | OWNER | BUNDLED_REDIS | TEST | DNS | TO_API_SERVER | out("test", [443])
        self.check(expected, CHART / "ci" / "balancer-owner.yaml")

    def test_metrics_are_for_those_who_are_named(self):
        expected = PUBLIC | INTERNAL | BUNDLED_REDIS | TEST | DNS | TO_API_SERVER
        expected |= {("prometheus", "control", 9090), ("prometheus", "edge", 9090)}
        self.check(expected, CHART / "ci" / "autoscaling.yaml")

    def test_a_redis_behind_sentinels_that_is_named(self):
        expected = PUBLIC | INTERNAL | TEST | DNS | TO_API_SERVER
        expected |= {it for source in ("control", "edge") for it in out(source, [6379, 26379], [OTHER_REDIS])}
        self.check(expected, CHART / "ci" / "redis-sentinel.yaml")

    def test_a_redis_cluster_anywhere(self):
        expected = PUBLIC | INTERNAL | TEST | DNS | TO_API_SERVER
        expected |= {it for source in ("control", "edge") for it in out(source, [7000])}
        self.check(expected, CHART / "ci" / "redis-cluster.yaml")

    def test_a_public_port_for_those_who_are_named(self):
        expected = {it for it in PUBLIC if it[0] == "internet"} | INTERNAL | BUNDLED_REDIS | TEST | DNS | TO_API_SERVER
        # Those of the relay are not named either.
        expected -= TEST
        self.check(expected, values={"networkPolicy": {"publicFrom": [{"ipBlock": {"cidr": "203.0.113.0/24"}}]}})

    def test_neither_end_allows_more_than_the_other_needs(self):
        documents = render(RENDERED_ONLY, CHART / "ci" / "balancer-owner.yaml")
        relay = ends(documents)
        # What is open to or from everybody, and so to those of the relay.
        everybody = {"Egress": {53, 443, 6443}, "Ingress": {8443, 8444}}
        needed = INTERNAL | OWNER | BUNDLED_REDIS | TEST
        for direction, ports in everybody.items():
            found = {
                (source.name, target.name, port)
                for source in relay
                for target in relay
                for port in PORTS
                if port not in ports and passes(documents, direction, source, target, port)
            }
            self.assertEqual(found, {it for it in needed if it[2] not in ports}, direction)

    def test_names_are_looked_up_over_udp_too(self):
        documents = render(RENDERED_ONLY)
        by_name = {end.name: end for end in ends(documents)}
        for source in ("control", "edge", "test"):
            self.assertTrue(allowed(documents, by_name[source], INTERNET, 53, "UDP"), source)
            self.assertFalse(allowed(documents, by_name[source], INTERNET, 443, "UDP"), source)
        self.assertFalse(allowed(documents, by_name["redis"], INTERNET, 53, "UDP"))

    def test_without_policies_everything_is_allowed(self):
        documents = render(RENDERED_ONLY, values={"networkPolicy": {"enabled": False}})
        by_name = {end.name: end for end in ends(documents)}
        self.assertTrue(allowed(documents, STRANGER, by_name["redis"], 6379))


if __name__ == "__main__":
    unittest.main()
