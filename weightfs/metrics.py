"""The live state as Prometheus text. Every metric's name is here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from weightfs.wire import Opcode


def by_name(requests: Counter[int]) -> dict[str, int]:
    """Request counts by the opcode's name, the number where it has none here."""
    names = {code.value: code.name.lower() for code in Opcode}
    return {names.get(code, f"opcode_{code}"): count for code, count in sorted(requests.items())}


class _Collector(Collector):
    def __init__(self, status: Callable[[], Mapping[str, Any]]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        info = GaugeMetricFamily(
            "weightfs_mount_info", "One mount, always 1", labels=["mountpoint", "source", "engine"]
        )
        # Prometheus text is UTF-8, paths need not be.
        labels = (str(status[key]) for key in ("mountpoint", "source", "engine"))
        info.add_metric([label.encode("utf-8", "backslashreplace").decode() for label in labels], 1)
        yield info
        yield GaugeMetricFamily("weightfs_uptime_seconds", "Since the daemon started", status["uptime_s"])
        yield GaugeMetricFamily("weightfs_open_inodes", "Files open through the mount", status["open_inodes"])
        yield GaugeMetricFamily(
            "weightfs_header_faults", "Weight files whose header has a fault", len(status["faults"])
        )
        yield CounterMetricFamily("weightfs_opens", "Files opened", status["opens"])
        yield CounterMetricFamily("weightfs_headers_parsed", "Headers not found in the index", status["headers_parsed"])
        yield CounterMetricFamily("weightfs_read_bytes", "Bytes read through user space", status["bytes_read"])
        yield CounterMetricFamily(
            "weightfs_requests_expired", "Requests past their deadline", status["requests_expired"]
        )
        yield CounterMetricFamily(
            "weightfs_requests_poisoned", "Requests that two daemons died of", status["requests_poisoned"]
        )
        yield CounterMetricFamily("weightfs_daemon_deaths", "Daemons of this mount that died", status["deaths"])
        yield GaugeMetricFamily("weightfs_watched_folders", "Watched for changes", status["watch"].get("folders", 0))
        yield from _of_prefetch(status["prefetch"])
        requests = CounterMetricFamily("weightfs_requests", "Requests that reached user space", labels=["operation"])
        for operation, count in status["requests"].items():
            requests.add_metric([operation], count)
        yield requests


def _of_prefetch(state: Mapping[str, Any]) -> Iterator[Metric]:
    yield GaugeMetricFamily("weightfs_memory_budget_bytes", "What models may take of memory", state["budget_bytes"])
    yield GaugeMetricFamily("weightfs_locked_bytes", "Layers locked in memory", state["locked_bytes"])
    yield GaugeMetricFamily("weightfs_prefetch_active", "Models being read ahead", len(state["active"]))
    yield GaugeMetricFamily("weightfs_prefetch_halted", "1 while memory is short", int(state["halted"] is not None))
    yield CounterMetricFamily("weightfs_prefetch_read_bytes", "Read ahead", state["filled_bytes"])
    yield CounterMetricFamily("weightfs_evicted_bytes", "Dropped from memory", state["evicted_bytes"])
    yield CounterMetricFamily("weightfs_prefetch_triggers", "Opens that call for a model", state["triggers"])
    if (ahead := state["predicted"]) is not None:
        yield CounterMetricFamily("weightfs_predicted_read_bytes", "Read before it was asked for", ahead["read_bytes"])
        yield CounterMetricFamily(
            "weightfs_predicted_used_bytes", "Of these, there when asked for", ahead["used_bytes"]
        )
        yield CounterMetricFamily("weightfs_predicted_wasted_bytes", "Of these, gone by then", ahead["wasted_bytes"])
    resident = GaugeMetricFamily(
        "weightfs_resident_bytes", "In memory, of models last wanted", labels=["model", "layer"]
    )
    for model in state["models"]:
        name = model["model"].encode("utf-8", "backslashreplace").decode()
        for layer in model["layers"]:
            resident.add_metric([name, layer["layer"].encode("utf-8", "replace").decode()], layer["resident_bytes"])
    yield resident


def exposition(status: Mapping[str, Any]) -> bytes:
    """The Prometheus text of one state."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(lambda: status))
    return generate_latest(registry)


def serve(address: tuple[str, int], status: Callable[[], Mapping[str, Any]]) -> None:
    """Serve the text over HTTP from a daemon thread, until the process ends."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(status))
    host, port = address
    start_http_server(port, host, registry)
