"""What a command loads: torch.compile, which nothing here uses, would cost two seconds at each start."""

import subprocess
import sys
from pathlib import Path

from tiny import write_tiny

PROGRAM = """\
import sys
from tetrad.cli import main
for line in sys.argv[1:]:
    assert main(line.split()) == 0
    loaded = [name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules]
    assert not loaded, (line, loaded)
"""


def test_no_stage_and_no_use_loads_the_compiler(tmp_path: Path) -> None:
    path = write_tiny(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the film"}\n')
    lines = [
        f"run {path} --run.out {tmp_path}/runs --pretrain.tokens 1024 --sft.epochs 0.2 --reward.epochs 1 --ppo.steps 2",
        f"generate {tmp_path}/runs/tiny/ppo --prompts {tmp_path}/prompts.jsonl --max-new 4",
        f"score {tmp_path}/runs/tiny/reward --data {tmp_path}/held_out.jsonl",
    ]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *lines], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
