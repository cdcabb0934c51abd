"""Two machines, as two network namespaces joined by a link, which is cut while they train."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from places import ROOT
from zygote import Zygote

from train.config import Config, changed, to_yaml
from train.disk.checkpoint import load_checkpoint
from train.disk.folder import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]

# In namespaces of its own for users, networks and mounts, so that it needs no rights and leaves nothing behind.
WITHIN = ("unshare", "--user", "--map-root-user", "--net", "--mount")
LINKED = """
set -e
mount -t tmpfs none /run  # where ip keeps the names of namespaces
for host in first second; do ip netns add $host; ip -n $host link set lo up; done
ip link add wire netns first type veth peer name wire netns second
ip -n first addr add 10.77.0.1/24 dev wire; ip -n first link set wire up
ip -n second addr add 10.77.0.2/24 dev wire; ip -n second link set wire up
"""
TRAIN = """
set +e
host() {  # NAME RANK: the training on that host; its exit code in NAME.code
    ip netns exec $1 unshare --uts sh -c 'hostname $0; exec "$@"' $1 env RANK=$2 LOCAL_RANK=0 "$python" -c "$slowly" \
        --config recipe.yaml run.dir=run-$1 > $1.out 2> $1.err
    echo $? > $1.code
}
export WORLD_SIZE=2 MASTER_ADDR=10.77.0.1 MASTER_PORT=29500 GLOO_SOCKET_IFNAME=wire
host first 0 &
host second 1 &
until [ -e cut ] || [ -e first.code ] || [ -e second.code ]; do sleep 0.1; done
ip -n first link set wire down
wait
"""
# steps that take a moment; with the seventh, the link is cut
SLOWLY = """
import sys, time
from pathlib import Path
from train.__main__ import main
from train.failpoints import arm

def step(count):
    if count == 7:
        Path("cut").touch()
    time.sleep(0.1)

arm("step", step)
sys.exit(main())
"""


def why_not() -> str | None:
    """Why there can be no two machines here."""
    for name, package in (("unshare", "util-linux"), ("ip", "iproute2")):
        if shutil.which(name) is None:
            return f"needs the program {name} (Debian's {package})"
    done = subprocess.run([*WITHIN, "sh", "-c", LINKED], capture_output=True, text=True)
    return f"no network namespaces here: {done.stderr.strip()[-200:]}" if done.returncode else None


def test_a_cut_link_ends_both_machines_which_name_each_other_and_one_resumes_alone(
    runs: Zygote, quick_config: Config, tmp_path: Path
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    noise = {"data.name": "synthetic", "data.synthetic_count": 1280, "data.backend": "torch", "run.checkpoint_every": 1}
    small = {"net.width": 1, "train.batch_size": 64, "train.eval_batch_size": 64, "train.epochs": 2}
    (tmp_path / "recipe.yaml").write_text(to_yaml(changed(quick_config, {**noise, **small})))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRAIN_DISTRIBUTED_TIMEOUT": "8"}
    environment |= {"python": sys.executable, "slowly": SLOWLY}
    subprocess.run([*WITHIN, "sh", "-c", LINKED + TRAIN], cwd=tmp_path, env=environment, check=True, timeout=300)
    said = {host: (tmp_path / f"{host}.err").read_text() for host in ("first", "second")}
    assert [(tmp_path / f"{host}.code").read_text().strip() for host in said] == ["1", "1"], said
    last = {host: text.strip().splitlines()[-1] for host, text in said.items()}
    assert last["first"].startswith("error: process 0 on first lost process 1 on second (silent for"), said
    assert last["second"].startswith("error: process 1 on second lost the store at 10.77.0.1:29500"), said
    assert "Traceback" not in "".join(said.values())
    # the first machine alone has the run, and goes on without the other
    assert not (tmp_path / "run-second").exists()
    assert load_checkpoint(tmp_path / "run-first" / "last.pt")["step"] >= 6
    code, out, err = runs.run("--config", tmp_path / "recipe.yaml", f"run.dir={tmp_path / 'run-first'}", "--resume")
    assert code == 0 and "processes 2 -> 1" in out, err
    assert [entry["epoch"] for entry in read_metrics(tmp_path / "run-first" / "metrics.jsonl")] == [1, 2]
