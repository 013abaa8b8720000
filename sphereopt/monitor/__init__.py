"""See what the norms do: a tracker, its probes, and where its rows go.

The callbacks for Lightning and transformers are in :mod:`sphereopt.monitor.lightning` and
:mod:`sphereopt.monitor.huggingface`, which need those packages and are imported by name.
"""

from sphereopt.monitor.jsonl import JsonlSink, LogError, iterate, read_jsonl
from sphereopt.monitor.probes import PROBES, Probe
from sphereopt.monitor.sinks import LogSink, ScalarSink, scalars
from sphereopt.monitor.summary import QUANTILES
from sphereopt.monitor.table import CsvSink, ParquetSink, to_parquet
from sphereopt.monitor.tracker import Tracker, track

__all__ = [
    "PROBES",
    "QUANTILES",
    "CsvSink",
    "JsonlSink",
    "LogError",
    "LogSink",
    "ParquetSink",
    "Probe",
    "ScalarSink",
    "Tracker",
    "iterate",
    "read_jsonl",
    "scalars",
    "to_parquet",
    "track",
]
