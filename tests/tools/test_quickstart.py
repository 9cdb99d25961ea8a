"""A second call of the quickstart. (The first takes minutes: see docs/performance.md.)."""

import subprocess
import sys
from pathlib import Path

from tests.support.limits import HANG_S


def test_a_second_call_lists_what_exists_and_changes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "quickstart"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (run / "samples.png").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    script = Path("tools/quickstart.py").resolve()
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0
    for words in (
        "exists already, trained for 2 steps",
        "runs/quickstart/samples.png",
        "CONTINUE=1",
        "rm -r runs/quickstart",
    ):
        assert words in done.stdout
    assert sorted(tmp_path.rglob("*")) == before
