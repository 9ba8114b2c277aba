"""Measures what samplers cost besides their network calls: python scripts/benchmark.py

Prints tables of ratios and writes them, with the machine they were measured on, to <output>/benchmark.json.
"""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig
from scripting import configs, entry, output

from score_sde.checks import one_of
from score_sde.evaluation.benchmark import PARTS, Sizes, benchmark, machine
from score_sde.training import write_atomically


@entry.main("benchmark")
def main(config: DictConfig) -> None:
    device = configs.device_of(config.device)
    sizes = Sizes.quick() if config.quick else Sizes(rounds=config.rounds)
    parts = [one_of("a part", part, PARTS) for part in config.parts]
    if not parts:
        raise ValueError(f"parts=[] measures nothing: give some of {', '.join(PARTS)}")
    record = {"machine": machine(device)}
    print(", ".join(f"{key}: {value}" for key, value in record["machine"].items()))
    for part in parts:
        table = benchmark([part], device, sizes, progress=True)[part]
        record[part] = table.to_dict("records")
        print(f"\n{part}")
        output.show(table)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "benchmark.json", json.dumps(record, indent=1) + "\n")
    print(f"\n{folder}: benchmark.json")


if __name__ == "__main__":
    main()
