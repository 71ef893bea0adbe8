"""What was tried, with figures: one line for each step, printed as it happens and kept as a table."""

import time
from pathlib import Path

PASSED, FAILED = "passed", "failed"


class Report:
    """The rows of a run, written to a file after each of them."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        self.began = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, scenario, step, result, seconds, figures=""):
        self.rows.append((scenario, step, result, seconds, figures))
        print(f"{result:7} {seconds:6.1f} s  {scenario}: {step}{'; ' + figures if figures else ''}", flush=True)
        self.path.write_text(self.table())

    def table(self):
        lines = ["| scenario | step | result | seconds | figures |", "|---|---|---|---:|---|"]
        for scenario, step, result, seconds, figures in self.rows:
            lines.append(f"| {scenario} | {step} | {result} | {seconds:.1f} | {figures} |")
        return "\n".join(lines) + "\n"

    def count(self, result):
        return sum(1 for row in self.rows if row[2] == result)

    def summary(self):
        """The line that ends the run."""
        return f"{self.count(PASSED)} passed, {self.count(FAILED)} failed, 0 skipped"


class Steps:
    """The steps of one scenario: `with steps("what holds") as figures` passes unless its body raises."""

    def __init__(self, report, scenario):
        self.report, self.scenario = report, scenario

    def __call__(self, step):
        return _Step(self, step)


class _Step:
    def __init__(self, steps, step):
        self.steps, self.step, self.figures = steps, step, []

    def __enter__(self):
        self.began = time.monotonic()
        return self.figures

    def __exit__(self, kind, error, trace):
        seconds = time.monotonic() - self.began
        result = PASSED if kind is None else FAILED
        figures = ", ".join(str(figure) for figure in self.figures)
        self.steps.report.add(self.steps.scenario, self.step, result, seconds, figures)
        return False
