"""What each step asks of a cluster, by flow and step. A run on this machine asks for nothing.

`memory_mb` is what a step takes with little data (Python, libraries, compiled kernels) and `per_million_mb` what each million events of the lake adds;
`[kubernetes] million_events` says for how many. `*` stands for every other step of the flow. Where the numbers are from, each times 1.3 for what a
measurement does not see:
- steps that only look and note: 340 MB at 100,000 events, which is the imports
- ingest: benchmarks/results/ingest.json, 1.03 GB at 1 million events, 1.49 at 10; and what whylogs and Metaflow add, 0.85 GB at 100,000 in place of .6
- batch: benchmarks/results/p4_batch.json, 660 MB for each worker; Ray takes 1.2 GB beside them
- training: benchmarks/results/p3_training.json, two branches of `fit` hold 2.9 GB together at 0.3 million events and 6.1 at 10 million, `rank` 3.5 and 4.0, most of it lists whose
  number `[train] max_requests` bounds; `start`, which reads the whole lake, 0.6 and 3.2, `evaluate` 0.7 and 2.4
- gates and search: not measured by step; they do what `fit`, `rank` and `evaluate` do, one after the other
- the others: what they read of the lake is less than training reads
"""
from math import ceil
from typing import NamedTuple


class Need(NamedTuple):
    """What one step asks for."""
    cpu: float = 0.5
    memory_mb: int = 512
    per_million_mb: int = 0
    disk_mb: int = 4_096

    def asked(self, million_events: float) -> dict[str, str]:
        """As `@resources` takes it, memory in steps of 256 MB."""
        memory = ceil((self.memory_mb + self.per_million_mb*million_events)/256)*256
        return {"cpu": f"{self.cpu:g}", "memory": str(memory), "disk": str(self.disk_mb)}


LEARN = Need(2, 5_120, 512, 20_480)
NEEDS: dict[str, dict[str, Need]] = {
    "IngestFlow": {"*": Need(), "ingest": Need(2, 1_536, 128, 20_480)},
    "TrainFlow": {"*": Need(1, 1_024, 384), "fit": Need(2, 2_048, 256), "rank": Need(2, 5_120, 128, 20_480)},
    "PromoteFlow": {"*": Need(), "judge": LEARN},
    "MaterializeFlow": {"*": Need(), "materialize": Need(1, 1_536, 512)},
    "BatchFlow": {"*": Need(), "score": Need(4, 5_120, 1_024)},
    "UpkeepFlow": {"*": Need(), "upkeep": Need(1, 1_024, 256)},
    "SearchFlow": {"*": Need(1, 1_024), "start": Need(1, 1_024, 512), "sources": LEARN, "ranking": LEARN, "reranking": LEARN, "end": LEARN},
    "MonitorFlow": {"*": Need(1, 1_536, 512)},
    "KpisFlow": {"*": Need(), "count": Need(1, 1_536, 512)},
    "ReportFlow": {"*": Need(1, 1_536, 512), "write": LEARN},
}


def need(flow: str, step: str) -> Need:
    """The row of a step; the flow's `*` where it has none, and a plain one for a flow that is not in the table."""
    rows = NEEDS.get(flow, {})
    return rows.get(step, rows.get("*", Need()))
