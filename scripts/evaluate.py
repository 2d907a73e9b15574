"""Evaluate a trained model on val and test: loss, calibration, and if asked to its uncertainty, also on foreign text.

python -m scripts.evaluate runs/my-run
python -m scripts.evaluate runs/my-run --mc_samples 20 --ood french.txt

Writes evaluation.json and reliability.png into the run directory, and uncertainty.png with --ood.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

from config import BadInput, Config
from program import FINISHED, run

OOD_SAMPLES = 10  # of MC-dropout when --ood is given without --mc_samples


def main(arguments: list[str]) -> int:
    """Evaluate, print tables, write the files."""
    options = parse_options(arguments)
    import pictures
    from evaluation.evaluate import evaluate
    from evaluation.uncertainty import check_stochastic, foreign_split
    from files import write_json
    from hardware import resolve
    from tracking.load_run import has_average, load_corpus, load_model, locate
    from tracking.run_directory import read_summary

    directory, checkpoint = locate(Path(options.run))
    model, config, _ = load_model(checkpoint)
    corpus = load_corpus(directory)
    where = config.run.model_copy(update={"device": options.device})
    hardware = resolve(where, read_summary(directory).get("hardware"))
    names = ("val", "test") if options.split == "both" else (options.split,)
    splits = {
        name: corpus.split(name) for name in names if options.split != "both" or name in corpus.manifest["splits"]
    }
    if options.max_tokens is not None:
        splits = {name: split.head(options.max_tokens) for name, split in splits.items()}
    foreign = None
    if options.mc_samples:
        check_stochastic(model)  # and the text below is read: what cannot be done is told before an hour of work
    if options.ood:
        foreign = foreign_split(options.ood, corpus, next(iter(splits.values())).n_tokens)
    kinds: list[Literal["model", "average"]] = ["model", "average"] if has_average(checkpoint) else ["model"]
    results: dict[str, Any] = {
        "checkpoint": checkpoint.name,
        "corpus": corpus.fingerprint,
        "hardware": hardware.describe(),
        "max_tokens": options.max_tokens,
        "weights": kinds[-1],  # the ones to use; calibration and MC-dropout are theirs
        **{name: {} for name in splits},
    }

    columns, calibrations = {}, {}
    for kind in kinds:
        model, _, _ = load_model(checkpoint, hardware.device, kind)
        for name, split in splits.items():
            title = f"{name}, averaged" if kind == "average" else name
            batches = batches_of(split, config, f"evaluating {title}")
            bytes_per_token = corpus.bytes_per_token(corpus.split(name), options.max_tokens)
            found, calibrations[name] = evaluate(model, batches, hardware, bytes_per_token)
            columns[title] = results[name][kind] = found
    print(f"run               {directory}, checkpoint {checkpoint.name}\n\n{table(columns)}")

    first = next(iter(splits))
    weights = ", averaged weights" if "average" in kinds else ""
    pictures.reliability(calibrations[first], directory / "reliability.png", f"{directory.name}, {first}{weights}")
    results["calibration"] = {"split": first, **vars(calibrations[first])}
    written = ["evaluation.json", "reliability.png"]
    if options.mc_samples:
        print(f"\nMC-dropout, {options.mc_samples} samples{weights}")
        written += evaluate_uncertainty(options, directory, model, config, splits, foreign, hardware, results)
    write_json(directory / "evaluation.json", results)
    print("\n" + "\n".join(f"written           {directory / name}" for name in written))
    return FINISHED


def evaluate_uncertainty(
    options: argparse.Namespace,
    directory: Path,
    model: Any,
    config: Config,
    splits: dict[str, Any],
    foreign: Any,
    hardware: Any,
    results: dict[str, Any],
) -> list[str]:
    """MC-dropout on the splits and on foreign text, printed and put into ``results``; returns the files written.

    ``foreign`` is a split of foreign text, or None; it is compared with the first of the others.
    """
    import pictures
    from evaluation.uncertainty import auroc, mc_dropout

    first = next(iter(splits))
    found = {}
    for name, split in (splits | ({} if foreign is None else {"foreign": foreign})).items():
        batches = batches_of(split, config)
        found[name] = mc_dropout(model, batches, hardware, options.mc_samples, config.run.seed, f"MC-dropout, {name}")
        results.setdefault(name, {})["mc"] = found[name].metrics
    results["mc_samples"] = options.mc_samples
    print("\n" + table({name: uncertainty.metrics for name, uncertainty in found.items()}))
    if foreign is None:
        return []
    inside, outside, notes = {}, {}, {}
    print(f"\nforeign text      {options.ood}, {foreign.n_tokens:,} tokens, against {first}")
    for measure in ("predictive entropy", "mutual information"):
        key = measure.replace(" ", "_")
        inside[measure] = getattr(found[first], f"{key}_N")
        outside[measure] = getattr(found["foreign"], f"{key}_N")
        area = results["foreign"][f"auroc/{key}"] = auroc(inside[measure], outside[measure])
        notes[measure] = f"AUROC {area:.3f}"
        print(f"AUROC             {area:.4f} by {measure}")
    results["foreign"] |= {"file": str(options.ood), "tokens": foreign.n_tokens, "against": first}
    title = f"{directory.name}: {first} split and {Path(options.ood).name}, {options.mc_samples} dropout samples"
    pictures.uncertainty_histogram(inside, outside, directory / "uncertainty.png", title, notes)
    return ["uncertainty.png"]


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """The words of the command line."""
    parser = argparse.ArgumentParser("python -m scripts.evaluate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", metavar="RUN", help="a run directory (its best checkpoint is taken), or a checkpoint")
    parser.add_argument("--split", choices=("val", "test", "both"), default="both", help="default: both")
    parser.add_argument(
        "--mc_samples", "--mc-samples", type=int, metavar="N", help="add MC-dropout with N samples a token"
    )
    parser.add_argument(
        "--ood",
        metavar="FILE",
        help=f"how well uncertainty tells this text from the corpus; --mc_samples is {OOD_SAMPLES} if not given",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: auto")
    parser.add_argument(
        "--max_tokens", "--max-tokens", type=int, metavar="N", help="only the first N tokens of each split"
    )
    options = parser.parse_args(arguments)
    if options.mc_samples is None:
        options.mc_samples = OOD_SAMPLES if options.ood else 0
    elif options.mc_samples < 1:
        raise BadInput(f"--mc_samples {options.mc_samples}: give at least 1")
    if options.max_tokens is not None and options.max_tokens < 2:
        raise BadInput(f"--max_tokens {options.max_tokens}: give at least 2, an input and a target")
    return options


def batches_of(split: Any, config: Config, title: str = "") -> Any:
    """The evaluation batches of a run, as train.py makes them; with a ``title`` they move a bar on a terminal."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    from data.loader import Batch, EvaluationBatches

    class Watched(EvaluationBatches):
        """Batches that tell how far the evaluation is."""

        def batch(self, index: int) -> Batch:
            bar.update()
            if bar.n >= len(self):
                bar.close()
            return super().batch(index)

    where = (split, config.model.context_length, config.training.micro_size, None, config.data.isolate_documents)
    if not title:
        return EvaluationBatches(*where)
    batches = Watched(*where)
    bar = tqdm(total=len(batches), desc=title, unit="batch", disable=None, leave=False)
    return batches


def table(columns: dict[str, dict[str, float]]) -> str:
    """Metrics as rows, results as columns."""
    widths = {title: max(12, len(title)) for title in columns}
    lines = [" " * 20 + "".join(f"  {title:>{width}}" for title, width in widths.items())]
    for row in next(iter(columns.values())):
        cells = [f"  {values[row]:>{widths[title]}.4f}" for title, values in columns.items()]
        lines.append(f"{row.removeprefix('mc/').replace('_', ' '):<20}{''.join(cells)}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
