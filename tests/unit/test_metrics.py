from __future__ import annotations

import urllib.request
from collections import Counter
from typing import Any

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from weightfs import metrics
from weightfs.wire import Opcode

STATUS: dict[str, Any] = {
    "mountpoint": "/models",
    "source": '/srv/"odd"\\name\n',
    "engine": "passthrough",
    "uptime_s": 12.5,
    "open_inodes": 3,
    "faults": [{}, {}],
    "opens": 100,
    "headers_parsed": 7,
    "bytes_read": 1 << 50,
    "requests_expired": 1,
    "requests_poisoned": 2,
    "deaths": 4,
    "watch": {"state": "inotify", "folders": 11},
    "prefetch": {
        "budget_bytes": 1 << 34,
        "locked_bytes": 4096,
        "active": [{}],
        "halted": None,
        "predicted": {"read_bytes": 30, "used_bytes": 20, "wasted_bytes": 10},
        "filled_bytes": 77,
        "evicted_bytes": 5,
        "triggers": 6,
        "models": [{"model": "a/model", "layers": [{"layer": "embedding", "bytes": 9, "resident_bytes": 8}]}],
    },
    "requests": {"lookup": 5, "read": 9, "opcode_99": 1},
}


def samples(text: bytes) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def test_the_text_says_what_the_status_says() -> None:
    assert samples(metrics.exposition(STATUS)) == {
        'weightfs_mount_info{engine=passthrough,mountpoint=/models,source=/srv/"odd"\\name\n}': 1,
        "weightfs_uptime_seconds": 12.5,
        "weightfs_open_inodes": 3,
        "weightfs_header_faults": 2,
        "weightfs_opens_total": 100,
        "weightfs_headers_parsed_total": 7,
        "weightfs_read_bytes_total": 1 << 50,
        "weightfs_requests_expired_total": 1,
        "weightfs_requests_poisoned_total": 2,
        "weightfs_daemon_deaths_total": 4,
        "weightfs_watched_folders": 11,
        "weightfs_memory_budget_bytes": 1 << 34,
        "weightfs_locked_bytes": 4096,
        "weightfs_prefetch_active": 1,
        "weightfs_prefetch_halted": 0,
        "weightfs_prefetch_read_bytes_total": 77,
        "weightfs_predicted_read_bytes_total": 30,
        "weightfs_predicted_used_bytes_total": 20,
        "weightfs_predicted_wasted_bytes_total": 10,
        "weightfs_evicted_bytes_total": 5,
        "weightfs_prefetch_triggers_total": 6,
        "weightfs_resident_bytes{layer=embedding,model=a/model}": 8,
        "weightfs_requests_total{operation=lookup}": 5,
        "weightfs_requests_total{operation=read}": 9,
        "weightfs_requests_total{operation=opcode_99}": 1,
    }


def test_a_source_whose_name_is_no_utf8_has_metrics_too() -> None:
    assert metrics.exposition({**STATUS, "source": "/srv/\udcff"})


def test_requests_by_name() -> None:
    counts = Counter({Opcode.READ.value: 3, Opcode.LOOKUP.value: 1, 99: 2})
    assert metrics.by_name(counts) == {"lookup": 1, "read": 3, "opcode_99": 2}
    assert metrics.by_name(Counter()) == {}


def test_it_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = []

    def start(port: int, host: str, registry: Any) -> None:
        servers.append(prometheus_client.start_http_server(port, host, registry))

    monkeypatch.setattr(metrics, "start_http_server", start)
    metrics.serve(("127.0.0.1", 0), lambda: STATUS)
    ((server, thread),) = servers
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=10) as reply:
            assert samples(reply.read())["weightfs_opens_total"] == 100
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
