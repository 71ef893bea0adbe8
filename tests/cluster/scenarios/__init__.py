"""What is tried on a cluster: one file for each scenario, in the order of `ALL`."""

from scenarios import access, autoscale, changes, image, install, kill, upgrade

ALL = {
    "image": image.scenario,
    "install": install.scenario,
    "access": access.scenario,
    "upgrade": upgrade.scenario,
    "changes": changes.scenario,
    "kill": kill.scenario,
    "autoscale": autoscale.scenario,
}


def chosen(names):
    """The scenarios of these names, or all; pairs of name and function."""
    unknown = [name for name in names if name not in ALL]
    if unknown:
        raise ValueError(f"no such scenario: {', '.join(unknown)}; there are {', '.join(ALL)}")
    return [(name, scenario) for name, scenario in ALL.items() if not names or name in names]
