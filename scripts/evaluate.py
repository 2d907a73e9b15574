"""Evaluate a trained model on val and test: loss, calibration, and if asked to its uncertainty, also on foreign text.

python -m scripts.evaluate runs/my-run
python -m scripts.evaluate runs/my-run --mc_samples 20 --ood french.txt
python -m scripts.evaluate runs/seed0 runs/seed1 runs/seed2 --ensemble

Writes evaluation.json and reliability.png into the run directory, and uncertainty.png with --ood. With --ensemble the
probabilities of several runs or checkpoints are averaged, and ensemble.json and ensemble.png are written.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from config import BadInput
from program import FINISHED, run

if TYPE_CHECKING:
    from data.shards import Corpus, Split

OOD_SAMPLES = 10  # of MC-dropout when --ood is given without --mc_samples


def main(arguments: list[str]) -> int:
    """Evaluate, print tables, write the files."""
    options = parse_options(arguments)
    return evaluate_ensemble(options) if options.ensemble else evaluate_run(options)


def evaluate_run(options: argparse.Namespace) -> int:
    """One run, or one checkpoint of it; returns the exit code."""
    import pictures
    from data.loader import EvaluationBatches
    from evaluation.evaluate import evaluate_parts, parts_of
    from evaluation.uncertainty import foreign_split, mc_dropout, stochastic_modules
    from files import write_json
    from hardware import resolve
    from tracking.load_run import has_average, load_corpus, load_model, locate
    from tracking.run_directory import read_summary

    directory, checkpoint = locate(Path(options.runs[0]))
    model, config, _ = load_model(checkpoint)
    corpus = load_corpus(directory)
    where = config.run.model_copy(update={"device": options.device})
    hardware = resolve(where, read_summary(directory).get("hardware"))
    names = split_names(options.split, corpus)
    context, size, isolated = config.model.context_length, config.training.micro_size, config.data.isolate_documents

    def batches_of(split: Split, limit: int | None) -> EvaluationBatches:
        return EvaluationBatches(split, context, size, limit, isolated)

    parts = {name: parts_of(corpus.portions(name), batches_of, options.max_tokens) for name in names}
    if corpus.sources and options.mc_samples:
        raise BadInput("--mc_samples and --ood cannot be had for a mixture yet; evaluate it without them")
    batches = {name: part.batches for name, (part, *_) in parts.items()}
    if options.mc_samples:
        stochastic_modules(model)  # raises BadInput, as the reading of the text below does, before an hour of work
    if options.ood:
        foreign = foreign_split(options.ood, corpus, batches[names[0]].split.n_tokens)
        batches["foreign"] = batches_of(foreign, options.max_tokens)
    kinds: list[Literal["model", "average"]] = ["model", "average"] if has_average(checkpoint) else ["model"]
    results: dict[str, Any] = {
        "checkpoint": checkpoint.name,
        "corpus": corpus.fingerprint,
        "hardware": hardware.describe(),
        "max_tokens": options.max_tokens,
        "weights": kinds[-1],  # the ones to use, of which calibration and MC-dropout are computed
        **{name: {} for name in batches},
    }

    calibrations, suffix = {}, {"model": "", "average": ", averaged"}
    for kind in kinds:
        model, _, _ = load_model(checkpoint, hardware.device, kind)
        for name in names:
            results[name][kind], calibrations[name] = evaluate_parts(model, parts[name], hardware, name + suffix[kind])
    columns = {name + suffix[kind]: results[name][kind] for kind in kinds for name in names}
    print(f"run               {directory}, checkpoint {checkpoint.name}\n\n{table(columns)}")

    first, weights = names[0], ", averaged weights" if "average" in kinds else ""
    pictures.reliability(calibrations[first], directory / "reliability.png", f"{directory.name}, {first}{weights}")
    results["calibration"] = {"split": first, **vars(calibrations[first])}
    written = ["evaluation.json", "reliability.png"]
    if options.mc_samples:
        print(f"\nMC-dropout, {options.mc_samples} samples{weights}")
        sampled = {
            name: mc_dropout(model, split, hardware, options.mc_samples, config.run.seed, f"MC-dropout, {name}")
            for name, split in batches.items()
        }
        written += tell_uncertainty(sampled, options, directory, results)
    write_json(directory / "evaluation.json", results)
    print("\n" + "\n".join(f"written           {directory / name}" for name in written))
    return FINISHED


def split_names(asked: str, corpus: Corpus) -> list[str]:
    """The splits to evaluate: val and, where there is one, test, unless one is asked for."""
    if asked != "both":
        return [asked]
    return [name for name in ("val", "test") if name == "val" or name in corpus.split_names]


def evaluate_ensemble(options: argparse.Namespace) -> int:
    """The mean probability of several runs or checkpoints; returns the exit code."""
    import pictures
    from evaluation.ensemble import evaluate_listed, save_ensemble
    from hardware import resolve
    from tracking.load_run import list_members, load_corpus
    from tracking.run_directory import read_config, read_summary

    listed = list_members(options.runs)
    first = Path(listed[0].run)
    corpus = load_corpus(first)
    where = read_config(first).run.model_copy(update={"device": options.device})
    hardware = resolve(where, read_summary(first).get("hardware"))
    splits = split_names(options.split, corpus)
    scores = evaluate_listed(listed, hardware, corpus, splits, options.max_tokens)
    print("members")
    for number, member in enumerate(listed):
        losses = ", ".join(f"{name} loss {found.members[number]:.4f}" for name, found in scores.items())
        print(f"  {number + 1:>2}  {member.run}, {member.checkpoint}, weight {member.weight:g}: {losses}")
    for name, found in scores.items():
        columns = {f"{name}, {count}": metrics for count, metrics in enumerate(found.after, 1)}
        print(f"\nmean probability of the first members\n{table(columns)}")
    given = [Path(path) for path in options.runs if Path(path).is_file()]
    file = options.save or (given[0] if len(options.runs) == len(given) == 1 else first / "ensemble.json")
    results = {name: vars(found) for name, found in scores.items()}
    about = {"corpus": corpus.fingerprint, "hardware": hardware.describe(), "max_tokens": options.max_tokens}
    save_ensemble(file, listed, about | results)
    picture = file.with_suffix(".png")
    pictures.ensemble(results, picture, f"{len(listed)} members, {first.name} first")
    print(f"\nwritten           {file}\nwritten           {picture}")
    return FINISHED


def tell_uncertainty(
    found: dict[str, Any], options: argparse.Namespace, directory: Path, results: dict[str, Any]
) -> list[str]:
    """Print the Uncertainty of each split and put it into ``results``; returns the files written.

    ``found["foreign"]``, if there is foreign text, is compared with the first of the others.
    """
    import pictures
    from evaluation.uncertainty import auroc

    for name, uncertainty in found.items():
        results[name]["mc"] = uncertainty.metrics
    results["mc_samples"] = options.mc_samples
    print("\n" + table({name: uncertainty.metrics for name, uncertainty in found.items()}))
    if "foreign" not in found:
        return []
    first, n_tokens = next(iter(found)), len(found["foreign"].nll_N) + 1  # the first token is no target
    print(f"\nforeign text      {options.ood}, {n_tokens:,} tokens, against {first}")
    pairs, notes = {}, {}
    for measure in ("predictive entropy", "mutual information"):
        key = measure.replace(" ", "_")
        pairs[measure] = tuple(getattr(found[name], f"{key}_N") for name in (first, "foreign"))
        area = results["foreign"][f"auroc/{key}"] = auroc(*pairs[measure])
        notes[measure] = f"AUROC {area:.3f}"
        print(f"AUROC             {area:.4f} by {measure}")
    results["foreign"] |= {"file": str(options.ood), "tokens": n_tokens, "against": first}
    title = f"{directory.name}: {first} split and {Path(options.ood).name}, {options.mc_samples} dropout samples"
    pictures.uncertainty_histogram(pairs, directory / "uncertainty.png", title, notes)
    return ["uncertainty.png"]


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """The words of the command line."""
    parser = argparse.ArgumentParser("python -m scripts.evaluate", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    how = (
        "a run directory (its best checkpoint is taken), or a checkpoint; with --ensemble several, or an ensemble.json"
    )
    add("runs", metavar="RUN", nargs="+", help=how)
    add("--ensemble", action="store_true", help="average the probabilities of all RUNs, and after 1, 2, ... of them")
    how = "where --ensemble writes; default: ensemble.json in the first run, or the ensemble.json that was given"
    add("--save", type=Path, metavar="FILE", help=how)
    add("--split", choices=("val", "test", "both"), default="both", help="default: both")
    add("--mc_samples", "--mc-samples", type=int, metavar="N", help="add MC-dropout with N samples a token")
    how = f"how well uncertainty tells this text from the corpus; --mc_samples is {OOD_SAMPLES} if not given"
    add("--ood", metavar="FILE", help=how)
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: auto")
    add("--max_tokens", "--max-tokens", type=int, metavar="N", help="only the first N tokens of each split")
    options = parser.parse_args(arguments)
    options.ensemble |= len(options.runs) == 1 and Path(options.runs[0]).is_file()
    if options.ensemble and (options.mc_samples or options.ood):
        raise BadInput("--ensemble goes with neither --mc_samples nor --ood; evaluate each run by itself")
    if not options.ensemble and (len(options.runs) > 1 or options.save):
        raise BadInput("several runs, and --save, need --ensemble, with which their probabilities are averaged")
    if options.save and (options.save.suffix != ".json" or options.save.is_dir()):
        raise BadInput(f"--save {options.save}: give the name of a .json file")
    if options.mc_samples is None:
        options.mc_samples = OOD_SAMPLES if options.ood else 0
    elif options.mc_samples < 1:
        raise BadInput(f"--mc_samples {options.mc_samples}: give at least 1")
    if options.max_tokens is not None and options.max_tokens < 2:
        raise BadInput(f"--max_tokens {options.max_tokens}: give at least 2, an input and a target")
    return options


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
