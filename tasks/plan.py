"""Say what each stage will take and which ratios fit; --write puts the largest into params.yaml."""

from __future__ import annotations

import argparse
import re

import yaml

from emloc.plan.table import RATIOS, plan_text
from tasks.budget import planner_of
from tasks.params import PARAMS, load_params
from tasks.stage import one_sentence

_RATIOS = re.compile(r"^ratios:[^#\n]*", re.MULTILINE)


def run(*, write: bool) -> None:
    """Print the plan; with `write`, replace the ratios of params.yaml by the largest that fits."""
    params = load_params()
    planner = planner_of(params, progress=True)
    highest = params.calibrate.max_ratio
    ratios = sorted({*params.ratios, *(ratio for ratio in RATIOS if ratio <= highest)})
    print(plan_text(planner, ratios, planner.device.type))
    if write:
        write_ratio(planner.largest_ratio())


def write_ratio(ratio: float) -> None:
    """Put one ratio into params.yaml; comments stay.

    Raises:
        ValueError: params.yaml has them on several lines.
    """
    line = f"ratios: [{ratio}]"
    text = PARAMS.read_text(encoding="utf-8")
    new = _RATIOS.sub(lambda found: line.ljust(len(found[0])), text, count=1)
    try:
        written = yaml.safe_load(new)["ratios"]
    except yaml.YAMLError:
        written = None
    if written != [ratio]:
        raise ValueError(f"{PARAMS} does not have its ratios on one line: write {line} yourself.")
    PARAMS.write_text(new, encoding="utf-8")
    print(f"{PARAMS}: {line}")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tasks.plan", description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="put the largest ratio that fits into params.yaml"
    )
    arguments = parser.parse_args()
    with one_sentence():
        run(write=arguments.write)


if __name__ == "__main__":
    main()
