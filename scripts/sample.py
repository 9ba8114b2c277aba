"""Draws samples from a trained model; images also as PNG files, and as images.npz for other tools' metrics.

python scripts/sample.py run=<dir> sampler=heun num_samples=1000
python scripts/sample.py run=<dir> label=3 guidance.scale=2                   classifier-free guidance; or class names
torchrun --nproc-per-node 2 scripts/sample.py run=<dir> num_samples=50000     on several GPUs, with the same samples
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig
from scripting import conditions, configs, entry, figures, guiding, output
from scripting.command_line import chosen
from torch import Tensor

from score_sde import BrownianNoise, Run, SampleNoise, distributed, plotting
from score_sde.build import build
from score_sde.checks import one_of
from score_sde.data import TensorData
from score_sde.evaluation import DigitClassifier

NOISES = {"sample": SampleNoise, "brownian": BrownianNoise}


@entry.main("sample")
def main(config: DictConfig) -> None:
    noise = NOISES[one_of("noise", config.noise, NOISES)]
    run = configs.open_run(config)
    model = configs.model_of(run, config)
    node = configs.sampler_config(config.sampler, run.path, config.step, conditions.asked_for(config, run))
    sampler = build(node, run.trust)
    sampler.check(model.sde)
    labels = conditions.labels_of(config.label, run)
    guided = guiding.guided(config, run, model)
    condition = conditions_of(config, run, labels)
    guided.check((config.num_samples, *model.event_shape), condition)
    data = guiding.labelled(run) if config.agreement else None
    if config.agreement and (data is None or not labels):
        raise ValueError("agreement=true compares samples with their labels: give label=, and a run on labelled data")

    name = chosen(config, "sampler")
    samples, nfe, seconds = distributed.sample(
        sampler, guided, config.num_samples, seed=config.seed, batch_size=config.batch_size, condition=condition,
        progress=name, noise=noise,
    )  # fmt: skip
    if not distributed.is_main():
        return
    suffix = "" if not labels else f"-label-{labels[0]}" if len(labels) == 1 else "-labels"
    settings = settings_of(config, node, labels)
    folder = output.folder_of(settings, Path(config.output or run.samples / f"{name}{suffix}"))
    output.save_samples(folder, condition | {"samples": samples})
    if figures.is_image(model):
        output.save_images(folder, samples)
    figures.save(sheet(samples, labels, run), folder / "samples.png")
    print(f"{output.member()}{len(samples)} samples of {name}: {nfe} network calls each, {seconds:.2f} s; in {folder}")
    if data is not None:
        agreement(data, samples, condition["label"]).to_csv(folder / "agreement.csv", index=False)


def conditions_of(config: DictConfig, run: Run, labels: list[int]) -> dict[str, Tensor]:
    """The samples' conditions: those given, what else the network needs, and the labels in turn."""
    given = dict(config.condition) | ({} if config.context is None else {"context": config.context})
    condition = conditions.of_samples(given, run, config.num_samples)
    return condition | ({"label": conditions.turns(labels, config.num_samples)} if labels else {})


def settings_of(config: DictConfig, node: DictConfig, labels: list[int]) -> dict[str, Any]:
    """All settings that the samples depend on; files by a hash of their contents."""
    given = configs.plain(config)
    settings = {name: given[name] for name in ("num_samples", "guidance", "threshold", "seed", "ema", "step")}
    settings |= {"label": labels, "context": output.content_of(config.context) or given["context"],
                 "sampler": configs.plain(node), "table": output.content_of(node.get("table"))}  # fmt: skip
    own = {name: output.content_of(value) or value for name, value in given["condition"].items()}
    further = {"condition": own, "noise": None if given["noise"] == "sample" else given["noise"]}
    return settings | {name: value for name, value in further.items() if value}


def sheet(samples: Tensor, labels: list[int], run: Run) -> Figure:
    """The first samples, with one or more columns per label, named if labels are few."""
    if not labels:
        return plotting.sheet(samples, columns=8)
    columns = max(1, 8 // len(labels)) * len(labels)
    names = run.config.get("class_names") or range(max(labels) + 1)
    named = [names[i] for i in conditions.turns(labels, columns).tolist()] if 1 < len(labels) <= 20 else []
    return plotting.sheet(samples, columns=columns, names=named)


def agreement(data: TensorData, samples: Tensor, labels: Tensor) -> pd.DataFrame:
    """The share of each label's samples that a classifier trained on the labelled data agrees with; prints the mean."""
    print("training a classifier on the labelled data", flush=True)
    train, held_out = data.examples(), data.reference(10_000)
    classifier = DigitClassifier(train.x, train.condition["label"])
    own = classifier.accuracy(held_out.x, held_out.condition["label"])
    table = pd.DataFrame({"label": labels, "agrees": classifier.predict(samples) == labels})
    print(f"a classifier agrees on {table['agrees'].mean():.1%} of the samples; on held-out data, {own:.1%}")
    return table.groupby("label", as_index=False).mean()


if __name__ == "__main__":
    main()
