"""See what the norms do: a tracker, its probes and its file."""

from sphereopt.monitor.jsonl import JsonlSink, read_jsonl
from sphereopt.monitor.probes import PROBES
from sphereopt.monitor.tracker import Tracker, track

__all__ = ["PROBES", "JsonlSink", "Tracker", "read_jsonl", "track"]
