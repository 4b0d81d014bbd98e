"""The small file: Deep Compression stage by stage as Han et al. have it, and how far past it the best recipe goes.

LeNet-300-100 and LeNet-5 on MNIST, a network of VGG-16's layout and the demo network (a ResNet-14) on Fashion-MNIST.
Every size is that of a file with everything in it that is needed to load the network again; the original's is 4 bytes a
parameter. Errors are of all 10,000 test images; runs do not look at them: shares, epochs and sizes are set here, and
coarseness is set by the size. LeNet-5's epochs and rate were chosen among three settings by ``--held-out``: errors on
training images that training was left without.

* Faithful (Han et al., Deep Compression, 2016, arxiv.org/abs/1510.00149, tables 1 to 4): the paper's shares by layer,
  magnitude pruning in rounds of training; k-means tables with linear initialization, trained; Huffman's code. Before
  that last stage sizes are as stored: 32-bit or b-bit weights, and places.
* Best: magnitude pruning little by little over all layers (LAMP) while the network imitates itself as it was, then
  training that imitates a teacher (LeNet-300-100's is LeNet-5, the others' they themselves); then uniform steps under
  E + λ · bits (`quantize.RateDistortion`) to a file of the size asked, arithmetic coding.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import baselines
import fashion
import torch
from baselines import Split, clothes, mnist, shifted
from results import publish
from torch import Tensor, nn

import featherweight as fw
from featherweight import prune, quantize, share
from featherweight.edits import Edit
from featherweight.step import Step


@dataclass(frozen=True)
class Settings:
    """How a network is made small.

    Attributes:
        network: trained.
        data: train or test → images and labels.
        teacher: whose answers are imitated after pruning in our own recipe; while it lasts, the network's own.
        augment: images → images, in our own recipe's training.
        factor: how many times smaller than the original our file is to be.
        sparsity: the share of weights that goes.
        epochs: of gradual pruning, and of training after it.
        rate: the peak learning rate.
        clip: the largest norm of a gradient in training.
        kept: Han et al.'s shares of weights kept, by layer; none for networks that are not theirs.
        bits: Han et al.'s, by layer.
        precision: of training.
    """

    network: Callable[..., nn.Module]
    data: Callable[[str], Split]
    teacher: Callable[..., nn.Module]
    augment: Callable[[Tensor], Tensor]
    factor: float
    sparsity: float
    epochs: tuple[float, float]
    rate: float
    clip: float | None = None
    kept: dict[str, float] = field(default_factory=dict)
    bits: dict[str, int] = field(default_factory=dict)
    precision: str = "no"


NETWORKS = {
    "LeNet-300-100": Settings(
        partial(baselines.trained, "LeNet-300-100"), mnist, partial(baselines.trained, "LeNet-5"),
        partial(shifted, by=1),
        factor=105, sparsity=0.97, epochs=(36, 24), rate=0.1,
        kept={"fc1": 0.08, "fc2": 0.09, "fc3": 0.26}, bits={"*": 6},
    ),
    "LeNet-5": Settings(
        partial(baselines.trained, "LeNet-5"), mnist, partial(baselines.trained, "LeNet-5"), partial(shifted, by=1),
        factor=208, sparsity=0.988, epochs=(20, 20), rate=0.05, clip=1.0,
        kept={"conv1": 0.66, "conv2": 0.12, "fc1": 0.08, "fc2": 0.19}, bits={"conv*": 8, "fc*": 5},
    ),
    "VGG-16, 1/8": Settings(
        partial(baselines.trained, "VGG-16, 1/8"), clothes, partial(baselines.trained, "VGG-16, 1/8"),
        partial(shifted, flip=True), factor=105, sparsity=0.97, epochs=(4, 4), rate=0.05, precision=fashion.PRECISION,
    ),
    "ResNet-14": Settings(
        fashion.load_network, clothes, fashion.load_network,
        partial(shifted, flip=True), factor=26, sparsity=0.82, epochs=(3, 3), rate=0.05, precision=fashion.PRECISION,
    ),
}  # fmt: skip


def apart(settings: Settings) -> Settings:
    """The same with all that is trained, trained without the last sixth of the training images, and judged on those."""
    network, teacher = partial(settings.network, apart=True), partial(settings.teacher, apart=True)
    return replace(settings, network=network, teacher=teacher, data=partial(baselines.held_out, settings.data))


class Bench:
    """One network, its data, and training with or without a teacher."""

    def __init__(self, name: str, seed: int = 0, held_out: bool = False) -> None:
        settings = NETWORKS[name]
        self.name, self.settings, self.seed = name, apart(settings) if held_out else settings, seed
        self.kept = baselines.keep(name, f"-pruned-{seed}{'-apart' if held_out else ''}.fw")
        self.network = self.settings.network()
        self.train, self.test = self.settings.data("train"), self.settings.data("test")
        self.bytes = 4 * sum(parameter.numel() for parameter in self.network.parameters())
        self.rows: list[str] = []

    def task(self, answers: Tensor | None = None, augment: Callable[[Tensor], Tensor] = lambda x: x) -> fw.Task:
        """Classify; calibrate on 1,024 training images."""

        def fit(model: nn.Module, epochs: float, loss: object = None) -> None:
            batches = baselines.Batches(self.train, augment, answers)
            settings = self.settings
            fw.fit(
                model,
                batches,
                epochs,
                baselines.loss,
                lr=settings.rate,
                clip=settings.clip,
                mixed_precision=settings.precision,
                seed=self.seed,
            )

        evaluate = partial(baselines.accuracy, split=self.test)
        images = self.train[0][:1024]
        return fw.Task(images[:1], calibration=images.split(256), evaluate=evaluate, train=fit, loss="cross_entropy")

    def row(self, recipe: str, stage: str, size: float, score: float | None, note: str = "") -> None:
        """A line of the table."""
        error = 100 * (1 - (score or 0))
        line = f"| {recipe} | {stage} | {size:,.0f} | {self.bytes / size:.1f}× | {error:.2f} | {note} |"
        print(self.name, line, flush=True)
        self.rows.append(line)

    def faithful(self) -> None:
        """Prune, share, code: Han et al.'s three stages."""
        settings, task = self.settings, self.task()
        gone = {layer: 1 - kept for layer, kept in settings.kept.items()}
        model, edits = self.network, list[Edit]()
        steps: dict[str, Step] = {
            "pruned": prune.Magnitude(sparsity=gone, schedule="iterative", rounds=3, epochs=3),
            "+ shared": share.KMeans(bits=settings.bits, data_aware=False, feedback=False, epochs=2),
        }
        for stage, step in steps.items():
            small = fw.compress(model, step, task=task)
            after, model, edits = small.ledger.after, small.model, [*edits, *small.edits]
            self.row("Han et al.", stage, after.total.bytes, after.score)
        both = fw.Compressed(model, edits, small.ledger, small.example)
        with tempfile.TemporaryDirectory() as folder:
            for coding, stage in (("huffman", "+ Huffman"), ("small", "+ adaptive arithmetic coding instead")):
                size = both.save(Path(folder) / "small.fw", ledger=False, coding=coding)  # type: ignore[arg-type]
                self.row("Han et al.", stage, size, after.score)

    def best(self) -> None:
        """Prune little by little beside a teacher, then uniform steps to the size asked."""
        settings = self.settings
        begun = time.process_time()
        task = self.task(baselines.answers(self.network, self.train[0]), settings.augment)
        before = "" if not self.kept.is_file() else ", pruned in an earlier run"
        if self.kept.is_file():
            pruned = fw.load(self.kept, into=self.network)
        else:
            gradual, after = settings.epochs
            step = prune.Magnitude(
                sparsity=settings.sparsity,
                spread="lamp",
                schedule="gradual",
                rounds=max(2, round(gradual / 3)),
                epochs=gradual,
            )
            pruned = fw.compress(self.network, step, task=task, seed=self.seed)
            taught = self.task(baselines.answers(settings.teacher(), self.train[0]), settings.augment)
            assert taught.train is not None
            taught.train(pruned.model, after)
            pruned.save(self.kept)
        score = baselines.accuracy(pruned.model, self.test)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.fw"
            size = pruned.save(path, ledger=False)
            self.row("best", "pruned and taught", size, score)
            limit = fw.Budget(bytes=int(self.bytes / settings.factor))
            small = fw.compress(pruned.model, quantize.RateDistortion(budget=limit), task=task)
            whole = fw.Compressed(small.model, [*pruned.edits, *small.edits], small.ledger, small.example)
            size = whole.save(path, ledger=False)
            again = fw.load(path, into=self.settings.network())
            score = baselines.accuracy(again.model, self.test)  # of the network as it is read from the file
        self.row(
            "best",
            "+ uniform steps, arithmetic coding",
            size,
            score,
            f"{time.process_time() - begun:.0f} CPU s{before}",
        )


def main(names: list[str], seed: int, held_out: bool, threads: int, write: bool) -> None:
    """Print a table of stages for every network."""
    torch.set_num_threads(threads)
    lines: list[str] = []
    for name in names:
        bench = Bench(name, seed, held_out)
        bench.row("", "as trained", bench.bytes, baselines.accuracy(bench.network, bench.test))
        if bench.settings.kept:
            bench.faithful()
        bench.best()
        lines += [f"## {name}", "", "| recipe | stage | bytes | smaller | error % | |", "|---|---|---|---|---|---|"]
        lines += [*bench.rows, ""]
    publish("deep_compression", __doc__ or "", lines[:-1], write, parts=names)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--seed", type=int, default=0, help="of pruning and of the training in it")
    parser.add_argument("--held-out", action="store_true", help="judge on training images kept out of training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="also keep the tables in benchmarks/results")
    options = parser.parse_args()
    if options.held_out and (options.write or "ResNet-14" in options.networks):
        parser.error("--held-out is for choosing settings: without --write, and not for ResNet-14, which has seen all")
    main(options.networks, options.seed, options.held_out, options.threads, options.write)
