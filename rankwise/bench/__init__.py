"""Speed and memory of models and engines, measured against each other in one run."""

from rankwise.bench.config import BenchConfig, Contestant, Load
from rankwise.bench.lineup import ENGINES, line_up
from rankwise.bench.run import bench
from rankwise.bench.summary import percentile

__all__ = ["ENGINES", "BenchConfig", "Contestant", "Load", "bench", "line_up", "percentile"]
