"""Study files: their points, and mistakes that are told all at once, before anything starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from command_line import parse
from config import BadInput, Regularizers
from studies.space import EXAMPLES, Point, Study, keys, read_study
from studies.sweep import sweep_yaml
from studies.worker import flags

SHIPPED = sorted((ROOT / "configs/studies").rglob("*.yaml"))


def study(**changes: Any) -> Study:
    values: dict[str, Any] = {"name": "s", "space": {"weight_decay": [0, 1]}, "seeds": 2}
    return Study(**(values | changes))


def written(path: Path, **changes: Any) -> str:
    """A study file with ``changes``; returns its path."""
    values: dict[str, Any] = {"name": "s", "space": {"weight_decay": [0, 1]}, "seeds": 2}
    (path / "study.yaml").write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return str(path / "study.yaml")


def names(of: Study) -> list[str]:
    return [point.name for point in of.points()]


def test_a_grid_is_a_product_and_the_baseline_comes_first_and_once() -> None:
    grid = study(space={"weight_decay": [0, "1e-1"], "regularizers.residual_dropout": [0, 0.2]})
    others = ["weight_decay=0,residual_dropout=0", "weight_decay=0,residual_dropout=0.2"]
    # weight_decay 0.1 without dropout is the default: the baseline itself
    assert names(grid) == ["baseline", *others, "weight_decay=0.1,residual_dropout=0.2"]
    assert grid.points()[1].knobs == {"regularizers.weight_decay": 0.0, "regularizers.residual_dropout": 0.0}
    assert names(study(baseline={"weight_decay": 1})) == ["baseline", "weight_decay=0"]
    assert study(baseline={"weight_decay": 1}).points()[0] == Point("baseline", {"regularizers.weight_decay": 1.0})


def test_a_list_is_its_points_under_their_names() -> None:
    points = [{"name": "heavy", "weight_decay": 3}, {"weight_decay": 3}, {"swa_start": 0.5}, {"ema_decay": 0.9}]
    assert names(study(search="list", space=points)) == ["baseline", "heavy", "swa_start=0.5", "ema_decay=0.9"]
    clash = [{"name": "a", "weight_decay": 3}, {"name": "a", "weight_decay": 2}]
    with pytest.raises(BadInput, match="two points are named 'a'"):
        study(search="list", space=clash).points()


@pytest.mark.parametrize("search", list(EXAMPLES))
def test_the_examples_are_studies(search: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "study.yaml").write_text(EXAMPLES[search])
    (tmp_path / "mine.yaml").write_text("training: {max_steps: 5}\n")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    example = read_study("study.yaml")
    assert example.search == search and (search == "tpe" or len(example.points()) > 3)
    assert all(example.config(point, 0) for point in example.points())


def test_help_teaches_every_key_of_a_study_file() -> None:
    asked = subprocess.run([sys.executable, "-m", "scripts.study", "-h"], cwd=ROOT, capture_output=True, text=True)
    for name, field in keys().items():
        assert f"\n  {name}: " in asked.stdout and field.description
        assert " ".join(field.description.split()) in " ".join(asked.stdout.split())
    assert all(line in asked.stdout for example in EXAMPLES.values() for line in example.splitlines())


def test_the_config_of_a_run() -> None:
    base = {"run": {"dir": "elsewhere", "resume": "never"}, "training": {"max_epochs": 2}}
    of = study(base=base, space={"max_steps": [5]}, seeds=[7])
    config = of.config(of.points()[1], 7)
    assert (config.training.max_steps, config.training.max_epochs) == (
        5,
        None,
    )  # the point's length replaces the base's
    assert (config.run.seed, config.run.dir, config.run.name) == (7, "elsewhere/s", "max_steps=5-seed7")
    assert config.run.resume == "auto"  # else a run that is gone on with would begin anew
    assert of.run_directory(of.points()[1], 7) == Path("elsewhere/s/max_steps=5-seed7")
    assert (config.tracking.group, config.tracking.tags) == ("s", ["max_steps=5"])
    assert parse(flags(config)) == config


def test_every_value_passes_the_command_line_unchanged() -> None:
    base = {"tracking": {"tags": ["a b", "c"]}, "optimizer": {"betas": [0.8, 0.99], "lr": 1.5e-7}}
    base |= {"schedule": {"warmup_steps": 0}, "data": {"corpus": "text", "path": "a 'b' [c]/*.txt"}}
    of = study(base=base, space={"swa_start": [None, 0.5], "decay_embeddings": [False]})
    for point in of.points():
        assert parse(flags(of.config(point, 1))) == of.config(point, 1)


def test_seeds() -> None:
    assert study(seeds=3).seeds == [0, 1, 2]
    assert study().seeds == [0, 1] and Study.model_validate({"name": "s", "space": {"lr": [1]}}).seeds == [0, 1, 2, 3]
    assert study(seeds=[4, 1], confirm_seeds=3).fresh_seeds == [1000, 1001, 1002]
    assert "nothing can be claimed" in study(confirm_seeds=0).warnings()[0]
    assert not study(seeds=2).warnings()


def test_tuning_is_on_unless_it_is_put_off() -> None:
    assert study().tune == {"optimizer.lr": [0.5, 1, 2]} and study(tune=False).tune is None is study(tune=None).tune
    of = study(tune={"lr": [0.1, 1, 10]}, baseline={"residual_dropout": 0.1})
    assert of.tuned(of.points()[0], 1) is of.points()[0]
    tuned = of.tuned(of.points()[0], 0.1)
    assert (tuned.name, tuned.origin) == ("baseline,lr=0.0002", "baseline")
    assert tuned.knobs == {"regularizers.residual_dropout": 0.1, "optimizer.lr": 0.0002}
    with pytest.raises(BadInput, match=r"lr is varied and tuned; leave it out of the space, or write tune: null"):
        study(space={"lr": [1e-3, 1e-4]}).points()
    with pytest.raises(BadInput, match=r"optimizer\.name cannot be tuned"):
        study(tune={"optimizer.name": [0.5, 1, 2]}).points()


def test_early_stopping_is_measured_at_its_best() -> None:
    stops = {"space": {"early_stopping_patience": [0, 3]}}
    assert "use metric: best val/loss" in study(**stops).warnings()[0]
    assert not study(**stops, metric="best val/loss").warnings()


def test_names_are_safe_and_differ_where_points_do() -> None:
    text = study(space={"data.path": ["a/b", "a_b"], "d_ff": list(range(1, 3))}, base={"data": {"corpus": "text"}})
    text = text.model_copy(update={"base": {"data": {"corpus": "text", "path": "x"}}})
    assert len(set(names(text))) == 5 and not any("/" in name for name in names(text))
    many = {knob: [0.25] for knob, field in Regularizers.model_fields.items() if field.annotation is float}
    del many["ema_decay"], many["dropout_from"], many["distillation_weight"]
    assert max(map(len, names(study(space=many)))) <= 100


def test_a_list_of_points_is_one_value_of_a_knob() -> None:
    """In a grid beside words, on the command line of its run, and in the file in which the study is kept."""
    grid = study(space={"weight_decay_schedule": ["cosine", [[0, 0.8], [1, "4e-1"]], [[0, 0.8], [1, 0.4]]]})
    *_, point = grid.points()
    assert names(grid) == ["baseline", "weight_decay_schedule=cosine", "weight_decay_schedule=0+0.8+1+0.4"]
    assert point.knobs == {"regularizers.weight_decay_schedule": [[0.0, 0.8], [1.0, 0.4]]}
    config = grid.config(point, 0)
    assert parse(flags(config)) == config and config.regularizers.weight_decay_schedule == [(0.0, 0.8), (1.0, 0.4)]
    assert names(Study(**json.loads(json.dumps(grid.resolved())))) == names(grid)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    space = {"atention_dropout": [0], "weight_decay": [1, -1], "residual_dropout": [0, 1.5], "run.seed": [1]}
    path = written(tmp_path, space=space | {"name": ["x"]}, base={"model": {"d_mdl": 3}}, seeds=[1, 1], sedes=2)
    with pytest.raises(BadInput) as caught:
        read_study(path)
    for words in (
        "unknown knob 'atention_dropout' in the space; did you mean regularizers.attention_dropout?",
        "weight_decay = -1 (from point weight_decay=-1,residual_dropout=0 and 1 more): must be greater than or equal",
        "residual_dropout = 1.5 (from point weight_decay=1,residual_dropout=1.5 and 1 more): must be less than 1",
        "run.seed in the space cannot be varied: give 'seeds' instead",
        "'name' in the space may be run.name or optimizer.name or schedule.name; write which",
        "unknown key 'model.d_mdl' in the base; did you mean model.d_model?",
        "seed 1 is given more than once",
        "unknown key 'sedes'; did you mean seeds?",
    ):
        assert words in str(caught.value), f"{words}\n\n{caught.value}"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"space": {}}, "the space is empty"),
        ({"space": {"weight_decay": []}}, "must have a list of values"),
        ({"space": {"weight_decay": 1}}, "must have a list of values"),
        ({"seeds": 0}, "at least one seed"),
        ({"seeds": []}, "at least one seed"),
        ({"seeds": [1, -1]}, "greater than or equal to 0"),
        ({"search": "tpe"}, "needs 'trials'"),
        ({"search": "tpe", "trials": 3, "space": {"lr": {"min": 2, "max": 1}}}, "min 2 must be below max 1"),
        ({"search": "tpe", "trials": 3, "space": {"lr": {"min": 0, "max": 1, "log": True}}}, "log needs a min above 0"),
        ({"search": "tpe", "trials": 3, "space": {"mlp_dropout": {"min": 0, "max": 2}}}, "must be less than 1"),
        (
            {"search": "tpe", "trials": 3, "space": {"ema_decay": {"min": 0.5, "max": 0.9}, "swa_start": [0.25, 0.5]}},
            "exclude each other",
        ),
        ({"search": "list"}, "must be a list of points"),
        ({"search": "gird"}, "'grid', 'list' or 'tpe'"),
        ({"metric": "val/los"}, "did you mean val/loss?"),
        ({"metric": "test/loss"}, "selects on val"),
        ({"storage": "mysql://x"}, "storage = 'mysql://x'"),
        ({"storage": "mysql://me:secret@x"}, "storage = 'mysql://...@x'"),
        ({"base": "configs/nope.yaml"}, "there is no config file"),
        ({"baseline": {"ema_decay": 0.9, "swa_start": 0.5}}, "exclude each other"),
    ],
)
def test_a_mistake_says_what_is_wrong(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput) as caught:
        read_study(written(tmp_path, **changes))
    assert words in str(caught.value)


def test_a_mistake_exits_with_2_and_no_traceback(tmp_path: Path) -> None:
    for arguments in (["run", written(tmp_path, space={"weight_decy": [1]})], ["status", "nope.yaml"]):
        command = [sys.executable, "-m", "scripts.study", *arguments]
        ended = subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert ended.returncode == 2 and ended.stderr.startswith("error: ") and "Traceback" not in ended.stderr
        assert not (tmp_path / "runs").exists()


def test_what_cannot_be_compared_is_warned_of() -> None:
    assert "val/bits_per_byte" in study(space={"vocab_size": [1000, 2000]}).warnings()[0]
    for space in ({"val_fraction": [0.1, 0.2]}, {"isolate_documents": [True]}, {"text_field": ["text", "title"]}):
        assert "changes what val/loss is measured on" in study(space=space).warnings()[0]


def test_a_resolved_study_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    before = read_study("configs/studies/weight_decay.yaml")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(before.resolved()))
    monkeypatch.chdir(tmp_path)
    after = read_study("study.yaml")
    assert [after.config(point, 1) for point in after.points()] == [
        before.config(point, 1) for point in before.points()
    ]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_study_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shipped = read_study(str(path))
    assert len(shipped.points()) > 2 and len(shipped.seeds) >= 3 and not shipped.warnings()


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.stem == "one_at_a_time"], ids=str)
def test_one_at_a_time_has_every_regularizer_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shipped = read_study(str(path))
    extras = {f"regularizers.{knob}": field.json_schema_extra for knob, field in Regularizers.model_fields.items()}
    baseline, *others = shipped.points()
    flat = shipped.config(baseline, 0).flat()
    assert all(flat[knob] == extra["off"] for knob, extra in extras.items())  # type: ignore[index, call-overload]
    alone = {knob: extra["typical"] for knob, extra in extras.items() if extra["kind"] != "modifier"}  # type: ignore[index, call-overload]
    del alone["regularizers.distillation_weight"]  # needs finished runs to learn from, which nobody has beforehand
    if "quick" in str(path):
        alone["regularizers.ema_decay"] = 0.99
    assert [point.knobs for point in others] == [{knob: value} for knob, value in alone.items()], "in config.py's order"


def test_a_sweep_says_the_same_as_the_study() -> None:
    of = study(base={"model": {"d_model": 64}}, space={"weight_decay": ["1e-3", 1], "optimizer.name": ["muon"]})
    sweep = yaml.safe_load(sweep_yaml(of))
    assert sweep["method"] == "grid" and sweep["metric"] == {"name": "val/loss", "goal": "minimize"}
    assert sweep["parameters"] == {
        "run.seed": {"values": [0, 1]},
        "regularizers.weight_decay": {"values": [0.001, 1.0]},
        "optimizer.name": {"values": ["muon"]},
    }
    # What an agent makes of ${args} is a command line that train.py takes.
    arguments = [f"--{knob}={side['values'][0]}" for knob, side in sweep["parameters"].items()]
    command = sweep["command"]
    assert command[:3] == ["${env}", "${interpreter}", "${program}"] and command[-1] == "${args}"
    config = parse([*command[3:-1], *arguments])
    assert config.model.d_model == 64 and config.regularizers.weight_decay == 0.001
    tpe = study(search="tpe", trials=4, tune=None, space={"lr": {"min": "1e-4", "max": 1, "log": True}})
    sweep = yaml.safe_load(sweep_yaml(tpe))
    assert (sweep["method"], sweep["run_cap"]) == ("bayes", 8)
    assert sweep["parameters"]["optimizer.lr"] == {"distribution": "log_uniform_values", "min": 1e-4, "max": 1.0}
    with pytest.raises(BadInput, match="lists its points"):
        sweep_yaml(study(search="list", space=[{"weight_decay": 1}]))
    assert json.dumps(sweep)
