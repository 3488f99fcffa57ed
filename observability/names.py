"""Every name that the outside sees of the program at work, once: spans, their attributes, metrics, log events.

Dashboards, alerts and people's searches hang on these, so a name is never written out anywhere else, and a test
asserts that each one here is really emitted.
"""

from enum import StrEnum


class SpanName(StrEnum):
    RECEIVE = "POST /hooks/{source}"  # SERVER: the route, never the path, which may hold a token
    SEND = "send"  # PRODUCER: from the minimized event to its commit
    PROCESS = "process"  # CONSUMER: one attempt; the destination's name follows
    DEAD_LETTER = "dead letter"  # INTERNAL
    REPLAY = "replay"  # INTERNAL
    # A CLIENT span is called as its method: POST, PROPFIND, …


class Attribute(StrEnum):
    """Attributes of spans: OpenTelemetry's semantic conventions 1.44, then ours.

    `url.full` and `url.path` are left out on purpose: a path can hold a token or a person's name.
    """

    HTTP_REQUEST_METHOD = "http.request.method"
    HTTP_ROUTE = "http.route"
    HTTP_RESPONSE_STATUS_CODE = "http.response.status_code"
    SERVER_ADDRESS = "server.address"
    SERVER_PORT = "server.port"
    ERROR_TYPE = "error.type"
    MESSAGING_SYSTEM = "messaging.system"
    MESSAGING_OPERATION_NAME = "messaging.operation.name"
    MESSAGING_OPERATION_TYPE = "messaging.operation.type"
    MESSAGING_DESTINATION_NAME = "messaging.destination.name"
    MESSAGING_MESSAGE_ID = "messaging.message.id"
    SOURCE = "sluicegate.source"
    EVENT_TYPE = "sluicegate.event_type"
    DUPLICATE_OF = "sluicegate.duplicate_of"
    ATTEMPT = "sluicegate.attempt"
    REPLAYED = "sluicegate.replayed"
    OUTCOME = "sluicegate.outcome"


class MetricName(StrEnum):
    ACCEPTED = "sluicegate_accepted_total"
    DUPLICATES = "sluicegate_duplicates_total"
    REFUSED = "sluicegate_refused_total"
    UNROUTED = "sluicegate_unrouted_total"
    HANDSHAKES = "sluicegate_handshakes_total"
    CONNECTIONS_REFUSED = "sluicegate_connections_refused_total"
    REQUEST_SECONDS = "sluicegate_request_seconds"
    DROPPED_KEYS = "sluicegate_dropped_keys_total"
    SECRET_USED = "sluicegate_secret_used_total"  # noqa: S105 — a name, not a secret
    SECRET_LAST_USED = "sluicegate_secret_last_used_timestamp_seconds"  # noqa: S105 — as that
    SECRETS_UNREADABLE = "sluicegate_secret_unreadable"
    ISSUER_AWAY = "sluicegate_issuer_away"
    ATTEMPTS = "sluicegate_attempts_total"
    ATTEMPT_SECONDS = "sluicegate_attempt_seconds"
    DELIVERY_SECONDS = "sluicegate_delivery_seconds"
    WAITING = "sluicegate_waiting"
    HELD = "sluicegate_held"
    DEAD = "sluicegate_dead"
    DESTINATION_LATE = "sluicegate_destination_late"
    SOURCE_SILENT = "sluicegate_source_silent"
    SOURCE_HEARD_SECONDS = "sluicegate_source_heard_seconds"
    SEQUENCE_MISSING = "sluicegate_sequence_missing"
    OLDEST_WAITING_SECONDS = "sluicegate_oldest_waiting_seconds"
    IN_FLIGHT = "sluicegate_in_flight"
    CONCURRENCY_LIMIT = "sluicegate_concurrency_limit"
    BREAKER_OPEN = "sluicegate_breaker_open"
    LANES_OWNED = "sluicegate_lanes_owned"
    TAKEOVERS = "sluicegate_takeovers_total"
    FENCED = "sluicegate_fenced_total"
    PRESENCE_LOST = "sluicegate_presence_lost_total"
    ORPHANS = "sluicegate_orphans_total"
    BATCH_SIZE = "sluicegate_batch_size"
    POOL_WAIT_SECONDS = "sluicegate_pool_wait_seconds"
    LOOP_LAG_SECONDS = "sluicegate_loop_lag_seconds"
    CLOCK_OFFSET_SECONDS = "sluicegate_clock_offset_seconds"
    PARTITIONS_AHEAD = "sluicegate_partitions_ahead"
    BALANCED = "sluicegate_balanced"
    TASK_RUNS = "sluicegate_task_runs_total"
    TASK_FAILURES = "sluicegate_task_failures_total"
    SPANS_DROPPED = "sluicegate_spans_dropped_total"
    LOG_LINES_DROPPED = "sluicegate_log_lines_dropped_total"
    CONFIGURATION = "sluicegate_configuration_info"
    FLEET_PROCESSES = "sluicegate_fleet_processes"
    CONFIGURATIONS_DIFFER = "sluicegate_configurations_differ"
    BUILD = "sluicegate_build_info"


class LogEvent(StrEnum):
    """What a log line is about: a thing of ours and what became of it.  The facts follow as keys and values."""

    SERVE_STARTING = "serve.starting"
    SERVE_READY = "serve.ready"
    SERVE_STOPPING = "serve.stopping"
    SERVE_STOPPED = "serve.stopped"
    WORKER_STARTED = "worker.started"
    WORKER_DIED = "worker.died"
    WORKER_RENEWED = "worker.renewed"
    WORKER_NOT_RENEWED = "worker.not_renewed"
    FAILPOINTS_ARMED = "failpoints.armed"  # this program will fail on purpose

    CONFIG_RELOADED = "config.reloaded"
    CONFIG_REFUSED = "config.refused"
    SECRETS_RENEWED = "secrets.renewed"
    SECRET_UNREADABLE = "secret.unreadable"  # noqa: S105 — or none that could be used: the one before it counts
    CONFIGURATIONS_DIFFER = "configurations.differ"
    CONFIGURATIONS_AGREE = "configurations.agree"

    POSTGRES_STARTED = "postgres.started"
    POSTGRES_STARTING = "postgres.starting"
    POSTGRES_RECOVERING = "postgres.recovering"
    POSTGRES_STOPPED = "postgres.stopped"
    POSTGRES_AWAY = "postgres.away"
    POSTGRES_BACK = "postgres.back"
    POSTGRES_LEFT = "postgres.left"  # a connection broke, or its server only reads: all are drawn anew
    MIGRATION_APPLIED = "migration.applied"
    CLOCK_SKEWED = "clock.skewed"

    EVENT_UNROUTED = "event.unrouted"
    DIAGNOSIS_BEGUN = "diagnosis.begun"
    HANDSHAKE_ANSWERED = "handshake.answered"
    CONNECTION_REFUSED = "connection.refused"
    REQUEST_REFUSED = "request.refused"
    REQUEST_FAILED = "request.failed"
    KEYS_UNAVAILABLE = "keys.unavailable"  # an issuer does not answer; its old keys count for a day

    SOURCE_SILENT = "source.silent"
    SOURCE_RESUMED = "source.resumed"
    SEQUENCE_GAP = "sequence.gap"
    SEQUENCE_FILLED = "sequence.filled"
    SEQUENCE_RESTARTED = "sequence.restarted"
    SEQUENCE_GIVEN_UP = "sequence.given_up"  # too many gaps: the lowest are not looked for any more

    DELIVERY_SETTLED = "delivery.settled"
    DELIVERY_DEAD = "delivery.dead"
    DELIVERY_FAILED = "delivery.failed"  # a bug of ours, with its stack
    PENDING_ORPHANED = "pending.orphaned"
    DESTINATION_HELD = "destination.held"
    DESTINATION_NOT_CONFIGURED = "destination.not_configured"
    DESTINATION_RELEASED = "destination.released"
    DESTINATION_LATE = "destination.late"
    DESTINATION_RECOVERED = "destination.recovered"
    BREAKER_OPENED = "breaker.opened"
    BREAKER_CLOSED = "breaker.closed"
    LANES_TAKEN_OVER = "lanes.taken_over"
    LANE_LOST = "lane.lost"
    PRESENCE_LOST = "presence.lost"  # the connection on which a dispatcher lives and listens
    LOOP_HANGS = "loop.hangs"

    DEAD_LETTERS_REPLAYED = "dead_letters.replayed"
    DEAD_LETTERS_DISCARDED = "dead_letters.discarded"
    DELIVERIES_REASSIGNED = "deliveries.reassigned"
    DELIVERIES_DISCARDED = "deliveries.discarded"

    TASK_FAILED = "task.failed"
    RETENTION_WAITS = "retention.waits"  # the database's clock is not believed: nothing is dropped
    PARTITION_DROPPED = "partition.dropped"
    PARTITIONS_LOW = "partitions.low"
    BOOKS_UNBALANCED = "books.unbalanced"

    SPANS_DROPPED = "spans.dropped"
    LOG_LINES_DROPPED = "log.lines_dropped"
    LIBRARY_SAID = "library.said"  # a line of the standard library's logging: who and where, never what
    PROCESS_FAILED = "process.failed"  # an exception that nobody caught
