"""`gptlab train`, as a user types it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Command, finish, start
from tests.tiny import tiny


def runs() -> Path:
    return Path(os.environ["GPTLAB_RUNS"])


def test_a_sweep_trains_compares_draws_and_speaks_and_the_second_skips(gptlab: Command, corpus_file: Path) -> None:
    sweep = ["train", "-m", *tiny(corpus_file, steps=4), "model/norm=layernorm,rmsnorm", "seed=0,1", "study=two_by_two"]
    first = gptlab(*sweep)
    assert first.code == 0, first.err
    assert "4 runs: 4 trained, 0 skipped, 0 failed" in first.out
    assert "1/4" in first.out
    assert "baseline" in first.out
    assert " ± " in first.out
    assert "a sample of the best arm" in first.out
    assert (runs() / "two_by_two" / "curves.png").read_bytes().startswith(b"\x89PNG")
    names = sorted(d.name for d in (runs() / "two_by_two").iterdir() if d.is_dir())
    assert len(names) == 4
    assert all("norm=" in n and "seed=" in n for n in names)
    second = gptlab(*sweep)
    assert "4 runs: 0 trained, 4 skipped, 0 failed" in second.out
    assert second.out.count("done ") >= 4


def test_a_failing_arm_leaves_the_others_alone_and_ends_with_1(gptlab: Command, corpus_file: Path) -> None:
    result = gptlab("train", "-m", *tiny(corpus_file, steps=4), "optimizer.learning_rate=1e30,1e-3", "study=half")
    assert result.code == 1
    assert "2 runs: 1 trained, 0 skipped, 1 failed" in result.out
    assert "(exit 4)" in result.err
    assert "Traceback" not in result.out + result.err


def test_python_and_command_line_make_the_same_run(gptlab: Command, corpus_file: Path) -> None:
    from gptlab import compose, load, train

    assert gptlab("train", *tiny(corpus_file, "seed=3", steps=4)).code == 0
    assert train(compose(tiny(corpus_file, "seed=3", steps=4))).state == "skipped"
    assert load("latest").config.seeds.init == 3


def test_overrides_may_stand_on_both_sides_of_an_option(gptlab: Command, corpus_file: Path) -> None:
    result = gptlab("train", *tiny(corpus_file, steps=2), "-m", "seed=0,1")
    assert "2 runs: 2 trained" in result.out, result.err


def test_a_failed_scratch_run_keeps_its_log(gptlab: Command, corpus_file: Path) -> None:
    result = gptlab("train", "--scratch", *tiny(corpus_file, steps=2), "optimizer.learning_rate=1e30")
    assert result.code == 4
    folder = Path(re.search(r"(\S+) is kept", result.out)[1])  # type: ignore[index]
    assert list(folder.glob("*/*/log.txt"))
    shutil.rmtree(folder)


def test_a_failed_scratch_sweep_keeps_its_logs(gptlab: Command, corpus_file: Path) -> None:
    result = gptlab("train", "--scratch", "-m", *tiny(corpus_file, steps=2), "optimizer.learning_rate=1e30,1e-3")
    assert result.code == 1
    shutil.rmtree(re.search(r"(\S+) is kept", result.out)[1])  # type: ignore[index]


def test_an_interrupt_outside_training_is_told(corpus_file: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow_start.py"
    slow.write_text("import time\nprint('waiting', flush=True)\ntime.sleep(60)\n")
    process = start("--plugin", str(slow), "train", *tiny(corpus_file), folder=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert result.code == 130
    assert "interrupted outside training" in result.err
    assert not runs().exists()


def test_scratch_leaves_nothing(gptlab: Command, corpus_file: Path) -> None:
    result = gptlab("train", "--scratch", *tiny(corpus_file, steps=2))
    assert result.code == 0, result.err
    assert not runs().exists()


def test_rerun_trains_again_what_is_done(gptlab: Command, corpus_file: Path) -> None:
    gptlab("train", *tiny(corpus_file, steps=2))
    assert "skipped" in gptlab("train", *tiny(corpus_file, steps=2)).out
    assert "skipped" not in gptlab("train", "--rerun", *tiny(corpus_file, steps=2)).out


def test_the_config_is_shown_and_nothing_is_trained(gptlab: Command) -> None:
    shown = gptlab("train", "--cfg", "job", "model/norm=rmsnorm")
    assert shown.code == 0
    assert "eps: 1.0e-06" in shown.out
    assert "hydra" not in shown.out
    assert "model/norm=rmsnorm" in shown.out, "which components were chosen"
    helped = gptlab("train", "--help")
    assert helped.code == 0
    assert re.search("model/norm: .*layernorm.*rmsnorm", helped.out)
    assert "experiment: " in helped.out
    assert not runs().exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["model.widht=3"], 2, "did you mean model.width?"),
        (["model/norm=rmsnrm"], 2, "did you mean rmsnorm?"),
        (["model.width=abc"], 2, "model.width"),
        (["model.heads=3"], 2, "model.heads=3 does not divide model.width=16"),
        (["model.context_length=0"], 2, "model.context_length=0 must be at least 1"),
        (["trainer.budget=5"], 2, "2000steps"),
        (["trainer.batch_tokens=70"], 2, "trainer.batch_tokens=70 is not a multiple of model.context_length=16; try 64"),
        (["experiment=nom"], 2, "did you mean norm?"),
        (["data.corpus.path=missing.txt"], 2, "data.corpus.path=missing.txt"),
        (["optimizer.learning_rate=-1"], 2, "optimizer.learning_rate=-1.0 must be at least 0"),
        (["schedule.final=2"], 2, "schedule.final=2.0 must be in [0, 1]"),
        (["hardware.device=cuda:77"], 2, "hardware.device=cuda:77"),
        (["hardware.precision=fp4"], 2, "hardware.precision=fp4 is not one of"),
        (["study=a/b"], 2, "study='a/b'"),
        (["name=${oc.env:HOME}"], 2, "would write the environment"),
        (["--reurn"], 2, "--reurn is not an option of gptlab train (did you mean --rerun?)"),
        (["seed=99999999999999999999999"], 2, "seed=99999999999999999999999 must be from 0"),
        (["trainer.batch_tokens=1600000"], 3, "too few for one batch"),
        (["optimizer.learning_rate=1e30"], 4, "at step"),
    ],
)
def test_bad_input_is_one_sentence_the_right_code_and_nothing_half_made(
    gptlab: Command, corpus_file: Path, arguments: list[str], code: int, said: str
) -> None:
    result = gptlab("train", *tiny(corpus_file), *arguments)
    assert result.code == code, result.err
    assert said in result.err
    assert "Traceback" not in result.err
    assert len(result.err.strip().splitlines()) == 1, result.err
    if code in (2, 3):
        assert not runs().exists()


def written() -> int:
    """Bytes of metrics on disk: a session that adds to them is training."""
    return sum(f.stat().st_size for f in runs().glob("*/*/metrics.jsonl"))


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_saves_a_checkpoint_and_the_same_command_resumes(corpus_file: Path, tmp_path: Path) -> None:
    command = ["train", *tiny(corpus_file, "trainer.budget=100000steps", "schedule=constant")]
    process = start(*command, folder=tmp_path)
    wait_for(lambda: bool(written()))
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert result.code == 75, result.err
    assert "the same command resumes it" in result.err
    assert "Traceback" not in result.err
    again = start(*command, folder=tmp_path)
    line = ""
    assert again.stdout is not None
    while "resumed at step" not in line and again.poll() is None:
        line = again.stdout.readline()
    before = written()
    wait_for(lambda: written() > before)
    again.send_signal(signal.SIGTERM)
    assert finish(again).code == 75
    assert "resumed at step" in line


def test_ctrl_c_ends_a_sweep_at_once_and_the_same_command_goes_on(corpus_file: Path, tmp_path: Path) -> None:
    budget = ["trainer.budget=100000steps", "schedule=constant"]
    process = start("train", "-m", *tiny(corpus_file, *budget), "seed=0,1", "study=cut", folder=tmp_path)
    wait_for(lambda: bool(written()))
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert result.code == 75, result.err
    assert "Traceback" not in result.err
    assert len(list(runs().glob("cut/*/config.json"))) == 1, "the second arm was not begun"


PLUGIN = '''
"""A norm of my own."""
import torch
from gptlab import register


@register("model/norm", "maxnorm")
class MaxNorm(torch.nn.Module):
    """Divides by the largest absolute value."""

    def __init__(self, width: int, *, eps: float = 1e-6):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return self.gain * x / (x.abs().amax(-1, keepdim=True) + self.eps)
'''


def test_a_plugin_is_one_file_through_the_joblib_launcher_too(corpus_file: Path, tmp_path: Path) -> None:
    (tmp_path / "my_norms.py").write_text(PLUGIN)
    sweep = ["train", "-m", *tiny(corpus_file, steps=4), "model/norm=rmsnorm,maxnorm", "seed=0,1", "study=mine"]
    result = finish(start("--plugin", "my_norms.py", *sweep, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", folder=tmp_path))
    assert result.code == 0, result.err
    assert "4 runs: 4 trained" in result.out
    assert "maxnorm" in result.out
    written = json.loads(next((runs() / "mine").glob("*/config.json")).read_text())
    assert written["config"]["hardware"]["threads"] == max(1, (os.cpu_count() or 1) // 2), "the cores are shared"
    alone = finish(start("runs", "show", "norm=maxnorm,", folder=tmp_path))
    assert alone.code == 2
    shown = finish(start("sample", next(d.name.rpartition("-")[2] for d in (runs() / "mine").glob("*maxnorm*")), folder=tmp_path))
    assert shown.code == 2
    assert "model/norm=maxnorm is not registered" in shown.err
    assert "--plugin" in shown.err


@pytest.mark.parametrize(
    ("content", "said"),
    [("import nonsense_that_is_not_there", "ModuleNotFoundError"), ("x = 1 / 0", "ZeroDivisionError"), ("def broken(:", "SyntaxError")],
)
def test_a_plugin_that_raises_is_named_with_its_line(gptlab: Command, tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / f"plugin_{abs(hash(content))}.py"
    file.write_text(content + "\n")
    result = gptlab("--plugin", str(file), "train", "--cfg", "job")
    assert result.code == 2
    assert said in result.err
    assert file.name in result.err
    assert "Traceback" not in result.err


def test_a_component_that_raises_when_built_is_one_sentence(gptlab: Command, tmp_path: Path, corpus_file: Path) -> None:
    file = tmp_path / "raising_norm.py"
    file.write_text(PLUGIN.replace("super().__init__()", "raise KeyError('no such thing')").replace("maxnorm", "raisingnorm"))
    result = gptlab("--plugin", str(file), "train", *tiny(corpus_file), "model/norm=raisingnorm")
    assert result.code == 2
    assert "KeyError" in result.err
    assert "raising_norm.py, line" in result.err
    assert not runs().exists()


TOKENIZER = '''
from gptlab.config.registry import register
from gptlab.data.tokenizer import ByteTokenizer


@register("data/tokenizer", "folded")
class Folded(ByteTokenizer):
    """Bytes, in lower case if asked."""

    name = "folded"

    def __init__(self, *, lower: bool = False) -> None:
        self.lower = lower

    def encode(self, text):
        return super().encode(text.lower() if self.lower else text)
'''


def test_a_tokenizer_of_ones_own_keeps_its_options_and_its_source_counts(corpus_file: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "folded_tokenizer.py"
    plugin.write_text(TOKENIZER)
    command = ["--plugin", str(plugin), "train", *tiny(corpus_file, steps=2), "data/tokenizer=folded", "data.tokenizer.lower=true"]
    assert finish(start(*command, folder=tmp_path)).code == 0
    written = json.loads(next(runs().glob("*/*/tokenizer.json")).read_text())
    assert written["options"] == {"lower": True}
    assert "skipped" in finish(start(*command, folder=tmp_path)).out
    plugin.write_text(TOKENIZER.replace("text.lower()", "text.upper()"))
    assert "skipped" not in finish(start(*command, folder=tmp_path)).out


def test_markup_in_a_message_is_only_text(gptlab: Command, tmp_path: Path, corpus_file: Path) -> None:
    file = tmp_path / "bracket_norm.py"
    raising = PLUGIN.replace("maxnorm", "bracketnorm").replace(
        "return self.gain", "raise ValueError('in [/x] [abc]')\n        return self.gain"
    )
    file.write_text(raising)
    sweep = ["train", "-m", *tiny(corpus_file, steps=2), "model/norm=bracketnorm,layernorm", "study=brackets"]
    result = gptlab("--plugin", str(file), *sweep)
    assert result.code == 1
    assert "in [/x] [abc]" in result.out
    assert "Traceback" not in result.err
    assert "in [/x] [abc]" in gptlab("--plugin", str(file), "runs", "list", "brackets").out
    assert gptlab("components", "check", str(file)).code == 1


TRACKER = '''
from gptlab.config.registry import register


@register("tracker", "failing")
class Failing:
    """Raises at every turn."""

    def start(self, run): raise OSError("start")
    def log(self, metrics): raise OSError("log")
    def finish(self, summary, code): raise ValueError("finish")
'''


def test_a_tracker_that_raises_costs_one_warning(gptlab: Command, tmp_path: Path, corpus_file: Path) -> None:
    file = tmp_path / "failing_tracker.py"
    file.write_text(TRACKER)
    result = gptlab("--plugin", str(file), "train", *tiny(corpus_file, steps=3), "tracker=failing")
    assert result.code == 0, result.err
    assert result.out.count("the tracker failed") == 1


def test_completion_asks_hydra() -> None:
    from gptlab.cli.completion import complete

    assert "model/norm=" in complete("model/no")
    assert {"model/norm=layernorm", "model/norm=rmsnorm"} <= set(complete("model/norm="))
    assert "model" in complete("mo")
    assert "trainer.budget=" in complete("trainer.bud")


def test_completion_of_the_shell_reaches_it() -> None:
    command = Path(sys.executable).with_name("gptlab")
    if not command.exists():
        pytest.skip("needs the installed `gptlab` command")
    asked = {**os.environ, "_GPTLAB_COMPLETE": "complete_bash", "COMP_WORDS": "gptlab train model/no", "COMP_CWORD": "2"}
    answer = subprocess.run([str(command)], env=asked, capture_output=True, text=True, timeout=60, check=False)
    assert "model/norm=" in answer.stdout, answer.stderr


def test_the_sweep_of_an_experiment_can_be_narrowed(gptlab: Command, corpus_file: Path) -> None:
    result = gptlab("train", "experiment=norm", *tiny(corpus_file, steps=2), "model/norm=rmsnorm", "seed=7", "study=narrow")
    assert result.code == 0, result.err
    assert "1 runs: 1 trained" in result.out or "1 run: 1 trained" in result.out
    members = [json.loads(line) for line in (runs() / "narrow" / "members.jsonl").read_text().splitlines()]
    assert [m["seed"] for m in members] == [7]


def test_rows_that_cannot_be_read_are_told_where_they_are_trained_on(gptlab: Command, corpus_file: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": line}) for line in corpus_file.read_text(encoding="utf-8").splitlines() or ["the king"] * 9]
    rows = rows * (1 + 4000 // sum(map(len, rows)))
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*rows[:2], rows[0][:-5], *rows[2:]]), encoding="utf-8")
    result = gptlab("train", *tiny(file))
    assert result.code == 0, result.err
    assert "1 row of the text could not be read and is left out" in result.out
