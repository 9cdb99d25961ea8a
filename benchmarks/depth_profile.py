"""Cost of a depth profile: steps that record one (monitor.depth_every) against the other steps of the same run.

    OMP_NUM_THREADS=1 python benchmarks/depth_profile.py

Prints one line, writes no results.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from tests.support.rank_pool import RankPool
from tests.support.small_runs import run_config, train, write_latents

EVERY, WARM_UP = 4, 10


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = write_latents(folder / "latents", samples=640)
        changes = {"train__steps": 120, "train__global_batch_size": 32, "model__depth": 12, "model__hidden_size": 128}
        config = run_config(folder, data, **changes, monitor__depth_every=EVERY)
        RankPool().run(1, train, config)
        lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()[WARM_UP:]
    records = [json.loads(line) for line in lines]
    watched, others = (
        statistics.median(r["step_s"] for r in records if (r["step"] % EVERY == 0) == is_watched)
        for is_watched in (True, False)
    )
    print(f"a step with a profile {watched:.3f} s, without {others:.3f} s: {watched / others - 1:.1%} more")


if __name__ == "__main__":
    main()
