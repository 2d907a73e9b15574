"""What a run tells the person before the screen: its beginning, how far it is, and what came out."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from config import Config
from data.loader import TrainingLoader
from data.shards import Corpus
from program import shown

SECONDS_BETWEEN_LINES = 5.0
SHOWN = {"train/loss": "train", "val/loss": "val", "val_average/loss": "average", "val/bits_per_byte": "bits/byte"}


class Console:
    """A bar on a terminal, with a line above it for each evaluation; elsewhere a line every few seconds."""

    def __init__(self, step: int, total_steps: int) -> None:
        self.bar = tqdm(total=total_steps, initial=step, unit="step", disable=None, dynamic_ncols=True, desc="training")
        self.told = time.monotonic()

    def tell(self, record: dict[str, Any]) -> None:
        """A record in words."""
        self.bar.update(record["step"] - self.bar.n)
        evaluated = "val/loss" in record
        words = [f"step {record['step']:>6}/{self.bar.total}"]
        for name, word in SHOWN.items():
            if name in record:
                words.append(f"{word} {record[name]:.4f}" if record[name] is not None else f"{word} not finite")
        if "train/lr" in record:
            words.append(f"lr {record['train/lr']:.2e}")
        if "train/tokens_per_second" in record:
            words.append(f"{record['train/tokens_per_second']:,.0f} tokens/s")
        if self.bar.disable:
            if evaluated or record["step"] == 1 or time.monotonic() - self.told > SECONDS_BETWEEN_LINES:
                print("  ".join(words), flush=True)
                self.told = time.monotonic()
        elif evaluated:
            self.bar.write("  ".join(words))
        else:
            self.bar.set_postfix_str("  ".join(words[1:]))

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def tell_start(directory: Path, step: int, corpus: str, length: str, config: Config, hardware: dict[str, Any]) -> None:
    """What is about to be trained, on what, for how long; ``step``: where the run goes on, 0 for its beginning."""
    print(f"run        {directory}" + (f" goes on from step {step}" if step else ""))
    print(f"corpus     {corpus}")
    print(f"length     {length}")
    if config.training.deterministic == "strict":
        print(f"strict     the gradients of {config.training.micro_batches} micro-batches are added in one fixed order")
    if config.training.deterministic == "fast":
        gained = "attention, NCCL and the compiler use their fastest sums; the same run gives other bits each time"
        print(f"fast       {gained if hardware['device'] == 'cuda' else 'nothing changes: it is for CUDA devices'}")
    print(f"hardware   {', '.join(f'{key} {value}' for key, value in hardware.items())}")
    if hardware["compile"]:
        print(
            "compile    the first step and the first evaluation take half a minute, and some seconds at a later start"
        )
    sys.stdout.flush()


def evaluation_line(config: Config, every: str | int, val_tokens: int) -> str:
    """What will be evaluated, and how often (``every``: steps, or epoch), of ``val_tokens`` that there are."""
    tokens = min(config.evaluation.max_tokens or val_tokens, val_tokens)
    often = "each epoch" if every == "epoch" else f"every {every:,} steps"
    share = "all" if tokens == val_tokens else f"the first {tokens:,} of"
    return f"evaluation {share} {val_tokens:,} val tokens and as many of training, {often} and at the end"


def source_lines(corpus: Corpus, loader: TrainingLoader, steps: int) -> list[str]:
    """Of each source of a mixture how much is read of it in so many steps."""
    read = loader.windows_read(steps)
    return [
        f"source     {source.name}: {count / sum(read):.2%} of the windows, {count / samples.windows_per_epoch:,.2f} "
        f"passes over {one.directory}"
        for (source, one), samples, count in zip(corpus.sources, loader.sources, read, strict=False)
    ]


def tell_results(
    directory: Path, summary: dict[str, Any], records: list[dict[str, Any]], diagnosis: str, again: bool
) -> None:
    """What a person wants to know when a run is over.

    Args:
        directory: of the run.
        summary: its summary.json.
        records: the lines of its metrics.jsonl.
        diagnosis: lines that say whether it underfits or overfits, and what to try next.
        again: it was over before it was started this time.
    """
    print(f"\n{outcome(summary, again)}")
    if "best/val/loss" in summary and summary["status"] != "preempted":
        samples = [record["sample"] for record in records if "sample" in record]
        if samples:
            print("\n".join(["", "sample", *(f"  | {line}" for line in shown(samples[-1]).split("\n"))]))
        print()
        tell_loss("best val loss", summary, "best/val/", f"at step {summary['best/step']}")
        if "test/loss" in summary:
            tell_loss("test loss", summary, "test/", "(the best checkpoint)")
        if summary.get("sparsity"):
            shares = summary["sparsity"].values()
            print(f"sparsity          {sum(shares) / len(shares):.1%} of a decayed tensor's weights are near zero")
        print(f"tokens per second {summary['tokens_per_second']:,.0f}")
        print(diagnosis)
    print(f"run directory     {directory}")
    if (directory / "curves.png").exists():
        print(f"curves            {directory / 'curves.png'}")
    sys.stdout.flush()


def outcome(summary: dict[str, Any], again: bool) -> str:
    """How a run ended, in a sentence or two."""
    steps = f"{summary['steps']} of {summary['total_steps']} steps"
    if again:
        return f"This run is finished already ({steps}); nothing was done. --run.resume=never starts it afresh."
    if summary["status"] == "preempted":
        return f"Stopped after {steps}, as asked. The same command goes on from here."
    if summary.get("stopped_early"):
        best = f"The best weights, of step {summary['best/step']}, are what is tested, loaded and exported."
        return f"Stopped early after {steps}: val had stopped improving.\n{best}"
    return f"Finished after {steps}."


def tell_loss(title: str, summary: dict[str, Any], prefix: str, where: str) -> None:
    """A loss in both of its units."""
    nats, bits = summary[f"{prefix}loss"], summary[f"{prefix}bits_per_byte"]
    comma = "" if where.startswith("(") else ","
    print(f"{title:<17} {nats:.4f} nats per token, {bits:.4f} bits per byte{comma} {where}")
