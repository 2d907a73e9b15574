"""Data, tokenizer, config or versions that changed under a run: refused with the difference, or warned of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from oracle import Flags, Train, contents, replace_in_checkpoint, replace_in_corpus, same_as
from safetensors.numpy import load_file, save_file

from command_line import parse
from config import BadInput
from data.loader import DATA_ORDER, TrainingLoader
from data.prepare import prepare
from data.shards import Corpus
from data.tokenizers import byte_tokenizer
from files import BLOCK
from tracking.load_run import run_tokenizer
from tracking.metrics import read_metrics
from training.checkpoint import existing, read_state


@pytest.mark.fault(26)
def test_a_token_outside_the_vocabulary_is_told_before_the_step_that_uses_it(
    train: Train, breakable: Flags, tmp_path: Path
) -> None:
    """The manifest agrees with the shard, so only reading the token can tell: by shard and offset."""
    flags = breakable()
    config = parse(flags)
    corpus = prepare(config.data, tmp_path / "corpora", quiet=True)
    name, offset = "train-00000.safetensors", 1777
    tensors = load_file(corpus / name)
    tensors["tokens"] = tensors["tokens"].copy()
    tensors["tokens"][offset] = 257
    save_file(tensors, tmp_path / "edited")
    replace_in_corpus(corpus, name, (tmp_path / "edited").read_bytes())
    loader = TrainingLoader(Corpus.open(corpus).split("train"), config.data, 0, 32, 8)
    using = [step for step in range(8) if refuses(loader, step)]  # all windows are used once in an epoch of 8 steps
    assert using and using[0] > 0
    refused = train(flags)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert f"{name} holds token 257 at offset {offset}, but the vocabulary has only 257 entries" in refused.stderr
    steps = [record["step"] for record in read_metrics(tmp_path / "runs/tiny")]
    assert steps == list(range(1, steps[-1] + 1))
    assert steps[-1] in (using[0], using[0] - 1)  # a step's first micro-batch is read during the step before


def refuses(loader: TrainingLoader, step: int) -> bool:
    """Whether the batch of this step is refused."""
    try:
        loader.batch(step)
    except BadInput:
        return True
    return False


@pytest.mark.fault(30)
@pytest.mark.parametrize("order", [None, 1, 99])
def test_a_run_that_saw_the_data_in_another_order_is_refused(
    order: int | None, interrupted: Path, train: Train, breakable: Flags
) -> None:
    """Going on would show it some of the data twice and some not at all; with --run.resume=never it begins anew."""
    for found in existing(interrupted / "checkpoints"):
        state = read_state(found)
        assert state.pop("data_order") == DATA_ORDER
        state |= {} if order is None else {"data_order": order}
        replace_in_checkpoint(found, "state.json", json.dumps(state).encode())
    before = contents(interrupted)
    refused = train(breakable())
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "step_00000016 is of another version of wellposed, which sees the data in another order" in refused.stderr
    assert f"(data_order {order or 1}, here {DATA_ORDER})" in refused.stderr
    assert "--run.resume=never" in refused.stderr and contents(interrupted) == before
    branch = train(breakable(run__branch_from=interrupted, run__name="branch"))
    assert branch.returncode == 2 and "in another order" in branch.stderr
    ended = train(breakable(run__resume="never"))
    assert ended.returncode == 0, ended.stderr


@pytest.mark.fault(28)
def test_a_tokenizer_of_the_same_size_is_another_one(train: Train, breakable: Flags, tmp_path: Path) -> None:
    """The file that data.tokenizer names gets two entries swapped between two starts."""
    file = tmp_path / "mine.json"
    byte_tokenizer().save(str(file))
    flags = breakable(data__tokenizer=file)
    killed = train(flags, WELLPOSED_FAULT="prune-begin:0:4:kill")
    assert killed.returncode == -9, killed.stderr
    swap(file)
    before = contents(tmp_path / "runs")
    refused = train(flags)
    assert refused.returncode == 2 and "was trained on the corpus" in refused.stderr
    assert contents(tmp_path / "runs") == before
    # Nor may the run's own copy change under the commands that read it.
    run = tmp_path / "runs/tiny"
    assert run_tokenizer(run) == run / "tokenizer.json"
    swap(run / "tokenizer.json")
    with pytest.raises(BadInput, match=r"tokenizer\.json is not the one that .* was trained with"):
        run_tokenizer(run)


def swap(file: Path) -> None:
    """Let A and B change places in a tokenizer.json."""
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    file.write_text(json.dumps(tokenizer))


@pytest.mark.slow
@pytest.mark.fault(30)
def test_another_version_is_warned_of_and_does_not_stop_the_run(
    whole_run: Path, interrupted: Path, train: Train, breakable: Flags
) -> None:
    summary = json.loads((interrupted / "summary.json").read_text())
    now = dict(summary["versions"])
    summary["versions"] |= {"torch": "1.0.0", "commit": "0123456789ab"}
    (interrupted / "summary.json").write_text(json.dumps(summary))
    ended = train(breakable())
    assert ended.returncode == 0, ended.stderr
    assert f"warning: torch was 1.0.0 when this run began and is {now['torch']}: bits may differ" in ended.stderr
    assert "warning: commit was 0123456789ab when this run began" in ended.stderr
    same_as(whole_run, interrupted)
    # What the run began with stays on record, however often it is started.
    assert json.loads((interrupted / "summary.json").read_text())["versions"] == summary["versions"]


@pytest.mark.fault(27)
@pytest.mark.parametrize("what", ["missing", "truncated", "renamed", "edited"])
def test_a_shard_that_changed_is_named(what: str, interrupted: Path, train: Train, breakable: Flags) -> None:
    (shard,) = interrupted.parent.parent.glob("corpora/*/train-00000.safetensors")
    if what == "missing":
        shard.unlink()
    elif what == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif what == "edited":
        shard.write_bytes(shard.read_bytes()[:-2] + b"x\0")
    else:
        shard.rename(shard.with_name("train-00001.safetensors"))
    before = contents(interrupted)
    refused = train(breakable())
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert str(shard.name) in refused.stderr and "prepare it again" in refused.stderr
    assert contents(interrupted) == before


@pytest.mark.fault(27)
def test_an_edited_part_is_told_before_the_step_that_reads_it(train: Train, tiny: Flags, tmp_path: Path) -> None:
    """The shard has two blocks of 256 KiB and a little of a third, which is edited: windows seldom lie there."""
    text = tmp_path / "large.txt"
    text.write_text(("".join(f"{number} {number * number}\n" for number in range(30_000)))[:300_000])
    flags = tiny(data__path=text, training__max_steps=100, tracking__log_every=1)
    config = parse(flags)
    corpus = prepare(config.data, tmp_path / "corpora", quiet=True)
    shard = corpus / "train-00000.safetensors"
    content = bytearray(shard.read_bytes())
    assert 2 * BLOCK < len(content) < 2.1 * BLOCK
    content[-1000] ^= 1
    shard.write_bytes(content)
    loader = TrainingLoader(Corpus.open(corpus).split("train"), config.data, 0, 32, 8)
    reading = next(step for step in range(100) if refuses(loader, step))
    refused = train(flags)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert f"{shard.name} is damaged" in refused.stderr and "prepare it again" in refused.stderr
    steps = [record["step"] for record in read_metrics(tmp_path / "runs/tiny")]
    assert reading > 1 and steps[-1] in (reading, reading - 1)
