"""Wrong values are refused with a message that helps, and right ones are documented."""

import re
import unittest

import yaml

from chart import CHART, HELMS, MATRIX, RENDERED_ONLY, REPOSITORY, Refused, containers, paths, pods, render, rendered

OWN = {"redis": {"enabled": False, "url": "redis://redis:6379"}}
GATEWAY = {"enabled": True, "parentRefs": [{"name": "public"}]}
# Values, and what the message must name.
WRONG = [
    ({"edge": {"replicsa": 3}}, "replicsa"),
    ({"edges": {"replicas": 3}}, "edges"),
    ({"control": {"autoscaling": {"enable": True}}}, "enable"),
    ({"edge": {"replicas": "3"}}, "replicas"),
    ({"edge": {"drain": {"graceSeconds": "15m"}}}, "graceSeconds"),
    ({"edge": {"extraArgs": ["idle-limit=4h"]}}, "extraArgs"),
    ({"edge": {"service": {"type": "LoadBalancr"}}}, "type"),
    ({"edge": {"service": {"port": 70000}}}, "port"),
    ({"edge": {"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 2}}}, "maxReplicas is less"),
    ({"control": {"autoscaling": {"enabled": True, "cpu": 0}}}, "no metric"),
    ({"publicHost": "https://relay.example"}, "publicHost"),
    ({"publicHost": "relay.example:443"}, "publicHost"),
    ({"publicHost": "relay.example"}, "needs edgeUrl"),
    ({"publicHost": "relay.example", "edgeUrl": "streams.example"}, "edgeUrl"),
    ({"publicHost": "relay.example", "edgeUrl": "https://streams.example/bridges"}, "edgeUrl"),
    ({"publicHost": "relay.example", "edgeUrl": "https://streams.{owner}.example"}, "edgeUrl"),
    ({"publicHost": "relay.example", "edgeUrl": "https://{owner}.streams.example", "tls": {"enabled": False}}, "needs tls.enabled"),
    ({"edgeUrl": "https://streams.example"}, "edgeUrl needs publicHost"),
    ({"ingress": {"enabled": True}}, "needs publicHost"),
    ({"gateway": GATEWAY}, "needs publicHost"),
    ({"publicHost": "relay.example", "gateway": {"enabled": True}}, "parentRefs"),
    ({"publicHost": "relay.example", "gateway": {**GATEWAY, "mode": "passthrough"}}, "another host"),
    ({"publicHost": "relay.example", "edgeUrl": "https://streams.example", "tls": {"enabled": False}, "gateway": {**GATEWAY, "mode": "passthrough"}}, "needs tls.enabled"),
    ({"publicHost": "relay.example", "gateway": GATEWAY, "ingress": {"enabled": True}}, "exclude each other"),
    ({"ingress": {"controller": "traefik"}}, "controller"),
    ({"redis": {"url": "redis://redis:6379"}}, "redis.enabled=false"),
    ({"redis": {"enabled": False}}, "needs redis.url"),
    ({"redis": {"enabled": False, "url": "redis:6379"}}, "url"),
    ({"redis": {"enabled": False, "url": "redis://relay:secret@redis:6379"}}, "url"),
    ({"redis": {**OWN["redis"], "cluster": True, "sentinelMaster": "main"}}, "exclude each other"),
    ({"redis": {"cluster": True}}, "Redis of your own"),
    ({"redis": {**OWN["redis"], "existingSecret": "", "caKey": "ca.crt"}}, "existingSecret"),
    ({"tls": {"existingSecret": "own", "certManager": {"issuer": "letsencrypt"}}}, "exclude each other"),
    ({"tls": {"existingSecret": "Own_Secret"}}, "existingSecret"),
    ({"internalTls": {"edge": {"existingSecret": ""}}}, "belong together"),
    ({"internalTls": {"certManager": {"issuer": "internal"}}}, "exclude each other"),
    ({"serviceMonitor": {"enabled": True}}, "metricsFrom"),
    ({"networkPolicy": {"metricsFrom": [{"podSelectr": {}}]}}, "podSelectr"),
    ({"clientAddress": {"forwardedFrom": ["10.0.0.1"]}}, "forwardedFrom"),
    ({"clientAddress": {"forwardedHeader": "x-real-ip"}}, "forwardedHeader"),
    ({"image": {"digest": "0123"}}, "digest"),
    ({"userId": 0}, "userId"),
]


class Values(unittest.TestCase):
    def test_wrong_ones_are_refused(self):
        for values, message in WRONG:
            for name in HELMS:
                with self.subTest(values=values, helm=name):
                    with self.assertRaises(Refused) as refused:
                        render(RENDERED_ONLY, values=values, name=name)
                    self.assertRegex(str(refused.exception), re.escape(message))

    def test_each_is_in_the_table_of_the_readme(self):
        readme = (CHART / "README.md").read_text()
        table = readme.split("<!-- values:begin -->\n")[1].split("<!-- values:end -->")[0]
        self.assertEqual(table, values_table(), "make the table anew with `python tests/chart/values_test.py --write`")

    def test_each_has_a_rule_in_the_schema(self):
        schema = yaml.safe_load((CHART / "values.schema.json").read_text())
        values = yaml.safe_load((CHART / "values.yaml").read_text())
        self.assertEqual(sorted(without_rule(schema, schema, values)), [])

    def test_each_flag_is_one_of_the_programs(self):
        operations = (REPOSITORY / "docs" / "operations.md").read_text()
        of_server = {(flag, role) for flag, roles in re.findall(r"^\| `--([a-z-]+)` \|(?:[^|]*\|){2} ([a-z, ]+) \|", operations, re.M)
                     for role in (["control", "edge"] if roles == "all" else roles.split(", "))}
        of_client = set(re.findall(r"`(?:-\w`, `)?--([a-z-]+)", (REPOSITORY / "docs" / "cli.md").read_text()))
        self.assertIn(("listen", "edge"), of_server)
        self.assertIn("ca", of_client)
        unknown = set()
        for file in MATRIX:
            for labels, spec in pods(rendered(file)).values():
                component = labels["app.kubernetes.io/component"]
                for flag in (match[1] for container in containers(spec) for it in container["args"] if (match := re.match("--([a-z-]+)", it))):
                    if component == "test" and flag not in of_client or component in ("control", "edge") and (flag, component) not in of_server:
                        unknown.add((flag, component))
        self.assertEqual(unknown, set())


def values_table():
    """The values with their comments, in Markdown."""
    rows = ["| value | default | meaning |", "|---|---|---|"]
    path, comment = [], []
    for line in (CHART / "values.yaml").read_text().splitlines():
        if not line.strip():
            comment = []
        elif line.strip().startswith("#"):
            comment.append(line.strip("# "))
        elif match := re.match(r"( *)(\w+):(.*)", line):
            depth = len(match[1]) // 2
            path[depth:] = [match[2]]
            if match[3].strip():
                rows.append(f"| `{'.'.join(path)}` | `{match[3].strip()}` | {' '.join(comment)} |")
            elif comment and path[-1] == "resources":
                rows.append(f"| `{'.'.join(path)}` | see values.yaml | {' '.join(comment)} |")
            comment = []
    rows = [row for row in rows if not re.match(r"\| `[\w.]+\.resources\.", row)]
    return "\n".join(rows) + "\n"


def without_rule(root, schema, values, start=""):
    if "$ref" in schema:
        schema = root["definitions"][schema["$ref"].rsplit("/", 1)[-1]]
    rules = schema.get("properties")
    if rules is None:
        return
    if schema.get("additionalProperties") is not False:
        yield f"{start}*"
    for key, value in values.items():
        if key not in rules:
            yield start + key
        elif isinstance(value, dict):
            yield from without_rule(root, rules[key], value, f"{start}{key}.")


if __name__ == "__main__":
    import sys

    if sys.argv[1:] == ["--write"]:
        readme = CHART / "README.md"
        before, after = readme.read_text().split("<!-- values:begin -->\n")
        readme.write_text(before + "<!-- values:begin -->\n" + values_table() + "<!-- values:end -->" + after.split("<!-- values:end -->")[1])
    else:
        unittest.main()
