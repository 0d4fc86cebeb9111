"""The pages of all processes as `GET /metrics` shows them, in the Prometheus text format.

It owns nothing and relies on the table in `tokenllm.counters`; the numbers of the server are the sums over its pages.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from tokenllm.counters import METRICS, Metric, Page, total


def render(pages: Sequence[Page]) -> bytes:
    """The body of `GET /metrics`."""
    return generate_latest(_Sums(pages))


class _Sums(Collector):
    def __init__(self, pages: Sequence[Page]) -> None:
        self._pages = pages

    def collect(self) -> Iterable[Family]:
        return (_family(metric, self._pages) for metric in METRICS)


def _family(metric: Metric, pages: Sequence[Page]) -> Family:
    match metric.kind:
        case "histogram":
            return _histogram(metric, pages)
        case "counter":
            family = CounterMetricFamily(metric.name, metric.help, labels=[metric.label] if metric.label else [])
        case "gauge":
            family = GaugeMetricFamily(metric.name, metric.help)
    for label in metric.labels:
        family.add_metric([label] if metric.label else [], total(pages, metric.name, label))
    return family


def _histogram(metric: Metric, pages: Sequence[Page]) -> Family:
    counts, sums = zip(*(page.histogram(metric.name) for page in pages), strict=True)
    bounds = [*map(str, metric.buckets), "+Inf"]
    events = accumulate(map(sum, zip(*counts, strict=True)))
    family = HistogramMetricFamily(metric.name, metric.help)
    family.add_metric([], list(zip(bounds, events, strict=True)), sum(sums))
    return family
