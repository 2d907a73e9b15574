"""The command line's contract: order of sources, messages, round trip, help."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from command_line import dump, fields, from_mapping, load_yaml, parse
from config import BadInput, Config
from studies.space import read_study
from tracking.run_directory import default_name, read_config


def mistakes(*arguments: str) -> list[str]:
    with pytest.raises(BadInput) as caught:
        parse(list(arguments))
    return str(caught.value).splitlines()


def test_defaults_then_files_in_order_then_flags(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {n_layers: 3, d_model: 64}\noptimizer: {lr: 1e-3}\n")
    (tmp_path / "b.yaml").write_text("model:\n  n_layers: 5\n")
    config = parse([str(tmp_path / "a.yaml"), "--model.d_model=128", str(tmp_path / "b.yaml"), "--model.d_model", "96"])
    assert (config.model.n_layers, config.model.d_model, config.optimizer.lr) == (5, 96, 0.001)
    assert config.model.n_heads == Config().model.n_heads


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--optimizer.lr=1e-3", 0.001),
        ("--training.max_steps=7", 7),
        ("--optimizer.betas=[0.8,0.9]", (0.8, 0.9)),
        ("--tracking.tags=[a,b]", ["a", "b"]),
        ("--regularizers.weight_decay_schedule=[[0, 0.8], [1, 4e-1]]", [(0.0, 0.8), (1.0, 0.4)]),
        ("--regularizers.weight_decay_schedule=cosine", "cosine"),
        ("--regularizers.weight_decay_epochs=null", None),
        ("--run.compile=on", "on"),
        ("--data.streaming=true", True),
        ("--data.path=12:30:00", "12:30:00"),
        ("--data.path=no", "no"),
        ("--data.path=null", None),
        ("--evaluation.every=epoch", "epoch"),
        ("--evaluation.every=50", 50),
        ("--run.threads=2", 2),
        ("--run.threads=auto", "auto"),
    ],
)
def test_flags_mean_what_they_say(flag: str, value: object) -> None:
    section, key = flag[2:].split("=")[0].split(".")
    found = getattr(getattr(parse([flag]), section), key)
    assert found == value and type(found) is type(value)


def test_yaml_truth_values(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run: {compile: on}\ndata: {streaming: yes}\n")
    config = parse([str(tmp_path / "c.yaml")])
    assert config.run.compile == "on" and config.data.streaming is True


def test_unknown_key_names_place_and_nearest(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("regularizers: {atention_dropout: 0.1}\n")
    expected = f"unknown key 'regularizers.atention_dropout' in {path}; did you mean regularizers.attention_dropout?"
    assert mistakes(str(path)) == [expected]
    assert mistakes("--model.n_layer=3") == [
        "unknown key 'model.n_layer' on the command line; did you mean model.n_layers?"
    ]
    assert "did you mean optimizer.lr?" in mistakes("--training.lr=1")[0]
    assert "is a section" in mistakes("--model=3")[0]


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """In a section, as a section, in a flow mapping; but not what an anchor brings in and is said anew."""
    path = tmp_path / "config.yaml"
    for text, line, key, first in (
        ("model:\n  n_layers: 3\n  d_model: 64\n  n_layers: 4\n", 4, "n_layers", 2),
        ("model:\n  n_layers: 3\noptimizer:\n  lr: 1e-3\nmodel:\n  d_model: 64\n", 5, "model", 1),
        ("model: {n_layers: 3,\n  n_layers: 3}\n", 2, "n_layers", 1),
        ("model: {n_layers: 3, n_layers: 4}\n", 1, "n_layers", 1),
    ):
        path.write_text(text)
        said = [f"{path}, line {line}: '{key}' is already given in line {first}; remove one"]
        assert mistakes(str(path)) == said
        assert mistakes(str(path), "--model.n_layer=3")[0] == said[0]  # with all other mistakes
        for read in (read_study, lambda _: read_config(tmp_path)):
            with pytest.raises(BadInput) as caught:
                read(str(path))  # type: ignore[arg-type]
            assert str(caught.value) == said[0]
    path.write_text("a: &one {x: 1, y: 2}\nb: {<<: *one, y: 3}\n")
    assert load_yaml(path, "config file") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


def test_all_bad_values_at_once(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("optimizer: {lr: -1}\nmodel: {n_layers: true, nonsense: 1}\n")
    found = "\n".join(
        mistakes(str(path), "--regularizers.z_loss=.inf", "--data.corpus=foo", "--training.max_steps=1.5")
    )
    for word in ("optimizer.lr", "model.n_layers", "model.nonsense", "z_loss", "data.corpus", "training.max_steps"):
        assert word in found
    assert f"optimizer.lr = -1 (from {path})" in found


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer.lr=nan"],
        ["--optimizer.lr=inf"],
        ["--model.n_layers=true"],
        ["--model.n_layers=2.5"],
        ["--optimizer.betas=[0.9,1.0]"],
        ["--optimizer.betas=0.9"],
        ["--regularizers.attention_dropout=1"],
        ["--model.context_length=4", "--regularizers.target_offset=4"],
        ["--model.d_model=100", "--model.n_heads=3"],
        ["--model.n_heads=4", "--model.n_kv_heads=3"],
        ["--training.global_batch_size=10", "--training.micro_batch_size=4"],
        ["--training.max_steps=5", "--training.max_epochs=1"],
        ["--data.corpus=text"],
        ["--data.corpus=stdlib", "--data.path=books/play.txt"],
        ["--run.name=../evil"],
        ["--run.threads=0"],
        ["--evaluation.every=0"],
        ["--data.val_fraction=0.5", "--data.test_fraction=0.5"],
        ["missing.yaml"],
        ["--optimizer.lr"],
        ["-x"],
    ],
)
def test_refused(flags: list[str]) -> None:
    assert len(mistakes(*flags)) == 1


def test_round_trip_is_exact() -> None:
    config = parse(["--optimizer.eps=1e-13", "--optimizer.lr=0.1234567890123456", "--run.compile=on", "--data.path=no"])
    assert from_mapping(yaml.safe_load(dump(config)), "dump") == config
    assert from_mapping(yaml.safe_load(dump(Config())), "dump") == Config()
    lists = ["--regularizers.weight_decay_schedule=[[0,1e-7],[1,0.3]]", "--schedule.points=[[0,1],[0.3,0.1],[1,0]]"]
    config = parse([*lists, "--schedule.name=points"])
    assert from_mapping(yaml.safe_load(dump(config)), "dump") == config


def test_a_later_source_replaces_the_length_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("training: {max_steps: 10}\n")
    training = parse([str(tmp_path / "a.yaml"), "--training.max_epochs=2"]).training
    assert (training.max_steps, training.max_epochs) == (None, 2.0)


def test_default_name_follows_what_changes_the_result_only() -> None:
    name = default_name(parse([]))
    for same in ("--run.dir=x", "--run.name=y", "--checkpoint.every=3", "--tracking.log_every=3", "--run.resume=never"):
        assert default_name(parse([same])) == name
    for other in ("--run.seed=1", "--optimizer.lr=0.1", "--evaluation.every=3", "--regularizers.z_loss=1e-4"):
        assert default_name(parse([other])) != name


def test_every_shipped_config_is_valid() -> None:
    shipped = sorted((ROOT / "configs").glob("*.yaml"))
    assert shipped
    for path in shipped:
        needs_path = [] if "path" in path.read_text() or "corpus" not in path.read_text() else ["--data.path=x"]
        parse([str(path), *needs_path])


def test_every_knob_has_a_doc_and_help_lists_it_within_a_second() -> None:
    started = time.perf_counter()
    asked = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    assert asked.returncode == 0 and seconds < 3  # the goal is 1 s alone on a machine; two tests run here at a time
    for key, field in fields().items():
        assert f"--{key}=" in asked.stdout
        assert field.description, f"{key} has no doc"
        assert " ".join(field.description.split())[:40] in " ".join(asked.stdout.split())


def test_help_needs_no_torch() -> None:
    code = "import sys, command_line, train; command_line.help_text(''); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"


OF_PYDANTIC = ("pydantic", "pydantic_core", "typing_extensions.py", "annotated_types", "typing_inspection")


@pytest.mark.parametrize("words", [["train.py"], ["-m", "scripts.generate", "runs/mine"]])
@pytest.mark.parametrize("there", [(), ("yaml", *OF_PYDANTIC)], ids=["nothing", "all but torch"])
def test_another_python_than_the_project_s_is_told(words: list[str], there: tuple[str, ...], tmp_path: Path) -> None:
    """-S stands for it: a Python without what is installed beside it."""
    for name in there:
        (tmp_path / name).symlink_to(Path(sysconfig.get_paths()["purelib"]) / name)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    asked = subprocess.run([sys.executable, "-S", *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert asked.returncode == 2 and "Traceback" not in asked.stderr, asked.stderr
    assert (
        asked.stderr.startswith("error: ") and "use .venv/bin/python, which make .venv/train.installed" in asked.stderr
    )


def test_a_mistake_exits_with_2_and_no_traceback() -> None:
    flags = ["--model.n_layer=3", "--optimizer.lr=0"]
    asked = subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert asked.returncode == 2 and "Traceback" not in asked.stderr
    assert [line.split(":")[0] for line in asked.stderr.splitlines()] == ["error", "error"]
