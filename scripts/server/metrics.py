"""What /metrics tells Prometheus: requests, tokens, seconds, how many are answered and wait, memory."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from model.inference.answerer import Answer
from scripts.server.limits import Limits

disable_created_metrics()  # a second series for each, of when it began
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    def __init__(self, limits: Limits):
        self.registry = registry = CollectorRegistry()
        ProcessCollector(namespace="minimind", registry=registry)
        self.requests = Counter(
            "minimind_requests", "replies by path and status", ["path", "status"], registry=registry
        )
        self.answers = Counter("minimind_answers", "answers by what ended them", ["ending"], registry=registry)
        self.prompt_tokens = Counter("minimind_prompt_tokens", "tokens of prompts", registry=registry)
        self.new_tokens = Counter("minimind_generated_tokens", "tokens of answers", registry=registry)
        self.pictures = Counter(
            "minimind_pictures", "pictures by whether they were known", ["known"], registry=registry
        )
        self.first = Histogram("minimind_time_to_first_token_seconds", "from the request's arrival", buckets=SECONDS,
                               registry=registry)  # fmt: skip
        self.duration = Histogram("minimind_request_duration_seconds", "of requests for answers, to the last byte",
                                  buckets=SECONDS, registry=registry)  # fmt: skip
        self.running = Gauge("minimind_rows_running", "answers that grow now", registry=registry)
        self.waiting = Gauge("minimind_rows_waiting", "requests behind them", registry=registry)
        most = Gauge("minimind_rows_limit", "how many may grow, and wait", ["which"], registry=registry)
        most.labels("running").set(limits.rows)
        most.labels("waiting").set(limits.waiting)

    def count(self, answer: Answer, ending: str) -> None:
        self.answers.labels(ending).inc()
        self.prompt_tokens.inc(answer.prompt_tokens)
        self.new_tokens.inc(answer.new_tokens)

    def text(self) -> bytes:
        return generate_latest(self.registry)
