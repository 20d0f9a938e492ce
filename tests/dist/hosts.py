"""SFT and PPO of example A on two network namespaces, which take themselves for two machines, against one machine.

    PYTHONPATH=src:tests python tests/dist/hosts.py RUNS [none|full|host]        # as root

RUNS has what `tetrad run examples/reviews-en/quick.toml --run.out RUNS` has made; nothing in it is changed. Each
namespace has its own host name, address and end of a veth pair, and starts `torchrun --nnodes 2` with one process; the
disk is common. Twenty steps each; prints whether weights and figures are those of two processes on one machine, bit by
bit, and how much came over the cable so far; exits 1 if not.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOSTS = {"tetrad-a": "10.77.0.1", "tetrad-b": "10.77.0.2"}
STAGES = {"sft": ["--sft.epochs", "0.0588", "--sft.validation", "[]"], "ppo": ["--ppo.steps", "20"]}
NAME = "reviews-en-quick"


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)


def connect() -> None:
    """Two namespaces, a cable between them, and names for both ends."""
    names = "127.0.0.1 localhost\n" + "".join(f"{address} {host}\n" for host, address in HOSTS.items())
    ip("link add tetrad-a type veth peer name tetrad-b")
    for host, address in HOSTS.items():
        ip(f"netns add {host}")
        (Path("/etc/netns") / host).mkdir(parents=True)
        (Path("/etc/netns") / host / "hosts").write_text(names)  # which `ip netns exec` puts at /etc/hosts
        ip(f"link set {host} netns {host}")
        ip(f"-n {host} addr add {address}/24 dev {host}")
        ip(f"-n {host} link set {host} up")
        ip(f"-n {host} link set lo up")


def disconnect() -> None:
    for host in HOSTS:
        subprocess.run(["ip", "netns", "del", host], check=False)
        shutil.rmtree(Path("/etc/netns") / host, ignore_errors=True)


def run(stage: str, out: Path, shard: str, hosts: list[str]) -> None:
    own = [*STAGES[stage], "--run.out", str(out), "--run.shard", shard]
    tetrad = ["-m", "tetrad", stage, str(ROOT / "examples/reviews-en/quick.toml"), *own]
    commands = [[sys.executable, *tetrad, "--nproc", "2"]]
    if hosts:
        start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(hosts)), "--nproc-per-node", "1"]
        start += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0]}:29500", "--rdzv-id", "hosts"]
        named = 'hostname "$0"; exec "$@"'
        commands = [
            ["ip", "netns", "exec", h, "unshare", "--uts", "sh", "-c", named, h, *start, *tetrad] for h in hosts
        ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    codes = [process.wait() for process in [subprocess.Popen(words, env=environment) for words in commands]]
    if any(codes):
        raise SystemExit(f"{stage} on {hosts or 'one machine'}: exit {codes}")


def travelled() -> float:
    """MB that the first namespace has received over the cable."""
    host = next(iter(HOSTS))
    words = ["ip", "netns", "exec", host, "cat", f"/sys/class/net/{host}/statistics/rx_bytes"]
    return int(subprocess.run(words, check=True, capture_output=True).stdout) / 1e6


def digests(folder: Path) -> dict[str, str]:
    files = [folder / "metrics.jsonl", *sorted((folder / "model").glob("*.safetensors"))]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}


def main(runs: str, shard: str = "none") -> int:
    good = True
    with tempfile.TemporaryDirectory() as name:
        connect()
        try:
            for stage in STAGES:
                both = []
                for hosts in ([], list(HOSTS)):
                    out = Path(name, f"{stage}-{len(hosts)}")
                    shutil.copytree(Path(runs, NAME), out / NAME)
                    for old in ("ppo", "evaluate", *([stage] if stage == "sft" else [])):
                        shutil.rmtree(out / NAME / old, ignore_errors=True)
                    run(stage, out, shard, hosts)
                    both.append(digests(out / NAME / stage))
                steps = len((out / NAME / stage / "metrics.jsonl").read_text().splitlines())
                good = good and both[0] == both[1]
                result = "the same bits" if both[0] == both[1] else both
                print(f"{stage}, {shard}: {steps} steps, {travelled():.1f} MB, {result}", flush=True)
        finally:
            disconnect()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
